"""What is equal to the last bit: runs of one topology, ranks that hold the same thing, jobs beside a bad one."""

import json
from collections import defaultdict

import pytest

from tests import launch, tiny
from tests.distributed import hooks

PP2, TP2 = "model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=2"
SP = "model.sequence_parallel=true"


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """Two jobs with dropout, of different ranks and ends."""
    folder = tmp_path_factory.mktemp("bits")
    tiny.write_base(folder / "base")
    jobs = [
        tiny.job(folder, "first", seed=1, batch=3, steps=7, lora_dropout=0.1),
        tiny.job(folder, "second", r=8, batch=2, steps=9, seed=2, lora_dropout=0.2, target_modules=["linear_qkv"]),
    ]
    return tiny.write_run(folder, jobs)


@pytest.mark.parametrize(
    ("world", "words"),
    [(1, []), (2, [PP2]), (2, []), (4, [PP2, TP2, SP])],
    ids=["one process", "PP2", "DP2", "PP2 TP2 SP"],
)
def test_two_runs_of_one_topology_are_equal_to_the_last_bit(run_file, tmp_path, world, words):
    for out in ("one", "two"):
        launch.train(run_file, f"checkpoint.save={tmp_path / out}", *words, world=world)
    for name in ("first", "second"):
        assert tiny.same_bits(tiny.adapter(tmp_path / "one", name), tiny.adapter(tmp_path / "two", name))
        assert tiny.losses(tmp_path / "one", name) == tiny.losses(tmp_path / "two", name)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (2, [PP2, "model.virtual_pipeline_model_parallel_size=2", "model.recompute_granularity=full"]),
        (4, [PP2, TP2, SP]),
        (2, []),
    ],
    ids=["interleaved, recomputed", "PP2 TP2 SP", "DP2"],
)
def test_a_rehearsed_microbatch_leaves_no_bit_behind(run_file, tmp_path, world, words):
    launch.train(run_file, f"checkpoint.save={tmp_path / 'plain'}", *words, world=world)
    rehearsed = [str(run_file), f"checkpoint.save={tmp_path / 'rehearsed'}", *words]
    launch.Ranks(hooks.rehearse_on_cpu, (rehearsed,), world=world, folder=tmp_path / "logs").wait().check()
    for name in ("first", "second"):
        assert tiny.same_bits(tiny.adapter(tmp_path / "plain", name), tiny.adapter(tmp_path / "rehearsed", name))
        assert tiny.losses(tmp_path / "plain", name) == tiny.losses(tmp_path / "rehearsed", name)


@pytest.mark.parametrize(
    ("world", "words"),
    [(2, []), (2, [TP2]), (2, [TP2, SP]), (4, [TP2, SP]), (4, [PP2, TP2, SP]), (4, [PP2])],
    ids=["DP2", "TP2", "TP2 SP", "DP2 TP2 SP", "PP2 TP2 SP", "PP2 DP2"],
)
def test_ranks_that_hold_the_same_factor_hold_the_same_bits_after_the_last_step(run_file, tmp_path, world, words):
    """Rows 1 and 23: the replicated factors under TP with and without SP, everything under DP."""
    file = tmp_path / "held.json"
    command = ["train", str(run_file), f"checkpoint.save={tmp_path / 'out'}", *words]
    launch.Ranks(hooks.keep_digests, (command, str(file)), world=world, folder=tmp_path / "logs").wait().check()
    ranks = json.loads(file.read_text())
    assert len(ranks) == world
    replicated, whole = defaultdict(set), defaultdict(set)
    for rank in ranks:
        assert set(rank["held"]) == {"first", "second"}
        for name, held in rank["held"].items():
            assert held["replicated"][0] > 0
            assert held["split"][0] > 0
            replicated[rank["pp"], name].add(held["replicated"][1])
            whole[rank["pp"], rank["tp"], name].add((held["replicated"][1], held["split"][1]))
    assert {len(kinds) for kinds in replicated.values()} == {1}
    assert {len(kinds) for kinds in whole.values()} == {1}
    stages, tensor = (2 if PP2 in words else 1), (2 if TP2 in words else 1)
    assert len({digest for kinds in whole.values() for digest in kinds}) == 2 * stages * tensor


@pytest.mark.parametrize("kind", ["inf once", "nan once", "inf always", "weights"])
@pytest.mark.parametrize(("world", "words"), [(1, []), (2, [PP2])], ids=["one process", "PP2"])
def test_a_job_with_numbers_that_are_not_finite_changes_no_bit_of_another(run_file, tmp_path, kind, world, words):
    """Row 18: the bad job skips those steps and says so, and stops after three of them in a row."""
    launch.train(run_file, f"checkpoint.save={tmp_path / 'good'}", *words, world=world)
    command = ["train", str(run_file), f"checkpoint.save={tmp_path / 'bad'}", *words]
    spoiled = launch.Ranks(hooks.spoil_steps, (command, 0, kind), world=world, folder=tmp_path / "logs").wait().check()
    assert tiny.same_bits(tiny.adapter(tmp_path / "bad", "second"), tiny.adapter(tmp_path / "good", "second"))
    assert tiny.losses(tmp_path / "bad", "second") == tiny.losses(tmp_path / "good", "second")
    lines = [json.loads(line) for line in (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line["step"] for line in lines if line["job"] == "first" and line["skipped"]]
    assert not any(line["skipped"] for line in lines if line["job"] == "second")
    assert f"first step {skipped[0]}/7" in spoiled.outputs[0]
    assert "SKIPPED: the gradient is not finite" in spoiled.outputs[0]
    start = tiny.read(run_file.parent / "init" / "first")
    kept = tiny.adapter(tmp_path / "bad", "first")
    if kind in ("inf once", "nan once"):
        assert skipped == [2]
    else:
        assert skipped[:3] == [2, 3, 4]
        assert "first is stopped" in spoiled.outputs[0]
    if kind != "weights":
        assert all(tensor.isfinite().all() for tensor in kept.values())
        assert not tiny.same_bits(kept, start)


def test_an_ended_job_is_not_touched_by_the_steps_of_the_others(tmp_path):
    """Row 19: what a job has after its last step stays, to the last bit, while another goes on for ten more."""
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, "early", steps=2, seed=1), tiny.job(tmp_path, "late", steps=12, seed=2)]
    kept = tmp_path / "held.json"
    command = ["train", str(tiny.write_run(tmp_path, jobs)), PP2]
    launch.Ranks(hooks.keep_digests, (command, str(kept)), world=2, folder=tmp_path / "logs").wait().check()
    assert len(tiny.losses(tmp_path / "out", "early")) == 2
    assert len(tiny.losses(tmp_path / "out", "late")) == 12
    for rank in json.loads(kept.read_text()):
        for held in rank["held"].values():
            assert held["whole"] == held["after its last step"]
