"""Jobs and topologies of awkward shapes: uneven replicas, batches of one, one job, rows that train nothing."""

import json
import pickle
import re
from collections import Counter

import pytest
import torch

from tests import launch, tiny
from tests.distributed import hooks
from tests.oracle.case import TOLERANCE, train_case

PP2, TP2 = "model.pipeline_model_parallel_size=2", "model.tensor_model_parallel_size=2"


def test_replicas_share_global_batches_that_they_do_not_divide(tmp_path, measured):
    """Row 23: three rows a step over two replicas, both of which have some, equal to PEFT training in one process."""
    tiny.write_base(tmp_path / "base")
    lengths = {"prompt": (20, 30), "completion": (20, 30)}
    jobs = [tiny.job(tmp_path, name, batch=3, steps=5, seed=seed, lengths=lengths) for seed, name in enumerate("ab")]
    tiny.write_run(tmp_path, jobs, token_capacity=64)
    case, kept = train_case(tmp_path), tmp_path / "schedules"
    ranks = launch.Ranks(
        hooks.keep_schedules, (["train", str(case.run_file)], str(kept)), world=2, folder=tmp_path / "logs"
    )
    ranks.wait().check()
    assert measured(case.error(tmp_path / "out")) <= TOLERANCE
    counts = {(job, step): [0, 0] for job in (0, 1) for step in range(1, 6)}
    for schedule in pickle.loads(kept.read_bytes()):
        for replica, stream in enumerate(schedule.replicas):
            for microbatch in stream:
                for sample in microbatch.samples:
                    counts[sample.job, sample.step][replica] += 1
    assert {sum(shares) for shares in counts.values()} == {3}
    assert all(all(shares) for shares in counts.values()), counts


@pytest.mark.parametrize(("world", "words"), [(2, []), (4, [TP2]), (4, [PP2])], ids=["DP2", "DP2 TP2", "DP2 PP2"])
def test_a_replica_without_a_sample_of_a_step_takes_the_step_all_the_same(tmp_path, measured, world, words):
    """One row a step: one of two replicas never has any of it, and no forward there applies the step before."""
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "one", batch=1, steps=7), tiny.job(tmp_path, "two", batch=2, seed=1)])
    case = train_case(tmp_path)
    launch.train(case.run_file, *words, world=world)
    assert measured(case.error(tmp_path / "out")) <= TOLERANCE


@pytest.mark.parametrize(("world", "words"), [(1, []), (2, [PP2]), (2, [TP2]), (2, [])], ids=["1", "PP2", "TP2", "DP2"])
def test_one_job_of_one_row_a_step_trains(tmp_path, measured, world, words):
    tiny.write_base(tmp_path / "base")
    tiny.write_run(tmp_path, [tiny.job(tmp_path, "only", batch=1, steps=3, rows=1)])
    case = train_case(tmp_path)
    launch.train(case.run_file, *words, world=world)
    assert measured(case.error(tmp_path / "out")) <= TOLERANCE


