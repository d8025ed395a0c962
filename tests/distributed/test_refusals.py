"""What is not supported, or can't work, ends training on all ranks at once: one line, status 2, nothing written."""

import json
from pathlib import Path

import pytest

from tests import launch, tiny


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith("rank")}


REFUSED = {
    "context parallelism": (2, ["model.context_parallel_size=2"], "context parallelism is not supported yet"),
    "expert parallelism": (2, ["model.expert_model_parallel_size=2"], "base models with experts are not supported"),
    "expert tensor parallelism": (2, ["model.expert_tensor_parallel_size=2"], "base models with experts are"),
    "more stages than layers": (8, ["model.pipeline_model_parallel_size=8"], "every stage needs a layer"),
    "heads that do not divide": (4, ["model.tensor_model_parallel_size=4"], "key/value heads"),
    "ranks that fill no replica": (2, ["model.pipeline_model_parallel_size=3"], "must be a multiple of 3"),
    "a row longer than a microbatch": (2, ["runtime.token_capacity=16"], "token_capacity = 16"),
    "a target that matches nothing": (2, ["jobs.first.peft.target_modules=[q_porj]"], "q_porj"),
    "an unknown key": (2, ["runtime.token_capasity=64"], "token_capacity"),
    "triton without a GPU": (2, ["runtime.lora_backend=triton"], "need a GPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_can_not_be_is_refused_on_every_rank_before_anything_is_written(tmp_path, case):
    """Rows 25, 26 and 12: context parallelism and odd splits are refused, not computed wrongly."""
    world, overrides, words = REFUSED[case]
    run_file = tiny.tiny_run(tmp_path / "run")
    before = _files(tmp_path)
    ranks = launch.Ranks(launch.command, (["train", str(run_file), *overrides],), world=world, folder=tmp_path / "logs")
    done = ranks.wait(60.0)
    assert set(done.statuses) == {2}
    lines = [line for output in done.outputs for line in output.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("lorafusion-megatron: error: ")
    assert words in lines[0]
    assert _files(tmp_path) == before


@pytest.mark.parametrize("change", [{"num_local_experts": 8}, {"model_type": "mixtral", "num_local_experts": 8}])
def test_a_base_model_with_experts_is_refused(tmp_path, change):
    """Row 27."""
    run_file = tiny.tiny_run(tmp_path / "run")
    config = tmp_path / "run" / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    ranks = launch.Ranks(launch.command, (["train", str(run_file)],), world=1, folder=tmp_path / "logs")
    done = ranks.wait(60.0)
    assert done.statuses == (2,)
    (line,) = done.outputs[0].splitlines()
    assert "base_model.path" in line
    assert "experts" in line or "mixtral" in line
    assert not (tmp_path / "run" / "out").exists()
