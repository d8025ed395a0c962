"""Rows on disk: the same as read ones, read once, made anew whenever something that they depend on changed."""

import errno
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lorafusion_megatron.config import load_run
from lorafusion_megatron.data import DataSource, load_dataset
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.training import row_cache
from lorafusion_megatron.training.row_cache import RowCache
from lorafusion_megatron.training.setup import prepare
from tests.unit.tiny_inputs import CHATML, VOCABULARY, id_rows, make_case, write_model, write_rows, write_tokenizer

CHAT = [
    {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{n}!"}],
        "tools": [{"name": "f"}],
    }
    for n in range(4)
]


@pytest.fixture(autouse=True)
def reads(monkeypatch) -> list[str]:
    """Files that are read, by name; all of them count as large."""
    read: list[str] = []

    def load(source, **_):
        read.append(source.path.name)
        return load_dataset(source)

    monkeypatch.setattr(row_cache, "load_dataset", load)
    monkeypatch.setattr(row_cache, "SMALL", 0)
    return read


def make(folder: Path, rows=CHAT, name="rows.jsonl", **changes) -> DataSource:
    """A data file beside a model."""
    model = folder / "base"
    if not model.exists():
        write_tokenizer(write_model(model))
    path = write_rows(folder / name, rows)
    return DataSource(path=path, key="k", model=model, vocab_size=VOCABULARY, **changes)


def content(dataset) -> list[tuple[list[int], list[bool]]]:
    return [(dataset.ids(row).tolist(), dataset.label_mask(row).tolist()) for row in range(len(dataset))]


def same(one, other) -> bool:
    """Whether two data sets agree in everything that training asks of them."""
    return (
        content(one) == content(other)
        and one.lengths.tolist() == other.lengths.tolist()
        and one.label_tokens.tolist() == other.label_tokens.tolist()
        and (one.path, one.rows_truncated, one.total_tokens) == (other.path, other.rows_truncated, other.total_tokens)
        and one.unread == other.unread
    )


@pytest.mark.parametrize(("rows", "limit"), [(CHAT, 24), (id_rows(9), 12)], ids=["chat", "tokenized"])
def test_rows_from_disk_are_the_rows_that_were_read(tmp_path, rows, limit, reads):
    source = make(tmp_path, rows, max_length=limit, truncate=True)
    before = load_dataset(source)
    assert before.rows_truncated > 0
    assert before.unread == (("tools",) if rows is CHAT else ())
    assert same(RowCache(tmp_path / "kept").load(source), before)
    assert same(RowCache(tmp_path / "kept").load(source), before), "another start"
    assert same(RowCache(tmp_path / "kept", write=False).load(source), before), "plan and validate"
    assert reads == ["rows.jsonl"]


def test_jobs_with_the_same_rows_share_them_with_and_without_a_disk(tmp_path, reads, monkeypatch):
    source = make(tmp_path)
    other = replace(source, key="jobs[1].dataset.path", max_length_key="jobs[1].max_length")
    for folder in (None, tmp_path / "kept"):
        cache = RowCache(folder)
        assert cache.load(source) is cache.load(other)
    monkeypatch.setattr(row_cache, "SMALL", 1 << 20)
    cache = RowCache(tmp_path / "small")
    assert cache.load(source) is cache.load(other)
    assert not (tmp_path / "small").exists(), "small files are not worth it"
    assert len(reads) == 3


def _same_size_other_content(source):
    text = source.path.read_text()
    source.path.write_text(text.replace("hi", "ho"))
    return source


