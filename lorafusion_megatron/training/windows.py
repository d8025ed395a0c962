"""Which optimizer steps of which jobs train together in the next window."""

from collections.abc import Mapping


def window_shares(remaining: Mapping[int, int], tokens_per_step: Mapping[int, float], budget: float) -> dict[int, int]:
    """Optimizer steps that each job takes in the next window.

    The jobs advance in proportion to what they have left, so that they end together and the last windows still have
    several jobs to interleave. Every unfinished job takes at least one step.

    Args:
        remaining: job -> optimizer steps left, at least 1.
        tokens_per_step: job -> mean tokens of a global batch.
        budget: tokens that a window should hold.

    Returns:
        job -> steps, at least 1 and at most what is left.
    """
    total = sum(remaining[job] * tokens_per_step[job] for job in remaining)
    share = min(1.0, budget / total) if total > 0 else 1.0
    return {job: min(left, max(1, round(left * share))) for job, left in remaining.items()}
