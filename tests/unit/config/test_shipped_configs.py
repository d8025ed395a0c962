"""Every run file in configs/ is valid as it stands, given a model, and the reference names every key."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafusion_megatron.cli.main import main
from lorafusion_megatron.config import RunConfig, load_run
from tests.unit.tiny_inputs import write_adapter, write_model, write_tokenizer

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose positions are enough for the examples at one token a byte."""
    folder = tmp_path_factory.mktemp("shipped")
    write_tokenizer(write_model(folder / "base", max_position_embeddings=2048))
    write_adapter(folder / "adapter", folder / "base", rank=16, alpha=32.0)
    return folder / "base"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_run_file_is_valid(
    path: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [f"base_model.path={model}"]
    if path.stem == "continue_adapter":
        overrides.append(f"jobs.harbour.peft.init_from={model.parent / 'adapter'}")
    status = main(["validate", str(path), *overrides])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert all(job.name in out for job in load_run(path, overrides).jobs)
    assert list(tmp_path.iterdir()) == []


def test_every_kind_of_example_is_there() -> None:
    stems = {path.stem for path in SHIPPED}
    assert {"quickstart", "pipeline", "tensor_parallel", "chat", "continue_adapter", "tokenized", "reference"} <= stems
    assert len({load_run(path).checkpoint.save for path in SHIPPED}) == len(SHIPPED)


def keys(cls: type) -> dict[str, Any]:
    """The keys of a section: of sections within it their keys, else the default (MISSING where required)."""
    out: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = next(iter(typing.get_args(hints[field.name])), hints[field.name])
        section = next((kind for kind in (hints[field.name], inner) if dataclasses.is_dataclass(kind)), None)
        out[field.name] = field.default if section is None else keys(typing.cast(type, section))
    return out


def test_reference_names_every_key_with_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "reference.yaml").read_text())
    written["jobs"] = written["jobs"][0]

    def compare(known: dict[str, Any], found: dict[str, Any], path: str) -> None:
        assert list(known) == list(found), path
        for key, default in known.items():
            if isinstance(default, dict):
                compare(default, found[key], f"{path}.{key}")
            elif default is not dataclasses.MISSING and f"{path}.{key}" != ".jobs.train.train_iters":
                value = tuple(found[key]) if isinstance(found[key], list) else found[key]
                assert value == default, f"{path}.{key}"

    compare(keys(RunConfig), written, "")


def test_reference_lists_both_spellings() -> None:
    text = (CONFIGS / "reference.yaml").read_text()
    for first, second in (("r:", "dim"), ("lora_alpha:", "alpha"), ("lora_dropout:", "dropout")):
        line = next(line for line in text.splitlines() if line.strip().startswith(first))
        assert line.endswith(f"also spelled {second}")
