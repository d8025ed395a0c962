"""A run of jobs inside Megatron's training loop: what stands in for its data, its step, its log and its checkpoints."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import NumMicroBatchesCalculator

from ...mcore import cpu_compat, parallel
from ...training.progress import make_progress
from ...training.rack import InjectedModel
from ...training.run import EXIT_UNSAVED, note_end
from ...training.setup import Prepared
from ...training.trainer import Trainer
from .base import take_over
from .checkpoint import Counts, Found, agree, find_checkpoint, write_checkpoint
from .entry import one_line_errors
from .options import without_effect
from .patches import Patches, local_layers, training_loop
from .watch import WatchedProgress

TAG = "job/{}/loss"
"""Name of a job's loss in Megatron's log line, in its TensorBoard and in its W&B."""


class WindowMicrobatches(NumMicroBatchesCalculator):
    """Megatron's number of microbatches: that of the window just run, and one between two iterations.

    Megatron's loop demands that the number never falls from one iteration's start to the next's; `update` is what
    it calls there.
    """

    def __init__(self, data_parallel_size: int) -> None:
        super().__init__()
        self._replicas = data_parallel_size
        self.micro_batch_size = 1
        self.set(1)

    def set(self, num_microbatches: int) -> None:
        """Take the number of a window."""
        self.num_micro_batches = num_microbatches
        self.current_global_batch_size = self.current_running_global_batch_size = num_microbatches * self._replicas

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """An iteration begins."""
        self.set(1)


class MegatronStop:
    """A stop that Megatron's ``--exit-signal-handler`` asks this rank for; without it there is none."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    def wished(self) -> bool:
        """Whether this rank got the signal; Megatron's own question asks all ranks at once."""
        if not self._args.exit_signal_handler:
            return False
        from megatron.training import get_signal_handler

        return bool(get_signal_handler()._signal_received)


