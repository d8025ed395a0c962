"""Groups jobs whose global batches are packed together: long samples with short ones."""

from collections.abc import Sequence


def head_tail_groups(mean_lengths: Sequence[float], count: int) -> list[list[int]]:
    """Deal the jobs, sorted by mean length, to ``count`` groups from both ends: longest with shortest.

    Args:
        mean_lengths: per job, in tokens.
        count: groups, 1 to the number of jobs.

    Returns:
        Per group the indices of its jobs, ascending; no group is empty.
    """
    order = sorted(range(len(mean_lengths)), key=lambda job: (-mean_lengths[job], job))
    groups: list[list[int]] = [[] for _ in range(count)]
    # Snake order: 0 1 2 2 1 0 0 1 2 … pairs head with tail.
    for place, job in enumerate(order):
        turn, offset = divmod(place, count)
        groups[offset if turn % 2 == 0 else count - 1 - offset].append(job)
    return [sorted(group) for group in groups]


def fewest_groups_that_fill(mean_lengths: Sequence[float], work: Sequence[float], distance: int) -> int:
    """Number of groups for which the other groups' work lasts for the dependency distance.

    Between two steps of a group the others' microbatches must fill ``distance - 1`` positions:
    ``sum of the other groups' work >= distance - 1``. With fewer groups a block is larger and packs better, so the
    least number that fills is taken; where none does, all jobs stand alone.

    Args:
        mean_lengths: per job, in tokens.
        work: per job the microbatches that one of its global batches fills.
        distance: dependency distance.
    """
    if distance == 1:
        return 1
    for count in range(2, len(work)):
        groups = head_tail_groups(mean_lengths, count)
        shares = [sum(work[job] for job in group) for group in groups]
        if sum(shares) - max(shares) >= distance - 1:
            return count
    return max(1, len(work))
