"""Starts the ranks of a run as torchrun does, but from a process that has imported everything once.

A Python process takes about 8 s of one core to import torch, Megatron and Transformers. Here one fork server imports
them, and each rank is a fork of it: fresh, isolated, able to crash or to be killed, and up in milliseconds.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["tests.preload"]
PATIENCE = 4.0 if torch.cuda.is_available() else 1.0
"""Factor of all time-outs: on a GPU every rank imports everything anew and may compile kernels."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Ranks that have ended."""

    statuses: tuple[int, ...]
    """Exit status by rank; minus the signal's number where one ended it."""
    outputs: tuple[str, ...]
    """What each rank wrote to stdout and stderr."""
    seconds: float

    def check(self) -> "Finished":
        """Raise with the output of the ranks that failed."""
        if any(self.statuses):
            tails = [f"rank {i} ended with {s}:\n{self.outputs[i][-3000:]}" for i, s in enumerate(self.statuses) if s]
            raise AssertionError("\n".join(tails))
        return self


class Ranks:
    """Running ranks of one run.

    Args:
        target: what each rank calls; a function of a module, so that it can be named to another process.
        arguments: its arguments; the returned integer is the exit status.
        world: number of ranks.
        folder: where the ranks' output is kept.
        environment: added to each rank's environment.
    """

    def __init__(
        self,
        target: Callable[..., int | None],
        arguments: Sequence[Any] = (),
        *,
        world: int,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # An import may use CUDA, and no fork of a process that did so can: on a GPU machine every rank starts anew.
        context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload(PRELOAD)
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self._started = time.monotonic()
        self._logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self._logs):
            log.touch()  # a test may look into it before the rank is up
            settings = ONE_THREAD | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            settings |= environment or {}
            process = context.Process(target=_rank, args=(target, tuple(arguments), settings, str(log)), daemon=True)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120.0) -> Finished:
        """Wait for all ranks; a rank that hangs fails the test, and none is left behind.

        As under torchrun, the others are ended where one fails; they get five seconds to end by themselves first.
        """
        timeout *= PATIENCE
        deadline = time.monotonic() + timeout
        failed = False
        while alive := [process for process in self.processes if process.is_alive()]:
            if not failed and any(process.exitcode for process in self.processes):
                failed, deadline = True, min(deadline, time.monotonic() + 5.0)
            if time.monotonic() > deadline:
                break
            alive[0].join(0.05)
        for process in alive:
            process.kill()
            process.join()
        finished = Finished(
            statuses=tuple(int(process.exitcode or 0) for process in self.processes),
            outputs=tuple(log.read_text(errors="replace") if log.exists() else "" for log in self._logs),
            seconds=time.monotonic() - self._started,
        )
        if alive and not failed:
            tails = "\n".join(f"rank {i}:\n{text[-1500:]}" for i, text in enumerate(finished.outputs))
            raise TimeoutError(f"ranks still ran after {timeout:.0f} s\n{tails}")
        return finished


def train(
    run_file: Path | str,
    *overrides: str,
    world: int = 1,
    timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """``torchrun --nproc-per-node WORLD -m lorafusion_megatron.train RUN_FILE OVERRIDES``, to its good end."""
    save = next((word.split("=", 1)[1] for word in overrides if word.startswith("checkpoint.save=")), None)
    folder = Path(save) if save else Path(run_file).parent
    ranks = Ranks(
        command,
        (["train", str(run_file), *overrides],),
        world=world,
        folder=folder.with_name(f"{folder.name}.logs"),
        environment=environment,
    )
    return ranks.wait(timeout).check()


def command(words: list[str]) -> int:
    """The command line of the package, in a rank."""
    from lorafusion_megatron.cli.main import main

    return main(words)


def train_in_turn(runs: list[list[str]]) -> int:
    """Several runs one after the other in the same process, each with its own process groups."""
    return next((status for words in runs if (status := command(["train", *words]))), 0)


def _rank(target: Callable[..., int | None], arguments: tuple[Any, ...], settings: dict[str, str], log: str) -> None:
    """Body of a rank's process."""
    os.environ.update(settings)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        status = target(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