def _other_file_with_the_same_times(source):
    status = source.path.stat()
    other = source.path.with_name("new")
    other.write_text(source.path.read_text().replace("hi", "ho"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(source.path)
    return source


def _other_template(source):
    (source.model / "chat_template.jinja").write_text(CHATML + "{# #}")
    return source


def _tool_template(source):
    (source.model / "additional_chat_templates").mkdir()
    (source.model / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML)
    return source


def _own_template(source):
    return replace(source, chat_template=CHATML + "{# own #}")


def _template_file(source):
    path = source.path.with_name("template.jinja")
    path.write_text(CHATML)
    return replace(source, chat_template=str(path))


@pytest.mark.parametrize(
    "change",
    [
        _same_size_other_content,
        _other_file_with_the_same_times,
        _other_template,
        _tool_template,
        _own_template,
        _template_file,
        lambda source: replace(source, max_length=24, truncate=True),
        lambda source: replace(source, max_length=4000),
        lambda source: replace(source, vocab_size=VOCABULARY + 1),
    ],
    ids=[
        "content",
        "replaced",
        "model's template",
        "tool template",
        "own template",
        "template file",
        "truncate",
        "limit",
        "vocabulary",
    ],
)
def test_whatever_rows_depend_on_makes_them_anew(tmp_path, change, reads):
    source = make(tmp_path)
    RowCache(tmp_path / "kept").load(source)
    changed = change(source)
    assert same(RowCache(tmp_path / "kept").load(changed), load_dataset(changed))
    assert len(reads) == 2


def test_other_code_or_libraries_make_rows_anew_and_code_of_a_tokenizer_keeps_them_off(tmp_path, reads, monkeypatch):
    source = make(tmp_path)
    RowCache(tmp_path / "kept").load(source)
    row_cache._code.cache_clear()
    monkeypatch.setattr(row_cache, "version", lambda name: "another")
    RowCache(tmp_path / "kept").load(source)
    row_cache._code.cache_clear()
    assert len(list((tmp_path / "kept").glob("*/"))) == 2
    trusted = replace(source, trust_remote_code=True)
    RowCache(tmp_path / "own").load(trusted)
    assert not (tmp_path / "own").exists()
    assert len(reads) == 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    source = make(tmp_path)

    def load(source, **_):
        rows = load_dataset(source)
        write_rows(source.path, CHAT[:1])
        return rows

    monkeypatch.setattr(row_cache, "load_dataset", load)
    assert len(RowCache(tmp_path / "kept").load(source)) == len(CHAT)
    assert len(RowCache(tmp_path / "kept").load(source)) == 1


@pytest.mark.parametrize("name", ["ids.npy", "labels.npy", "offsets.npy", "rows.json"])
@pytest.mark.parametrize("spoil", ["cut", "empty", "gone"])
def test_rows_that_are_not_whole_are_made_again(tmp_path, name, spoil, reads):
    source = make(tmp_path)
    RowCache(tmp_path / "kept").load(source)
    (file,) = (tmp_path / "kept").glob(f"*/{name}")
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: -3 if spoil == "cut" else 0])
    assert same(RowCache(tmp_path / "kept").load(source), load_dataset(source))
    assert same(RowCache(tmp_path / "kept").load(source), load_dataset(source))
    assert len(reads) == 2


def test_where_nothing_can_be_written_rows_are_in_memory_and_the_reason_is_known(tmp_path, monkeypatch):
    source = make(tmp_path)
    (tmp_path / "file").write_text("")
    cache = RowCache(tmp_path / "file" / "kept")
    assert same(cache.load(source), load_dataset(source))
    assert cache.trouble == "Not a directory"

    def full(folder, *_):
        (folder / "ids.npy").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lorafusion_megatron.data.dataset.JobDataset.save", lambda self, folder: full(folder))
    cache = RowCache(tmp_path / "kept")
    assert same(cache.load(source), load_dataset(source))
    assert cache.trouble == "No space left on device"
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".lock"], "nothing half-written stays"