class Session:
    """One enabled run on this rank.

    Args:
        args: Megatron's arguments, which it changes where the run file decides.
        prepared: the checked run.
    """

    def __init__(self, args: Namespace, prepared: Prepared) -> None:
        self.args, self.prepared = args, prepared
        self.microbatches = WindowMicrobatches(prepared.topology.data_parallel)
        self.trainer: Trainer | None = None
        self._progress: WatchedProgress | None = None
        self._patches = Patches()
        self._checkpoint: Found | None = None
        self._finished = False
        self._unsaved = False
        """Whether the run ended without a last adapter, or without the state at a stop."""
        self._save_failed = False
        """Whether the newest checkpoint under ``--save`` could not be written."""

    def open(self) -> None:
        """Put everything in place."""
        self._checkpoint = find_checkpoint(self.args)
        _take_over_arguments(self.args, self.prepared)
        if self.prepared.device == "cpu":
            from . import cpu

            cpu_compat.install()
            self._patches.install(cpu.patches())
        if self.args.transformer_impl == "local":
            self._patches.install(local_layers())
        self._patches.install(training_loop(self))

    def close(self) -> None:
        """Put Megatron back as it was."""
        self._patches.remove()
        if self.prepared.device == "cpu":
            from . import cpu

            cpu_compat.uninstall()
            cpu.restore_validation()

    def wrapping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's DDP wrapper, with the base taken over before it."""

        def wrap(chunks: Sequence[torch.nn.Module], *rest: Any, **named: Any) -> Any:
            """All ranks' first call with their models: they agree where to begin, and the jobs are set up."""
            on_gpu = self.prepared.device == "cuda"
            device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
            groups = parallel.join(device=device, timeout_minutes=self.args.distributed_timeout_minutes)
            with one_line_errors():
                agree(self._checkpoint, groups)
                self.prepared, targets = take_over(chunks, self.prepared, groups)
                wrapped = original(chunks, *rest, **named)
                self._begin(InjectedModel(chunks=wrapped, targets=targets), groups)
            return wrapped

        return wrap

    def _begin(self, model: InjectedModel, groups: parallel.Groups) -> None:
        logger = self.prepared.run.logger
        self._progress = WatchedProgress(
            make_progress(is_first=groups.is_first, log_interval=logger.log_interval, log_format=logger.log_format)
        )
        self._progress.note(
            f"{len(self.prepared.run.jobs)} jobs on {self.prepared.device}: {self.args.transformer_impl} layers, "
            f"{self.prepared.backend.name} adapters"
        )
        if idle := without_effect(sys.argv[1:]):
            self._progress.note(f"the run file decides, not {', '.join(idle)}")
        for note in self.prepared.notes:
            self._progress.note(note)
        self.trainer = Trainer(
            self.prepared,
            groups,
            self._progress,
            MegatronStop(self.args),
            model=model,
            resume_from=self._checkpoint.folder if self._checkpoint else None,
        )

    def data_iterators(self, provider: Any) -> tuple[None, None, None]:
        """No iterators of Megatron's: a window makes its own. From here on it is known what is left to train."""
        self.args.do_train, self.args.do_valid, self.args.do_test = True, False, False
        trainer = self._running()
        if not trainer.next_window.windows_left():
            trainer.settle()  # a last validation that a stop kept from being made, jobs that want to join
        if trainer.stopped:
            self.args.train_iters = self.args.iteration  # nothing is left to Megatron's loop, which would leave
            self._finish(complete=False)
            return None, None, None
        self._set_iterations(self.args.iteration)
        if not trainer.next_window.windows_left():
            trainer.progress.note("every job has ended already")
            self._finish(complete=True)
        return None, None, None

    def train_step(
        self,
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        config: Any,
        forward_backward_func: Any,
        iteration: int = 0,
        **_: Any,
    ) -> tuple[dict[str, torch.Tensor], int, bool, bool, int, None, None, None]:
        """Plan a window and run it through Megatron's schedule; the jobs' optimizers step on the way.

        The script's forward step and iterator are not called: data, routing and loss are the jobs'.
        """
        trainer = self._running()
        config.grad_scale_func = None  # set by the loop for loss scaling; here the losses carry their weights
        before = {index: job.applied for index, job in trainer.jobs.items()}
        trainer.advance()
        while not trainer.stopped and not trainer.next_window.windows_left() and trainer.advance():
            pass  # jobs that joined at the end of the last window
        self.microbatches.set(self._watched().num_microbatches)
        self._set_iterations(iteration + 1)
        losses = {
            TAG.format(job.name): torch.tensor([job.losses[-1]], device=trainer.groups.device)
            for index, job in trainer.jobs.items()
            if job.applied > before.get(index, 0)
        }
        if not trainer.stopped and not trainer.next_window.windows_left():
            self._finish(complete=True)
        return losses, 0, False, False, 0, None, None, None

    def logging(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's log without the losses of jobs that had no step since its last line (it would say 0)."""

        def log(loss_dict: dict[str, Any], total_loss_dict: dict[str, Any], *rest: Any, **named: Any) -> Any:
            for tag in [tag for tag in total_loss_dict if tag.startswith("job/") and tag not in loss_dict]:
                del total_loss_dict[tag]
            return original(loss_dict, total_loss_dict, *rest, **named)

        return log

    def window_tokens(self) -> tuple[float, float]:
        """(tokens, sum of squared lengths) of the window over all replicas, for Megatron's throughput."""
        return self._watched().tokens, self._watched().squares

    def deciding_exit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ways out of its loop (a signal, a time, an iteration): the run ends with it."""

        def decide(*rest: Any, **named: Any) -> Any:
            leaves = original(*rest, **named)
            if leaves:
                self._finish(complete=False)
            return leaves

        return decide

    def save_checkpoint(
        self,
        iteration: int,
        model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        num_floating_point_operations_so_far: float,
        *_: Any,
        **__: Any,
    ) -> None:
        """The jobs' state under ``--save``; every rank calls it, and knows whether it is there."""
        trainer, saved = self._running(), True
        state = trainer.writer.last_state if self._finished else trainer.checkpoint()
        counts = Counts(
            iteration=iteration,
            consumed_train_samples=self.args.consumed_train_samples,
            num_floating_point_operations_so_far=num_floating_point_operations_so_far,
        )
        if trainer.writer.state_failed:
            trainer.progress.note(f"iteration {iteration} is not saved, since the jobs' state could not be written")
            saved = False
        elif trainer.groups.is_first and state is not None:
            saved = write_checkpoint(self.args.save, Path(state), counts, trainer.progress.note)
        self._save_failed = not trainer.groups.broadcast(saved)

    def load_checkpoint(self, *_: Any, **__: Any) -> tuple[int, float]:
        """(iteration, floating-point operations) of the checkpoint that the trainer began from, or zeros."""
        if self._checkpoint is None:
            resumed = self._running().writer.last_state
            go_on = f"go on from {resumed}, and iterations count from 0" if resumed else "begin afresh"
            self._running().progress.note(f"no checkpoint under {self.args.load}: the jobs {go_on}")
            return 0, 0
        counts = self._checkpoint.counts
        self.args.consumed_train_samples = counts.consumed_train_samples
        return counts.iteration, counts.num_floating_point_operations_so_far

    def leaving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's last call, after its last save: where something could not be saved the exit status says so."""

        def leave(*rest: Any, **named: Any) -> Any:
            result = original(*rest, **named)
            if self._unsaved or self._save_failed:
                sys.exit(EXIT_UNSAVED)
            return result

        return leave

    def _finish(self, *, complete: bool) -> None:
        if self._finished:
            return
        trainer = self._running()
        trainer.finish(complete=complete)
        who = "by a signal" if trainer.stopped else "by an exit option of Megatron's"
        self._unsaved = note_end(trainer, who, trainer.progress, done=complete)
        trainer.progress.close()
        self._finished = True

    def _set_iterations(self, done: int) -> None:
        """Megatron's number of iterations: those done and the windows that are left as far as is known now."""
        self.args.train_iters = done + self._running().next_window.windows_left()

    def _running(self) -> Trainer:
        assert self.trainer is not None, "the model was not wrapped: pretrain(...) must build it"
        return self.trainer

    def _watched(self) -> WatchedProgress:
        assert self._progress is not None
        return self._progress


def _take_over_arguments(args: Namespace, prepared: Prepared) -> None:
    """Set what the run file decides, and what a frozen base asks for."""
    args.train_iters, args.train_samples = 1, None
    args.lr_decay_iters = args.lr_decay_samples = args.lr_warmup_fraction = None
    args.lr_warmup_iters = args.lr_warmup_samples = 0
    args.lr, args.min_lr = args.lr or 0.0, 0.0
    args.micro_batch_size, args.global_batch_size = 1, prepared.topology.data_parallel
    args.eval_iters, args.eval_interval, args.full_validation = 0, None, False
    args.gradient_accumulation_fusion = False  # it would read main_grad of frozen weights
    args.freeze_all_layers = True
    args.dataloader_type = "external"
    if prepared.transformer_impl == "local":
        args.transformer_impl = "local"
        args.apply_rope_fusion = args.persist_layer_norm = args.masked_softmax_fusion = False
    if prepared.device == "cpu":
        args.distributed_backend, args.use_cpu_initialization = "gloo", True
        args.bias_swiglu_fusion = args.bias_dropout_fusion = args.bias_gelu_fusion = False
