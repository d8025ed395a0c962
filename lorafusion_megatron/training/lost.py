"""Telling a lost rank from a fault of the program: what the collectives raise when another rank does not answer."""

import re

SIGNS = (
    "timed out waiting",  # gloo, in a collective or a receive
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "no route to host",
    "network is unreachable",
    "socket timeout",  # the store where ranks meet
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
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError | ConnectionError):
            text = " ".join(str(seen).split())
            if any(sign in text.lower() for sign in SIGNS):
                # gloo begins with the place in its own source: [../gloo/transport/tcp/pair.cc:547]
                return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text)[:200]
        seen = seen.__cause__ or seen.__context__
    return None
