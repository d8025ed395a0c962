"""Telling a lost rank from a fault of the program: what the collectives raise when another rank does not answer."""

import re
import traceback

SIGNS = (
    "timed out waiting",  # gloo, in a collective or a receive
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "no route to host",
    "network is unreachable",
    "socket timeout",  # the store where ranks meet
    "waiting for clients",  # the same, where one never came
    "client socket has timed out",
    "remote process exited or there was a network error",  # NCCL
    "communicator was aborted",
    "unhandled system error",
)
"""What such an error says, in lower case; gloo's and NCCL's errors have no class of their own."""


def lost_rank(error: BaseException) -> str | None:
    """What a collective said of a rank that does not answer; None where the error is another one.

    Args:
        error: what training raised. What it was raised from is looked at too.

    Returns:
        One line.

    Note: the system's own errors (`ConnectionError`) count only where `torch.distributed` passed them on. A reader of
        stdout or a tracker's server that has gone away says the same words.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) or (isinstance(seen, ConnectionError) and _from_distributed(seen)):
            text = " ".join(str(seen).split())
            if any(sign in text.lower() for sign in SIGNS):
                # gloo begins with the place in its own source: [../gloo/transport/tcp/pair.cc:547]
                return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text)[:200]
        seen = seen.__cause__ or seen.__context__
    return None


def _from_distributed(error: BaseException) -> bool:
    """Whether the error came through a module of torch.distributed."""
    modules = (str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f"{module}.".startswith("torch.distributed.") for module in modules)
