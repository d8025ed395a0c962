"""Order tables against Megatron's own code, and the dependency distance that follows from them."""

from types import SimpleNamespace

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.order import Op, Pipeline

SHAPES = [(2, 2), (2, 3), (4, 2), (4, 4), (8, 2)]


@pytest.mark.parametrize(("stages", "virtual"), SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_interleaved_order_is_megatrons(stages: int, virtual: int, groups: int) -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

    count = groups * stages
    table = schedules.get_schedule_table(count, virtual, stages)
    pipeline = Pipeline(stages=stages, virtual_stages=virtual)
    assert pipeline.table(count) == table
    for stage in range(stages):
        link = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=virtual,
        )
        warmup = schedules.get_pp_rank_microbatches(count, virtual, stages, p2p_communicator=link)[2]
        expected = convert_schedule_table_to_order(warmup, virtual, table)
        order = pipeline.order(stage, count)
        assert [-(op.chunk + 1) if op.backward else op.chunk + 1 for op in order] == (expected)
        forwards = [(op.microbatch, op.chunk) for op in order if not op.backward]
        backwards = [(op.microbatch, virtual - 1 - op.chunk) for op in order if op.backward]
        assert forwards == backwards == table


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_plain_order_is_what_megatrons_1f1b_runs(stages: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in range(stages):
        assert Pipeline(stages=stages).order(stage, count) == _order_that_megatron_runs(
            stages, stage, count, monkeypatch
        )


def _order_that_megatron_runs(stages: int, stage: int, count: int, monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """Run Megatron's schedule of one stage with everything but its order taken out."""
    import torch
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.process_groups_config import ProcessGroupCollection

    ran: list[Op] = []
    seen = {False: 0, True: 0}

    def record(backward: bool) -> None:
        ran.append(Op(backward, 0, seen[backward]))
        seen[backward] += 1

    def forward_step(*_: object, **__: object) -> tuple[torch.Tensor, int]:
        record(False)
        return torch.ones(1), 0

    class Config:
        """Every switch off."""

        def __getattr__(self, name: str) -> None:
            return None

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    monkeypatch.setattr(schedules, "get_model_config", lambda _: Config())
    monkeypatch.setattr(schedules, "get_tensor_shapes", lambda **_: [()])
    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", lambda *_, **__: record(True))
    monkeypatch.setattr(schedules, "deallocate_output_tensor", lambda *_: None)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    groups = ProcessGroupCollection()
    groups.tp = groups.cp = group

    class Link:
        """Pipeline messages that carry nothing."""

        config = Config()
        total_stages, current_stage = stages, stage
        is_pp_first_stage, is_pp_last_stage = stage == 0, stage == stages - 1

        def __getattr__(self, name: str) -> object:
            return lambda *_: None

    schedules.forward_backward_pipelining_without_interleaving(
        forward_step_func=None,
        data_iterator=None,
        model=None,
        num_microbatches=count,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=Link(),
        pg_collection=groups,
    )
    monkeypatch.undo()
    return ran


@pytest.mark.parametrize(
    ("stages", "virtual", "distance"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (8, 1, 8), (2, 2, 4), (4, 2, 8), (4, 4, 8)]
)
def test_distance_of_known_pipelines(stages: int, virtual: int, distance: int) -> None:
    assert Pipeline(stages=stages, virtual_stages=virtual).distance() == distance


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (2, 1), (5, 1), *SHAPES])
def test_distance_is_enough_everywhere_and_no_less_would_be(stages: int, virtual: int) -> None:
    pipeline = Pipeline(stages=stages, virtual_stages=virtual)
    distance, count = pipeline.distance(), pipeline.accepted_count(40)
    tight = False
    for stage in range(stages):
        order = pipeline.order(stage, count)
        done = {op.microbatch: at for at, op in enumerate(order) if op.backward}
        start: dict[int, int] = {}
        for at, op in enumerate(order):
            if not op.backward:
                start.setdefault(op.microbatch, at)
        for microbatch in range(count - distance):
            assert done[microbatch] < start[microbatch + distance]
        tight |= distance > 1 and any(done[m] > start[m + distance - 1] for m in range(count - distance))
    assert tight or distance == 1


def test_interleaved_counts_are_whole_groups() -> None:
    assert [Pipeline(stages=4, virtual_stages=2).accepted_count(n) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [Pipeline(stages=4).accepted_count(n) for n in (0, 1, 5)] == [0, 1, 5]


def test_chunks_on_one_stage_are_refused() -> None:
    with pytest.raises(UserError, match="interleaved schedule needs at least 2 stages"):
        Pipeline(stages=1, virtual_stages=2)
