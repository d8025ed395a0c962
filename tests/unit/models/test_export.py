"""Taking the latest adapter or a kept step out of a run's folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models import export
from lorafusion_megatron.models.adapter import read_adapter, write_adapter
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.export import export_adapter
from lorafusion_megatron.types import AdapterSpec
from tests.unit.models.conftest import SaveModel
from tests.unit.models.test_peft_adapter import random_tensors

SPEC = AdapterSpec(name="a", rank=4, alpha=6.0, dropout=0.1, use_rslora=True, target_modules=("linear_fc2",), seed=9)


@pytest.fixture
def run_dir(save_model: SaveModel, tmp_path: Path) -> Path:
    """A run with job a, kept at steps 5 and 10, and job b with no kept step."""
    base = save_model("llama")
    model = read_model_spec(base)
    for folder, seed in (("a", 12), ("a/step_5", 5), ("a/step_10", 10), ("b", 1), (".b.half", 7)):
        write_adapter(tmp_path / "run" / folder, SPEC, base, random_tensors(model, replace(SPEC, seed=seed)))
    (tmp_path / "run" / "state").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize(("step", "seed"), [(None, 12), (5, 5), (10, 10)])
def test_the_asked_step_comes_out_whole(run_dir: Path, tmp_path: Path, step: int | None, seed: int) -> None:
    assert export_adapter(run_dir, "a", tmp_path / "out", step=step)
    model = read_model_spec(tmp_path / "base")
    config, tensors = read_adapter(tmp_path / "out", model)
    assert config.spec("a") == replace(SPEC, target_modules=("down_proj",), seed=0)
    assert config.base_model_path == str(tmp_path / "base")
    expected = random_tensors(model, replace(SPEC, seed=seed))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_a_base_model_that_is_elsewhere_is_said(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    assert not export_adapter(run_dir, "a", tmp_path / "out")
    read_adapter(tmp_path / "out")


def test_a_base_model_that_is_an_empty_mount_point_is_one_that_is_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    (tmp_path / "base").mkdir()
    assert not export_adapter(run_dir, "a", tmp_path / "out")
    read_adapter(tmp_path / "out")


def test_a_step_that_the_run_drops_once_it_is_read_comes_out_whole(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_and_drop(folder: Path, *, key: str) -> object:
        found = read_adapter(folder, key=key)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(export, "read_adapter", read_and_drop)
    assert export_adapter(run_dir, "a", tmp_path / "out", step=5)
    read_adapter(tmp_path / "out")


@pytest.mark.parametrize(
    ("job", "step", "words"),
    [
        ("c", None, "JOB: {run} holds no adapter of 'c'; jobs with an adapter: a, b; give one of them"),
        ("../base", None, "holds no adapter of '../base'"),
        ("a/step_5", None, "holds no adapter of 'a/step_5'"),
        ("state", None, "holds no adapter of 'state'"),
        ("a", 7, "--step: job 'a' has no kept step 7; kept steps: 5, 10"),
        ("b", 7, "--step: job 'b' has no kept step 7; kept steps: none"),
    ],
)
def test_what_is_not_there_is_an_error_that_lists_what_is(
    run_dir: Path, tmp_path: Path, job: str, step: int | None, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        export_adapter(run_dir, job, tmp_path / "out", step=step)
    assert words.format(run=run_dir) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_run_and_an_existing_output_are_errors(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RUN_DIR: .* is not a directory"):
        export_adapter(tmp_path / "nothing", "a", tmp_path / "out")
    with pytest.raises(UserError, match=r"--output: .* exists"):
        export_adapter(run_dir, "a", run_dir / "b")


def test_a_damaged_adapter_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"RUN_DIR: .*adapter_model\.safetensors can't be read"):
        export_adapter(run_dir, "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_not_exported(run_dir: Path, tmp_path: Path, save_model: SaveModel) -> None:
    save_model("llama", num_hidden_layers=4)
    with pytest.raises(UserError, match="is missing; the adapter is on 4 layers"):
        export_adapter(run_dir, "a", tmp_path / "out")
