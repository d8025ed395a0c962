"""Adapters in PEFT's format: PEFT reads ours, we read PEFT's, and what is not plain LoRA is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models import tensors as tensors_on_disk
from lorafusion_megatron.models.adapter import load_initial_adapter, read_adapter, write_adapter
from lorafusion_megatron.models.adapter_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_adapter_is_jobs,
    read_adapter_config,
)
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.projections import adapter_shapes
from lorafusion_megatron.types import AdapterSpec, ModelSpec
from tests.unit.models.conftest import FAMILIES, SaveModel, biases

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEC = AdapterSpec(name="job", rank=4, alpha=10.0, dropout=0.25, use_rslora=True, target_modules=ALL, seed=1)


def random_tensors(model: ModelSpec, spec: AdapterSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(spec.seed)
    shapes = adapter_shapes(model, spec.target_modules, spec.rank, layers=spec.layers_to_transform)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def llama(save_model: SaveModel) -> tuple[Path, ModelSpec]:
    folder = save_model("llama")
    return folder, read_model_spec(folder)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_written_with_the_same_keys_and_the_right_scale(
    save_model: SaveModel, tmp_path: Path, family: str, rslora: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_model(family, **biases(family))
    spec = replace(SPEC, use_rslora=rslora, target_modules=ALL if rslora else ("v_proj", "q_proj"))
    tensors = random_tensors(read_model_spec(base), spec)
    write_adapter(tmp_path / "adapter", spec, base, tensors)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    loaded = {k.replace(".default.", "."): v for k, v in model.state_dict().items() if ".lora_" in k}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (4, 10, 0.25, True)
    assert config.base_model_name_or_path == str(base)
    scale = model.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"]
    assert scale == spec.scaling == (5.0 if rslora else 2.5)


def test_what_peft_saves_reads_back(llama: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, spec = llama
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["k_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "adapter")
    got, tensors = read_adapter(tmp_path / "adapter", spec)
    assert (got.rank, got.alpha, got.dropout, got.use_rslora) == (3, 6.0, 0.1, False)
    assert got.target_modules == ("k_proj", "o_proj")
    assert got.base_model_path == str(base)
    saved = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert tensors.keys() == saved.keys() == adapter_shapes(spec, got.target_modules, 3).keys()
    assert all(torch.equal(tensors[key], saved[key]) for key in saved)


def test_round_trip_keeps_every_bit_in_every_dtype(llama: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    base, model = llama
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: value.to(dtype) for name, value in random_tensors(model, SPEC).items()}
        write_adapter(tmp_path / str(dtype), SPEC, base, tensors)
        config, got = read_adapter(tmp_path / str(dtype), model)
        assert config.spec("job") == replace(SPEC, target_modules=tuple(sorted(ALL)), seed=0)
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[key], value) and got[key].dtype == dtype for key, value in tensors.items())


def test_an_adapter_of_some_layers_reads_back_and_loads_in_peft(llama: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, model = llama
    spec = replace(SPEC, layers_to_transform=(2, 0), target_modules=("q_proj",))
    tensors = random_tensors(model, spec)
    assert len(tensors) == 4
    write_adapter(tmp_path / "job", spec, base, tensors)
    config, got = read_adapter(tmp_path / "job", model)
    assert config.layers_to_transform == (0, 2)
    assert got.keys() == tensors.keys()
    assert load_initial_adapter(tmp_path / "job", model, replace(spec, layers_to_transform=(0, 2))).keys() == got.keys()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "job")
    loaded = {k.replace(".default.", ".") for k in peft.state_dict() if ".lora_" in k}
    assert loaded == tensors.keys()


def test_an_adapter_is_replaced_and_the_other_files_of_its_folder_stay(
    llama: tuple[Path, ModelSpec], tmp_path: Path
) -> None:
    base, model = llama
    folder = tmp_path / "run" / "job"
    write_adapter(folder, SPEC, base, random_tensors(model, SPEC))
    (folder / "losses.json").write_text("[1.0]")
    write_adapter(folder / "step_2", SPEC, base, random_tensors(model, SPEC))
    newer = replace(SPEC, seed=2)
    write_adapter(folder, newer, base, random_tensors(model, newer))
    config, got = read_adapter(folder, model)
    assert all(torch.equal(got[key], value) for key, value in random_tensors(model, newer).items())
    other = replace(SPEC, rank=2, target_modules=("o_proj",))
    write_adapter(folder, other, base, random_tensors(model, other))
    config, got = read_adapter(folder, model)
    assert (config.rank, config.target_modules) == (2, ("o_proj",))
    assert (folder / "losses.json").read_text() == "[1.0]"
    assert contents(tmp_path / "run") == sorted(
        ["job", "job/losses.json", "job/step_2"]
        + [f"job/{sub}{name}" for sub in ("", "step_2/") for name in (CONFIG_FILE, WEIGHTS_FILE)]
    )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (folder / file).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("same_config", [True, False])
@pytest.mark.parametrize("exists", [True, False])
def test_a_reader_at_any_moment_of_a_write_sees_a_whole_adapter_or_none(
    llama: tuple[Path, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, same_config: bool
) -> None:
    base, model = llama
    folder = tmp_path / "run" / "job"
    old = SPEC
    new = replace(SPEC, seed=2) if same_config else replace(SPEC, seed=2, alpha=3.0, rank=2)
    if exists:
        write_adapter(folder, old, base, random_tensors(model, old))
    seen: list[str] = []

    def look() -> None:
        if not (folder / CONFIG_FILE).exists():
            seen.append("none")
            return
        config, got = read_adapter(folder, model)
        for name, spec in (("old", old), ("new", new)):
            tensors = random_tensors(model, spec)
            if config.spec("job").scaling == spec.scaling and all(torch.equal(got[k], v) for k, v in tensors.items()):
                seen.append(name)
                return
        raise AssertionError("a mixture of both adapters")

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            look()
            result = call(*args, **kwargs)
            look()
            return result

        return wrapper

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(os, "fsync", watched(os.fsync))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    monkeypatch.setattr(tensors_on_disk, "save_file", watched(save_file))
    write_adapter(folder, new, base, random_tensors(model, new))
    order = list(dict.fromkeys(seen))
    assert order == (["old"] if exists else []) + (["none"] if not exists or not same_config else []) + ["new"]


def test_an_adapter_goes_where_a_link_leads_and_into_a_folder_that_can_not_be_replaced(
    llama: tuple[Path, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = llama
    (tmp_path / "dangling").symlink_to(tmp_path / "later" / "new")
    write_adapter(tmp_path / "dangling", SPEC, base, random_tensors(model, SPEC))
    assert contents(tmp_path / "later") == ["new", f"new/{CONFIG_FILE}", f"new/{WEIGHTS_FILE}"]
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    replace_file = os.replace

    def move(source: Path, target: Path) -> None:
        assert source.is_relative_to(tmp_path / "disk"), "another file system"
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", move)
    write_adapter(tmp_path / "link", SPEC, base, random_tensors(model, SPEC))
    assert contents(tmp_path / "disk") == [CONFIG_FILE, WEIGHTS_FILE]


def test_safetensors_own_error_for_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        tensors_on_disk.save_tensors({"x": torch.zeros(2)}, tmp_path / "missing" / "x.safetensors")


def test_a_failed_write_leaves_the_older_adapter_and_nothing_else(
    llama: tuple[Path, ModelSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, model = llama
    folder = tmp_path / "run" / "job"
    write_adapter(folder, SPEC, base, random_tensors(model, SPEC))
    before = {path: (tmp_path / "run" / path).read_bytes() for path in contents(tmp_path / "run")[1:]}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(folder, SPEC, base, random_tensors(model, replace(SPEC, seed=2)))
    assert {path: (tmp_path / "run" / path).read_bytes() for path in contents(tmp_path / "run")[1:]} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "has no"),
        (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(4, 2)}), "is not a key of a LoRA linear"),
        (lambda t: t.update({next(iter(t)): torch.ones(5, 48)}), "not of rank 4"),
        (lambda t: t.clear(), "there is no tensor"),
    ],
)
def test_tensors_that_are_no_adapter_are_not_written(
    llama: tuple[Path, ModelSpec], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    base, model = llama
    tensors = random_tensors(model, SPEC)
    change(tensors)
    with pytest.raises(ValueError, match=words):
        write_adapter(tmp_path / "run" / "job", SPEC, base, tensors)
    assert not (tmp_path / "run").exists()


def test_one_shared_factor_goes_out_under_each_projection_and_comes_back(
    llama: tuple[Path, ModelSpec], tmp_path: Path
) -> None:
    base, model = llama
    shared = replace(SPEC, target_modules=("linear_qkv", "linear_fc1", "o_proj"))
    tensors = random_tensors(model, shared)
    for layer in range(3):
        path = f"base_model.model.model.layers.{layer}"
        for name in ("k_proj", "v_proj"):
            tensors[f"{path}.self_attn.{name}.lora_A.weight"] = tensors[f"{path}.self_attn.q_proj.lora_A.weight"]
        tensors[f"{path}.mlp.up_proj.lora_A.weight"] = tensors[f"{path}.mlp.gate_proj.lora_A.weight"]
    write_adapter(tmp_path / "job", shared, base, tensors)
    config, _ = read_adapter(tmp_path / "job", model)
    assert config.target_modules == ("gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    got = load_initial_adapter(tmp_path / "job", model, shared)
    assert all(torch.equal(got[key], value) for key, value in tensors.items())
    tensors[f"{path}.self_attn.v_proj.lora_A.weight"] = tensors[f"{path}.self_attn.v_proj.lora_A.weight"] + 1e-3
    write_adapter(tmp_path / "job", shared, base, tensors)
    with pytest.raises(UserError, match="the A factors of linear_qkv in layer 2 differ; target linear_qkv has one A"):
        load_initial_adapter(tmp_path / "job", model, shared)
    assert load_initial_adapter(tmp_path / "job", model, replace(SPEC, target_modules=config.target_modules))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (replace(SPEC, rank=8), "r is 4; the job that starts from it has 8"),
        (replace(SPEC, alpha=11.0), "lora_alpha is 10.0; the job that starts from it has 11.0"),
        (replace(SPEC, use_rslora=False), "use_rslora is True; the job that starts from it has False"),
        (replace(SPEC, target_modules=("q_proj",)), "the job that starts from it has ['q_proj']"),
        (
            replace(SPEC, layers_to_transform=(0, 2)),
            "layers_to_transform is None; the job that starts from it has (0, 2)",
        ),
    ],
)
def test_an_initial_adapter_must_be_the_jobs(
    llama: tuple[Path, ModelSpec], tmp_path: Path, job: AdapterSpec, words: str
) -> None:
    base, model = llama
    write_adapter(tmp_path / "job", SPEC, base, random_tensors(model, SPEC))
    with pytest.raises(UserError) as caught:
        load_initial_adapter(tmp_path / "job", model, job, key="jobs[0].peft.init_from")
    assert words in str(caught.value)
    assert str(caught.value).startswith("jobs[0].peft.init_from: ")


@pytest.mark.parametrize(
    ("stored", "job"),
    [
        (2, (2,)),
        ([2], (2,)),
        ([2, 0], (0, 2)),
        ([0, 2], (2, 0)),
        (None, (2, 1, 0)),
        ([], (0, 1, 2)),
        ([2, 1, 0], None),
        ([0, 2, 2], (0, 2)),
    ],
    ids=str,
)
def test_layers_are_the_same_however_they_are_written(
    llama: tuple[Path, ModelSpec], tmp_path: Path, stored: object, job: tuple[int, ...] | None
) -> None:
    base, model = llama
    spec = replace(SPEC, layers_to_transform=job)
    tensors = random_tensors(model, spec)
    write_adapter(tmp_path / "job", spec, base, tensors)
    edit_config(layers_to_transform=stored)(tmp_path / "job")
    config = read_adapter_config(tmp_path / "job", key="k")
    check_adapter_is_jobs(tmp_path / "job", config, spec, model, key="k")
    assert load_initial_adapter(tmp_path / "job", model, spec).keys() == tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_factors_may_be_of_every_common_type(llama: tuple[Path, ModelSpec], tmp_path: Path, dtype: torch.dtype) -> None:
    base, model = llama
    write_adapter(tmp_path / "job", SPEC, base, {k: v.to(dtype) for k, v in random_tensors(model, SPEC).items()})
    assert {tensor.dtype for tensor in read_adapter(tmp_path / "job", model)[1].values()} == {dtype}


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return edit


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), "adapter_config.json does not exist"),
        (lambda f: (f / CONFIG_FILE).write_text("{"), "adapter_config.json can't be read"),
        (lambda f: (f / WEIGHTS_FILE).unlink(), "adapter_model.safetensors: it does not exist"),
        (lambda f: (f / WEIGHTS_FILE).write_bytes(b"x" * 99), "adapter_model.safetensors can't be read"),
        (edit_config(peft_type="IA3"), "peft_type 'IA3'; LORA is"),
        (edit_config(use_dora=True), "use_dora is True; use_dora is not supported"),
        (edit_config(bias="all"), "bias is 'all'"),
        (edit_config(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
        (edit_config(rank_pattern={"q_proj": 2}), "rank_pattern is"),
        (edit_config(alpha_pattern={"q_proj": 2}), "alpha_pattern is"),
        (edit_config(layers_to_transform=[0, 1]), "is not part of the model; the adapter is on 2 of"),
        (edit_config(layers_to_transform=[0, 3]), "names layer 3; the base model has layers 0 to 2"),
        (edit_config(layers_to_transform=["0"]), "layers_to_transform is ['0']"),
        (edit_config(layers_to_transform=True), "layers_to_transform is True"),
        (edit_config(fan_in_fan_out=True), "fan_in_fan_out is True"),
        (edit_config(trainable_token_indices=[1]), "trainable_token_indices is [1]"),
        (edit_config(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
        (edit_config(r=0), "r is 0"),
        (edit_config(r=8), "is not of rank 8"),
        (edit_config(lora_alpha="16"), "lora_alpha is '16'"),
        (edit_config(lora_alpha=1e308), "lora_alpha is 1e+308; it must be a positive number of at most 2^64"),
        (edit_config(lora_alpha=10**400), "lora_alpha is 1000"),
        (edit_config(alpha_pattern={f"layers.{n}.q_proj": 2 for n in range(500)}), "...}; alpha_pattern is not"),
        (edit_config(lora_dropout=1.0), "lora_dropout is 1.0"),
        (edit_config(target_modules="all-linear"), "target_modules is 'all-linear'"),
        (edit_config(target_modules=["q_proj"]), "it holds tensors of"),
        (edit_config(target_modules=[*ALL, "x_proj"]), "it holds tensors of"),
        (edit_weights(lambda t: t.pop(Q0)), "has no base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        (edit_weights(lambda t: [t.pop(k) for k in list(t) if ".layers.2." in k]), "layers.2.self_attn.q_proj.lora_A"),
        (
            edit_weights(lambda t: t.update({k.replace(".0.", ".3."): v.clone() for k, v in t.items() if ".0." in k})),
            "is not part of the model; the adapter is on 3 of the base model's 3 layers",
        ),
        (edit_weights(lambda t: t.update({Q0: torch.ones(4, 47)})), "has shape [4, 47]; the base model makes it"),
        (edit_weights(lambda t: t[Q0].fill_(float("inf"))), "holds values that are not finite"),
        (
            edit_weights(lambda t: t.update({Q0: torch.ones(4, 48, dtype=torch.int32)})),
            "is I32; weights are float64, float32, float16 or bfloat16",
        ),
        (
            edit_weights(lambda t: t.update({Q0: torch.ones(4, 48).to(torch.float8_e4m3fn)})),
            f"{Q0} is F8_E4M3; weights",
        ),
        (edit_weights(lambda t: t.update({f"{Q0}.extra": torch.ones(1)})), "is not a key of a LoRA linear"),
    ],
)
def test_a_folder_that_is_no_plain_adapter_of_the_model_is_one_line_that_says_why(
    llama: tuple[Path, ModelSpec], tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    base, model = llama
    write_adapter(tmp_path / "job", SPEC, base, random_tensors(model, SPEC))
    damage(tmp_path / "job")
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "job", model, key="--adapter")
    assert words in str(caught.value)
    assert str(caught.value).startswith("--adapter: ")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        read_adapter(tmp_path / "nothing")
