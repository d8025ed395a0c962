"""A whole run: checks first, then process groups, then the trainer."""

import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..config.run import RunConfig
from ..mcore.quiet import quiet_megatron
from .hosts import choose_interface
from .lost import lost_rank
from .memory import describe, predict_run_memory
from .printing import Printer
from .progress import Progress, make_progress
from .setup import Prepared, prepare
from .signals import EXIT_STOPPED, StopRequest

if TYPE_CHECKING:
    from ..mcore.parallel import Groups
    from .trainer import Trainer

EXIT_UNSAVED = 73
"""Exit status where a job's last adapter, or the state at a stop, could not be written (EX_CANTCREAT of sysexits.h)."""
EXIT_LOST = 1
"""Exit status where another rank does not answer; nothing is saved, since that takes all ranks."""


def train_run(run: RunConfig) -> int:
    """Train all jobs of a run on this rank.

    Returns:
        0 when every job ended; `signals.EXIT_STOPPED` where a signal ended the run after its state was saved;
        `EXIT_LOST` where another rank was lost; `EXIT_UNSAVED` where a last adapter, or the state at a stop, could not
        be written.

    Raises:
        UserError: the run can't start as it is; no process group was made and nothing was written.
    """
    quiet_megatron()
    prepared = prepare(run)
    from ..mcore import parallel
    from .trainer import Trainer

    if prepared.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    interface = choose_interface()
    stop = StopRequest()
    groups = _join(prepared)
    if groups is None:
        stop.restore()
        return EXIT_LOST
    progress = make_progress(
        is_first=groups.is_first, log_interval=run.logger.log_interval, log_format=run.logger.log_format
    )
    failed = True
    try:
        progress.note(
            f"{len(run.jobs)} jobs on {prepared.device}: {prepared.transformer_impl} layers "
            f"({prepared.transformer_reason}), {prepared.backend.name} adapters"
        )
        for note in (*prepared.notes, *([interface] if interface else [])):
            progress.note(note)
        trainer = Trainer(prepared, groups, progress, stop)
        done = trainer.train()
        # Launchers end the other ranks when one has left: none leaves before rank 0 has written everything.
        groups.broadcast(None)
        _note_memory(prepared, groups, progress)
        failed = False
        who = f"by {stop.signal.name}" if stop.signal is not None else "on another rank's signal"
        if note_end(trainer, who, progress, done=done):
            return EXIT_UNSAVED
    except (RuntimeError, ConnectionError) as error:
        reason = lost_rank(error)
        if isinstance(error, BrokenPipeError) and reason is None:
            # A command whose stdout breaks ends with 0; this run is not done, and no line of it raises.
            raise RuntimeError("a pipe broke") from error
        if reason is None:
            raise
        _tell_lost(reason)
        return EXIT_LOST
    finally:
        progress.close()
        parallel.stop(failed=failed)
        stop.restore()
    return 0 if done else EXIT_STOPPED


def note_end(trainer: "Trainer", who: str, progress: Progress, *, done: bool) -> bool:
    """Say how to go on where something is left to do.

    Args:
        trainer: which has ended.
        who: what stopped it, where it was stopped.
        progress: where it is said.
        done: whether every job ended.

    Returns:
        Whether a last adapter, or the state at a stop, could not be written: the run ends with `EXIT_UNSAVED` then.
    """
    if not done:
        if trainer.unsaved_state:
            kept = trainer.writer.last_state or "no checkpoint"
            progress.note(
                f"stopped {who}; the state could NOT be saved, for the reason told above: mend that and start the same "
                f"command again, which goes on from {kept}"
            )
        else:
            progress.note(f"stopped {who}; the state is saved: start the same command again to go on")
    if trainer.unsaved:
        progress.note(
            f"the last adapters of {', '.join(trainer.unsaved)} could not be saved, for the reason told above: mend "
            "that and start the same command again"
        )
    return bool(trainer.unsaved) or (trainer.unsaved_state and not done)


def _join(prepared: Prepared) -> "Groups | None":
    """Meet the other ranks; None, and told, where one does not come."""
    from ..mcore import parallel

    try:
        return parallel.start(
            prepared.topology,
            device=prepared.device,
            seed=prepared.run.runtime.seed,
            timeout_minutes=prepared.run.runtime.distributed_timeout_minutes,
        )
    except RuntimeError as error:
        reason = lost_rank(error)
        if reason is None:
            raise
        _tell_lost(reason)
        return None


def _tell_lost(reason: str) -> None:
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    Printer(sys.stderr).line(
        f"lorafusion-megatron: rank {rank} on {host} lost another rank, or the network to it ({reason}); "
        "start the same command again to go on from the last checkpoint"
    )


def _note_memory(prepared: Prepared, groups: Any, progress: Progress) -> None:
    """Say how much memory each stage took at most, beside what was predicted; every rank of a GPU run calls it."""
    if prepared.device != "cuda":
        return
    everyone = groups.gather((groups.pp_rank, torch.cuda.max_memory_allocated()))
    if everyone is not None:
        predicted = predict_run_memory(prepared.run, prepared.spec, prepared.layers_per_chunk)
        measured = {stage: max(size for other, size in everyone if other == stage) for stage, _ in everyone}
        for line in describe(predicted, measured).splitlines():
            progress.note(f"memory, {line}")
