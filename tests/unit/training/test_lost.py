"""Errors that mean a lost rank, as gloo, NCCL and the store word them, and errors that mean another thing."""

import pytest
import torch.distributed as dist

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
        (
            dist.DistStoreError("Timed out after 7 seconds waiting for clients. 1/2 clients joined."),
            "Timed out after 7 seconds waiting for clients. 1/2 clients joined.",
        ),
        (
            dist.DistNetworkError("The client socket has timed out after 6000ms while trying to connect to (a, 1)."),
            "The client socket has timed out after 6000ms while trying to connect to (a, 1).",
        ),
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


def raised_in(module: str, error: Exception) -> Exception:
    """The error as a function of that module raises it."""
    names = {"__name__": module, "error": error}
    exec("def fail(): raise error", names)
    with pytest.raises(type(error)) as caught:
        names["fail"]()
    return caught.value


GONE = (BrokenPipeError(32, "Broken pipe"), ConnectionResetError(104, "Connection reset by peer"))


@pytest.mark.parametrize("error", GONE)
def test_an_error_of_the_system_is_one_where_torch_distributed_raised_it(error: Exception) -> None:
    raised = raised_in("torch.distributed.distributed_c10d", error)
    assert lost_rank(raised) == str(error)
    outer = RuntimeError("the side thread failed")
    outer.__cause__ = raised
    assert lost_rank(outer) == str(error)


@pytest.mark.parametrize("error", GONE)
@pytest.mark.parametrize("module", ["wandb.sdk.lib.sock_client", "rich.console", "torch.distributedly"])
def test_a_pipe_of_stdout_or_a_tracker_is_not_one(error: Exception, module: str) -> None:
    assert lost_rank(raised_in(module, error.with_traceback(None))) is None
