"""What an adapter in PEFT's format is, by its configuration and the header of its weights alone; knows no torch."""

import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.checkpoint import read_header, read_json_object
from lorafusion_megatron.models.files import folder_fault
from lorafusion_megatron.models.projections import adapter_shapes, projection_names
from lorafusion_megatron.types import AdapterSpec, ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

type Shapes = Mapping[str, tuple[int, ...]]
"""PEFT's key of a factor -> its shape."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_short = reprlib.Repr(maxlist=12, maxtuple=12, maxstring=80)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_MAX_ALPHA = float(1 << 64)
"""Bound of numbers in a run file too; the scale must fit fp32."""
# Options of PEFT that change what an adapter computes, beyond W x + scaling * B A x on each target of each layer;
# each with the value that leaves it off.
_MUST_BE_OFF: Mapping[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_bdlora": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
}
# Initial values that also change the base weights, so that the adapter alone is not the whole difference.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an ``adapter_config.json`` says."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    """Hugging Face projection names, sorted."""
    layers_to_transform: tuple[int, ...] | None
    """Layers that carry the adapter, ascending from 0; None for all."""
    base_model_path: str

    def spec(self, name: str) -> AdapterSpec:
        """The same as an adapter's specification; an adapter that was read needs no seed."""
        return AdapterSpec(
            name=name,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            use_rslora=self.use_rslora,
            target_modules=self.target_modules,
            layers_to_transform=self.layers_to_transform,
            seed=0,
        )


def read_adapter_config(folder: str | Path, *, key: str) -> AdapterConfig:
    """Read the configuration of a plain LoRA adapter.

    Args:
        folder: PEFT folder.
        key: where the folder was given, for messages.

    Raises:
        UserError: the folder or the file is missing or unreadable; an option makes the adapter something else than
            W x + scaling * B A x.
    """
    if (fault := folder_fault(folder)) is not None:
        raise UserError(
            f"{str(folder)!r} {fault}",
            rule=f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="give the path of an adapter in PEFT's format",
            key=key,
        )
    file = Path(folder) / CONFIG_FILE
    config = read_json_object(file, key=key)
    if config.get("peft_type") != "LORA":
        raise adapter_error(
            file, f"peft_type {_brief(config.get('peft_type'))}", "LORA is the type that is supported", key
        )
    for option, off in _MUST_BE_OFF.items():
        value = config.get(option)
        if value not in (None, off) and value != [] and value != {}:
            raise adapter_error(file, f"{option} is {_brief(value)}", f"{option} is not supported", key)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        rule = "the adapter needs a base model that this method changed"
        raise adapter_error(file, f"init_lora_weights {_brief(init)}", rule, key)
    return AdapterConfig(
        **_read_numbers(file, config, key),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=_read_targets(file, config.get("target_modules"), key),
        layers_to_transform=_read_layers(file, config.get("layers_to_transform"), key),
        base_model_path=str(config.get("base_model_name_or_path") or ""),
    )


