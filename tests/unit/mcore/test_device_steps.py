"""Steps that are decided on the device do what steps that are decided on the host do."""

from types import SimpleNamespace

import pytest
import torch

from lorafusion_megatron.mcore.device_steps import DeviceSteps
from lorafusion_megatron.mcore.steps import AdapterSteps, StepRule

GROUPS = SimpleNamespace(tp_size=1, tp_rank=0, dp_size=1, pp_size=1, device=torch.device("cpu"))


class _Shard:
    """Flat buffers of 40 parameters, rounded to bf16 for the linears."""

    def __init__(self) -> None:
        self.master = torch.linspace(-1, 1, 40)
        self.params = self.master.bfloat16()
        self.grad = torch.zeros(41)
        self.num_replicated = 8

    numel = property(lambda self: self.master.numel())
    loss = property(lambda self: self.grad[-1])

    def refresh(self) -> None:
        self.params.copy_(self.master)


def _rule(**changes) -> StepRule:
    values = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.01, "clip_grad": 0.5, "max_bad_steps": 3}
    return StepRule(lr_at=lambda step: 1e-2 / step, **values | changes)


def _run(kind, gradients, rule):
    steps = kind(0, _Shard(), rule, GROUPS)
    reports = []
    for number, gradient in enumerate(gradients, 1):
        steps.shard.grad[:-1] += gradient
        steps.shard.loss.add_(float(number))
        steps.end_step(number)
        assert steps.pending
        assert steps.ready
        reports.append(steps.apply())
        assert not steps.pending
        assert not steps.shard.grad.any()
    if kind is DeviceSteps:
        assert reports == [None] * len(gradients)
        reports = steps.reports(wait=True)
    return steps, reports


def _gradients(bad=()):
    torch.manual_seed(1)
    out = [torch.randn(40) * 10.0 ** (i % 4 - 2) for i in range(12)]
    for index, value in bad:
        out[index][3] = value
    return out


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_masters_and_reports_are_those_of_the_host(clip):
    host, device = (_run(kind, _gradients(), _rule(clip_grad=clip)) for kind in (AdapterSteps, DeviceSteps))
    torch.testing.assert_close(device[0].shard.master, host[0].shard.master, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(device[0].shard.params, host[0].shard.params)
    assert [r.step for r in device[1]] == [r.step for r in host[1]]
    for got, want in zip(device[1], host[1], strict=True):
        assert (got.loss, got.lr, got.skipped) == (want.loss, want.lr, want.skipped)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-12)
    assert device[0].counters == host[0].counters


def test_a_gradient_that_is_not_finite_changes_nothing_and_the_next_step_goes_on():
    bad = [(2, float("inf")), (5, float("nan"))]
    host, device = (_run(kind, _gradients(bad), _rule()) for kind in (AdapterSteps, DeviceSteps))
    assert [r.skipped for r in device[1]] == [i in (2, 5) for i in range(12)]
    torch.testing.assert_close(device[0].shard.master, host[0].shard.master, rtol=1e-6, atol=1e-7)
    assert device[0].counters == host[0].counters
    assert device[0].counters.optimizer_steps == 10


def test_a_job_stops_after_its_last_bad_step_at_the_same_step_as_on_the_host():
    bad = [(i, float("inf")) for i in (4, 5, 6)]
    host, device = (_run(kind, _gradients(bad), _rule()) for kind in (AdapterSteps, DeviceSteps))
    assert [r.skipped for r in device[1]] == [r.skipped for r in host[1]] == [False] * 4 + [True] * 8
    assert device[0].counters == host[0].counters
    assert device[0].stopped
    torch.testing.assert_close(device[0].shard.master, host[0].shard.master, rtol=1e-6, atol=1e-7)


def test_a_snapshot_hands_reports_on_before_it_is_made():
    """A step's loss is written with the adapter that the step left."""
    steps = DeviceSteps(0, _Shard(), _rule(), GROUPS)
    told = []
    steps.deliver = told.append
    steps.shard.grad[0] = 1.0
    steps.end_step(1)
    steps.apply()
    snapshot = steps.snapshot()
    assert [report.step for report in told] == [1]
    assert snapshot.counters.applied == snapshot.counters.optimizer_steps == 1
    assert steps.reports(wait=True) == []


def test_a_restored_job_goes_on_as_if_it_had_never_stopped():
    gradients = _gradients()
    whole, _ = _run(DeviceSteps, gradients, _rule())
    first, _ = _run(DeviceSteps, gradients[:5], _rule())
    snapshot = first.snapshot()
    second = DeviceSteps(0, _Shard(), _rule(), GROUPS)
    for target, source in zip(second.restore(snapshot.counters), (snapshot.exp_avg, snapshot.exp_avg_sq), strict=True):
        target.copy_(source)
    second.shard.master.copy_(snapshot.master)
    for number, gradient in enumerate(gradients[5:], 6):
        second.shard.grad[:-1] += gradient
        second.end_step(number)
        second.apply()
    assert torch.equal(second.shard.master, whole.shard.master)
