"""The dependency distance of a pipeline schedule and the microbatch count that it accepts."""


def dependency_distance(stages: int, virtual_stages: int = 1) -> int:
    """Least distance in positions from the end of a job's step to the first microbatch of its next one.

    Stage 0 runs ``W`` forwards before its first backward (Megatron's warmup) and then alternates, so its forward
    number f comes after its backward number f - W - 1. A microbatch is done with on stage 0 when its chunk 0 ran
    backward, which is the last of its backwards; it starts with the forward of chunk 0.

    Args:
        stages: pipeline stages S.
        virtual_stages: chunks per stage V.

    Returns:
        S for V = 1; for V > 1 what the order of Megatron's interleaved schedule gives.
    """
    if stages == 1 and virtual_stages == 1:
        return 1
    if virtual_stages == 1:
        return stages
    warmup = 2 * (stages - 1) + (virtual_stages - 1) * stages
    round_length = stages * virtual_stages

    def forward_number(microbatch: int) -> int:
        return microbatch // stages * round_length + microbatch % stages

    worst = 1
    for done in range(stages):
        backward = (virtual_stages - 1) * stages + done
        start = done + 1
        while forward_number(start) < backward + warmup + 1:
            start += 1
        worst = max(worst, start - done)
    return worst


def accepted_count(microbatches: int, stages: int, virtual_stages: int) -> int:
    """Least number of microbatches >= ``microbatches`` that the schedule accepts (whole groups when interleaved)."""
    if virtual_stages == 1:
        return microbatches
    return -(-microbatches // stages) * stages
