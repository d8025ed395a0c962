"""Subset sum for the last few samples of a microbatch."""

from collections.abc import Callable, Sequence

FIRST_CHOICES = 8


def closest_sum(
    values: Sequence[float],
    wanted: float,
    tolerance: float,
    exact: Callable[[tuple[int, ...]], float | None],
    penalties: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """One to three of ``values`` whose sum is closest to ``wanted``.

    All single values and, by two pointers, for each sum the nearest pairs are tried, then triples that start with
    one of a few values.

    Args:
        values: ascending.
        wanted: the sum to come close to.
        tolerance: a gap that ends the search.
        exact: the true sum of chosen indices, or None where they are not allowed.
        penalties: per value what taking it adds to the gap; none by default.

    Returns:
        Indices; empty where taking nothing is closest.

    Note: O(n) calls at most, most of them skipped by comparing ``values`` first.
    """
    best_gap = wanted
    best: tuple[int, ...] = ()

    def consider(chosen: tuple[int, ...], rough: float) -> None:
        nonlocal best_gap, best
        penalty = sum(penalties[index] for index in chosen) if penalties else 0.0
        if abs(wanted - rough) + penalty >= best_gap:
            return
        true = exact(chosen)
        if true is not None and abs(wanted - true) + penalty < best_gap:
            best_gap, best = abs(wanted - true) + penalty, chosen

    def pairs(base: tuple[int, ...], base_sum: float, low: int) -> None:
        high = len(values) - 1
        while low < high:
            total = base_sum + values[low] + values[high]
            consider((*base, low, high), total)
            if total > wanted:
                high -= 1
            else:
                low += 1

    for index in range(len(values) - 1, -1, -1):
        consider((index,), values[index])
    pairs((), 0.0, 0)
    if best_gap > tolerance:
        for first in range(0, len(values), max(1, len(values) // FIRST_CHOICES)):
            pairs((first,), values[first], first + 1)
    return best
