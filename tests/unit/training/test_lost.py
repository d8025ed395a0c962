"""Errors that mean a lost rank, as gloo, NCCL and the store word them, and errors that mean another thing."""

import pytest

from lorafusion_megatron.training.lost import lost_rank


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 6000ms for recv operation"),
            "Timed out waiting 6000ms for recv operation",
        ),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"
            ),
            "Connection closed by peer [::1]:5",
        ),
        (
            RuntimeError("NCCL error: unhandled system error,\nremote process exited or there was a network error"),
            "NCCL error: unhandled system error, remote process exited or there was a network error",
        ),
        (ConnectionResetError("Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_a_lost_rank_is_told_in_one_line(error: Exception, wanted: str) -> None:
    assert lost_rank(error) == wanted


def test_what_an_error_was_raised_from_is_looked_at() -> None:
    error = ValueError("the side thread failed")
    error.__cause__ = RuntimeError("Timed out waiting 1000ms")
    assert lost_rank(error) == "Timed out waiting 1000ms"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("Timed out waiting"), KeyError("x")])
def test_other_errors_are_not(error: Exception) -> None:
    assert lost_rank(error) is None
