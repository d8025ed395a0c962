"""The lock of a run's folder within one process; between processes: tests/distributed/test_one_folder.py."""

import errno
import fcntl
import multiprocessing
import os
import pickle

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training.lock import lock_folder, unlock_folder


def _try(folder, out) -> None:
    try:
        lock_folder(folder, print)
    except UserError as error:
        out.put(pickle.dumps(error))
    else:
        out.put(None)


def from_another_process(folder) -> UserError | None:
    """What another process gets that wants the folder."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_try, args=(folder, out))
    process.start()
    answer = out.get(timeout=60)
    process.join()
    return None if answer is None else pickle.loads(answer)


def test_it_keeps_other_processes_out_until_it_is_given_back_and_never_its_own(tmp_path):
    folder = tmp_path / "new" / "out"
    lock_folder(folder, pytest.fail)
    lock_folder(folder.parent / "." / "out", pytest.fail)
    error = from_another_process(folder)
    assert isinstance(error, UserError)
    assert error.key == "checkpoint.save"
    assert f"in use by process {os.getpid()} on " in str(error)
    unlock_folder(folder)
    assert from_another_process(folder) is None
    unlock_folder(folder)  # not held: nothing


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes = []
    lock_folder(tmp_path, notes.append)
    unlock_folder(tmp_path)
    assert len(notes) == 1
    assert "No locks available" in notes[0]


def test_a_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError) as refused:
        lock_folder(tmp_path / "out", pytest.fail)
    assert refused.value.key == "checkpoint.save"


def test_a_full_disk_keeps_nobody_out_of_his_own_folder(tmp_path, monkeypatch):
    class Full:
        """A file on a disk without room."""

        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = type(tmp_path).open
    monkeypatch.setattr(type(tmp_path), "open", lambda path, *mode: Full(opened(path, *mode)))
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    lock_folder(tmp_path, pytest.fail)
    unlock_folder(tmp_path)


def test_an_error_crosses_processes_whole():
    error = pickle.loads(pickle.dumps(UserError("given", rule="rule", remedy="remedy", key="key")))
    assert (error.given, error.rule, error.remedy, error.key) == ("given", "rule", "remedy", "key")
    assert str(error) == "key: given; rule; remedy"
