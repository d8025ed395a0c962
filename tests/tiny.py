"""Whole small runs for tests that train: models with lively weights, adapters with both factors non-zero, run files."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from lorafusion_megatron.config.targets import HF_TARGETS
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.families import hf_tensors
from lorafusion_megatron.models.projections import adapter_shapes, projection_names
from tests.unit.tiny_inputs import write_rows

VOCABULARY = 64
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
OPTIMIZER = {
    "lr": 2e-3,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-6,
    "clip_grad": 0.5,
}
Tensors = dict[str, torch.Tensor]


def write_base(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A base model whose matrices keep the size of their input and whose norms and biases are not trivial."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config = CONFIG | changes
    config["architectures"] = [f"{architecture[config['model_type']]}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in hf_tensors(read_model_spec(folder)):
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = values if "embed" in name else values / math.sqrt(shape[1])
        else:
            tensors[name] = 0.1 * values + (1.0 if "norm" in name else 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows_of_ids(
    path: Path, count: int, *, seed: int = 0, prompt: tuple[int, int] = (1, 20), completion: tuple[int, int] = (1, 30)
) -> Path:
    """Tokenized rows; lengths are drawn from the half-open ranges."""
    rng = np.random.default_rng(seed)

    def ids(bounds: tuple[int, int]) -> list[int]:
        return rng.integers(0, VOCABULARY, rng.integers(*bounds)).tolist()

    return write_rows(path, [{"prompt_ids": ids(prompt), "completion_ids": ids(completion)} for _ in range(count)])


def write_start(folder: Path, base: Path, peft: dict[str, Any], *, seed: int = 0) -> Path:
    """An adapter in PEFT's format to start from, of a job's own peft settings, with A and B drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = read_model_spec(base)
    generator = torch.Generator().manual_seed(seed)
    targets = peft.get("target_modules", list(HF_TARGETS))
    layers = peft.get("layers_to_transform")
    shared: Tensors = {}
    tensors: Tensors = {}
    for name, shape in adapter_shapes(spec, targets, peft["r"]).items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        if layers is not None and layer not in layers:
            continue
        scale = 1 / math.sqrt(shape[1]) if "lora_A" in name else 0.05
        tensors[name] = torch.randn(shape, generator=generator) * scale
        for fused, parts in (("linear_qkv", "qkv"), ("linear_fc1", ("gate", "up"))):
            if fused in targets and "lora_A" in name and any(f".{part}_proj." in name for part in parts):
                tensors[name] = shared.setdefault(f"{fused}{layer}", tensors[name]).clone()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": peft["r"],
        "lora_alpha": peft["lora_alpha"],
        "lora_dropout": peft.get("lora_dropout", 0.0),
        "use_rslora": peft.get("use_rslora", False),
        "target_modules": projection_names(spec, targets),
        "layers_to_transform": layers,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def job(
    folder: Path,
    name: str,
    *,
    r: int = 4,
    alpha: float = 8.0,
    rows: int = 11,
    batch: int = 3,
    steps: int = 4,
    seed: int = 0,
    start: bool = True,
    lengths: dict[str, tuple[int, int]] | None = None,
    optimizer: dict[str, Any] | None = None,
    **peft: Any,
) -> dict[str, Any]:
    """A job of a run file, with its rows and the adapter that it starts from; needs ``folder/base``."""
    peft = {"r": r, "lora_alpha": alpha, **peft}
    data = write_rows_of_ids(folder / "data" / f"{name}.jsonl", rows, seed=seed, **(lengths or {}))
    if start:
        peft["init_from"] = str(write_start(folder / "init" / name, folder / "base", peft, seed=seed))
    return {
        "name": name,
        "dataset": {"path": str(data), "shuffle": False},
        "peft": peft,
        "optimizer": OPTIMIZER | (optimizer or {}),
        "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 1, "min_lr": 1e-4},
        "train": {"global_batch_size": batch, "train_iters": steps},
    }


def write_run(folder: Path, jobs: Sequence[dict[str, Any]], *, base: Path | None = None, **runtime: Any) -> Path:
    """A run file in fp32 on the CPU; the base model is ``folder/base`` unless another is given."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "base_model": {"path": str(base or folder / "base"), "dtype": "float32"},
        "runtime": {"token_capacity": 128, "seed": 5, "device": "cpu", "distributed_timeout_minutes": 1.0, **runtime},
        "jobs": list(jobs),
        "checkpoint": {"save": str(folder / "out")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


def tiny_run(folder: Path, **runtime: Any) -> Path:
    """Two jobs of different ranks, targets and lengths on a Llama of four layers."""
    write_base(folder / "base")
    jobs = [
        job(folder, "first", steps=4, seed=1),
        job(folder, "second", r=8, alpha=4.0, batch=2, steps=6, seed=2, target_modules=["q_proj", "v_proj"]),
    ]
    return write_run(folder, jobs, **runtime)


def read(folder: Path) -> Tensors:
    """The tensors of an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


def adapter(folder: Path, name: str) -> Tensors:
    """The tensors of a job's latest adapter in the folder of a run."""
    return read(folder / name)


def losses(folder: Path, name: str) -> list[float]:
    """A job's losses by optimizer step."""
    return json.loads((folder / name / "losses.json").read_text())


def update_error(got: Tensors, want: Tensors, start: Tensors) -> float:
    """``max over tensors of |got - want| / |want - start|``: 1 for an adapter that never moved."""
    assert set(got) == set(want) == set(start)

    def one(name: str) -> float:
        moved = want[name].double() - start[name].double()
        assert moved.norm() > 0, f"{name} did not move"
        return float((got[name].double() - want[name].double()).norm() / moved.norm())

    errors = {name: one(name) for name in want}
    assert all(math.isfinite(error) for error in errors.values())
    return max(errors.values())


def same_bits(got: Tensors, want: Tensors) -> bool:
    """Whether two adapters are equal to the last bit."""
    return set(got) == set(want) and all(torch.equal(got[name], want[name]) for name in want)
