"""LoRA adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.checkpoint import read_json_object
from lorafusion_megatron.models.files import flush, temporary_folder
from lorafusion_megatron.models.projections import (
    adapter_shapes,
    projection_names,
    resolve_targets,
    target_linears,
)
from lorafusion_megatron.models.tensors import save_tensors
from lorafusion_megatron.types import AdapterSpec, ModelSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
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


def write_adapter(
    folder: str | Path, spec: AdapterSpec, base_model_path: str | Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter in PEFT's format so that no reader ever sees half of one.

    Args:
        folder: where to; it may hold an older adapter and other files, which stay.
        spec: the adapter. ``target_modules`` on disk are the projections that ``tensors`` hold.
        base_model_path: what ``base_model_name_or_path`` shall say.
        tensors: PEFT's key -> A ``[r, in]`` or B ``[out, r]``; an A that several projections share comes once under
            the key of each.

    Raises:
        ValueError: a key is not PEFT's, a factor lacks its partner, or a shape is not of this rank.
        OSError: writing failed; the older adapter is whole and nothing new is left behind.

    Note:
        Both files are written to a temporary folder and flushed to the disk. A new folder then appears by one
        rename. In a folder that exists the weights are replaced by one rename; the configuration is the same at
        every step of a job, so any pair of files that a reader can find is a whole adapter. Where it differs, it is
        removed first and put back last: in between there is no adapter rather than a mixed one.
    """
    folder = Path(os.path.realpath(folder))
    config = _peft_config(spec, base_model_path, _check_tensors(spec.rank, tensors))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as temporary:
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # Copies, since the tensors may be views of one flat buffer or, for a shared A, one tensor.
        host = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        save_tensors(host, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        # What the umask leaves: safetensors makes files that only their owner may read.
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            flush(temporary / name)
        flush(temporary)
        _publish(temporary, folder)


def read_adapter(
    folder: str | Path, model: ModelSpec | None = None, *, key: str = ""
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Read an adapter in PEFT's format and check all of it.

    Args:
        folder: PEFT folder.
        model: base model that it must fit; None checks the adapter against itself alone.
        key: where the folder was given, for messages.

    Returns:
        Its configuration, and PEFT's key -> A ``[r, in]`` or B ``[out, r]`` in the stored dtype on the CPU.

    Raises:
        UserError: a file is missing or damaged; it is not plain LoRA; keys or shapes don't match its targets, its
            rank or the model; a value is not finite.
    """
    folder = Path(folder)
    config = _read_config(folder, key)
    tensors = _read_weights(folder / WEIGHTS_FILE, key)
    try:
        targets = _check_tensors(config.rank, tensors)
    except ValueError as error:
        raise _error(folder / WEIGHTS_FILE, str(error), "keys and shapes are those of PEFT's LoRA", key) from None
    if set(targets) != set(config.target_modules):
        given = f"it holds tensors of {', '.join(targets)}"
        rule = f"{CONFIG_FILE} names {', '.join(config.target_modules)}"
        raise _error(folder / WEIGHTS_FILE, given, rule, key)
    if model is not None:
        check_adapter_fits(folder, config, tensors, model, key=key)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _error(folder / WEIGHTS_FILE, f"{name} holds values that are not finite", "weights are finite", key)
    return config, tensors


def check_adapter_fits(
    folder: str | Path,
    config: AdapterConfig,
    tensors: Mapping[str, torch.Tensor],
    model: ModelSpec,
    *,
    key: str = "",
) -> None:
    """Check that an adapter covers its targets in every layer of a model with the right shapes, and nothing else.

    Raises:
        UserError: it doesn't.
    """
    file = Path(folder) / WEIGHTS_FILE
    layers = _layers(model, config.layers_to_transform)
    if layers[-1] >= model.num_layers:
        given = f"layers_to_transform names layer {layers[-1]}"
        raise _error(Path(folder) / CONFIG_FILE, given, f"the base model has layers 0 to {model.num_layers - 1}", key)
    expected = adapter_shapes(model, config.target_modules, config.rank, layers=layers, key=key)
    for name in (*expected, *tensors):
        if name not in tensors:
            raise _error(file, f"{name} is missing", f"the adapter is on {len(layers)} layers of the base model", key)
        if name not in expected:
            rule = f"the adapter is on {len(layers)} of the base model's {model.num_layers} layers"
            raise _error(file, f"{name} is not part of the model", rule, key)
        if tuple(tensors[name].shape) != expected[name]:
            given = f"{name} has shape {list(tensors[name].shape)}"
            raise _error(file, given, f"the base model makes it {list(expected[name])}", key)


def load_initial_adapter(
    folder: str | Path, model: ModelSpec, spec: AdapterSpec, *, key: str = "peft.init_from"
) -> dict[str, torch.Tensor]:
    """Read the adapter that a job starts from.

    Args:
        folder: PEFT folder.
        model: base model of the run.
        spec: the job's adapter, whose rank, scale and targets the folder must have.
        key: where the folder was given, for messages.

    Returns:
        PEFT's key -> A ``[r, in]`` or B ``[out, r]``, for every projection of every layer that the job trains.

    Raises:
        UserError: as `read_adapter`; rank, scale, targets or layers are not the job's; projections that share one A
            in the job have different ones in the folder.
    """
    config, tensors = read_adapter(folder, model, key=key)
    where = Path(folder) / CONFIG_FILE
    if config.rank != spec.rank:
        raise _error(where, f"rank {config.rank}", f"the job's rank is {spec.rank}", key)
    if config.spec(spec.name).scaling != spec.scaling:
        given = f"scale {config.spec(spec.name).scaling:g} (lora_alpha {config.alpha:g}, rslora {config.use_rslora})"
        raise _error(where, given, f"the job's scale is {spec.scaling:g}; another one changes the outputs", key)
    names = projection_names(model, spec.target_modules)
    if set(names) != set(config.target_modules):
        given = f"targets {', '.join(config.target_modules)}"
        raise _error(where, given, f"the job trains {', '.join(names)}", key)
    layers = _layers(model, spec.layers_to_transform)
    if layers != _layers(model, config.layers_to_transform):
        given = f"layers_to_transform {config.layers_to_transform or 'null (all)'}"
        raise _error(where, given, f"the job trains {spec.layers_to_transform or 'all layers'}", key)
    linears = target_linears(model)
    for name, target in resolve_targets(model, spec.target_modules).items():
        for layer in layers if target.shared else ():
            keys = [linears[name].projections[index].tensor_name(layer, "A") for index in target.projections]
            if not all(torch.equal(tensors[keys[0]], tensors[other]) for other in keys[1:]):
                given = f"the A factors of {name} in layer {layer} differ"
                raise _error(Path(folder) / WEIGHTS_FILE, given, f"target {name} has one A for all of them", key)
    return tensors


def _peft_config(spec: AdapterSpec, base_model_path: str | Path, targets: list[str]) -> dict[str, Any]:
    """The keys that PEFT 0.18 and vLLM read; those that newer versions added have defaults that leave them off."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_path),
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": sorted(targets),
        "init_lora_weights": True,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_bias": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None if spec.layers_to_transform is None else list(spec.layers_to_transform),
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _check_tensors(rank: int, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Check keys and shapes against each other; return the projections that they belong to, in order."""
    targets: dict[str, None] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is not a key of a LoRA linear")
        factor = match["factor"]
        partner = f"base_model.model.{match['module']}.lora_{'B' if factor == 'A' else 'A'}.weight"
        if partner not in tensors:
            raise ValueError(f"{key} has no {partner}")
        if tensor.ndim != 2 or tensor.shape[0 if factor == "A" else 1] != rank:
            raise ValueError(f"{key} has shape {list(tensor.shape)}, which is not of rank {rank}")
        targets[match["module"].rpartition(".")[2]] = None
    if not targets:
        raise ValueError("there is no tensor")
    return list(targets)


def _read_config(folder: Path, key: str) -> AdapterConfig:
    if not folder.is_dir():
        raise UserError(
            f"{str(folder)!r} is not a directory",
            rule=f"an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            remedy="give the path of an adapter in PEFT's format",
            key=key,
        )
    file = folder / CONFIG_FILE
    config = read_json_object(file, key=key)
    if config.get("peft_type") != "LORA":
        raise _error(file, f"peft_type {config.get('peft_type')!r}", "LORA is the type that is supported", key)
    for option, off in _MUST_BE_OFF.items():
        value = config.get(option)
        if value not in (None, off) and value != [] and value != {}:
            raise _error(file, f"{option} is {value!r}", f"{option} is not supported", key)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise _error(
            file, f"init_lora_weights {init!r}", "the adapter needs a base model that this method changed", key
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout, targets = config.get("lora_dropout") or 0.0, config.get("target_modules")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise _error(file, f"r is {rank!r}", "it must be a positive integer", key)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise _error(file, f"lora_alpha is {alpha!r}", "it must be a positive number", key)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise _error(file, f"lora_dropout is {dropout!r}", "it must be from 0 to below 1", key)
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise _error(file, f"target_modules is {targets!r}", "it must be a list of projection names", key)
    return AdapterConfig(
        rank=rank,
        alpha=float(alpha),
        dropout=float(dropout),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=tuple(sorted(targets)),
        layers_to_transform=_read_layers(file, config.get("layers_to_transform"), key),
        base_model_path=str(config.get("base_model_name_or_path") or ""),
    )


def _layers(model: ModelSpec, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """The layers that carry an adapter, ascending."""
    return tuple(range(model.num_layers)) if layers is None else tuple(sorted(layers))


def _read_layers(file: Path, value: Any, key: str) -> tuple[int, ...] | None:
    """``layers_to_transform``: absent or empty for all layers, a number, or a list of numbers."""
    numbers = [value] if isinstance(value, int) else value or None
    if numbers is None:
        return None
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise _error(file, f"layers_to_transform is {value!r}", "it must list layer numbers from 0", key)
    return tuple(sorted(set(numbers)))


def _read_weights(file: Path, key: str) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise _error(file, "it does not exist", "an adapter's weights are in safetensors format", key)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _error(file, f"it can't be read ({error})", "it must be a whole safetensors file", key) from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise _error(file, f"{name} is {tensor.dtype}", "weights are floating-point", key)
    return tensors


def _publish(temporary: Path, folder: Path) -> None:
    """Move a flushed adapter to its place."""
    if not folder.exists():
        os.replace(temporary, folder)
        flush(folder.parent)
        return
    config = folder / CONFIG_FILE
    changed = not config.is_file() or config.read_bytes() != (temporary / CONFIG_FILE).read_bytes()
    if changed:
        config.unlink(missing_ok=True)
    os.replace(temporary / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    if changed:
        os.replace(temporary / CONFIG_FILE, config)
    flush(folder)


def _error(file: Path, given: str, rule: str, key: str) -> UserError:
    return UserError(f"{file}: {given}", rule=rule, remedy="give a plain LoRA adapter of this base model", key=key)
