"""The order in which each stage runs forwards and backwards: Megatron's 1F1B and interleaved schedules as data."""

from dataclasses import dataclass

from lorafusion_megatron.errors import UserError


@dataclass(frozen=True, slots=True)
class Op:
    """One forward or backward of a microbatch on a chunk of a stage."""

    backward: bool
    chunk: int
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Shape of the pipeline."""

    stages: int = 1
    virtual_stages: int = 1
    """Model chunks per stage; chunk c of stage s is the (c * stages + s)-th piece of the model."""

    def __post_init__(self) -> None:
        if self.virtual_stages > 1 and self.stages < 2:
            raise UserError(
                f"{self.virtual_stages} chunks on one stage",
                rule="the interleaved schedule needs at least 2 stages",
                remedy="raise pipeline_model_parallel_size or drop virtual_pipeline_model_parallel_size",
                key="model.virtual_pipeline_model_parallel_size",
            )

    @property
    def chunks(self) -> int:
        """Pieces of the model."""
        return self.stages * self.virtual_stages

    def accepted_count(self, microbatches: int) -> int:
        """Least count >= ``microbatches`` that the schedule accepts: whole groups of ``stages`` when interleaved."""
        group = self.stages if self.virtual_stages > 1 else 1
        return -(-microbatches // group) * group

    def warmup(self, stage: int) -> int:
        """Forwards (of chunks) that ``stage`` runs before its first backward, as Megatron counts them."""
        behind = self.stages - stage - 1
        return behind if self.virtual_stages == 1 else 2 * behind + (self.virtual_stages - 1) * self.stages

    def table(self, microbatches: int) -> list[tuple[int, int]]:
        """(microbatch, chunk) of each forward in order; backwards run the same with the chunks reversed."""
        return [
            (microbatch, chunk)
            for first in range(0, microbatches, self.stages)
            for chunk in range(self.virtual_stages)
            for microbatch in range(first, min(first + self.stages, microbatches))
        ]

    def order(self, stage: int, microbatches: int) -> list[Op]:
        """Everything that ``stage`` runs, in order: warmup forwards, then one forward, one backward, then backwards.

        Args:
            stage: pipeline stage from 0.
            microbatches: positions of the stream.
        """
        table = self.table(microbatches)
        last = self.virtual_stages - 1
        forwards = [Op(False, chunk, microbatch) for microbatch, chunk in table]
        backwards = [Op(True, last - chunk, microbatch) for microbatch, chunk in table]
        warmup = min(self.warmup(stage), len(table))
        ops = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            ops += (forward, backward)
        return ops + backwards[len(table) - warmup :]

    def distance(self) -> int:
        """Least distance in positions from the end of a job's step to the first microbatch of its next one.

        A microbatch is done with on a stage after the last backward of any of its chunks, and starts with its
        first forward. Read off the order table of stage 0, which has the longest warmup: S for 1F1B, more when
        interleaved (4 stages of 2 chunks: 8).

        Returns:
            The least d such that microbatch i + d starts after microbatch i is done, for every i.

        Note: the order repeats every ``stages`` microbatches, so four times that past the warmup shows every case.
        """
        count = self.accepted_count(4 * self.chunks + self.stages)
        done: dict[int, int] = {}
        start: dict[int, int] = {}
        for at, op in enumerate(self.order(0, count)):
            if op.backward:
                done[op.microbatch] = at
            else:
                start.setdefault(op.microbatch, at)
        worst = 1
        for microbatch in range(self.stages):
            later = microbatch + 1
            while start[later] < done[microbatch]:
                later += 1
            worst = max(worst, later - microbatch)
        return worst
