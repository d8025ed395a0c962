"""What the benchmarks share: CUDA-graph replays interleaved in one process, a description of the machine, tables."""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

FLUSH_BYTES = 256 << 20
"""More than any L2: written before each timed replay, so that every one starts cold."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One implementation of one case."""

    name: str
    forward: Callable[[], torch.Tensor]
    inputs: Sequence[torch.Tensor]
    """What the backward computes gradients of; gradients of adapters that go elsewhere are not among them."""


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every benchmark."""
    parser.add_argument("--repeats", type=int, default=20, help="timed replays of each implementation (median)")
    parser.add_argument("--json", metavar="FILE", help="write a row per case")
    parser.add_argument("--plot", metavar="PNG", help="write a bar chart")


def require_gpu() -> None:
    """Stop with one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError(
            "no GPU is visible", rule="benchmarks measure kernels on a GPU", remedy="run on a machine that has one"
        )


def numbers(text: str, kind: type = int, *, key: str) -> list[Any]:
    """A list of numbers given as ``1,2,3``."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"{text!r}", rule="must be numbers with commas between", remedy="e.g. 1,4,32", key=key
        ) from None


def machine() -> dict[str, str]:
    """Name of the GPU, its clock now and at most, driver and versions."""
    import triton

    out = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    fields = ("clocks.sm", "clocks.max.sm", "driver_version")
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split(",")
        out |= dict(zip(fields, (value.strip() for value in values), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        out["clocks.sm"] = "unknown"
    return out


def measure(
    candidates: Sequence[Candidate], upstream: torch.Tensor, *, repeats: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Median milliseconds of the forward and of forward and backward.

    Args:
        candidates: implementations of one case.
        upstream: gradient of the output.
        repeats: timed replays.

    Returns:
        name -> [forward ms, forward+backward ms], and name -> reason of those that failed.

    Note: replays of all implementations alternate, so that clocks and temperature favour none.
    """
    graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
    failed: dict[str, str] = {}
    for candidate in candidates:
        try:
            for which, run in enumerate(_runs(candidate, upstream)):
                graphs[candidate.name, which] = _captured(run)
        except Exception as error:  # whatever a foreign implementation raises is its result
            failed[candidate.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            graphs.pop((candidate.name, 0), None)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[tuple[str, int], list[float]] = {key: [] for key in graphs}
    for repeat in range(repeats + 3):
        for key, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[key].append(start.elapsed_time(end))
    names = [candidate.name for candidate in candidates if candidate.name not in failed]
    return {name: [round(statistics.median(times[name, which]), 4) for which in (0, 1)] for name in names}, failed


def host_microseconds(candidates: Sequence[Candidate], upstream: torch.Tensor, *, calls: int = 100) -> dict[str, float]:
    """Microseconds that the host needs for one forward and backward: the time of a call where the GPU has little to do.

    Args:
        candidates: implementations of one case of few tokens.
        upstream: gradient of the output.
        calls: how many are timed, without waiting in between.
    """
    out = {}
    for candidate in candidates:
        _, run = _runs(candidate, upstream)
        for _ in range(10):
            run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        out[candidate.name] = round((time.perf_counter() - started) / calls * 1e6, 1)
    return out


def _runs(candidate: Candidate, upstream: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    def forward() -> None:
        with torch.no_grad():
            candidate.forward()

    def both() -> None:
        torch.autograd.grad(candidate.forward(), candidate.inputs, upstream)

    return forward, both


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], keys: Sequence[str]) -> str:
    """Rows as text: the case, then forward / forward+backward milliseconds and the ratio to frozen."""
    head = [*keys, *names]
    lines = [head]
    for row in rows:
        cells = [str(row[key]) for key in keys]
        for name in names:
            if name in row:
                forward, both = row[name]
                cells.append(f"{forward:.3f} {both:.3f} x{both / row['frozen'][1]:.3f}")
            else:
                cells.append("-")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_json(path: str | None, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """``{"machine": …, "rows": [...]}``; nothing without a path."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")


def bar_chart(
    path: str | None, title: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str], keys: Sequence[str]
) -> None:
    """Forward+backward over frozen, a group of bars per case; nothing without a path."""
    if not path:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError(
            "matplotlib is not installed", rule="--plot draws with it", remedy="pip install matplotlib", key="--plot"
        ) from None
    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.6 * len(rows)), 4.5), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        heights = [row[name][1] / row["frozen"][1] if name in row else 0.0 for row in rows]
        bars = axes.bar([i + place * width for i in range(len(rows))], heights, width, label=name)
        axes.bar_label(
            bars, [f"{height:.2f}" if height else "" for height in heights], fontsize=7, rotation=90, padding=2
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = ["\n".join(f"{key} {row[key]}" for key in keys) for row in rows]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(rows))], labels, fontsize=7)
    axes.set_ylabel("forward + backward, frozen linear = 1")
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, ncols=len(names))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
