"""Checks of the adapters that jobs start from, by their configurations and headers alone; knows no torch."""

import json

from lorafusion_megatron.config import RunConfig
from lorafusion_megatron.models.adapter_config import (
    check_adapter_fits,
    check_adapter_is_jobs,
    read_adapter_config,
    read_adapter_shapes,
)
from lorafusion_megatron.training.sequences import checkpoint_folder, sequences
from lorafusion_megatron.types import ModelSpec


def check_initial_adapters(run: RunConfig, spec: ModelSpec) -> None:
    """Check every job's ``peft.init_from`` against the job.

    Raises:
        UserError: the folder or a file is missing or broken; it is not plain LoRA; rank, alpha, rsLoRA, targets, layers
            or shapes are not the job's.

    Note: this takes milliseconds, without torch. What the values alone tell (some are not finite, projections that
        share one A in the job have several) is checked when they are loaded (`models.adapter.load_initial_adapter`).
        A job that goes on from a checkpoint needs no such folder any more.
    """
    going_on = _begun_before(run)
    for index, job in enumerate(run.jobs):
        if job.peft.init_from is not None and job.name not in going_on:
            folder, key = job.peft.init_from, f"jobs[{index}].peft.init_from"
            config = read_adapter_config(folder, key=key)
            check_adapter_is_jobs(folder, config, run.adapter_spec(index), spec, key=key)
            check_adapter_fits(folder, config, read_adapter_shapes(folder, config, key=key), spec, key=key)


def _begun_before(run: RunConfig) -> set[str]:
    """Jobs that go on from the newest checkpoint of the run's folder or have ended, as its manifest says."""
    states = run.checkpoint.save / "state"
    if run.checkpoint.resume == "never":
        return set()
    try:
        manifest = {"jobs": []}
        for newest in sequences(states)[:1]:
            manifest = json.loads((checkpoint_folder(states, newest) / "manifest.json").read_text())
        return {
            job["name"] for job in manifest["jobs"] if job["counters"] or job["status"] not in ("running", "paused")
        }
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or the run will say what is wrong with it
        return set()
