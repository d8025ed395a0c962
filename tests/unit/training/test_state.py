"""Checkpoints on disk, what a window saves and what is left of it after a stop."""

import errno
import json
import math
import os

import pytest
import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.scheduler.trim import trim_schedule
from lorafusion_megatron.training.checkpoints import _drop_old_steps
from lorafusion_megatron.training.saver import PlanPosition, plan_saves
from lorafusion_megatron.training.sequences import sequences
from lorafusion_megatron.training.state import (
    StateWriter,
    check_state,
    decode_schedule,
    drop_old,
    drop_unfinished,
    encode_schedule,
    load_job,
    newest_state,
    set_damaged_aside,
)
from lorafusion_megatron.training.windows import window_shares
from lorafusion_megatron.types import GlobalBatch, Sample


def batches(job: int, lengths: list[list[int]]) -> list[GlobalBatch]:
    """Global batches of one job: the lengths of each step's samples."""
    out = []
    for step, tokens in enumerate(lengths, 1):
        samples = tuple(
            Sample(job=job, step=step, position=i, row=i, tokens=n, batch_label_tokens=sum(tokens))
            for i, n in enumerate(tokens)
        )
        out.append(GlobalBatch(job=job, step=step, samples=samples, label_tokens=sum(tokens)))
    return out


SCHEDULE = build_schedule(
    [batches(0, [[9, 8, 7]] * 6), batches(1, [[20, 5]] * 4), batches(2, [[3]] * 6)],
    PlanOptions(token_capacity=32, stages=2),
)
WHERE = PlanPosition(window=3, schedule=SCHEDULE, shape={"stages": 2}, statuses={0: ("running", "")})


def write(folder, sequence: int, value: float = 1.0):
    def factors():
        return {(0, "q_proj", "A"): torch.full((2, 3), value), (0, "q_proj", "B"): torch.full((4, 2), value)}

    writer = StateWriter(folder, sequence)
    writer.job("a", {"master": factors(), "exp_avg": factors(), "exp_avg_sq": factors()})
    writer.schedule(SCHEDULE)
    return writer.commit({"window": 3, "inside": True, "shape": {}, "jobs": []})


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    path = write(tmp_path, 7, 0.5)
    assert path.name == "00000007"
    found, manifest = newest_state(tmp_path, pytest.fail)
    assert found == path
    assert manifest["window"] == 3
    assert decode_schedule(path) == SCHEDULE
    parts = dict(load_job(path, "a", [(0, "q_proj")]))
    assert set(parts) == {"master", "exp_avg", "exp_avg_sq"}
    assert torch.equal(parts["exp_avg"][0, "q_proj", "A"], torch.full((2, 3), 0.5))
    assert json.loads(json.dumps(encode_schedule(SCHEDULE))) == encode_schedule(SCHEDULE)


def test_nothing_shows_under_its_name_before_it_is_whole(tmp_path):
    writer = StateWriter(tmp_path, 1)
    writer.schedule(SCHEDULE)
    assert newest_state(tmp_path, pytest.fail) is None
    writer.discard()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "no manifest", "no object", "outside", "not json"])
def test_every_damage_is_seen_named_and_passed_over(damage, tmp_path):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    file, manifest = newer / "a.safetensors", newer / "manifest.json"
    value = json.loads(manifest.read_text())
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "bit":
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    elif damage == "gone":
        file.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no object":
        manifest.write_text("[]")
    elif damage == "outside":
        seal = {"bytes": 0, "sha256": ""}
        manifest.write_text(json.dumps(value | {"files": {"../../etc/passwd": seal}}))
    else:
        manifest.write_text("[")
    with pytest.raises((ValueError, OSError)):
        check_state(newer)
    said: list[str] = []
    assert newest_state(tmp_path, said.append)[0] == older
    assert len(said) == 1
    assert f"{newer} is passed over" in said[0]
    assert "\n" not in said[0]
    set_damaged_aside(tmp_path, older)
    assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000002.damaged"}
    assert sequences(tmp_path) == [1], "it does not count as kept any more"


