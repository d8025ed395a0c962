"""The base model is frozen: no gradient, no changed bit, and nothing trips over parameters without a gradient."""

import json

import pytest

from tests import launch, tiny
from tests.distributed import hooks
from tests.oracle.case import TOLERANCE, train_case


@pytest.mark.parametrize("fusion", [False, True], ids=["plain", "fusion asked for"])
def test_the_base_gets_no_gradient_even_where_gradient_fusion_is_asked_for(tmp_path, measured, fusion):
    """Row 4: Megatron's fusion reads ``main_grad`` of a weight, which a frozen one does not have."""
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", target_modules=["q_proj", "down_proj"])])
    case, kept = train_case(tmp_path), tmp_path / "kept.json"
    arguments = (["train", str(case.run_file)], str(kept), fusion)
    launch.Ranks(hooks.keep_base, arguments, world=1, folder=tmp_path / "logs").wait().check()
    base = json.loads(kept.read_text())
    assert base["parameters"] == 3 + 4 * 6
    assert base["changed"] == []
    assert base["with gradient"] == []
    assert measured(case.error(tmp_path / "out")) <= TOLERANCE


@pytest.mark.parametrize(
    ("world", "words"),
    [(1, []), (2, ["model.pipeline_model_parallel_size=2"]), (2, ["model.tensor_model_parallel_size=2"]), (2, [])],
    ids=["one process", "PP2", "TP2", "DP2"],
)
def test_the_logged_gradient_norm_is_peft_s_and_counts_each_parameter_once(tmp_path, measured, world, words):
    """Row 5: most parameters have no gradient at all; frozen ones are no part of the norm."""
    tiny.write_base(tmp_path / "base")
    jobs = [
        tiny.job(tmp_path, "some", layers_to_transform=[1], seed=1),
        tiny.job(tmp_path, "all", seed=2, target_modules=["linear_qkv", "linear_proj", "linear_fc2"]),
    ]
    tiny.write_run(tmp_path, jobs)
    case = train_case(tmp_path)
    launch.train(case.run_file, *words, world=world)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    for job in ("some", "all"):
        got = [line["grad_norm"] for line in lines if line["job"] == job]
        want = json.loads((case.answers / job / "grad_norms.json").read_text())
        assert len(got) == len(want) == 4
        assert measured(max(abs(a - b) / b for a, b in zip(got, want, strict=True))) <= TOLERANCE
