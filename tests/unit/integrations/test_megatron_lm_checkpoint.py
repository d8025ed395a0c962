"""The jobs' state in Megatron's layout of folders: written whole, found by the tracker, another's refused."""

import shutil
from argparse import Namespace

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_lm import checkpoint
from lorafusion_megatron.integrations.megatron_lm.checkpoint import (
    Counts,
    find_checkpoint,
    read_counts,
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
    assert found == saved / "iter_0000012"
    assert read_counts(found) == newer
    assert (found / "00000007" / "manifest.json").read_text() == "{}"
    assert notes == [f"saved checkpoint of iteration {n} to {saved}/iter_{n:07d}" for n in (3, 12)]


def test_writing_one_iteration_again_replaces_it(tmp_path, state):
    saved = tmp_path / "saved"
    write_checkpoint(str(saved), state, COUNTS, print)
    (state / "manifest.json").write_text("[]")
    write_checkpoint(str(saved), state, COUNTS, print)
    assert (saved / "iter_0000003" / "00000007" / "manifest.json").read_text() == "[]"


def test_without_load_or_a_tracker_there_is_none(tmp_path):
    assert find_checkpoint(loading(None)) is None
    assert find_checkpoint(loading(tmp_path)) is None
    with pytest.raises(UserError, match=r"^--load: .*latest_checkpointed_iteration\.txt does not exist"):
        find_checkpoint(loading(tmp_path, must_exist=True))


@pytest.mark.parametrize("tracked", ["5", "release", "", "3\nrm"])
def test_a_checkpoint_of_another_kind_is_refused(tmp_path, state, tracked):
    write_checkpoint(str(tmp_path), state, COUNTS, print)
    (tmp_path / "iter_0000005" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracked)
    with pytest.raises(UserError, match=r"^--load: .* names .*; it must name a checkpoint of jobs.*megatron\.json"):
        find_checkpoint(loading(tmp_path))


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, state, monkeypatch):
    saved, notes = tmp_path / "saved", []
    write_checkpoint(str(saved), state, COUNTS, print)

    copytree = shutil.copytree

    def full(source, target):
        copytree(source, target)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.shutil, "copytree", full)
    newer = Counts(iteration=4, consumed_train_samples=50, num_floating_point_operations_so_far=2e12)
    write_checkpoint(str(saved), state, newer, notes.append)
    assert "iteration 4 could not be saved" in notes[0]
    assert "No space left" in notes[0]
    assert find_checkpoint(loading(saved)) == saved / "iter_0000003"
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
