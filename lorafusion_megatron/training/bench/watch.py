"""A GPU's clock and power while something runs: what a benchmark's figures depend on beside the code."""

import contextlib
import statistics
import subprocess
from types import TracebackType
from typing import NamedTuple

import torch

MILLISECONDS = 200
"""Between two readings."""


class Reading(NamedTuple):
    """Medians over a run."""

    clock_mhz: float
    """Of the multiprocessors."""
    watts: float
    """Of the whole card."""


class Watch:
    """Context manager that asks ``nvidia-smi`` a few times a second.

    Args:
        device: the GPU; another device, or None, is not watched.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._command: list[str] = []
        if device is not None and device.type == "cuda":
            # By its own name: CUDA_VISIBLE_DEVICES numbers GPUs otherwise than nvidia-smi.
            uuid = torch.cuda.get_device_properties(device).uuid
            query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
            self._command = ["nvidia-smi", f"--id=GPU-{uuid}", *query, f"--loop-ms={MILLISECONDS}"]
        self._process: subprocess.Popen[str] | None = None
        self.reading: Reading | None = None
        """Once the context is left; None where there was nothing to read."""

    def __enter__(self) -> "Watch":
        if self._command:
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                assert self._process.stdout is not None
                self._process.stdout.readline()  # it takes a while to start; the reading before the run doesn't count
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        lines = self._process.communicate()[0].splitlines()
        readings = []
        for line in lines:
            with contextlib.suppress(ValueError):  # "[N/A]", or a line that was cut off
                clock, power = map(float, line.split(","))
                readings.append((clock, power))
        if readings:
            self.reading = Reading(*map(statistics.median, zip(*readings, strict=True)))
