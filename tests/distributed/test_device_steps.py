"""Steps decided on the device, with norms that ride on the pipeline's messages: the same adapters, on gloo and CPU."""

from pathlib import Path

import pytest

from tests import launch
from tests.oracle.case import TOLERANCE, OracleCase, make_case

LAYOUTS = {
    "one process": (1, []),
    "PP2": (2, ["model.pipeline_model_parallel_size=2"]),
    "PP4": (4, ["model.pipeline_model_parallel_size=4"]),
    "PP2 flushed": (2, ["model.pipeline_model_parallel_size=2", "runtime.schedule=sequential"]),
    "PP2 TP2": (4, ["model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=2"]),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> OracleCase:
    """A case that the oracle has trained."""
    return make_case(tmp_path_factory.mktemp("case"), arch="qwen2", seed=5)


def train_on_device(words: list[str]) -> int:
    """The command line with the steps that a GPU run has."""
    import lorafusion_megatron.training.rack as rack
    from lorafusion_megatron.mcore.device_steps import DeviceSteps

    rack.make_steps = lambda job, shard, rule, groups, chunks=1: DeviceSteps(job, shard, rule, groups)
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
