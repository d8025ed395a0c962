"""Requests to a run: whatever is wrong with one, the run goes on; a decision once recorded is never lost."""

import json
import shutil
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.training.lifecycle import Inbox

STATUSES = {"a": "running", "123": "running"}


def inbox(folder, said: list[str], **resumed) -> Inbox:
    (folder / "inbox").mkdir(exist_ok=True)
    return Inbox(folder, said.append, **resumed)


def good(_) -> bool:
    return True


def decide(box: Inbox, window: int, statuses=STATUSES, check=good, **how) -> list[dict]:
    """What is decided, without ids and the requests' files."""
    events = box.decide(window, statuses, check, **how)
    return [{key: event[key] for key in event if key not in ("id", "request", "job")} for event in events]


def write(folder, name: str, text: str):
    """A request by hand."""
    (folder / "inbox").mkdir(exist_ok=True)
    (folder / "inbox" / name).write_text(text)
    return folder / "inbox" / name


def new_job(folder, name: str) -> str:
    (folder / "d.jsonl").write_text("")
    return f"name: {name}\ndataset: {{path: {folder}/d.jsonl}}\ntrain: {{global_batch_size: 1, train_iters: 1}}\n"


def test_the_line_that_a_kill_cut_off_does_not_take_the_next_one_along(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"window": 1, "op": "pause", "name": "a"}\n{"window": 3, "op": "pau')
    said: list[str] = []
    box = inbox(tmp_path, said, carried_out=None, held_window=1)
    write(tmp_path, "x.yaml", "op: cancel\nname: a\n")
    wanted = [{"window": 3, "op": "cancel", "name": "a"}]
    assert decide(box, 3) == wanted
    again = inbox(tmp_path, said, carried_out=None, held_window=1)
    assert decide(again, 2) == []
    assert decide(again, 3) == wanted
    assert decide(again, 4) == []
    assert decide(inbox(tmp_path, said), 1) == [{"window": 1, "op": "pause", "name": "a"}]
    assert said == []


def test_a_name_that_looks_like_a_number_stays_a_name(tmp_path):
    box = inbox(tmp_path, [])
    write(tmp_path, "x.yaml", "op: pause\nname: 123\n")
    assert decide(box, 0) == [{"window": 0, "op": "pause", "name": "123"}]


def test_a_job_that_was_added_again_before_its_first_request_is_replayed_joins_once(tmp_path):
    """It joined at window 7; a resume from window 4 forgot it, its owner added it again at window 5."""
    write(tmp_path, "x.yaml", new_job(tmp_path, "c"))
    assert decide(inbox(tmp_path, []), 7) == [{"window": 7, "op": "add", "name": "c"}]
    said: list[str] = []
    box = inbox(tmp_path, said, held_window=4)
    write(tmp_path, "y.yaml", new_job(tmp_path, "c"))
    assert decide(box, 5) == [{"window": 5, "op": "add", "name": "c"}]
    assert decide(box, 7, STATUSES | {"c": "running"}) == []
    assert said == ["add of c, decided before, is left out: there already"]
    assert box.carried_out == {1, 2}


@pytest.mark.parametrize(("op", "status"), [("resume", "finished"), ("cancel", "stopped"), ("pause", "paused")])
def test_a_decision_that_does_not_fit_any_more_is_left_out(op, status, tmp_path):
    (tmp_path / "events.jsonl").write_text(json.dumps({"window": 2, "op": op, "name": "a"}) + "\n")
    said: list[str] = []
    assert decide(inbox(tmp_path, said), 2, {"a": status}) == []
    assert said == [f"{op} of a, decided before, is left out: {status}"]


def test_a_request_that_a_kill_left_behind_its_record_is_not_met_twice(tmp_path, monkeypatch):
    file = write(tmp_path, "x.yaml", "op: pause\nname: a\n")
    first = inbox(tmp_path, [])
    with monkeypatch.context() as patch:
        patch.setattr(first, "_move", lambda *_: None)
        assert len(decide(first, 0)) == 1
    said: list[str] = []
    again = inbox(tmp_path, said, carried_out=first.carried_out)
    assert decide(again, 1) == []
    assert not file.exists()
    assert said == []


def test_a_copy_of_a_request_that_was_answered_is_a_new_request(tmp_path):
    master = write(tmp_path, "x.yaml", "op: pause\nname: a\n").rename(tmp_path / "pause.yaml")
    box = inbox(tmp_path, [])
    for window in (0, 1):
        shutil.copy2(master, tmp_path / "inbox" / "x.yaml")  # with the time of the first
        assert decide(box, window) == [{"window": window, "op": "pause", "name": "a"}]


def test_what_was_recorded_for_windows_that_never_come_takes_effect_when_nothing_else_is_left(tmp_path):
    lines = [{"window": 9, "op": "pause", "name": "a"}, {"window": 8, "op": "cancel", "name": "a"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    box = inbox(tmp_path, [])
    assert decide(box, 5) == []
    assert decide(box, 5, last=True) == lines
    assert decide(box, 6, last=True) == []


def test_a_request_whose_check_goes_on_waits_and_is_decided_when_it_is_done(tmp_path):
    write(tmp_path, "x.yaml", new_job(tmp_path, "c"))
    box = inbox(tmp_path, [])
    assert decide(box, 0, check=lambda _: False) == []
    assert box.waits
    assert decide(box, 1) == [{"window": 1, "op": "add", "name": "c"}]
    assert not box.waits


@pytest.mark.parametrize("text", ["op: pause\nname: a\n", "op: pause\nname: nobody\n"], ids=["met", "refused"])
def test_a_request_that_can_not_be_moved_away_is_answered_once(text, tmp_path, monkeypatch):
    """Another user's file in a sticky folder."""

    def refuse(*_):
        raise PermissionError("Operation not permitted")

    write(tmp_path, "x.yaml", text)
    said: list[str] = []
    box = inbox(tmp_path, said)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    assert len(decide(box, 0)) == ("nobody" not in text)
    assert decide(box, 1) == []
    assert len([line for line in said if "can't be moved away" in line]) == 1
    assert len([line for line in said if "is refused" in line]) == ("nobody" in text)


def test_an_inbox_and_a_log_that_can_not_be_read_wait(tmp_path, monkeypatch):
    write(tmp_path, "x.yaml", "op: pause\nname: a\n")
    (tmp_path / "events.jsonl").write_text(json.dumps({"window": 0, "op": "cancel", "name": "123"}) + "\n")
    said: list[str] = []
    box = inbox(tmp_path, said)

    def stale(*_, **__):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "iterdir", stale)
        broken.setattr(Path, "read_text", stale)
        assert decide(box, 0) == []
        assert decide(box, 1) == []
    assert len(said) == 1
    assert "recorded decisions wait" in said[0]
    assert [event["op"] for event in decide(box, 2)] == ["cancel", "pause"]


def test_a_decision_in_a_new_folder_has_an_id_that_the_loaded_checkpoint_does_not_know(tmp_path):
    """As after Megatron's --load into another checkpoint.save: what it holds stands in no log here."""
    box = inbox(tmp_path, [], carried_out=[1, 2])
    write(tmp_path, "p.yaml", "op: pause\nname: a\n")
    assert [event["id"] for event in box.decide(0, STATUSES, good)] == [3]
    again = inbox(tmp_path, [], carried_out=[1, 2])
    assert [event["op"] for event in again.decide(0, STATUSES, good)] == ["pause"], "a kill came before a checkpoint"


def test_lines_of_the_log_that_are_no_decisions_are_told_once_and_passed_over(tmp_path):
    good_line = {"id": 8, "window": 0, "op": "pause", "name": "a"}
    bad = [
        {},
        {**good_line, "window": "0"},
        {**good_line, "op": "explode"},
        {**good_line, "request": 5},
        {"id": 9, "window": 0, "op": "add", "name": "new"},
        {**good_line, "id": None},
    ]
    lines = [json.dumps(event).encode() for event in (*bad, good_line)]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([b"\xff\xfe", b"[" * 100_000, b"7", *lines]))
    said: list[str] = []
    box = inbox(tmp_path, said)
    assert [event["op"] for event in decide(box, 0)] == ["pause"]
    assert decide(box, 1) == []
    assert len(said) == len(bad)
    write(tmp_path, "c.yaml", "op: cancel\nname: a\n")
    assert [event["id"] for event in box.decide(1, {"a": "paused"}, good)] == [11]


@pytest.mark.parametrize("name", ["123", "true", "null", "1e5", "a"])
def test_the_command_quotes_names(name, tmp_path):
    jobs = [{"name": name, "status": "running", "reason": "", "step": 1, "num_steps": 10}]
    status = {"state": "running", "window": 1, "bubble_share": 0.04, "jobs": jobs, "last_checkpoint": None}
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["job", "cancel", str(tmp_path), name]) == 0
    (event,) = decide(Inbox(tmp_path, pytest.fail), 0, {name: "running"})
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
        assert decide(box, 0) == []
    assert len(said) == 1
    assert "request x.yaml waits: it could not be recorded" in said[0]
    assert [path.name for path in (tmp_path / "inbox").iterdir()] == ["x.yaml"]
    assert decide(box, 1) == [{"window": 1, "op": "pause", "name": "a"}]
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
    Inbox(tmp_path, pytest.fail).decide(0, {}, lambda job: not seen.append(job))
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
    seen = []
    for name, folder in (("both", here), ("beside", tmp_path), ("nowhere", here)):
        job = tmp_path / "job.yaml"
        job.write_text(
            f"name: {name}\ndataset: {{path: {name}.jsonl}}\ntrain: {{global_batch_size: 1, train_iters: 1}}\n"
        )
        assert main(["job", "add", str(tmp_path), str(job)]) == 0
        Inbox(tmp_path, pytest.fail).decide(0, {}, lambda job: not seen.append(job))
        assert seen[-1].dataset.path == folder / f"{name}.jsonl"
