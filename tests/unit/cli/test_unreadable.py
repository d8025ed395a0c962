"""What a run file or a command names and may not be read is one line that says why, never a traceback."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from tests.unit.tiny_inputs import Case, make_case, write_rows

ORDINARY_USER = 65534
TOO_LONG = "x" * 300


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A run in a folder that every user may enter and write, unlike those of pytest."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        made = make_case(Path(folder))
        for file in Path(folder).rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes files that only their owner may read
        yield made


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody has rights on a file or folder meanwhile; root, whom nothing would stop, is an ordinary user."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(ORDINARY_USER)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


def line(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a refused command."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def private(case: Case, name: str) -> Path:
    """A copy of a part of the case in a folder of its own, ``private``."""
    source, copy = case.folder / name, case.folder / "private" / Path(name).name
    copy.parent.mkdir()
    return Path(shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy))


@pytest.mark.parametrize(
    ("key", "name", "reads"),
    [
        ("base_model.path", "base", "can't be read"),
        ("jobs[0].dataset.path", "data/first.jsonl", "cannot be read"),
        ("jobs[0].eval.path", "data/first.jsonl", "cannot be read"),
        ("jobs[0].peft.init_from", "adapter", "can't be read"),
    ],
)
def test_a_path_that_may_not_be_entered(
    case: Case, key: str, name: str, reads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{key}={private(case, name)}"]
    words += ["jobs[0].eval.interval=1"] if "eval" in key else []
    file = case.write()
    assert main(["validate", str(file), *words]) == 0, "it also imports all that the next one needs"
    capsys.readouterr()
    with closed(case.folder / "private"):
        said = line(capsys, "validate", file, *words)
    assert f"{key}: " in said
    assert f"{reads} (Permission denied)" in said
    said = line(capsys, "validate", file, *words, f"{key}={TOO_LONG}")
    assert f"{key}: " in said
    assert f"{reads} (File name too long)" in said


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base/config.json", "base_model.path"),
        ("base/model.safetensors", "base_model.path"),
        ("base/tokenizer.json", "jobs[0].dataset.path"),
        ("base/tokenizer_config.json", "jobs[0].dataset.path"),
        ("base/chat_template.jinja", "jobs[0].dataset.chat_template"),
        ("data/first.jsonl", "jobs[0].dataset.path"),
        ("adapter/adapter_config.json", "jobs[0].peft.init_from"),
        ("adapter/adapter_model.safetensors", "jobs[0].peft.init_from"),
    ],
)
def test_a_file_that_may_not_be_read(case: Case, name: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(case.rows, [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    file = case.write()
    assert main(["validate", str(file)]) == 0
    capsys.readouterr()
    with closed(case.folder / name):
        said = line(capsys, "validate", file)
    assert f"{key}: " in said
    assert "read (Permission denied)" in said
    assert "download it again" not in said


def exported(case: Case) -> Path:
    """A run's folder with the adapter of job ``first``, which names the case's base model."""
    run = case.folder / "run"
    shutil.copytree(case.adapter, run / "first")
    case.edit_json(run / "first" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(case.model)))
    return run


@pytest.mark.parametrize("part", ["", "first"])
def test_export_from_a_run_that_may_not_be_entered(case: Case, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = exported(case), case.folder / "out"
    assert main(["export", str(run), "first", "--output", str(case.folder / "before")]) == 0
    capsys.readouterr()
    with closed(run / part):
        said = line(capsys, "export", run, "first", "--output", out)
    assert "RUN_DIR: " in said
    assert "can't be read (Permission denied)" in said
    said = line(capsys, "export", case.folder / TOO_LONG, "first", "--output", out)
    assert "can't be read (File name too long)" in said
    assert not out.exists()


def test_export_checks_an_adapter_alone_where_its_base_can_not_be_reached(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    place = private(case, "base")
    run = exported(case)
    file = run / "first" / "adapter_config.json"
    case.edit_json(file, lambda config: config.update(base_model_name_or_path=str(place)))
    assert main(["export", str(run), "first", "--output", str(case.folder / "before")]) == 0
    assert "checked by itself" not in capsys.readouterr().out
    with closed(place.parent):
        assert main(["export", str(run), "first", "--output", str(case.folder / "one")]) == 0
    assert "checked by itself" in capsys.readouterr().out
    for number, name in enumerate((f"/{TOO_LONG}", "a\0b", "\ud800")):
        case.edit_json(file, lambda config, name=name: config.update(base_model_name_or_path=name))
        out = case.folder / str(number)
        assert main(["export", str(run), "first", "--output", str(out)]) == 0
        assert "checked by itself" in capsys.readouterr().out
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == name


@pytest.mark.parametrize("name", ["base", "adapter", "base/tokenizer_config.json"])
def test_merge_of_what_may_not_be_read(case: Case, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = private(case, name.split("/")[0])
    parts = {"base": case.model, "adapter": case.adapter, name.split("/")[0]: place}
    words = ["merge", "--base", parts["base"], "--adapter", parts["adapter"], "--output"]
    assert main([*map(str, words), str(case.folder / "before")]) == 0
    capsys.readouterr()
    with closed(case.folder / "private" / name if "/" in name else place.parent):
        said = line(capsys, *words, case.folder / "out")
    assert f"--{name.split('/')[0]}: " in said
    assert "can't be read (Permission denied)" in said
    assert not (case.folder / "out").exists()


def test_names_that_are_no_text_are_printed_escaped(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line and JSON can name what a terminal does not take."""
    name = {"base_model_name_or_path": "\ud800"}
    case.edit_json(case.adapter / "adapter_config.json", lambda config: config.update(name))
    out = os.fsdecode(os.fsencode(case.folder) + b"/\xff")
    assert main(["merge", "--base", str(case.model), "--adapter", str(case.adapter), "--output", out]) == 0
    said = capsys.readouterr().out
    assert "\\udcff" in said
    assert "the adapter names '\\ud800' as its base model" in said
    assert main(["export", str(exported(case)), "first", "--output", f"{out}2"]) == 0
    assert "\\udcff2" in capsys.readouterr().out