RECORD = {
    "name": "a", "status": "running", "reason": "", "num_steps": 9, "applied": 1, "losses": [2.5], "evals": [],
    "added": False, "config": {}, "counters": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"jobs": None},
        {"jobs": ["a"]},
        {"jobs": [{**RECORD, "losses": None}]},
        {"jobs": [{**RECORD, "counters": {"applied": 1}}]},
        {"jobs": [{key: value for key, value in RECORD.items() if key != "applied"}]},
        {"window": "3"},
        {"inside": 1},
        {"files": {"a.safetensors": {"bytes": "9", "sha256": ""}}},
        "gone",
        "deep",
        "digit",
    ],
    ids=str,
)
def test_a_manifest_of_another_form_is_passed_over_and_one_flipped_digit_too(change, tmp_path):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    file = newer / "manifest.json"
    value = json.loads(file.read_text())
    without = {key: item for key, item in value.items() if key != "digest"}
    file.write_text(json.dumps(without | {"jobs": [RECORD]}))
    assert newest_state(tmp_path, pytest.fail)[0] == newer, "one of a version that wrote no digest"
    if change == "deep":
        file.write_text("[" * 100_000)
    elif change == "gone":
        file.write_text(json.dumps({key: item for key, item in without.items() if key != "inside"}))
    elif change == "digit":
        file.write_text(json.dumps(value | {"window": 4}))
    else:
        file.write_text(json.dumps(without | change))
    said: list[str] = []
    assert newest_state(tmp_path, said.append)[0] == older
    assert len(said) == 1


def test_folders_with_other_names_are_no_checkpoints(tmp_path):
    path = write(tmp_path, 3)
    for name in ("77", "²", "notes", "000000²1"):
        (tmp_path / name).mkdir()
    assert newest_state(tmp_path, pytest.fail)[0] == path
    assert sequences(tmp_path) == [3]


