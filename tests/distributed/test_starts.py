"""A job that joins and starts from the adapter of another job of the run."""

import json
import shutil

import yaml

from lorafusion_megatron.cli.main import main
from tests import tiny
from tests.distributed.test_job_lifecycle import background, make, statuses
from tests.distributed.test_stop_and_resume import wait_for_lines


def test_a_resume_that_lets_it_join_again_starts_it_from_the_same_adapter(tmp_path):
    run_file, out = make(tmp_path, steps=30), tmp_path / "out"
    late = tiny.job(tmp_path, "late", steps=5, batch=2, seed=3, start=False)
    late["peft"]["init_from"] = str(out / "a")
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(late))
    words = ("checkpoint.save_interval=2", "checkpoint.keep=100")
    ranks = background(run_file, *words)
    wait_for_lines(out, 12)
    assert main(["job", "add", str(out), str(tmp_path / "late.yaml")]) == 0
    ranks.wait(90.0).check()
    (event,) = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert event["job"]["peft"]["init_from"] == str(out / "inbox" / "starts" / "late")
    trained, losses = tiny.adapter(out, "late"), tiny.losses(out, "late")
    before = 0
    for state in (out / "state").iterdir():  # as after a kill before any checkpoint held it
        jobs = [job["name"] for job in json.loads((state / "manifest.json").read_text())["jobs"]]
        before += "late" not in jobs
        if "late" in jobs:
            shutil.rmtree(state)
    assert before
    again = background(run_file, *words).wait(90.0).check()
    assert "late joins" in again.outputs[0]
    assert statuses(out) == {"a": "finished", "b": "finished", "late": "finished"}
    assert tiny.losses(out, "late") == losses
    assert tiny.same_bits(tiny.adapter(out, "late"), trained)
