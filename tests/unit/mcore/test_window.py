"""Passes over a window, and where the norms of a step travel."""

import pytest
import torch

from lorafusion_megatron.mcore.p2p import NormMail
from lorafusion_megatron.mcore.window import flushed, whole
from lorafusion_megatron.scheduler.order import Pipeline
from lorafusion_megatron.types import Microbatch, Sample, Schedule, StepEnd
from tests.unit.mcore.stages import Group


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


class _Stage:
    """One stage that passes mail by hand: it adds 10^stage, so that a total shows who is in it."""

    def __init__(self, stage: int, pipeline: Pipeline, count: int, ends: dict[int, int]) -> None:
        self.stage, self.pipeline, self.ends = stage, pipeline, ends
        self.mail = NormMail(
            Group(stage, pipeline.stages),
            lambda p: ends.get(p, 0),
            torch.device("cpu"),
            num_microbatches=count,
            chunks=pipeline.virtual_stages,
        )
        self.ops = list(pipeline.order(stage, count))
        self.totals: dict[int, torch.Tensor] = {}
        self.first_forward: dict[int, int] = {}
        """Position -> first position whose first chunk ran forward here with its total known."""

    def _piece(self, op) -> int:
        return op.chunk * self.pipeline.stages + self.stage

    def source(self) -> tuple[str, int, int] | None:
        """The message that the next op waits for; None where it needs none."""
        op = self.ops[0]
        edge = self._piece(op) == (self.pipeline.chunks - 1 if op.backward else 0)
        return None if edge else ("up" if op.backward else "down", self._piece(op), op.microbatch)

    def run(self, message: torch.Tensor | None) -> tuple[tuple[str, int, int], torch.Tensor | None]:
        """Run the next op; (where its message goes, what rides with it)."""
        op, mail, last = self.ops.pop(0), self.mail, self.stage == self.pipeline.stages - 1
        position, piece = op.microbatch, self._piece(op)
        if op.chunk == 0 and not (last if op.backward else self.stage == 0):
            room = (mail.from_behind if op.backward else mail.from_before)(position)
            assert (room is None) == (message is None)
            if room is not None:
                room.copy_(message)
        else:
            assert message is None
        if not op.backward:
            if op.chunk == 0:
                for ended in mail.carried(position):
                    self.first_forward[ended] = position
                    if self.ends.get(ended):
                        self.totals[ended] = mail.total(ended).clone()
            rides = mail.downward(position) if op.chunk == 0 and not last else None
            return ("down", piece + 1, position), rides
        if op.chunk == 0 and self.ends.get(position):
            mine = [torch.tensor([10.0**self.stage, k]) for k in range(self.ends[position])]
            mail.add(position, [sums.double() for sums in mine])
        rides = mail.upward(position) if op.chunk == 0 and self.stage else None
        return ("up", piece - 1, position), rides


@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (3, 1), (4, 1), (2, 2), (2, 4), (3, 2), (4, 2), (4, 3)])
def test_every_stage_has_a_total_before_the_first_forward_that_may_need_it(stages, chunks):
    shape = Pipeline(stages=stages, virtual_stages=chunks)
    count, ends = shape.accepted_count(23), {1: 1, 4: 2, 5: 1, 9: 1, 10: 3, 22: 1}
    pipeline = [_Stage(stage, shape, count, ends) for stage in range(stages)]
    sent: dict[tuple[str, int, int], torch.Tensor | None] = {}
    while any(stage.ops for stage in pipeline):
        able = [s for s in pipeline if s.ops and (s.source() is None or s.source() in sent)]
        assert able, "the schedule is stuck"
        for stage in able:
            source = stage.source()
            where, message = stage.run(None if source is None else sent.pop(source))
            sent[where] = message
    distance = shape.distance()
    for stage in pipeline:
        known = set(stage.first_forward)
        assert sorted([*known, *stage.mail.left]) == list(range(count))
        assert {position for position in range(count) if position + distance < count} <= known
        assert all(forward <= position + distance for position, forward in stage.first_forward.items())
        assert set(stage.totals) == known & set(ends)
        for position, total in stage.totals.items():
            assert total[:, 0].tolist() == [sum(10.0**s for s in range(stages))] * ends[position]
            assert total[:, 1].tolist() == [float(stages * k) for k in range(ends[position])]
