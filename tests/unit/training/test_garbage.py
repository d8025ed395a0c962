"""What lives is frozen; what is frozen and no longer lives is freed the next time."""

import gc
import weakref

import pytest

from lorafusion_megatron.training import garbage
from lorafusion_megatron.training.garbage import Collector, settle


class Node:
    """One end of a cycle."""

    def __init__(self):
        self.itself = self


def test_a_cycle_that_was_frozen_is_freed_once_it_is_let_go():
    try:
        node = Node()
        seen = weakref.ref(node)
        settle()
        assert gc.get_freeze_count() > 1000
        del node
        gc.collect()
        assert seen() is not None
        settle()
        assert seen() is None
    finally:
        gc.unfreeze()


@pytest.fixture
def settled(monkeypatch) -> list[None]:
    """An entry for each time that garbage was settled."""
    times: list[None] = []
    monkeypatch.setattr(garbage, "settle", lambda: times.append(None))
    return times


def test_a_process_settles_before_its_first_two_windows_and_after_jobs_have_left(settled):
    collector = Collector(active=True)
    counts = []
    for released in (False, False, False, True, False):
        collector.before_window(released=released)
        counts.append(len(settled))
    assert counts == [1, 2, 2, 3, 3]


def test_where_it_would_cost_more_than_it_saves_nothing_is_frozen(settled):
    collector = Collector(active=False)
    collector.before_window(released=True)
    assert not settled


def test_a_process_that_goes_on_after_a_run_frees_the_runs_cycles():
    try:
        collector = Collector(active=True)
        node = Node()
        seen = weakref.ref(node)
        collector.before_window(released=False)
        del node
        collector.close()
        gc.collect()
        assert seen() is None
    finally:
        gc.unfreeze()
