"""Dependency repair: delays positions with no-ops until each job's steps are the distance apart."""

from collections.abc import Sequence

from lorafusion_megatron.scheduler.rows import Row, noop_row


def repair_distance(rows: Sequence[Row], distance: int, replicas: int, *, barrier: bool = False) -> list[Row]:
    """Insert the fewest no-ops that keep the order of ``rows`` and the dependency distance.

    Args:
        rows: positions in order; each job's steps in order.
        distance: least distance from a step's last position to the first of the job's next step.
        replicas: data-parallel replicas.
        barrier: the distance holds between steps of different jobs too: the pipeline drains after each global batch.

    Returns:
        Rows at their final positions.
    """
    out: list[Row] = []
    last: dict[tuple[int, int], int] = {}
    for row in rows:
        steps = row.steps()
        if barrier:
            free = max((at + distance for key, at in last.items() if key not in steps), default=0)
        else:
            free = max((last[job, step - 1] + distance for job, step in steps if (job, step - 1) in last), default=0)
        out += [noop_row(replicas)] * (free - len(out))
        if barrier:
            last = {}
        last.update(dict.fromkeys(steps, len(out)))
        out.append(row)
    return out
