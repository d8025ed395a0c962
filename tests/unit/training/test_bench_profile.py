"""What the benchmark's profile counts."""

from types import SimpleNamespace

from torch.autograd import DeviceType

from lorafusion_megatron.training.bench.profile import KernelTimes, covered, describe, on_device


def test_overlapping_kernels_count_once():
    assert covered([(0.0, 10.0), (2.0, 4.0), (8.0, 12.0), (20.0, 21.0)]) == 13.0
    assert covered([]) == 0.0


def test_the_longest_kernels_come_first():
    times = KernelTimes(milliseconds={"a": 1.0, "b": 3.0}, calls={"a": 7, "b": 2}, busy=3.5, span=5.0, host={"op": 2.0})
    lines = describe(times, most=1).splitlines()
    assert lines[0] == "kernels ran in 3.5 of 5.0 ms; their times sum to 4.0 ms"
    assert lines[1].split() == ["3.00", "ms", "2", "x", "b"]
    assert len(lines) == 3


def test_ranges_that_span_kernels_are_not_counted_with_them():
    def event(name, device=DeviceType.CUDA, *, annotation=False, time=1.0):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, device_time=time)

    events = [event("kernel"), event("Optimizer.step", annotation=True), event("op", DeviceType.CPU)]
    assert [e.name for e in on_device([*events, event("empty", time=0.0)])] == ["kernel"]
