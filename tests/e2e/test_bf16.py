"""A bf16 base: every topology trains what fp32 trains, within what rounding to bf16 costs."""

import pytest
import torch

from tests import launch, tiny

PP2, TP2, SP = (
    "model.pipeline_model_parallel_size=2",
    "model.tensor_model_parallel_size=2",
    "model.sequence_parallel=true",
)
TOPOLOGIES = {
    "one process": (1, []),
    "PP2": (2, [PP2]),
    "TP2 SP": (2, [TP2, SP]),
    "DP2": (2, []),
    "PP2 TP2 full recompute": (4, [PP2, TP2, "model.recompute_granularity=full"]),
}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """A run in fp32: two jobs, one with dropout."""
    folder = tmp_path_factory.mktemp("bf16")
    tiny.write_base(folder / "base")
    optimizer = {"adam_eps": 1e-3}  # with a small epsilon the first steps are signs, of rounding where gradients vanish
    jobs = [
        tiny.job(folder, "plain", r=8, alpha=16.0, batch=4, steps=6, seed=1, optimizer=optimizer),
        tiny.job(folder, "dropped", r=4, batch=3, steps=5, seed=2, lora_dropout=0.1, optimizer=optimizer),
    ]
    launch.train(tiny.write_run(folder, jobs))
    return folder


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bf16_trains_what_fp32_trains_within_its_rounding(fp32, tmp_path, measured, topology):
    world, words = TOPOLOGIES[topology]
    out = tmp_path / "out"
    launch.train(fp32 / "run.yaml", "base_model.dtype=bfloat16", f"checkpoint.save={out}", *words, world=world)
    for name in ("plain", "dropped"):
        start, want, got = tiny.read(fp32 / "init" / name), tiny.adapter(fp32 / "out", name), tiny.adapter(out, name)
        assert {tensor.dtype for tensor in got.values()} == {torch.float32}
        assert measured(tiny.update_error(got, want, start)) <= 0.1
        for a, b in zip(tiny.losses(out, name), tiny.losses(fp32 / "out", name), strict=True):
            assert a == pytest.approx(b, rel=5e-3)
