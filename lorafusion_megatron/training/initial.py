"""Checks of the adapters that jobs start from, by their configuration and headers alone: no torch."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorafusion_megatron.config import RunConfig
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.checkpoint import read_json_object
from lorafusion_megatron.models.projections import projection_names
from lorafusion_megatron.types import AdapterSpec, ModelSpec


def check_initial_adapters(run: RunConfig, spec: ModelSpec) -> None:
    """Check every job's ``peft.init_from`` against the job.

    Raises:
        UserError: the folder or a file is missing or broken; rank, alpha, rsLoRA or targets are not the job's.

    Note: the tensors themselves are checked when they are loaded (`models.adapter.load_initial_adapter`); this tells
        the common mistakes apart within milliseconds and without torch. A job that goes on from a checkpoint needs no
        such folder any more.
    """
    going_on = _begun_before(run)
    for index, job in enumerate(run.jobs):
        if job.peft.init_from is not None and job.name not in going_on:
            key = f"jobs[{index}].peft.init_from"
            _check_config(job.peft.init_from, run.adapter_spec(index), spec, key)
            _check_weights(job.peft.init_from / "adapter_model.safetensors", job.peft.r, key)


def _begun_before(run: RunConfig) -> set[str]:
    """Jobs that go on from the newest checkpoint of the run's folder or have ended, as its manifest says."""
    states = run.checkpoint.save / "state"
    if run.checkpoint.resume == "never" or not states.is_dir():
        return set()
    newest = max((path for path in states.iterdir() if path.name.isdigit()), default=None)
    try:
        manifest = json.loads((newest / "manifest.json").read_text()) if newest else {"jobs": []}
        return {
            job["name"] for job in manifest["jobs"] if job["counters"] or job["status"] not in ("running", "paused")
        }
    except (OSError, ValueError, KeyError, TypeError):  # the run will say what is wrong with it
        return set()


def _check_config(folder: Path, adapter: AdapterSpec, spec: ModelSpec, key: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder",
            rule="an adapter is a folder in PEFT's format",
            remedy="check the path",
            key=key,
        )
    file = folder / "adapter_config.json"
    config = read_json_object(file, key=key)
    names = projection_names(spec, adapter.target_modules)
    wanted: dict[str, object] = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "target_modules": sorted(names),
        "layers_to_transform": None if adapter.layers_to_transform is None else list(adapter.layers_to_transform),
    }
    targets = config.get("target_modules")
    found = config | {
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": sorted(map(str, targets)) if isinstance(targets, list) else targets,
    }
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{file}: {name} is {found.get(name)!r}",
                rule=f"the job that starts from it has {value!r}",
                remedy="give the job the adapter's own peft settings, or another adapter",
                key=key,
            )


def _check_weights(file: Path, rank: int, key: str) -> None:
    if not file.is_file():
        raise UserError(
            f"{file} does not exist",
            rule="an adapter's weights are in safetensors format",
            remedy="complete the folder",
            key=key,
        )
    try:
        with safe_open(file, framework="numpy") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} can't be read ({error})",
            rule="it must be a whole safetensors file",
            remedy="copy it anew",
            key=key,
        ) from None
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[0 if ".lora_A." in name else 1] != rank:
            raise UserError(
                f"{file}: {name} has shape {list(shape)}",
                rule=f"A is [{rank}, in] and B is [out, {rank}]",
                remedy="give an adapter of the job's rank",
                key=key,
            )
