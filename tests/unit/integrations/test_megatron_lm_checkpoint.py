"""The jobs' state in Megatron's layout of folders: written whole, found by the tracker, another's refused."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_lm import checkpoint
from lorafusion_megatron.integrations.megatron_lm.checkpoint import (
    Counts,
    Found,
    agree,
    find_checkpoint,
    write_checkpoint,
)

COUNTS = Counts(iteration=3, consumed_train_samples=40, num_floating_point_operations_so_far=1.5e12)


@pytest.fixture
def state(tmp_path):
    """A state folder of the trainer."""
    folder = tmp_path / "out" / "state" / "00000007"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


def loading(folder, *, must_exist=False):
    return Namespace(load=None if folder is None else str(folder), exit_on_missing_checkpoint=must_exist)


def test_what_was_written_is_found_and_counted(tmp_path, state):
    notes = []
    saved = tmp_path / "saved"
    write_checkpoint(str(saved), state, COUNTS, notes.append)
    newer = Counts(iteration=12, consumed_train_samples=90, num_floating_point_operations_so_far=4e12)
    write_checkpoint(str(saved), state, newer, notes.append)
    assert sorted(path.name for path in saved.iterdir()) == [
        "iter_0000003",
        "iter_0000012",
        "latest_checkpointed_iteration.txt",
    ]
    found = find_checkpoint(loading(saved))
    assert found == Found(folder=saved / "iter_0000012", counts=newer)
    assert (found.folder / "00000007" / "manifest.json").read_text() == "{}"
    assert notes == [f"saved checkpoint of iteration {n} to {saved}/iter_{n:07d}" for n in (3, 12)]


def test_writing_one_iteration_again_replaces_it(tmp_path, state):
    saved = tmp_path / "saved"
    assert write_checkpoint(str(saved), state, COUNTS, print)
    (state / "manifest.json").write_text("[]")
    assert write_checkpoint(str(saved), state, COUNTS, print)
    assert (saved / "iter_0000003" / "00000007" / "manifest.json").read_text() == "[]"
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_a_kill_while_an_iteration_is_written_again_leaves_a_whole_one(tmp_path, state, monkeypatch):
    """Killed after any of the calls that change a name, `find_checkpoint` finds the old one or the new one."""

    class Killed(BaseException):
        pass

    for calls in range(4):
        saved, left = tmp_path / f"saved{calls}", [calls]
        assert write_checkpoint(str(saved), state, COUNTS, print)

        def counted(original, left=left):
            def call(*args, **named):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return original(*args, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            patch.setattr(Path, "replace", counted(Path.replace))
            with pytest.raises(Killed):
                write_checkpoint(str(saved), state, COUNTS, print)
        found = find_checkpoint(loading(saved))
        assert found is not None
        assert found.counts == COUNTS
        assert (found.folder / "00000007" / "manifest.json").read_text() == "{}"
        assert write_checkpoint(str(saved), state, COUNTS, print)
        assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path, state):
    saved = tmp_path / "saved"
    assert write_checkpoint(str(saved), state, COUNTS, print)
    code = (
        "import os, sys; from pathlib import Path; from lorafusion_megatron.models.files import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])): os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], timeout=60, check=False)
    assert len(list(saved.iterdir())) == 3
    assert write_checkpoint(str(saved), state, COUNTS, print)
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_all_that_is_written_is_flushed_before_it_has_its_name(tmp_path, state, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.append(path.relative_to(tmp_path / "saved")))
    write_checkpoint(str(tmp_path / "saved"), state, COUNTS, print)
    inside = {path.parts[1:] for path in flushed if path.parts and path.parts[0].startswith(".")}
    one = "iter_0000003"
    assert inside == {(one,), (one, "megatron.json"), (one, "00000007"), (one, "00000007", "manifest.json")}
    assert flushed[-1] == Path()


def test_without_load_or_a_tracker_there_is_none(tmp_path):
    assert find_checkpoint(loading(None)) is None
    assert find_checkpoint(loading(tmp_path)) is None
    with pytest.raises(UserError, match=r"^--load: .*latest_checkpointed_iteration\.txt does not exist"):
        find_checkpoint(loading(tmp_path, must_exist=True))


@pytest.mark.parametrize("tracked", ["5", "release", "", "3\nrm", "²", "9" * 5000])
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, state, tracked):
    write_checkpoint(str(tmp_path), state, COUNTS, print)
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracked, encoding="utf-8")
    with pytest.raises(UserError, match=r"^--load: .* names .*; it must name a checkpoint of jobs.*megatron\.json"):
        find_checkpoint(loading(tmp_path))


def test_a_tracker_that_cannot_be_read_is_refused(tmp_path):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(b"\xff\xfe3")
    with pytest.raises(UserError, match=r"^--load: .*iteration\.txt can't be read .*utf-8"):
        find_checkpoint(loading(tmp_path))
    tracker.unlink()
    tracker.mkdir()
    with pytest.raises(UserError, match=r"^--load: .*iteration\.txt can't be read \(Is a directory\)"):
        find_checkpoint(loading(tmp_path))


def test_a_checkpoint_whose_state_is_gone_is_refused(tmp_path, state):
    write_checkpoint(str(tmp_path), state, COUNTS, print)
    shutil.rmtree(tmp_path / "iter_0000003" / "00000007")
    with pytest.raises(UserError, match=r"^--load: .*iter_0000003 holds no state; "):
        find_checkpoint(loading(tmp_path))


WHOLE = vars(COUNTS)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "null",
        "[" * 100000,
        '{"iteration": 3}',
        json.dumps(WHOLE | {"iteration": "3"}),
        json.dumps(WHOLE | {"iteration": 3.5}),
        json.dumps(WHOLE | {"iteration": True}),
        json.dumps(WHOLE | {"consumed_train_samples": -1}),
        json.dumps(WHOLE | {"num_floating_point_operations_so_far": float("nan")}),
    ],
    ids=lambda text: text[:50],
)
def test_damaged_counts_are_refused(tmp_path, state, text):
    write_checkpoint(str(tmp_path), state, COUNTS, print)
    (tmp_path / "iter_0000003" / "megatron.json").write_text(text)
    with pytest.raises(UserError, match=r"^--load: .*megatron\.json can't be read \(.*; it holds what Megatron's loop"):
        find_checkpoint(loading(tmp_path))


def test_counts_of_a_later_version_are_read(tmp_path, state):
    write_checkpoint(str(tmp_path), state, COUNTS, print)
    later = WHOLE | {"num_floating_point_operations_so_far": 0, "more": 1}
    (tmp_path / "iter_0000003" / "megatron.json").write_text(json.dumps(later))
    assert find_checkpoint(loading(tmp_path)).counts.num_floating_point_operations_so_far == 0


@pytest.mark.parametrize(
    ("iterations", "told"),
    [
        ((3, 3, 3), None),
        ((None, None), None),
        ((3, 3, None), "rank 0 finds iteration 3, rank 2 no checkpoint"),
        ((None, 3), "rank 0 finds no checkpoint, rank 1 iteration 3"),
        ((3, 2), "rank 0 finds iteration 3, rank 1 iteration 2"),
    ],
)
def test_ranks_that_find_different_checkpoints_are_refused(iterations, told):
    everyone = [
        None
        if iteration is None
        else Counts(iteration=iteration, consumed_train_samples=0, num_floating_point_operations_so_far=0.0)
        for iteration in iterations
    ]
    mine = None if everyone[0] is None else Found(folder=Path("saved"), counts=everyone[0])
    groups = SimpleNamespace(gather=lambda value: [value, *everyone[1:]], broadcast=lambda value: value)
    if told is None:
        agree(mine, groups)
        return
    with pytest.raises(UserError, match=f"^--load: {told}; all ranks begin from one checkpoint"):
        agree(mine, groups)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, state, monkeypatch):
    saved, notes = tmp_path / "saved", []
    write_checkpoint(str(saved), state, COUNTS, print)

    copytree = shutil.copytree

    def full(source, target):
        copytree(source, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copytree", full)
    newer = Counts(iteration=4, consumed_train_samples=50, num_floating_point_operations_so_far=2e12)
    assert not write_checkpoint(str(saved), state, newer, notes.append)
    assert "iteration 4 could not be saved" in notes[0]
    assert "No space left" in notes[0]
    assert find_checkpoint(loading(saved)).folder == saved / "iter_0000003"
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
