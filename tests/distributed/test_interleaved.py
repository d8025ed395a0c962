"""The interleaved pipeline trains what one process trains, and no step begins before the one it needs has ended."""

import json

import pytest

from tests import launch, tiny
from tests.distributed.interleaving import LATE, train_and_watch

LAYOUTS = {"PP2 of 2 chunks": (2, 2), "PP2 of 4 chunks": (2, 4), "PP4 of 2 chunks": (4, 2)}
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of two jobs with short global batches on a model of eight layers, trained by one process."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_base(folder / "base", num_hidden_layers=8)
    jobs = [
        tiny.job(folder, "first", batch=2, steps=6, seed=1),
        tiny.job(folder, "second", r=8, batch=4, steps=4, seed=2, target_modules=["q_proj", "down_proj"]),
    ]
    run_file = tiny.write_run(folder, jobs, token_capacity=64)
    launch.train(run_file, f"checkpoint.save={folder / 'one'}")
    return folder


@pytest.mark.parametrize("schedule", ["staggered", "sequential"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains_what_one_process_trains(one_process, tmp_path, measured, layout, schedule):
    stages, chunks = LAYOUTS[layout]
    _train(one_process, tmp_path, stages, chunks, schedule).check()
    ranks = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(stages)]
    for name in ("first", "second"):
        got, want = (tiny.adapter(out, name) for out in (tmp_path / "out", one_process / "one"))
        assert measured(tiny.update_error(got, want, tiny.read(one_process / "init" / name))) <= TOLERANCE
        losses = zip(tiny.losses(tmp_path / "out", name), tiny.losses(one_process / "one", name), strict=True)
        assert max(abs(a - b) for a, b in losses) < 1e-4
    # Every sample of a step after the first, before each of the stage's chunks, on every stage.
    assert {seen["checked"] for seen in ranks} == {chunks * (5 * 2 + 3 * 4)}
    # The distance is that of the worst place in a group of microbatches; there one backward lies in between.
    assert "behind 1" in ranks[0]
    assert "behind 0" not in ranks[0]


@pytest.mark.parametrize("layout", ["PP2 of 2 chunks", "PP4 of 2 chunks"])
def test_a_distance_shorter_by_one_position_would_begin_steps_too_early(one_process, tmp_path, layout):
    stages, chunks = LAYOUTS[layout]
    assert _train(one_process, tmp_path, stages, chunks, "sequential", shorter=1).statuses[0] == LATE


def _train(run, folder, stages, chunks, schedule, *, shorter=0):
    """Train the run in ranks that watch what they do."""
    words = [
        "train",
        str(run / "run.yaml"),
        f"checkpoint.save={folder / 'out'}",
        f"model.pipeline_model_parallel_size={stages}",
        f"model.virtual_pipeline_model_parallel_size={chunks}",
        f"runtime.schedule={schedule}",
    ]
    arguments = (words, str(folder), shorter)
    return launch.Ranks(train_and_watch, arguments, world=stages, folder=folder / "logs").wait(180.0)
