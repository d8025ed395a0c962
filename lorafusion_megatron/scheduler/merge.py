"""Merges under-filled neighbours: the half-full microbatches where two blocks meet."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.packing import padded_tokens
from lorafusion_megatron.scheduler.rows import Row


def merge_rows(rows: Sequence[Row], capacity: int, multiple: int, distance: int) -> list[Row]:
    """Join a position with the one before it wherever both fit on every replica and no job's steps come too close.

    Args:
        rows: positions in order, distances met or to be repaired later.
        capacity: padded tokens of a microbatch.
        multiple: padding multiple.
        distance: dependency distance; a merge that would need a no-op elsewhere is left out.

    Returns:
        As many rows or fewer.
    """
    out: list[Row] = []
    last: dict[tuple[int, int], int] = {}
    for row in rows:
        joined = _join(out[-1], row, capacity, multiple) if out else None
        position = len(out) - 1
        if joined is not None and all(
            last.get((job, step - 1), -distance) + distance <= position for job, step in row.steps()
        ):
            out[-1] = joined
        else:
            out.append(row)
        last.update(dict.fromkeys(row.steps(), len(out) - 1))
    return out


def _join(first: Row, second: Row, capacity: int, multiple: int) -> Row | None:
    """The two rows as one, or None where a replica would overflow or hold two steps of a job."""
    steps = first.steps() | second.steps()
    if len({job for job, _ in steps}) < len(steps):
        return None
    parts = tuple(one + two for one, two in zip(first.parts, second.parts, strict=True))
    # Emptiest of the second with fullest of the first would fit more often; replicas are sorted alike, so reverse.
    if any(padded_tokens(part, multiple) > capacity for part in parts):
        parts = tuple(one + two for one, two in zip(first.parts, second.parts[::-1], strict=True))
        if any(padded_tokens(part, multiple) > capacity for part in parts):
            return None
    return Row(parts, first.empty_steps + second.empty_steps)
