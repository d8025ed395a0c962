"""Rows tokenized by several processes: the same data set and the same errors as by one."""

import os
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lorafusion_megatron.data import DataSource, JobDataset, load_dataset, parallel
from lorafusion_megatron.data import load as load_module
from lorafusion_megatron.errors import UserError
from tests.unit.tiny_inputs import VOCABULARY, id_rows, write_model, write_rows, write_tokenizer

CHAT = [
    {"messages": [{"role": "user", "content": f"q{n}" * (n % 7)}, {"role": "assistant", "content": f"é{n}" * (n % 5)}]}
    for n in range(50)
]
KINDS = {
    "messages": CHAT,
    "tokenized": id_rows(50),
    "completion": [{"prompt": "p" * (n % 4), "completion": "c" * (n % 6)} for n in range(50)],
    "text": [{"text": "x" * n} for n in range(50)],
    "one row": CHAT[1:2],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CHUNK", 3)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenizer(write_model(tmp_path / "base"))


def source(model: Path, rows: list[Any], **changes: Any) -> DataSource:
    path = write_rows(model.parent / "rows.jsonl", rows)
    return DataSource(path=path, key="k", model=model, vocab_size=VOCABULARY, **changes)


def content(dataset: JobDataset) -> tuple[Any, ...]:
    rows = [(dataset.ids(row).tolist(), dataset.label_mask(row).tolist()) for row in range(len(dataset))]
    return rows, dataset.lengths.tolist(), dataset.label_tokens.tolist(), dataset.rows_truncated, dataset.unread


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [{}, {"max_length": 32, "truncate": True}], ids=["whole", "cut"])
def test_several_processes_make_the_same_data_set(model: Path, kind: str, limits: dict[str, Any]) -> None:
    given = source(model, KINDS[kind], **limits)
    assert content(load_dataset(given, workers=3)) == content(load_dataset(given))


def test_what_no_template_mentions_is_told_by_every_process(model: Path) -> None:
    rows = deepcopy(CHAT[:20])
    rows[0]["tools"] = [{"name": "f"}]
    rows[17]["messages"][1]["reasoning_content"] = "hm"
    assert load_dataset(source(model, rows), workers=3).unread == ("reasoning_content", "tools")


BAD = {"messages": [{"role": "user"}]}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [BAD, *CHAT],
        [*CHAT[:11], BAD, *CHAT, {"text": "later"}],
        [*CHAT[:30], {"text": "another kind"}, BAD],
        [*CHAT[:10], BAD, "{no JSON"],
        [*CHAT[:10], "{no JSON", BAD],
        [*CHAT, {"messages": [{"role": "user", "content": "long" * 40}]}],
        [{"prompt_ids": [], "completion_ids": [n]} for n in range(40)]
        + [{"prompt_ids": [VOCABULARY], "completion_ids": []}],
        [{"prompt_ids": [n], "completion_ids": []} for n in range(40)],
    ],
    ids=["empty", "first", "row", "kind", "row before JSON", "JSON before row", "long", "vocabulary", "no labels"],
)
def test_the_error_that_comes_first_in_the_file_is_told(model: Path, rows: list[Any]) -> None:
    given = source(model, rows, max_length=100)
    with pytest.raises(UserError) as alone:
        load_dataset(given)
    with pytest.raises(UserError) as together:
        load_dataset(given, workers=3)
    assert str(together.value) == str(alone.value)
    assert together.value.key == alone.value.key


@pytest.mark.parametrize("how", ["at its first rows", "before it started", "can't start"])
def test_where_a_process_is_lost_this_one_reads_for_itself(
    model: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, killed = source(model, CHAT), []

    class Popen(subprocess.Popen):
        def __init__(self, *args: Any, **more: Any) -> None:
            if how == "can't start":
                raise BlockingIOError("no more processes")
            super().__init__(*args, **more)
            if how == "before it started":
                self.kill()
                killed.append(self.pid)

    receive = parallel._Worker.receive

    def lose(self: parallel._Worker) -> Any:
        if how == "at its first rows" and not killed:
            killed.append(self._process.pid)
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()  # its next chunk finds nobody, if this one was answered already
        return receive(self)

    monkeypatch.setattr(parallel.subprocess, "Popen", Popen)
    monkeypatch.setattr(parallel._Worker, "receive", lose)
    assert content(load_dataset(given, workers=2)) == content(load_dataset(given))
    assert bool(killed) == (how != "can't start")


def test_the_processes_import_from_where_this_one_does(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model.parent / "pickle.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(load_module, "_encode", lambda source: pytest.fail("they were lost"))
    assert len(load_dataset(source(model, CHAT), workers=2)) == len(CHAT)


def test_the_processes_end_with_the_work_and_import_no_torch(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            started.append(self)

    monkeypatch.setattr(parallel.subprocess, "Popen", Popen)
    load_dataset(source(model, CHAT), workers=2)
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
    words = "import sys, lorafusion_megatron.data.parallel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
