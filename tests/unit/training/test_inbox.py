"""Requests to a run: whatever is wrong with one, the run goes on; a decision once recorded is never lost."""

import json

import pytest

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.training.lifecycle import Inbox

STATUSES = {"a": "running", "123": "running"}


def inbox(folder, said: list[str]) -> Inbox:
    (folder / "inbox").mkdir(exist_ok=True)
    return Inbox(folder, said.append)


def test_the_line_that_a_kill_cut_off_does_not_take_the_next_one_along(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"window": 1, "op": "pause", "name": "a"}\n{"window": 3, "op": "pau')
    said: list[str] = []
    box = inbox(tmp_path, said)
    (tmp_path / "inbox" / "x.yaml").write_text("op: pause\nname: a\n")
    decided = box.decide(3, STATUSES, lambda _: None)
    assert decided == [{"window": 3, "op": "pause", "name": "a"}]
    assert Inbox(tmp_path, said.append).decide(3, STATUSES, lambda _: None) == decided
    assert Inbox(tmp_path, said.append).decide(1, STATUSES, lambda _: None) == [decided[0] | {"window": 1}]
    assert said == []


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    box = inbox(tmp_path, [])
    (tmp_path / "inbox" / "x.yaml").write_text("op: pause\nname: 123\n")
    assert box.decide(0, STATUSES, lambda _: None) == [{"window": 0, "op": "pause", "name": "123"}]


@pytest.mark.parametrize("name", ["123", "true", "null", "1e5", "a"])
def test_the_command_quotes_names(name, tmp_path):
    jobs = [{"name": name, "status": "running", "reason": "", "step": 1, "num_steps": 10}]
    status = {"state": "running", "window": 1, "bubble_share": 0.04, "jobs": jobs, "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["job", "cancel", str(tmp_path), name]) == 0
    (event,) = Inbox(tmp_path, lambda _: None).decide(0, {name: "running"}, lambda _: None)
    assert event == {"window": 0, "op": "cancel", "name": name}


def test_a_request_that_breaks_the_check_is_put_aside(tmp_path):
    def check(_):
        raise TypeError("TextInputSequence must be str")

    said: list[str] = []
    box = inbox(tmp_path, said)
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "inbox" / "x.yaml").write_text(
        f"name: c\ndataset: {{path: {tmp_path}/d.jsonl}}\ntrain: {{global_batch_size: 1, train_iters: 1}}\n"
    )
    assert box.decide(0, STATUSES, check) == []
    assert said == ["request x.yaml is refused: TypeError: TextInputSequence must be str"]
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["x.yaml.refused"]


def test_a_request_that_can_not_be_recorded_waits_and_is_met_once_there_is_room(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    said: list[str] = []
    box = inbox(tmp_path, said)
    (tmp_path / "inbox" / "x.yaml").write_text("op: pause\nname: a\n")
    with monkeypatch.context() as patched:
        patched.setattr(box, "_append", full)
        assert box.decide(0, STATUSES, lambda _: None) == []
    assert len(said) == 1
    assert "request x.yaml waits: it could not be recorded" in said[0]
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["x.yaml"]
    assert box.decide(1, STATUSES, lambda _: None) == [{"window": 1, "op": "pause", "name": "a"}]
    assert not list((tmp_path / "inbox").iterdir())


@pytest.mark.parametrize(("state", "job_status", "takes"), [("done", "paused", True), ("done", "finished", False)])
def test_a_paused_job_of_a_run_that_ended_can_be_resumed(state, job_status, takes, tmp_path, capsys):
    jobs = [{"name": "a", "status": job_status, "reason": "", "step": 1, "num_steps": 10}]
    status = {"state": state, "window": 1, "bubble_share": 0.04, "jobs": jobs, "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["job", "resume", str(tmp_path), "a"]) == (0 if takes else 2)
    text = capsys.readouterr()
    assert ("the same command is started again" in text.out) is takes
    assert ("the run in" in text.err) is not takes


def test_files_that_a_new_job_names_are_found_from_its_folder_or_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "d.jsonl").write_text("")
    (tmp_path / "tpl.jinja").write_text("{{ messages }}")
    status = {"state": "running", "window": 1, "bubble_share": 0.04, "jobs": [], "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("")
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: c\ndataset: {path: ~/d.jsonl, chat_template: tpl.jinja}\ntrain: {global_batch_size: 1, train_iters: 1}\n"
    )
    assert main(["job", "add", str(tmp_path), str(job)]) == 0
    seen = []
    Inbox(tmp_path, pytest.fail).decide(0, {}, seen.append)
    assert str(seen[0].dataset.path) == str(tmp_path / "home" / "d.jsonl")
    assert seen[0].dataset.chat_template == str(tmp_path / "tpl.jinja")


def test_the_command_and_the_run_mean_the_same_file_by_a_relative_path(tmp_path, monkeypatch):
    """One rule: from here, else beside the job's file; one that is nowhere is named as the run would name it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for folder in (here, tmp_path):
        (folder / "both.jsonl").write_text("")
    (tmp_path / "beside.jsonl").write_text("")
    status = {"state": "running", "window": 1, "bubble_share": 0.04, "jobs": [], "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("")
    for name, folder in (("both", here), ("beside", tmp_path), ("nowhere", here)):
        job = tmp_path / "job.yaml"
        job.write_text(
            f"name: {name}\ndataset: {{path: {name}.jsonl}}\ntrain: {{global_batch_size: 1, train_iters: 1}}\n"
        )
        assert main(["job", "add", str(tmp_path), str(job)]) == 0
        seen = []
        Inbox(tmp_path, pytest.fail).decide(0, {}, seen.append)
        assert seen[-1].dataset.path == folder / f"{name}.jsonl"