def test_a_loss_is_the_sum_over_label_tokens_by_their_number_however_they_are_split(tmp_path):
    """Row 24: 10 and 90 label tokens that don't fit into one microbatch; the mean of means would be far off."""
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, name, batch=batch, steps=2) for name, batch in (("both", 2), ("ten", 1), ("ninety", 1))]
    rows = [
        {"prompt_ids": [1, 2, 3], "completion_ids": [(7 * i) % 13 for i in range(10)]},
        {"prompt_ids": [4], "completion_ids": [(5 * i) % 64 for i in range(90)]},
    ]
    for job, chosen in zip(jobs, (rows, rows[:1], rows[1:]), strict=True):
        (tmp_path / "data" / f"{job['name']}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    kept = tmp_path / "schedules"
    words = ["train", str(tiny.write_run(tmp_path, jobs, token_capacity=92))]
    launch.Ranks(hooks.keep_schedules, (words, str(kept)), world=1, folder=tmp_path / "logs").wait().check()
    (schedule,) = pickle.loads(kept.read_bytes())
    first_step = [any((s.job, s.step) == (0, 1) for s in microbatch.samples) for microbatch in schedule.replicas[0]]
    assert sum(first_step) == 2
    both, ten, ninety = (tiny.losses(tmp_path / "out", job["name"])[0] for job in jobs)
    assert both == pytest.approx((10 * ten + 90 * ninety) / 100, rel=1e-6)
    assert abs(both - (ten + ninety) / 2) > 1e-3


@pytest.mark.parametrize(("world", "words"), [(1, []), (2, [PP2]), (2, [TP2])], ids=["one process", "PP2", "TP2"])
@pytest.mark.parametrize("recompute", ["null", "full"])
def test_b_of_every_layer_moves_at_the_first_step_and_a_from_the_second(tmp_path, world, words, recompute):
    """Rows 2 and 28: new adapters (B zero) over a frozen embedding and grouped queries, with recompute too."""
    tiny.write_base(tmp_path / "base")
    run_file = tiny.write_run(tmp_path, [tiny.job(tmp_path, "new", steps=3, start=False)])
    words = [*words, f"model.recompute_granularity={recompute}", "checkpoint.save_interval=1", "checkpoint.keep=9"]
    launch.train(run_file, *words, world=world)
    first, second, third = (tiny.read(tmp_path / "out" / "new" / f"step_{step}") for step in (1, 2, 3))
    assert len(first) == 4 * 7 * 2
    for name in first:
        if "lora_B" in name:
            assert first[name].count_nonzero() > 0.9 * first[name].numel(), name
        else:
            bound = 1 / first[name].shape[1] ** 0.5
            assert first[name].abs().max() <= bound + 2e-3, name
            assert not torch.equal(first[name], second[name]), name
        assert not torch.equal(second[name], third[name]), name


@pytest.mark.parametrize(("world", "words"), [(1, []), (2, [PP2]), (2, [TP2])], ids=["one process", "PP2", "TP2"])
def test_exactly_the_tensors_that_the_run_file_names_are_trained_and_exported(tmp_path, world, words):
    """Rows 7 and 8: q and v on the fused qkv leave k alone; all stages' layers are there."""
    tiny.write_base(tmp_path / "base")
    run_file = tiny.write_run(tmp_path, [tiny.job(tmp_path, "qv", target_modules=["q_proj", "v_proj", "down_proj"])])
    launch.train(run_file, *words, world=world)
    modules = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    assert set(tiny.adapter(tmp_path / "out", "qv")) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in range(4)
        for module in modules
        for factor in "AB"
    }


def test_rows_without_a_label_token_add_nothing_and_are_reported(tmp_path):
    """Row 31: a row cut until only its prompt is left; the job trains as if it were not there."""
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, name, batch=2, steps=3) for name in ("cut", "clean")]
    rows = [{"prompt_ids": [1 + i, 2, 3], "completion_ids": [4, 5 + i, 6]} for i in range(3)]
    long = {"prompt_ids": list(range(1, 12)), "completion_ids": [7, 8]}
    for job, chosen in zip(jobs, ([rows[0], long, rows[1], rows[2]], rows), strict=True):
        (tmp_path / "data" / f"{job['name']}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    jobs[0] |= {"max_length": 8}
    jobs[0]["dataset"]["truncate"] = True
    done = launch.train(tiny.write_run(tmp_path, jobs))
    assert "cut: 1 of 4 rows of" in done.outputs[0]
    assert "have no label token and train nothing" in done.outputs[0]
    assert "clean: " not in done.outputs[0]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["samples"], line["label_tokens"]) for line in lines if line["job"] == "cut"] == [
        (1, 3),
        (2, 6),
        (1, 3),
    ]
    start = tiny.read(tmp_path / "init" / "cut")
    assert not tiny.same_bits(tiny.adapter(tmp_path / "out", "cut"), start)


def test_the_log_and_the_trace_show_which_jobs_share_each_microbatch(tmp_path):
    """Row 29: a user sees whether jobs run together or in turn, and what that is worth."""
    tiny.write_base(tmp_path / "base")
    jobs = [tiny.job(tmp_path, name, batch=3, rows=9, seed=seed) for seed, name in enumerate("abc")]
    kept = tmp_path / "schedules"
    words = ["train", str(tiny.write_run(tmp_path, jobs, token_capacity=64)), PP2]
    done = launch.Ranks(hooks.keep_schedules, (words, str(kept)), world=2, folder=tmp_path / "logs").wait().check()
    (schedule,) = pickle.loads(kept.read_bytes())
    mixes = ["+".join("abc"[job] for job in sorted({s.job for s in m.samples})) for m in schedule.replicas[0]]
    wanted = Counter(mix or "no-op" for mix in mixes)
    assert len(wanted) > 3
    (line,) = [line for line in done.outputs[0].splitlines() if "jobs together:" in line]
    shown = dict(part.rsplit(" ", 1) for part in line.split("jobs together: ")[1].split(", "))
    assert {mix: int(count) for mix, count in shown.items()} == wanted
    (speedup,) = re.findall(r"^predicted ([0-9.]+) times as fast as one job after the other$", done.outputs[0], re.M)
    assert float(speedup) > 1.1
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    for stage in (0, 1):
        seen = ["+".join(e["args"]["samples"]) for e in events if e["ph"] == "X" and e["pid"] == stage]
        assert Counter(mix or "no-op" for mix in seen) == {mix: 2 * count for mix, count in wanted.items()}
