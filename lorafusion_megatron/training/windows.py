"""Which optimizer steps of which jobs train together in the next window."""

import math
from collections.abc import Mapping

from ..scheduler.options import PlanOptions

LEAST = 4
"""Microbatches a stage of a window that is short for the sake of a validation: filling and draining take a fifth."""


def window_shares(
    remaining: Mapping[int, int],
    tokens_per_step: Mapping[int, float],
    budget: float,
    until_eval: Mapping[int, float] | None = None,
    least: float = 0.0,
) -> dict[int, int]:
    """Optimizer steps that each job takes in the next window.

    The jobs advance in proportion to what they have left, so that they end together and the last windows still have
    several jobs to interleave. Every unfinished job takes at least one step. A job that is validated soon holds the
    others back with it: else they would run ahead, and it would train alone in the end.

    Args:
        remaining: job -> optimizer steps left, at least 1.
        tokens_per_step: job -> mean tokens of a global batch.
        budget: tokens that a window should hold.
        until_eval: job -> steps to its next validation, at which its part of a window ends; None: without any.
        least: tokens that a window holds even so, where they are left: filling and draining a shorter one costs more.

    Returns:
        job -> steps, at least 1 and at most what is left.
    """
    total = sum(remaining[job] * tokens_per_step[job] for job in remaining)
    share = min(1.0, budget / total) if total > 0 else 1.0
    ends = until_eval or {}
    together = min((ends[job] / left for job, left in remaining.items() if job in ends), default=1.0)
    if total > 0:
        share = min(share, max(together, least / total))
    return {
        job: int(min(left, max(1, round(left * share)), ends.get(job, math.inf))) for job, left in remaining.items()
    }


def least_tokens(options: PlanOptions) -> float:
    """Tokens below which no window is cut so that jobs stay together (`LEAST`)."""
    return float(LEAST * options.stages * options.replicas * options.token_capacity)