def test_rows_that_can_not_be_kept_are_read_once_by_each_and_by_nobody_in_turn(tmp_path, reads, monkeypatch):
    source, begun, go_on = make(tmp_path), threading.Event(), threading.Event()

    def full(self, folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lorafusion_megatron.data.dataset.JobDataset.save", full)
    first = RowCache(tmp_path / "kept", rank=0, ranks=2)
    first.share_out([source, make(tmp_path, CHAT[:1], "other.jsonl")])
    assert same(first.load(source), load_dataset(source))
    assert reads == ["rows.jsonl"], "what was read for sharing is not read again, and no more is tried"
    at_once = threading.Barrier(3)

    def load(source, **_):
        if not begun.is_set():
            begun.set()
            assert go_on.wait(10)
        else:
            at_once.wait(10)  # breaks where they read one after the other
        return load_dataset(source)

    monkeypatch.setattr(row_cache, "load_dataset", load)
    found = []
    threads = [threading.Thread(target=lambda: found.append(RowCache(tmp_path / "kept").load(source))) for _ in "1234"]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert [same(rows, load_dataset(source)) for rows in found] == [True] * 4


def test_a_file_is_read_by_one_process_while_others_wait(tmp_path, reads, monkeypatch):
    source, begun, go_on = make(tmp_path), threading.Event(), threading.Event()

    def load(source, **_):
        reads.append("slow")
        begun.set()
        assert go_on.wait(10)
        return load_dataset(source)

    monkeypatch.setattr(row_cache, "load_dataset", load)
    found = []
    threads = [threading.Thread(target=lambda: found.append(RowCache(tmp_path / "kept").load(source))) for _ in "12"]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    third = RowCache(tmp_path / "kept", rank=1, ranks=2)
    third.share_out([source])
    assert reads == ["slow"], "one that only shares the work out goes on"
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert [same(rows, load_dataset(source)) for rows in found] == [True, True]
    assert reads == ["slow"]


def test_ranks_begin_with_different_files_and_leave_errors_for_later(tmp_path, reads):
    sources = [make(tmp_path, CHAT[: n + 1], f"{n}.jsonl") for n in range(3)]
    write_rows(tmp_path / "0.jsonl", [{"bad": 1}])
    cache = RowCache(tmp_path / "kept", rank=1, ranks=2)
    cache.share_out([*sources, replace(sources[0], path=tmp_path / "missing.jsonl")])
    assert reads == ["2.jsonl", "0.jsonl", "1.jsonl"]
    with pytest.raises(UserError, match="has the fields bad"):
        cache.load(sources[0])
    assert len(cache.load(sources[1])) == 2
    assert len(reads) == 4


def test_without_locks_all_read_the_first_ones_rows_stay_and_nothing_is_told(tmp_path, monkeypatch):
    source, kept = make(tmp_path), tmp_path / "kept"

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(row_cache.fcntl, "flock", refuse)

    def load(source, **_):
        rows = load_dataset(source)
        if not list(kept.glob("*/")):  # another process is faster
            other.load(source)
        return rows

    monkeypatch.setattr(row_cache, "load_dataset", load)
    cache, other = RowCache(kept), RowCache(kept)
    monkeypatch.setattr(other, "_make", lambda key, source, make=other._make: _with(load_dataset, make, key, source))
    assert same(cache.load(source), load_dataset(source))
    assert (cache.trouble, other.trouble) == (None, None)
    assert (cache._made, other._made) == (set(), cache.used)


def _with(read, make, *arguments):
    """Make rows with another reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "load_dataset", read)
        return make(*arguments)


def test_large_files_are_told_before_they_are_read(tmp_path, monkeypatch):
    source, said = make(tmp_path), []
    RowCache(tmp_path / "kept", say=said.append).load(source)
    assert said == []
    monkeypatch.setattr(row_cache, "TOLD", 1)
    RowCache(tmp_path / "other", rank=3, ranks=4, say=said.append).load(source)
    assert said == [f"rank 3 reads {source.path} (0 MB)"]


def test_what_nobody_uses_any_more_is_dropped_and_what_a_run_that_does_not_begin_made_is_discarded(tmp_path):
    old, new = make(tmp_path), make(tmp_path, CHAT[:2], "new.jsonl")
    folder = tmp_path / "out" / "kept"
    RowCache(folder).load(old)
    (folder / f".{'0' * 32}.host-1-99999999.abcdef01").mkdir()
    cache = RowCache(folder)
    cache.load(new)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    used = RowCache(folder)
    used.load(new)
    RowCache(folder).drop_old()
    assert {path.name for path in folder.iterdir()} == cache.used, "what was used lately"
    RowCache(folder).load(old)
    RowCache(folder).drop_old()
    assert len(list(folder.glob("*/"))) == 2, "what is no week old"
    again = RowCache(folder)
    again.load(new)
    again.load(old)
    again.discard()
    assert len(list(folder.glob("*/"))) == 2, "what was there before stays"
    elsewhere = RowCache(tmp_path / "never" / "kept")
    elsewhere.load(old)
    elsewhere.discard()
    assert not (tmp_path / "never").exists()


def test_bad_input_leaves_nothing_behind(tmp_path, monkeypatch):
    case = make_case(tmp_path)
    write_rows(tmp_path / "data" / "second.jsonl", [{"prompt_ids": [1], "completion_ids": [VOCABULARY]}])
    run = load_run(case.write(), [])
    for rank in ("0", "1"):  # whose sharing out begins with one file or with the other
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=f"token id {VOCABULARY}"):
            prepare(run)
        assert not run.checkpoint.save.exists()
    monkeypatch.undo()
    monkeypatch.setattr(row_cache, "SMALL", 0)
    write_rows(tmp_path / "data" / "second.jsonl", id_rows(5))
    prepared = prepare(run)
    assert len(list((run.checkpoint.save / "tokenized").glob("*/"))) == 2
    assert prepared.rows.used == {path.name for path in (run.checkpoint.save / "tokenized").glob("*/")}


@pytest.mark.parametrize(("processors", "workers"), [(2, 1), (7, 1), (8, 2), (32, 8), (256, 16)])
def test_large_files_are_read_by_a_quarter_of_the_processors(tmp_path, monkeypatch, processors, workers):
    source, given = make(tmp_path), []
    monkeypatch.setattr(row_cache.os, "sched_getaffinity", lambda _: range(processors))

    def load(source, *, workers):
        given.append(workers)
        return load_dataset(source)

    monkeypatch.setattr(row_cache, "load_dataset", load)
    RowCache(None).load(source)
    monkeypatch.setattr(row_cache, "LARGE", 0)
    RowCache(None).load(source)
    RowCache(tmp_path / "kept").load(source)
    assert given == [1, workers, workers]
