"""Training on GPUs: the oracle in fp32 and bf16, no waiting for the device, bounded memory, no deadlock."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests import launch
from tests.gpu import ranks
from tests.oracle.case import TOLERANCE, OracleCase

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(1200),  # launch's own time-outs tell more
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
four_gpus = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")

IMPLEMENTATIONS = ("local", "transformer_engine")
TOPOLOGIES = {
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": "true"},
}


def _require(implementation: str) -> None:
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")


def _train(case: OracleCase, out: Path, world: int, implementation: str, dtype: str, model: dict, *words: str, **env):
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    launch.train(
        case.run_file,
        f"checkpoint.save={out}",
        f"model.transformer_impl={implementation}",
        f"base_model.dtype={dtype}",
        *overrides,
        *words,
        world=world,
        environment=env,
    )
    return case.error(out)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_gpu_in_fp32_gives_what_peft_gives(case, tmp_path, measured, implementation, backend):
    _require(implementation)
    error = _train(case, tmp_path / "o", 1, implementation, "float32", {}, f"runtime.lora_backend={backend}")
    assert measured(error) <= TOLERANCE


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_gpu_in_bf16_is_as_near_to_fp32_as_peft_in_bf16(case, bf16_error, tmp_path, measured, implementation):
    _require(implementation)
    error = _train(case, tmp_path / "o", 1, implementation, "bfloat16", {})
    assert measured(error) <= ranks.BF16_MARGIN * bf16_error


@two_gpus
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_gpus_in_fp32_give_what_peft_gives(case, tmp_path, measured, implementation, topology):
    _require(implementation)
    error = _train(case, tmp_path / "o", 2, implementation, "float32", TOPOLOGIES[topology])
    assert measured(error) <= TOLERANCE


@two_gpus
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_gpus_in_bf16_are_as_near_to_fp32_as_peft_in_bf16(case, bf16_error, tmp_path, measured, topology):
    error = _train(case, tmp_path / "o", 2, "auto", "bfloat16", TOPOLOGIES[topology])
    assert measured(error) <= ranks.BF16_MARGIN * bf16_error


@two_gpus
@pytest.mark.parametrize(
    "model",
    [{"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, {}, TOPOLOGIES["PP2"]],
    ids=["interleaved", "data parallel", "PP2"],
)
def test_other_layouts_in_fp32_give_what_peft_gives_with_one_hardware_queue(case, tmp_path, measured, model):
    error = _train(case, tmp_path / "o", 2, "auto", "float32", model, CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert measured(error) <= TOLERANCE


@four_gpus
@pytest.mark.parametrize(
    "model",
    [TOPOLOGIES["PP2"], TOPOLOGIES["PP2"] | {"virtual_pipeline_model_parallel_size": 2}],
    ids=["PP2 DP2", "interleaved DP2"],
)
def test_reductions_never_lock_up_against_messages_with_one_hardware_queue(case, tmp_path, measured, model):
    """All streams of a GPU share one queue here: a reduction that waited in front of a message would wait forever."""
    error = _train(case, tmp_path / "o", 4, "auto", "float32", model, CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert measured(error) <= TOLERANCE


@two_gpus
def test_a_rank_that_fails_says_why_and_ends_while_another_waits_for_its_messages(case, tmp_path):
    words = [str(case.run_file), f"checkpoint.save={tmp_path / 'o'}", "model.pipeline_model_parallel_size=2"]
    finished = launch.Ranks(ranks.fail_on_the_last_rank, (words,), world=2, folder=tmp_path / "logs").wait()
    assert finished.statuses[1] not in (0, -signal.SIGALRM)
    assert "a fault of the second step" in finished.outputs[1]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=two_gpus)])
def test_the_host_waits_for_the_device_no_more_often_in_a_longer_window(tmp_path, world):
    out = tmp_path / "counts.json"
    launch.Ranks(ranks.count_synchronisations, (str(out), [12, 36]), world=world, folder=tmp_path).wait(200.0).check()
    short, long = json.loads(out.read_text())
    assert long["microbatches"] >= 2 * short["microbatches"]
    assert sum(long["waits"].values()) <= sum(short["waits"].values()), (short, long)


@two_gpus
def test_three_hundred_steps_keep_memory_and_losses(case, tmp_path, measured):
    """Dropout and recompute on; the losses of two stages are those of one GPU, and memory stays after step 20."""
    run = yaml.safe_load(case.run_file.read_text())
    run["base_model"]["dtype"] = "bfloat16"
    run["model"] = {"recompute_granularity": "full"}
    run["jobs"].append(run["jobs"][0] | {"name": "job3"})
    for job in run["jobs"]:
        job["peft"]["lora_dropout"] = 0.1
        job["train"]["train_iters"] = 75
    running = {}
    for world in (1, 2):  # side by side: both are small, and the memory is each process' own
        run["checkpoint"] = {"save": str(tmp_path / f"out{world}")}
        run["model"]["pipeline_model_parallel_size"] = world
        file = tmp_path / f"run{world}.yaml"
        file.write_text(yaml.safe_dump(run))
        words, folder = ([str(file)], str(tmp_path / f"memory{world}")), tmp_path / f"logs{world}"
        running[world] = launch.Ranks(ranks.train_and_watch, words, world=world, folder=folder)
    losses = {}
    for world, started in running.items():
        started.wait(280.0).check()
        names = [job["name"] for job in run["jobs"]]
        losses[world] = {n: json.loads((tmp_path / f"out{world}" / n / "losses.json").read_text()) for n in names}
        for rank in range(world):
            seen = json.loads((tmp_path / f"memory{world}.{rank}").read_text())
            assert len(seen) == 300
            # Up to step 280: at their ends the jobs' last adapters are copied before they are written.
            assert max(seen[200:280]) <= 1.005 * max(seen[20:100])
    for name in losses[1]:
        one, two = np.array(losses[1][name]), np.array(losses[2][name])
        assert measured(float(np.abs(two / one - 1).max())) <= 0.02
