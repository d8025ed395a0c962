"""Taking one adapter out of a run's folder."""

import os
import re
from pathlib import Path

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.adapter import read_adapter, write_adapter
from lorafusion_megatron.models.adapter_config import CONFIG_FILE, check_adapter_fits
from lorafusion_megatron.models.config import read_model_spec
from lorafusion_megatron.models.files import folder_fault, prepare_output

_STEP = re.compile(r"step_(\d+)")


def export_adapter(run_dir: str | Path, job: str, output: str | Path, *, step: int | None = None) -> bool:
    """Copy a job's adapter out of a run's folder, checking all of it on the way.

    Args:
        run_dir: what the run file names as ``checkpoint.save``.
        job: name of the job.
        output: PEFT folder to write, new or empty.
        step: a kept step; None takes the latest adapter.

    Returns:
        Whether the adapter was also checked against its base model: not where that is no folder
            on this machine, one that may not be entered, or one without ``config.json``, as an empty mount point.

    Raises:
        UserError: there is no such run, job or step; the adapter is damaged or doesn't fit its base model; the
            output exists.
    """
    source = find_adapter(run_dir, job, step)
    config, tensors = read_adapter(source, key="RUN_DIR")
    base = config.base_model_path
    has_base = bool(base) and folder_fault(base) is None and os.path.exists(os.path.join(base, "config.json"))
    if has_base:
        model = read_model_spec(base, key=str(source / CONFIG_FILE))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_adapter_fits(source, config, shapes, model, key="RUN_DIR")
    # Not the file's size: the run may have dropped the step since.
    folder = prepare_output(output, sum(tensor.nbytes for tensor in tensors.values()), key="--output")
    write_adapter(folder, config.spec(job), base, tensors)
    return has_base


def find_adapter(run_dir: str | Path, job: str, step: int | None = None) -> Path:
    """The folder of a job's latest adapter, or of a kept step.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    run = Path(run_dir)
    _check_listed(run)
    # Hidden folders are adapters that are being written.
    jobs = sorted(file.parent.name for file in run.glob(f"[!.]*/{CONFIG_FILE}"))
    if job not in jobs:
        if os.path.isdir(run / job):
            _check_listed(run / job)
        raise UserError(
            f"{run} holds no adapter of {job!r}",
            rule=f"jobs with an adapter: {', '.join(jobs) or 'none'}",
            remedy="give one of them"
            if jobs
            else "wait for its first kept step (checkpoint.save_interval), its end or a stop, or give another run",
            key="JOB",
        )
    if step is None:
        return run / job
    matches = (_STEP.fullmatch(file.parent.name) for file in (run / job).glob(f"step_*/{CONFIG_FILE}"))
    kept = {int(match[1]): match[0] for match in matches if match}
    if step not in kept:
        raise UserError(
            f"job {job!r} has no kept step {step}",
            rule=f"kept steps: {', '.join(map(str, sorted(kept))) or 'none'}",
            remedy="give one of them, or leave --step out for the latest adapter",
            key="--step",
        )
    return run / job / kept[step]


def _check_listed(folder: Path) -> None:
    """Globbing takes a folder that may not be listed for an empty one."""
    if (fault := folder_fault(folder, listed=True)) is not None:
        raise UserError(
            f"{str(folder)!r} {fault}",
            rule="a run's folder is what checkpoint.save names",
            remedy="give the folder of a run",
            key="RUN_DIR",
        )
