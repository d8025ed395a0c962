"""Passes over a window, and where the norms of a step travel."""

import pytest
import torch

from lorafusion_megatron.mcore.p2p import NormMail
from lorafusion_megatron.mcore.window import flushed, whole
from lorafusion_megatron.scheduler.order import Pipeline
from lorafusion_megatron.types import Microbatch, Sample, Schedule, StepEnd


def _sample(job: int, step: int) -> Sample:
    return Sample(job=job, step=step, position=0, row=0, tokens=4, batch_label_tokens=4)


def _schedule(rows: list[tuple[int, int] | None], ends: dict[int, list[tuple[int, int]]]) -> Schedule:
    stream = tuple(Microbatch(samples=() if row is None else (_sample(*row),)) for row in rows)
    return Schedule(
        replicas=(stream,),
        step_ends=tuple(StepEnd(job=j, step=s, position=p) for p, pairs in ends.items() for j, s in pairs),
        distance=2,
        token_capacity=8,
        padding_multiple=1,
    )


def test_a_flushed_window_is_cut_at_its_steps_and_drops_the_fillers():
    schedule = _schedule([(0, 1), (0, 1), None, (0, 2), None, (1, 1)], {1: [(0, 1)], 3: [(0, 2)], 5: [(1, 1)]})
    passes = flushed(schedule)
    assert passes.positions == (0, 1, 3, 5)
    assert passes.lengths == (2, 1, 1)
    assert whole(schedule).positions == (0, 1, 2, 3, 4, 5)
    assert whole(schedule).lengths == (6,)


def test_a_filler_that_ends_an_empty_step_and_rows_behind_the_last_step_are_run():
    schedule = _schedule([(0, 1), None, None, (1, 1)], {0: [(0, 1)], 1: [(1, 7)]})
    assert flushed(schedule).positions == (0, 1, 3)
    assert flushed(schedule).lengths == (1, 1, 1)


class _Group:
    """A pipeline's process group, as far as the mail asks."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class _Stage:
    """One stage of 1F1B that passes mail by hand: it adds 10^stage, so that a total shows who is in it."""

    def __init__(self, stage: int, stages: int, count: int, ends: dict[int, int]) -> None:
        self.stage, self.stages, self.ends = stage, stages, ends
        self.mail = NormMail(_Group(stage, stages), lambda p: ends.get(p, 0), torch.device("cpu"))
        self.ops = list(Pipeline(stages=stages).order(stage, count))
        self.totals: dict[int, torch.Tensor] = {}

    def source(self) -> tuple[str, int, int] | None:
        """The message that the next op waits for; None where it needs none."""
        op = self.ops[0]
        edge = self.stage == (self.stages - 1 if op.backward else 0)
        return None if edge else ("up" if op.backward else "down", self.stage, op.microbatch)

    def run(self, message: torch.Tensor | None) -> tuple[tuple[str, int, int], torch.Tensor | None]:
        """Run the next op; (where its message goes, what rides with it)."""
        op, mail = self.ops.pop(0), self.mail
        position = op.microbatch
        if message is not None:
            (mail.from_behind if op.backward else mail.from_before)(position, message)
        if not op.backward:
            if self.ends.get(position - self.stages):
                self.totals[position - self.stages] = mail.total(position - self.stages)
            return ("down", self.stage + 1, position), mail.downward(position)
        if self.ends.get(position):
            mine = [torch.tensor([10.0**self.stage, k]) for k in range(self.ends[position])]
            mail.add(position, [sums.double() for sums in mine])
        return ("up", self.stage - 1, position), mail.upward(position) if self.stage else None


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_stage_has_a_total_before_the_first_forward_that_may_need_it(stages):
    count, ends = 11, {1: 1, 4: 2, 5: 1, 9: 1, 10: 3}
    pipeline = [_Stage(stage, stages, count, ends) for stage in range(stages)]
    sent: dict[tuple[str, int, int], torch.Tensor | None] = {}
    while any(stage.ops for stage in pipeline):
        able = [s for s in pipeline if s.ops and (s.source() is None or s.source() in sent)]
        assert able, "the schedule is stuck"
        for stage in able:
            source = stage.source()
            where, message = stage.run(None if source is None else sent.pop(source))
            sent[where] = message
    for stage in pipeline:
        assert set(stage.totals) == {position for position in ends if position + stages < count}
        for position, total in stage.totals.items():
            assert total[:, 0].tolist() == [sum(10.0**s for s in range(stages))] * ends[position]
            assert total[:, 1].tolist() == [float(stages * k) for k in range(ends[position])]
