"""Where the GPU's time goes in one run of a variant: its kernels by total time, and how much of the run they fill."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType


@dataclass(frozen=True, kw_only=True)
class KernelTimes:
    """The kernels of one rank's run."""

    milliseconds: Mapping[str, float]
    """Kernel -> its runs' total. Kernels of several streams overlap, so the sum may exceed `busy`."""
    calls: Mapping[str, int]
    busy: float
    """Milliseconds in which at least one kernel ran."""
    span: float
    """Milliseconds from the first kernel's start to the last one's end."""
    host: Mapping[str, float] = field(default_factory=dict)
    """Operation -> milliseconds of the processor, its own alone."""


def profile_kernels(run: Callable[[], None]) -> KernelTimes:
    """Run once under PyTorch's profiler.

    Args:
        run: what to look at; it ends with the device idle.

    Note: the profiler lengthens launches; `busy` and the kernels' own times are those of an undisturbed run.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = on_device(profiler.events())
    milliseconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in kernels:
        milliseconds[event.name] = milliseconds.get(event.name, 0.0) + event.device_time / 1e3
        calls[event.name] = calls.get(event.name, 0) + 1
    spans = sorted((e.time_range.start, e.time_range.end) for e in kernels)
    host = {e.key: e.self_cpu_time_total / 1e3 for e in profiler.key_averages() if e.self_cpu_time_total > 0}
    return KernelTimes(
        milliseconds=milliseconds,
        calls=calls,
        busy=covered(spans) / 1e3,
        span=(max(stop for _, stop in spans) - spans[0][0]) / 1e3 if spans else 0.0,
        host=host,
    )


def on_device(events: Iterable[Any]) -> list[Any]:
    """The profiler's events that are kernels and copies: not the ranges that ``record_function`` names around them."""
    return [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation and e.device_time > 0]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def describe(times: KernelTimes, *, most: int = 30) -> str:
    """The kernels and operations of most time, for people."""
    lines = [f"kernels ran in {times.busy:.1f} of {times.span:.1f} ms; their times sum to "
             f"{sum(times.milliseconds.values()):.1f} ms"]  # fmt: skip
    ranked = sorted(times.milliseconds.items(), key=lambda item: -item[1])
    lines += [f"{value:9.2f} ms {times.calls[name]:6} x  {name[:110]}" for name, value in ranked[:most]]
    hosts = sorted(times.host.items(), key=lambda item: -item[1])
    lines += ["processor time"] + [f"{value:9.2f} ms           {name[:90]}" for name, value in hosts[: most // 2]]
    return "\n".join(lines)