def read_adapter_shapes(folder: str | Path, config: AdapterConfig, *, key: str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of an adapter's factors from the header of its weights, and check them against its configuration.

    Raises:
        UserError: the file is missing or damaged, a type is not floating point of 16 to 64 bits, or keys and shapes
            don't match the targets or the rank.
    """
    file = Path(folder) / WEIGHTS_FILE
    if not os.path.lexists(file):
        raise adapter_error(file, "it does not exist", "an adapter's weights are in safetensors format", key)
    header = read_header(file, key=key, remedy="copy the adapter anew")
    for name, (_, dtype) in header.items():
        if dtype not in _FLOATS:
            raise adapter_error(file, f"{name} is {dtype}", "weights are float64, float32, float16 or bfloat16", key)
    shapes = {name: shape for name, (shape, _) in header.items()}
    try:
        targets = check_factors(config.rank, shapes)
    except ValueError as error:
        raise adapter_error(file, str(error), "keys and shapes are those of PEFT's LoRA", key) from None
    if set(targets) != set(config.target_modules):
        rule = f"{CONFIG_FILE} names {', '.join(config.target_modules)}"
        raise adapter_error(file, f"it holds tensors of {', '.join(targets)}", rule, key)
    return shapes


def check_factors(rank: int, shapes: Shapes) -> list[str]:
    """Check keys and shapes against each other; return the projections that they belong to, in order.

    Raises:
        ValueError: a key is not PEFT's, a factor lacks its partner, or a shape is not of this rank.
    """
    targets: dict[str, None] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is not a key of a LoRA linear")
        factor = match["factor"]
        partner = f"base_model.model.{match['module']}.lora_{'B' if factor == 'A' else 'A'}.weight"
        if partner not in shapes:
            raise ValueError(f"{key} has no {partner}")
        if len(shape) != 2 or shape[0 if factor == "A" else 1] != rank:
            raise ValueError(f"{key} has shape {list(shape)}, which is not of rank {rank}")
        targets[match["module"].rpartition(".")[2]] = None
    if not targets:
        raise ValueError("there is no tensor")
    return list(targets)


def check_adapter_fits(
    folder: str | Path, config: AdapterConfig, shapes: Shapes, model: ModelSpec, *, key: str = ""
) -> None:
    """Check that an adapter covers its targets in every layer of a model with the right shapes, and nothing else.

    Raises:
        UserError: it doesn't.
    """
    file = Path(folder) / WEIGHTS_FILE
    layers = adapter_layers(model, config.layers_to_transform)
    if layers[-1] >= model.num_layers:
        given = f"layers_to_transform names layer {layers[-1]}"
        rule = f"the base model has layers 0 to {model.num_layers - 1}"
        raise adapter_error(Path(folder) / CONFIG_FILE, given, rule, key)
    expected = adapter_shapes(model, config.target_modules, config.rank, layers=layers, key=key)
    for name in (*expected, *shapes):
        if name not in shapes:
            rule = f"the adapter is on {len(layers)} layers of the base model"
            raise adapter_error(file, f"{name} is missing", rule, key)
        if name not in expected:
            rule = f"the adapter is on {len(layers)} of the base model's {model.num_layers} layers"
            raise adapter_error(file, f"{name} is not part of the model", rule, key)
        if shapes[name] != expected[name]:
            given = f"{name} has shape {list(shapes[name])}"
            raise adapter_error(file, given, f"the base model makes it {list(expected[name])}", key)


def check_adapter_is_jobs(
    folder: str | Path, config: AdapterConfig, job: AdapterSpec, model: ModelSpec, *, key: str
) -> None:
    """Check that an adapter is what a job that starts from it trains.

    Args:
        folder: PEFT folder.
        config: its configuration.
        job: the job's adapter, whose names of targets and order of layers may be others.
        model: base model of the run.
        key: where the folder was given, for messages.

    Raises:
        UserError: rank, alpha, rsLoRA, targets or layers are not the job's.
    """
    same_layers = adapter_layers(model, job.layers_to_transform) == adapter_layers(model, config.layers_to_transform)
    names = sorted(projection_names(model, job.target_modules))
    for name, found, wanted, same in (
        ("r", config.rank, job.rank, config.rank == job.rank),
        ("lora_alpha", config.alpha, job.alpha, config.alpha == job.alpha),
        ("use_rslora", config.use_rslora, job.use_rslora, config.use_rslora == job.use_rslora),
        ("target_modules", list(config.target_modules), names, list(config.target_modules) == names),
        ("layers_to_transform", config.layers_to_transform, job.layers_to_transform, same_layers),
    ):
        if not same:
            raise UserError(
                f"{Path(folder) / CONFIG_FILE}: {name} is {_brief(found)}",
                rule=f"the job that starts from it has {_brief(wanted)}",
                remedy="give the job the adapter's own peft settings, or another adapter",
                key=key,
            )


def adapter_layers(model: ModelSpec, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers that carry an adapter, ascending."""
    return tuple(range(model.num_layers)) if layers is None else tuple(sorted(layers))


def adapter_error(file: Path, given: str, rule: str, key: str) -> UserError:
    """An error about one file of an adapter."""
    return UserError(f"{file}: {given}", rule=rule, remedy="give a plain LoRA adapter of this base model", key=key)


def _brief(value: object) -> str:
    """A value of a configuration in a message, however long it is."""
    return _short.repr(value)


def _read_numbers(file: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout") or 0.0
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise adapter_error(file, f"r is {_brief(rank)}", "it must be a positive integer", key)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= _MAX_ALPHA:
        raise adapter_error(file, f"lora_alpha is {_brief(alpha)}", "it must be a positive number of at most 2^64", key)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise adapter_error(file, f"lora_dropout is {_brief(dropout)}", "it must be from 0 to below 1", key)
    return {"rank": rank, "alpha": float(alpha), "dropout": float(dropout)}


def _read_targets(file: Path, targets: Any, key: str) -> tuple[str, ...]:
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise adapter_error(file, f"target_modules is {_brief(targets)}", "it must be a list of projection names", key)
    return tuple(sorted(set(targets)))


def _read_layers(file: Path, value: Any, key: str) -> tuple[int, ...] | None:
    """``layers_to_transform``: absent or empty for all layers, a number, or a list of numbers."""
    numbers = [value] if isinstance(value, int) else value or None
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise adapter_error(file, f"layers_to_transform is {_brief(value)}", "it must list layer numbers from 0", key)
    return tuple(sorted(set(numbers)))
