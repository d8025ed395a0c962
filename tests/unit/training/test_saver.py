"""The saving thread: what it copies, and what it lets go of."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch

from lorafusion_megatron.mcore.steps import AdapterSteps, StepRule
from lorafusion_megatron.training import saver as saver_module
from lorafusion_megatron.training.saver import PlanPosition, SaveItem, Saver
from lorafusion_megatron.training.state import PARTS
from tests.unit.training.one_factor import GROUPS, OneFactor

WHERE = PlanPosition(window=0, schedule=None, shape={}, statuses={})
RULE = StepRule(lr_at=lambda step: 1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, clip_grad=0.0, max_bad_steps=3)


class _Written:
    """Takes what a saver writes."""

    def __init__(self) -> None:
        self.adapters, self.states = [], []
        self.saver = Saver(GROUPS, write_adapter=self._adapter, write_state=self._state)
        self.steps = AdapterSteps(0, OneFactor(), RULE, SimpleNamespace(tp_size=1))
        self.steps.optimizer.step()

    def _adapter(self, job, step, factors, best, keep=True):
        self.adapters.append((job, step, best, factors))

    def _state(self, item):
        self.states += [(job, parts) for job, _, parts in item.jobs()]

    def save(self, *items: SaveItem) -> list[weakref.ref]:
        """Save these, and return what becomes of the copies that were made."""
        copies = []

        def copy(*, moments):
            snapshot = self.steps.snapshot(moments=moments)
            parts = [getattr(snapshot, part) for part in PARTS]
            copies.extend(weakref.ref(part) for part in parts if part is not None)
            return snapshot

        self.saver.expect(items)
        self.saver.offer(0, 0, self.steps.shard, copy)
        self.saver.close_window()
        return copies


@pytest.fixture
def written():
    made = _Written()
    yield made
    made.saver.close_window()
    made.saver.finish()


def adapter(**more) -> SaveItem:
    return SaveItem(wants={0: 0}, **more)


def state() -> SaveItem:
    return SaveItem(wants={0: 0}, cut=0, where=WHERE)


@pytest.mark.parametrize("make", [adapter, state])
def test_copies_are_let_go_of_when_they_are_written_and_not_when_the_next_ones_come(written, make):
    gc.disable()
    try:
        copies = written.save(make())
        written.saver.drain()
        assert copies
        assert [copy() for copy in copies] == [None] * len(copies)
    finally:
        gc.enable()


def test_moments_are_copied_where_a_checkpoint_wants_them_alone(written):
    assert len(written.save(adapter(), adapter(best=True))) == 1
    assert len(written.save(adapter(), state())) == 3
    written.saver.drain()
    assert [best for _, _, best, _ in written.adapters] == [False, True, False]
    master = written.steps.shard.master.view(2, 3)
    assert all(torch.equal(factors[0, "q_proj", "A"], master) for *_, factors in written.adapters)
    ((_, parts),) = written.states
    assert torch.equal(parts["master"][0, "q_proj", "A"], master)
    moments = written.steps.snapshot()
    assert moments.exp_avg.any()
    for part in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(parts[part][0, "q_proj", "A"], getattr(moments, part).view(2, 3))


@pytest.mark.timeout(20)
def test_nothing_is_left_to_wait_for_when_the_thread_has_ended():
    written = _Written()
    written.save(adapter())
    written.saver.finish()
    written.saver.drain()
    assert len(written.adapters) == 1


@pytest.mark.timeout(20)
def test_a_saver_whose_disk_hangs_says_so_after_two_checkpoints_and_no_more_when_it_goes_on(monkeypatch):
    monkeypatch.setattr(saver_module, "PATIENCE_SECONDS", 0.2)
    goes_on = threading.Event()
    written = _Written()
    write, written.saver._write_state = written.saver._write_state, lambda item: (goes_on.wait(10), write(item))
    written.save(adapter(), state())
    assert not written.saver.is_behind
    written.save(adapter(), state())
    assert not written.saver.is_behind, "a burst is no hang"
    time.sleep(0.25)
    assert written.saver.is_behind
    goes_on.set()
    written.saver.drain()
    assert not written.saver.is_behind
    items = [SaveItem(wants={0: 0}, cut=cut, where=WHERE) for cut in (5, 6, 9, 10)]
    written.saver.expect([adapter(), *items])
    assert written.saver.leave_out(5, 8) == 2, "the cuts 6 and 9, after the positions 5 and 8"
    assert [item.dropped for item in items] == [False, True, True, False]
    written.saver.close_window()  # the others were never filled
    written.saver.finish()
    assert not written.saver.is_behind
    assert len(written.states) == 2
