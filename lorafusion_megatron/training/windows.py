"""Which optimizer steps of which jobs train together in the next window."""

import math
from collections.abc import Mapping


def window_shares(
    remaining: Mapping[int, int],
    tokens_per_step: Mapping[int, float],
    budget: float,
    until_eval: Mapping[int, float] | None = None,
) -> dict[int, int]:
    """Optimizer steps that each job takes in the next window.

    The jobs advance in proportion to what they have left, so that they end together and the last windows still have
    several jobs to interleave. Every unfinished job takes at least one step.

    Args:
        remaining: job -> optimizer steps left, at least 1.
        tokens_per_step: job -> mean tokens of a global batch.
        budget: tokens that a window should hold.
        until_eval: job -> steps to its next validation, at which its part of a window ends; None: without any.

    Returns:
        job -> steps, at least 1 and at most what is left.
    """
    total = sum(remaining[job] * tokens_per_step[job] for job in remaining)
    share = min(1.0, budget / total) if total > 0 else 1.0
    ends = until_eval or {}
    return {
        job: int(min(left, max(1, round(left * share)), ends.get(job, math.inf))) for job, left in remaining.items()
    }