def test_a_state_folder_that_is_not_mounted_is_no_fresh_start(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    (tmp_path / "file").touch()
    for name, words in (("link", "scratch, which is not there"), ("file", "is no folder")):
        with pytest.raises(UserError, match=words) as refused:
            newest_state(tmp_path / name, pytest.fail)
        assert refused.value.key == "checkpoint.save"
    assert newest_state(tmp_path / "nothing", pytest.fail) is None


def test_a_run_does_not_begin_anew_because_its_checkpoints_can_not_be_read(tmp_path, monkeypatch):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)

    def stale(self, *_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", stale)
        with pytest.raises(UserError, match="Stale file handle") as unreadable:
            newest_state(tmp_path, pytest.fail)
    assert str(newer) in str(unreadable.value)
    manifest = newer / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        newest_state(tmp_path, pytest.fail)
    for path in (older, newer):
        (path / "manifest.json").write_text("{")
    said: list[str] = []
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        newest_state(tmp_path, said.append)
    assert len(said) == 2


def test_the_newest_are_kept_and_unfinished_ones_of_dead_writers_removed(tmp_path):
    for sequence in (1, 2, 3):
        write(tmp_path, sequence)
    (tmp_path / ".00000004.1").mkdir()
    mine = tmp_path / f".00000005.{os.getpid()}"
    mine.mkdir()
    drop_old(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "00000002", "00000003"]


def test_a_run_that_starts_removes_unfinished_ones_of_its_own_number_too(tmp_path):
    """In a container the run before, which was killed, often had the same one."""
    path = write(tmp_path, 1)
    for name in (f".00000002.{os.getpid()}", ".00000003.1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").write_bytes(b"cut off")
    drop_unfinished(tmp_path, own=True)
    assert list(tmp_path.iterdir()) == [path]
    drop_unfinished(tmp_path / "none", own=True)


def test_a_missing_tensor_is_told(tmp_path):
    path = write(tmp_path, 1)
    with pytest.raises(ValueError, match="v_proj"):
        dict(load_job(path, "a", [(0, "v_proj")]))


def test_a_window_saves_adapters_at_intervals_and_ends_and_states_between():
    items, since = plan_saves(SCHEDULE, {0: 0, 1: 0, 2: 0}, {0: 6, 1: 4, 2: 6}, 2, WHERE)
    adapters = {(job, step) for item in items if item.cut is None for job, step in item.wants.items()}
    assert adapters == {(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (2, 2), (2, 4), (2, 6)}
    states = [item for item in items if item.cut is not None]
    assert len(states) == 16 // 6
    assert since == 16 % 6
    for item in states:
        done = {}
        for end in SCHEDULE.step_ends:
            if end.position < item.cut:
                done[end.job] = end.step
        assert item.wants == {0: 0, 1: 0, 2: 0} | done
    last, _ = plan_saves(SCHEDULE, {0: 0, 1: 0, 2: 0}, {0: 6, 1: 4, 2: 6}, None, WHERE)
    assert sorted(step for item in last for step in item.wants.values()) == [4, 6, 6]


def test_windows_shorter_than_the_interval_save_states_all_the_same():
    """A window that validation ends early, or large global batches: fewer steps than lie between two checkpoints."""
    counts, since = [], 0
    for _ in range(8):
        items, since = plan_saves(SCHEDULE, {0: 0, 1: 0, 2: 0}, {0: 6, 1: 4, 2: 6}, 10, WHERE, since)
        counts.append(sum(item.cut is not None for item in items))
    assert sum(counts) == 8 * 16 // 30


def test_jobs_that_ended_do_not_put_checkpoints_off():
    """``num_steps`` names every job of the run; the interval is of those that the window trains."""
    many = {job: 6 for job in range(100)} | {1: 4}
    items, _ = plan_saves(SCHEDULE, {0: 0, 1: 0, 2: 0}, many, 2, WHERE)
    assert sum(item.cut is not None for item in items) == 16 // 6


@pytest.mark.parametrize("cut", range(0, SCHEDULE.num_microbatches + 1, 2))
def test_the_rest_of_a_window_has_every_unfinished_step_once_and_the_same_microbatches(cut):
    applied = {0: 0, 1: 0, 2: 0}
    for end in SCHEDULE.step_ends:
        if end.position < cut:
            applied[end.job] = end.step
    rest = trim_schedule(SCHEDULE, applied)
    assert {(e.job, e.step) for e in rest.step_ends} == {
        (e.job, e.step) for e in SCHEDULE.step_ends if e.step > applied[e.job]
    }
    skipped = SCHEDULE.num_microbatches - rest.num_microbatches
    assert rest.replicas[0] == SCHEDULE.replicas[0][skipped:]
    left = {(s.job, s.step, s.position) for m in rest.replicas[0] for s in m.samples if s.step > applied[s.job]}
    assert left == {
        (s.job, s.step, s.position) for m in SCHEDULE.replicas[0] for s in m.samples if s.step > applied[s.job]
    }
    assert skipped <= cut
    assert trim_schedule(SCHEDULE, applied, multiple=2).num_microbatches % 2 == SCHEDULE.num_microbatches % 2


def test_jobs_advance_in_proportion_and_end_together():
    shares = window_shares({0: 100, 1: 50, 2: 1}, {0: 10.0, 1: 10.0, 2: 10.0}, 300.0)
    assert shares == {0: 20, 1: 10, 2: 1}
    assert window_shares({0: 3}, {0: 10.0}, 1e9) == {0: 3}
    assert window_shares({0: 3, 1: 900}, {0: 1e9, 1: 1.0}, 1.0) == {0: 1, 1: 1}
    assert window_shares({0: 3, 1: 9}, {0: 1.0, 1: 1.0}, 1e9, {0: 2, 1: float("inf")}) == {0: 2, 1: 6}


def test_a_job_that_is_validated_soon_holds_the_others_back():
    tokens, ends = {0: 10.0, 1: 10.0}, {0: 5, 1: math.inf}
    assert window_shares({0: 60, 1: 60}, tokens, 1e9, ends) == {0: 5, 1: 5}
    assert window_shares({0: 60, 1: 60}, tokens, 1e9, ends, 400.0) == {0: 5, 1: 20}, "not for ever shorter windows"
    assert window_shares({0: 60, 1: 60}, tokens, 1e9, ends, 1e9) == {0: 5, 1: 60}
    assert window_shares({0: 60, 1: 60}, tokens, 80.0, ends) == {0: 4, 1: 4}


def test_the_step_folders_that_were_written_last_are_kept(tmp_path):
    """Those of an earlier run in the same folder, which got further, make room for this run's."""
    for order, step in enumerate((40, 50, 10, 20, 30)):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        os.utime(folder, ns=(order * 10**9, order * 10**9))
    (tmp_path / "step_best").mkdir()
    _drop_old_steps(tmp_path, 2, {20, 30})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_20", "step_30", "step_best"]


def test_a_step_that_was_just_written_is_kept_though_the_clock_went_back(tmp_path):
    for step, time in ((10, 9), (20, 9), (30, 1)):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        os.utime(folder, ns=(time * 10**9, time * 10**9))
    _drop_old_steps(tmp_path, 2, {30})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_20", "step_30"]
