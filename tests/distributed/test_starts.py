"""Jobs that start from an adapter in the folder of the run, which the run itself writes over."""

import json
import shutil

import yaml

from lorafusion_megatron.cli.main import main
from tests import launch, tiny
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


def test_jobs_that_start_from_what_the_run_writes_over_start_from_it_once(tmp_path):
    """As after a kill before the first checkpoint of the interval, when the last adapter of a short job is there."""
    run_file, out = make(tmp_path, steps=6), tmp_path / "out"
    launch.train(run_file)
    start = tiny.adapter(out, "a")
    run = yaml.safe_load(run_file.read_text())
    run["jobs"][0]["peft"]["init_from"] = str(out / "a")
    run_file.write_text(yaml.safe_dump(run))
    launch.train(run_file, "checkpoint.resume=never")
    assert not tiny.same_bits(tiny.adapter(out, "a"), start)
    _same_after_a_kill(run_file, since=set())


def test_a_new_job_of_the_run_file_starts_once_from_one_that_goes_on(tmp_path):
    """As after a stop in the middle, with the adapter of then, and a kill when b is done but no checkpoint says so."""
    run_file, out = make(tmp_path, steps=6), tmp_path / "out"
    launch.train(run_file, "checkpoint.save_interval=2", "checkpoint.keep=100")
    first, *later = sorted(_states(out))
    for state in later:
        shutil.rmtree(out / "state" / state)
    records = json.loads((out / "state" / first / "manifest.json").read_text())["jobs"]
    (applied,) = [record["applied"] for record in records if record["name"] == "b"]
    assert 0 < applied < 6
    shutil.copytree(out / "b" / f"step_{applied}", out / "b", dirs_exist_ok=True)
    late = tiny.job(tmp_path, "late", r=8, steps=5, batch=2, seed=3, start=False)
    late["peft"]["init_from"] = str(out / "b")
    run = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(run | {"jobs": [*run["jobs"], late]}))
    launch.train(run_file, "checkpoint.keep=100")
    _same_after_a_kill(run_file, since={first})


def _same_after_a_kill(run_file, since: set[str]) -> None:
    """Take a run back to its first checkpoint beside those of ``since``, and compare what it makes of that."""
    out = run_file.parent / "out"
    names = [job["name"] for job in yaml.safe_load(run_file.read_text())["jobs"]]
    trained = {name: tiny.adapter(out, name) for name in names}
    _, *later = sorted(_states(out) - since)
    assert later
    for state in later:
        shutil.rmtree(out / "state" / state)
    launch.train(run_file, "checkpoint.keep=100")
    assert all(tiny.same_bits(tiny.adapter(out, name), trained[name]) for name in names)


def _states(out) -> set[str]:
    return {path.name for path in (out / "state").iterdir()}
