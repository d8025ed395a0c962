"""What is left of a window whose first steps were trained before a stop."""

from collections.abc import Mapping
from dataclasses import replace

from ..types import Schedule


def trim_schedule(schedule: Schedule, applied: Mapping[int, int], *, multiple: int = 1) -> Schedule:
    """The rest of a window: positions from the first that some unfinished step needs.

    Microbatches keep their samples, also those of steps that are done (the runtime gives these weight 0), so that
    every product has the shape, and every result the bits, that an undisturbed run has. Where such a step ends is in
    ``replayed_ends``: zero times what is not finite is not zero, so the runtime forgets the step's gradient there.

    Args:
        schedule: the whole window.
        applied: job -> optimizer steps done.
        multiple: positions are cut off in multiples of this (the stages of an interleaved schedule).

    Returns:
        The rest; without any position where nothing is left.
    """
    ends = [end for end in schedule.step_ends if end.step > applied[end.job]]
    needed = [end.position for end in ends]
    for replica in schedule.replicas:
        for position, microbatch in enumerate(replica):
            if any(sample.step > applied[sample.job] for sample in microbatch.samples):
                needed.append(position)
                break
    start = min(needed, default=schedule.num_microbatches) // multiple * multiple
    done = [end for end in schedule.step_ends if end.step <= applied[end.job] and end.position >= start]
    return replace(
        schedule,
        replicas=tuple(replica[start:] for replica in schedule.replicas),
        step_ends=tuple(replace(end, position=end.position - start) for end in ends),
        replayed_ends=tuple(replace(end, position=end.position - start) for end in done),
    )
