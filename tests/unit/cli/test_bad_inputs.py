"""Bad input ends with one line that names the key, exit status 2, and nothing written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_megatron.cli.main import main
from tests.unit.cli.bad_inputs import BAD_INPUTS, Bad
from tests.unit.tiny_inputs import make_case


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name.replace(" ", "_"))
def test_bad_input_is_one_line_with_its_key(
    bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    case = make_case(tmp_path)
    if bad.spoil:
        bad.spoil(case)
    run_file = case.write()
    before = tree(tmp_path)
    assert main(["validate", str(run_file), *bad.overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    prefix, _, message = err.partition("error: ")
    assert prefix == "lorafusion-megatron: "
    assert bad.key in message.split(": ")[0]
    assert bad.says in message
    assert message.count("; ") >= 2, "given; rule; remedy"
    assert len(message) < 500
    assert tree(tmp_path) == before


def test_names_are_distinct_and_enough() -> None:
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS) >= 60


def test_the_unspoiled_case_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(tmp_path)
    assert main(["validate", str(case.write())]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines]
    head = table.index(
        ["job", "rank", "alpha", "rows", "tokens", "labels", "longest", "batch", "steps", "epochs", "lr"]
    )
    assert table[head + 1][:4] == ["first", "4", "8", "7"]
    assert table[head + 2][7:10] == ["2", "5", "2.0"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [[], ["validat"], ["validate"], ["validate", "a.yaml", "--fast"]])
def test_bad_command_lines_are_one_line_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--help" in err


def test_world_size_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = str(make_case(tmp_path).write())
    words = ["validate", run_file, "model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=2"]
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert main(words) == 2
    assert "6 ranks for tensor 2 x pipeline 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(words) == 0


def test_validate_imports_no_torch(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    case.rows.write_text('{"text": "plain text, so that the tokenizer is loaded too"}\n')
    program = (
        "import sys; from lorafusion_megatron.cli.main import main; status = main(sys.argv[1:]); "
        "bad = {'torch', 'megatron', 'transformers'} & set(sys.modules); "
        "sys.exit(f'{status} {bad}' if status or bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "validate", str(case.write())],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"WORLD_SIZE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "first" in done.stdout
