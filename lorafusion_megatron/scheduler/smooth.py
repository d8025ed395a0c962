"""Reorders positions so that neighbours take similar time.

Under 1F1B the stages work on neighbouring microbatches at once and wait for the longest of them (`waiting_time`): an
isolated microbatch that takes 20 % longer costs 20 % of a slot on every stage, and the next ones to it nothing.
"""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.rows import Row
from lorafusion_megatron.scheduler.waits import find_peaks, waiting_time
from lorafusion_megatron.scheduler.weights import Weights


class _Spans:
    """Where each (job, step) has its first and last position, under swaps of positions."""

    def __init__(self, rows: Sequence[Row], distance: int) -> None:
        self.distance = distance
        self.steps = [dict(row.steps()) for row in rows]
        self.positions: dict[tuple[int, int], list[int]] = {}
        for position, steps in enumerate(self.steps):
            for item in steps.items():
                self.positions.setdefault(item, []).append(position)

    def allows(self, early: int, late: int) -> bool:
        """Whether swapping the two positions keeps each job's steps the distance apart."""
        leaves, comes = self.steps[early], self.steps[late]
        for job, step in leaves.items():
            if job in comes:
                if comes[job] != step:
                    return False
                continue
            following = self.positions.get((job, step + 1))
            if following and late + self.distance > following[0]:
                return False
        for job, step in comes.items():
            if job not in leaves:
                before = self.positions.get((job, step - 1))
                if before and before[-1] + self.distance > early:
                    return False
        return True

    def swap(self, early: int, late: int) -> None:
        """Record that the two positions changed places."""
        leaves, comes = self.steps[early], self.steps[late]
        for old, new, steps, others in ((early, late, leaves, comes), (late, early, comes, leaves)):
            for job, step in steps.items():
                if job not in others:
                    positions = self.positions[job, step]
                    positions[positions.index(old)] = new
                    positions.sort()
        self.steps[early], self.steps[late] = comes, leaves


def smooth_rows(rows: Sequence[Row], weights: Weights, *, distance: int, width: int, rounds: int = 2) -> list[Row]:
    """Swap positions up to a distance apart while that lowers the time that stages wait for their neighbours.

    Args:
        rows: a valid stream.
        weights: predicted time of a microbatch.
        distance: dependency distance.
        width: how many neighbours wait for each other.
        rounds: passes over the stream.

    Returns:
        The same rows in a valid order of no greater waiting time.

    Note: no-op positions stay where they are.
    """
    rows = list(rows)
    spans = _Spans(rows, distance)
    times = [max(map(weights.part, row.parts)) for row in rows]
    threshold = 0.002 * max(times, default=0.0)

    for _ in range(rounds):
        peaks = find_peaks(times, width)
        improved = False
        for early in range(len(rows) - 1):
            if rows[early].is_noop:
                continue
            for late in range(early + 1, min(len(rows), early + distance + 1)):
                if not (peaks[early] or peaks[late]) or abs(times[early] - times[late]) <= threshold:
                    continue
                if rows[late].is_noop or not spans.allows(early, late):
                    continue
                first, stop = max(0, early - width + 1), min(len(rows), late + width)
                before = waiting_time(times[first:stop], width)
                times[early], times[late] = times[late], times[early]
                if waiting_time(times[first:stop], width) < before - 1e-9 * before:
                    spans.swap(early, late)
                    rows[early], rows[late] = rows[late], rows[early]
                    improved = True
                else:
                    times[early], times[late] = times[late], times[early]
        if not improved:
            break
    return rows
