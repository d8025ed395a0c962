"""The status of a run from its files alone, and the commands that read it."""

import json
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.config.build import Builder
from lorafusion_megatron.config.job import JobConfig
from lorafusion_megatron.config.yaml_reader import parse_yaml
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training.status import JobStatus, read_status, sparkline


@pytest.fixture
def run_dir(tmp_path):
    """A run that goes on: job a at step 3 of 10, job b ended."""
    lines = [
        {"time": 100.0 + step, "job": job, "step": step, "loss": 3.0 - 0.5 * step, "lr": 0.1, "grad_norm": 1.0}
        for job, steps in (("a", 3), ("b", 2))
        for step in range(1, steps + 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"job": "a", "st')
    jobs = [
        {"name": "a", "status": "running", "reason": "", "step": 1, "num_steps": 10},
        {"name": "b", "status": "finished", "reason": "", "step": 2, "num_steps": 2},
    ]
    status = {"state": "running", "window": 1, "bubble_share": 0.04, "jobs": jobs, "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "state" / "00000002").mkdir(parents=True)
    (tmp_path / "state" / "00000002" / "manifest.json").write_text("{}")
    (tmp_path / "state" / "00000003").mkdir()
    return tmp_path


def test_the_status_says_steps_losses_eta_and_the_last_whole_checkpoint(run_dir):
    status = read_status(run_dir)
    a, b = status.jobs
    assert (a.step, a.num_steps, a.losses) == (3, 10, [2.5, 2.0, 1.5])
    assert a.eta_seconds() == pytest.approx(7.0)
    assert b.eta_seconds() is None
    assert status.last_checkpoint.endswith("00000002")
    assert status.bubble_share == 0.04


@pytest.mark.parametrize(
    ("gaps", "seconds"),
    [
        ([2.0] * 60, 2.0),
        ([2.0] * 30 + [36000.0] + [2.0] * 10, 2.0),
        ([2.0] * 30 + [36000.0] + [2.0] * 5 + [36000.0] + [2.0] * 5, 2.0),
        ([2.0, 36000.0, 2.0], 2.0),
        ([2.0] * 30 + [-3600.0] + [2.0] * 10, 2.0),
        ([1.0, 1.0, 28.0] * 20, 10.0),  # bursts: three steps in each window that the job shares
        ([0.0, 0.0, 3.0], 1.0),
        ([0.0, 0.0], None),
        ([], None),
    ],
)
def test_the_eta_follows_the_rate_whatever_the_pauses(gaps, seconds):
    times = list(accumulate(gaps, initial=1e9))
    job = JobStatus(name="a", status="running", reason="", step=100, num_steps=200, times=times)
    wanted = None if seconds is None else pytest.approx(100 * seconds, rel=0.05)
    assert job.eta_seconds() == wanted


def test_the_table_shows_every_job(run_dir, capsys):
    assert main(["status", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "3/10" in text
    assert "1.5000" in text
    assert "0:07" in text
    assert main(["status", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["jobs"][0]["name"] == "a"


def test_brackets_are_no_markup(run_dir, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("x") / "c[" / "] a[red]b"
    shutil.copytree(run_dir, folder)
    status = json.loads((folder / "status.json").read_text())
    status["jobs"][1] |= {"name": "[/]", "reason": "[bold]:smile:"}
    (folder / "status.json").write_text(json.dumps(status))
    assert main(["status", str(folder)]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert text.count("c[/]a[red]b") == 2
    assert "finished:[bold]:smile:" in text
    assert text.count("[/]") == 3


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"jobs": [{"name": 1}]}',
        '{"jobs": [{"name": "a", "status": "", "reason": "", "step": "1", "num_steps": 2}]}',
        '{"jobs": 5}',
        '{"bubble_share": "x"}',
        '{"state": 3}',
        "[" * 100_000,
        b"\xff",
    ],
    ids=range(9),
)
@pytest.mark.parametrize("words", [["status"], ["status", "--json"], ["job", "list"]])
def test_a_status_that_does_not_fit_is_one_line(words, content, run_dir, capsys):
    (run_dir / "status.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([*words, str(run_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "status.json is damaged" in error


def test_lines_that_do_not_fit_are_passed_over(run_dir, capsys):
    good = {"time": 200.0, "job": "b", "step": 2, "loss": 1.0}
    bad = [{"loss": "x"}, {"loss": True}, {"step": "1"}, {"step": -1}, {"time": None}, {"time": 1e400}, {"job": 1}]
    lines = [json.dumps(good | change).encode() for change in bad] + [b'{"job": "\xff"}', b"[" * 100_000, b"7", b"\xff"]
    huge = json.dumps(good | {"loss": 10**400}).encode()
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join([*lines, huge, json.dumps(good).encode(), b""]))
    job = read_status(run_dir).jobs[1]
    assert (job.losses, job.step) == ([1.0], 2)
    for words in (["status"], ["status", "--json"], ["job", "list"]):
        assert main([*words, str(run_dir)]) == 0
    assert capsys.readouterr().err == ""


def test_a_name_that_is_too_long_is_one_line(capsys):
    assert main(["status", "n" * 300]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "can't be read (File name too long)" in error


def test_a_loss_that_was_not_finite_has_no_place_in_the_curve(run_dir, capsys):
    lines = [{"time": 200.0, "job": "b", "step": 3, "loss": None}, {"time": 201.0, "job": "b", "step": 4, "loss": 1.0}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = read_status(run_dir).jobs[1]
    assert (len(job.losses), job.losses[1], job.times, job.step) == (2, 1.0, [200.0, 201.0], 4)
    assert len(sparkline(job.losses)) == 1
    assert main(["status", str(run_dir)]) == 0
    assert main(["status", str(run_dir), "--json"]) == 0
    text = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(text, parse_constant=pytest.fail)["jobs"][1]["losses"] == [None, 1.0]


def test_status_needs_no_torch(run_dir):
    code = (
        "import sys; from lorafusion_megatron.cli.main import main; "
        f"assert main(['status', {str(run_dir)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_curve_goes_down_where_the_loss_does():
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([]) == ""
    assert sparkline([1.0, float("nan"), 1.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)])) == 24


def test_a_folder_without_a_run_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_status(tmp_path)


def test_requests_are_files_that_appear_whole(run_dir, capsys):
    assert main(["job", "pause", str(run_dir), "a"]) == 0
    (file,) = (run_dir / "inbox").iterdir()
    assert file.suffix == ".yaml"
    assert file.read_text() == 'op: pause\nname: "a"\n'
    assert main(["job", "list", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "a  running  3/10" in text
    assert f"waiting: {file.name}" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["status", "{dir}/nowhere"], "holds no run"),
        (["job", "pause", "{dir}/nowhere", "a"], "holds no run"),
        (["job", "pause", "{dir}", "c"], "no job is called c"),
        (["job", "add", "{dir}", "{dir}/nowhere.yaml"], "can't be read"),
        (["job", "add", "{dir}", "{dir}/bad.yaml"], "peft.rank"),
        (["job", "add", "{dir}", "{dir}/broken.yaml"], "broken.yaml"),
        (["job", "add", "{dir}", "{dir}/list.yaml"], "section"),
        (["job", "jump", "{dir}", "a"], "invalid choice"),
        (["job"], "ACTION"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(words, expected, run_dir, capsys):
    (run_dir / "bad.yaml").write_text(
        "name: c\ndataset: {path: x}\ntrain: {global_batch_size: 1, train_iters: 1}\npeft: {rank: 3}\n"
    )
    (run_dir / "broken.yaml").write_text("{")
    (run_dir / "list.yaml").write_text("- a\n")
    assert main([word.format(dir=run_dir) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error
    assert not (run_dir / "inbox").exists()


def test_a_job_files_name_may_be_as_long_as_a_name_can_be(run_dir, capsys):
    file = run_dir / f"{'n' * 250}.yaml"
    name = "c" * 128
    file.write_text(f"name: {name}\ndataset: {{path: x}}\ntrain: {{global_batch_size: 1, train_iters: 1}}\n")
    (run_dir / "x").touch()
    assert main(["job", "add", str(run_dir), str(file)]) == 0
    (request,) = (run_dir / "inbox").iterdir()
    assert request.name.endswith(f"-{name}.yaml")


def test_a_name_that_yaml_takes_for_a_number_is_asked_for_as_a_name(run_dir, capsys):
    file = run_dir / "job.yaml"
    file.write_text('name: "12e5"\ndataset: {path: x}\ntrain: {global_batch_size: 1, train_iters: 1}\n')
    assert main(["job", "add", str(run_dir), str(file)]) == 0
    (request,) = (run_dir / "inbox").iterdir()
    job = Builder(run_dir).section(JobConfig, parse_yaml(request.read_text(), source="request"), "request")
    assert (job.name, job.dataset.path) == ("12e5", Path("x").absolute())


def test_relative_paths_with_a_brace_become_absolute_and_a_template_as_text_stays(run_dir):
    file = run_dir / "job.yaml"
    template = "{{ messages }}"
    file.write_text(
        "name: c\ndataset: {path: 'data/{x}.jsonl', chat_template: '" + template + "'}\n"
        "eval: {path: 'data/{y}.jsonl', interval: 1}\npeft: {init_from: 'old/{z}'}\n"
        "train: {global_batch_size: 1, train_iters: 1}\n"
    )
    assert main(["job", "add", str(run_dir), str(file)]) == 0
    (request,) = (run_dir / "inbox").iterdir()
    raw = json.loads(request.read_text())
    assert raw["dataset"] == {"path": str(Path("data/{x}.jsonl").absolute()), "chat_template": template}
    assert raw["eval"]["path"] == str(Path("data/{y}.jsonl").absolute())
    assert raw["peft"]["init_from"] == str(Path("old/{z}").absolute())


def test_an_inbox_that_is_a_file_is_one_line(run_dir, capsys):
    (run_dir / "inbox").touch()
    assert main(["job", "pause", str(run_dir), "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "inbox can't be written (File exists)" in error
    assert main(["job", "list", str(run_dir)]) == 0


def test_a_run_that_is_over_takes_no_request(run_dir, capsys):
    status = json.loads((run_dir / "status.json").read_text())
    (run_dir / "status.json").write_text(json.dumps(status | {"state": "done"}))
    assert main(["job", "pause", str(run_dir), "a"]) == 2
    assert "is done" in capsys.readouterr().err
    (run_dir / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    assert main(["job", "pause", str(run_dir), "a"]) == 0
    assert "is read when the same command is started again" in capsys.readouterr().out
