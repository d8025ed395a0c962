"""Steps decided on the device, with norms that ride on the pipeline's messages: the same adapters, on gloo and CPU."""

import os
from pathlib import Path

import pytest

from lorafusion_megatron.training.signals import EXIT_STOPPED
from tests import launch
from tests.oracle.case import TOLERANCE, OracleCase, make_case

INTERLEAVED = ["model.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "one process": (1, []),
    "PP2": (2, ["model.pipeline_model_parallel_size=2"]),
    "PP4": (4, ["model.pipeline_model_parallel_size=4"]),
    "PP2 flushed": (2, ["model.pipeline_model_parallel_size=2", "runtime.schedule=sequential"]),
    "PP2 of 2 chunks": (2, [*INTERLEAVED, "model.pipeline_model_parallel_size=2"]),
    "DP2": (2, []),
    "PP2 DP2": (4, ["model.pipeline_model_parallel_size=2"]),
    "PP2 of 2 chunks DP2": (4, [*INTERLEAVED, "model.pipeline_model_parallel_size=2"]),
    "PP2 TP2": (4, ["model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> OracleCase:
    """A case that the oracle has trained."""
    return make_case(tmp_path_factory.mktemp("case"), arch="qwen2", seed=5)


def train_on_device(words: list[str], stop_at_vote: int | None = None) -> int:
    """The command line with the steps that a GPU run has; the last rank may wish to stop at one of the votes."""
    import lorafusion_megatron.training.rack as rack
    from lorafusion_megatron.mcore.device_steps import DeviceSteps

    rack.make_steps = lambda job, shard, rule, groups, chunks: DeviceSteps(job, shard, rule, groups)
    if stop_at_vote is not None and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        from lorafusion_megatron.training.signals import StopRequest

        votes = iter(range(1, 1_000_000))
        StopRequest.wished = lambda self: next(votes) >= stop_at_vote  # type: ignore[method-assign]
    return launch.command(["train", *words])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapters_and_losses_are_those_of_training_alone(case, tmp_path, measured, layout):
    world, words = LAYOUTS[layout]
    out = tmp_path / "out"
    arguments = [str(case.run_file), f"checkpoint.save={out}", "checkpoint.save_interval=2", *words]
    launch.Ranks(train_on_device, (arguments,), world=world, folder=tmp_path / "logs").wait().check()
    assert measured(case.error(out)) <= TOLERANCE


def test_kept_steps_come_with_their_losses(case, tmp_path):
    """Reports arrive later than steps: a snapshot waits for them."""
    out = tmp_path / "out"
    arguments = [str(case.run_file), f"checkpoint.save={out}", "checkpoint.save_interval=1", "checkpoint.keep=100"]
    launch.Ranks(train_on_device, (arguments,), world=1, folder=tmp_path / "logs").wait().check()
    for job in sorted(Path(out).glob("job*")):
        assert len(list(job.glob("step_*"))) >= 6


@pytest.mark.parametrize("layout", ["PP2", "PP2 flushed", "PP2 of 2 chunks"])
def test_a_stop_inside_a_window_drains_the_mail_and_a_resume_ends_where_an_unbroken_run_does(case, tmp_path, layout):
    world, words = LAYOUTS[layout]
    words = [str(case.run_file), *words]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch.Ranks(
        train_on_device, ([*words, f"checkpoint.save={whole}"],), world=world, folder=tmp_path / "logs1"
    ).wait().check()
    arguments = [*words, f"checkpoint.save={broken}"]
    stopped = launch.Ranks(train_on_device, (arguments, 2), world=world, folder=tmp_path / "logs2").wait()
    assert stopped.statuses == (EXIT_STOPPED,) * world, stopped.outputs[0][-2000:]
    done = len((broken / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < len((whole / "metrics.jsonl").read_text().splitlines())
    launch.Ranks(train_on_device, (arguments,), world=world, folder=tmp_path / "logs3").wait().check()
    for job in ("job0", "job1", "job2"):
        for name in ("adapter_model.safetensors", "losses.json"):
            assert (broken / job / name).read_bytes() == (whole / job / name).read_bytes(), (job, name)
