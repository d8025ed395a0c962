"""Leaving a run."""

import signal

import pytest
from megatron.core import parallel_state

from lorafusion_megatron.mcore import parallel


@pytest.fixture
def calls(monkeypatch):
    """What `stop` calls, in a process that seems to be a rank of two."""
    calls = []
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: calls.append("megatron"))
    monkeypatch.setattr(parallel.signal, "signal", lambda number, action: calls.append((number, action)))
    monkeypatch.setattr(parallel.signal, "alarm", lambda seconds: calls.append(seconds))
    return calls


@pytest.mark.parametrize(("backend", "failed"), [("nccl", False), ("gloo", False), ("gloo", True)])
def test_a_clean_end_leaves_the_groups(monkeypatch, calls, backend, failed):
    monkeypatch.setattr(parallel.dist, "get_backend", lambda: backend)
    parallel.stop(failed=failed)
    assert calls == ["megatron", "destroy"]


def test_a_rank_that_failed_does_not_wait_for_the_others_in_nccl(monkeypatch, calls):
    monkeypatch.setattr(parallel.dist, "get_backend", lambda: "nccl")
    parallel.stop(failed=True)
    assert calls == [(signal.SIGALRM, signal.SIG_DFL), parallel.LAST_SECONDS]
