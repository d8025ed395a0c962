"""Which way a product runs on this GPU: a traffic model narrows the candidates, a short measurement chooses.

The choice is kept on disk per GPU, torch, Triton and source of the kernels, so a machine measures a shape once. No
list of GPU names anywhere: an unknown GPU is measured like any other. Where the disk can't be used, choices stay in
memory and the next process measures again.
"""

import contextlib
import hashlib
import json
import os
import statistics
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton

HOPPER, FUSED, EXPAND = "hopper", "fused", "expand"
"""`product_hopper`, `product`, and cuBLAS for the frozen product, then the adapter's part added in place."""
OPERATIONS_PER_BYTE = 266
"""Operations that the matrix units do in the time the memory moves a byte; 266 on an H100, 160 to 330 on its kin."""
HELD_BACK = 10_000_000
"""Clock cycles that the GPU waits before timed runs, 5 to 10 ms: all are queued by then, so no figure holds the time
that the host takes to launch them."""
ROUNDS, WARM_ROUNDS = 14, 3
"""Rounds in which every candidate runs once, and how many of them don't count."""
GROUPS = (8, 4, 16)
"""Row blocks side by side; which is faster depends on what fits the L2 beside the columns of W."""


@dataclass(frozen=True)
class Way:
    """A way to compute a product."""

    kind: str
    group: int = 0
    """Row blocks side by side, of the first two kinds."""

    @property
    def name(self) -> str:
        """In the file of choices."""
        return f"{self.kind} {self.group}" if self.group else self.kind


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One product to choose for."""

    tokens: int
    """Rounded up to a power of two: microbatches of about one size share a choice."""
    inner: int
    width: int
    columns: int
    """Columns of S, rounded up to 16."""
    forward: bool
    drop: bool
    dtype: str


def expand_is_hopeless(problem: Problem) -> bool:
    """Whether reading and writing the output once more costs over a quarter of the frozen product.

    Note: the fused product was never measured to lose more than 12 percent to cuBLAS, so beyond a quarter a
    measurement can only waste its time. The product does ``inner / 2`` operations for each byte of that traffic.
    """
    return OPERATIONS_PER_BYTE / (problem.inner / 2) > 0.25


class Tuner:
    """Chooses among candidates by measuring them once.

    Args:
        path: file of the choices among all ways; None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._unsaved: dict[str, str] = {}
        """Choices of this process that are not on disk yet."""
        self._warned = False
        self._choices = self._saved()

    def known(self, problem: Problem) -> str | None:
        """Name of the choice for a problem, None where it was not measured yet."""
        return self._choices.get(_name(problem))

    def measure(self, problem: Problem, candidates: Mapping[str, Callable[[], object]]) -> str:
        """Run all candidates in turn a few times, remember the fastest and return its name.

        Args:
            problem: what the choice is for.
            candidates: name -> function that launches it; what the device has no room for is out.
        """
        runs = {}
        for name, run in candidates.items():  # compiles
            try:
                run()
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
                continue
            runs[name] = run
        times = _median_ms(runs) if runs else {EXPAND: 0.0}
        choice = min(times, key=times.__getitem__)
        self._choices[_name(problem)] = self._unsaved[_name(problem)] = choice
        self._save()
        return choice

    def _saved(self) -> dict[str, str]:
        """The file's choices; none where there is no file or a crash cut it off, and they are measured again."""
        try:
            saved = json.loads(self.path.read_text()) if self.path is not None else {}
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            self._warn(error)
            return {}
        return saved if isinstance(saved, dict) else {}

    def _save(self) -> None:
        if self.path is None:
            return
        # Ranks of all machines that share a home write side by side: each keeps what others have added and replaces
        # the file whole. What is lost between the two is measured again. Not mkstemp's 0600: users may share a cache.
        temporary = self.path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._saved() | self._unsaved, indent=1, sort_keys=True))
            temporary.replace(self.path)
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):
                temporary.unlink()
        else:
            self._unsaved.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(f"choices of products stay in memory: {error}", stacklevel=2)
        self._warned = True


def cache_path(device: torch.device) -> Path | None:
    """File of this device's choices: under ``LORAFUSION_CACHE``, or the user's cache folder; None without a home."""
    folder = _cache_folder()
    if folder is None:
        return None
    source = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    properties = torch.cuda.get_device_properties(device)
    identity = (properties.name, properties.multi_processor_count, torch.__version__, triton.__version__)
    digest = hashlib.sha256(repr(identity).encode() + source).hexdigest()[:16]
    return folder / f"products-{digest}.json"


def _cache_folder() -> Path | None:
    if root := os.environ.get("LORAFUSION_CACHE"):
        return Path(root)
    try:
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without an entry in the password file, as in some containers
        warnings.warn(f"choices of products stay in memory: {error} LORAFUSION_CACHE names a folder", stacklevel=2)
        return None
    return Path(cache_home) / "lorafusion_megatron"


@cache
def _name(problem: Problem) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(problem).items())


def _median_ms(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, all queued while the GPU is held back.

    Note: in turn, round after round. The clock rises from idle and falls again under a load that reaches the power
    limit; one candidate after another was measured at different clocks, and choices were up to 5 % slower than the
    best.
    """
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    # This stream alone: another one may hold a reduction that ends only when this rank's host goes on.
    stream = torch.cuda.current_stream()
    stream.synchronize()
    torch.cuda._sleep(HELD_BACK)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            times[name].append((start, end))
    stream.synchronize()
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in pairs[WARM_ROUNDS:])
        for name, pairs in times.items()
    }
