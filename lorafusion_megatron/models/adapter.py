"""LoRA adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorafusion_megatron.models.adapter_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    Shapes,
    adapter_error,
    adapter_layers,
    check_adapter_fits,
    check_adapter_is_jobs,
    check_factors,
    read_adapter_config,
    read_adapter_shapes,
)
from lorafusion_megatron.models.files import flush, read_fault, temporary_folder
from lorafusion_megatron.models.projections import resolve_targets, target_linears
from lorafusion_megatron.models.tensors import save_tensors
from lorafusion_megatron.types import AdapterSpec, ModelSpec


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
    config = _peft_config(spec, base_model_path, check_factors(spec.rank, _shapes(tensors)))
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
    config = read_adapter_config(folder, key=key)
    shapes = read_adapter_shapes(folder, config, key=key)
    if model is not None:
        check_adapter_fits(folder, config, shapes, model, key=key)
    tensors = _read_weights(folder / WEIGHTS_FILE, shapes, key)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise adapter_error(
                folder / WEIGHTS_FILE, f"{name} holds values that are not finite", "weights are finite", key
            )
    return config, tensors


def load_initial_adapter(
    folder: str | Path, model: ModelSpec, spec: AdapterSpec, *, key: str = "peft.init_from"
) -> dict[str, torch.Tensor]:
    """Read the adapter that a job starts from.

    Args:
        folder: PEFT folder.
        model: base model of the run.
        spec: the job's adapter, whose rank, alpha, targets and layers the folder must have.
        key: where the folder was given, for messages.

    Returns:
        PEFT's key -> A ``[r, in]`` or B ``[out, r]``, for every projection of every layer that the job trains.

    Raises:
        UserError: as `read_adapter`; it is not the job's (`check_adapter_is_jobs`); projections that share one A
            in the job have different ones in the folder.
    """
    config, tensors = read_adapter(folder, model, key=key)
    check_adapter_is_jobs(folder, config, spec, model, key=key)
    layers = adapter_layers(model, spec.layers_to_transform)
    linears = target_linears(model)
    for name, target in resolve_targets(model, spec.target_modules).items():
        for layer in layers if target.shared else ():
            keys = [linears[name].projections[index].tensor_name(layer, "A") for index in target.projections]
            if not all(torch.equal(tensors[keys[0]], tensors[other]) for other in keys[1:]):
                given = f"the A factors of {name} in layer {layer} differ"
                raise adapter_error(Path(folder) / WEIGHTS_FILE, given, f"target {name} has one A for all of them", key)
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


def _read_weights(file: Path, names: Iterable[str], key: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header was read."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        given = f"it can't be read ({read_fault(file, error)})"
        raise adapter_error(file, given, "it must be a whole safetensors file", key) from None


def _shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
