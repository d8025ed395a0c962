"""Prints what the planner must hold: bubbles, microbatches and planning time on the paper's workloads.

    python scripts/bench/planner.py                        # all workloads, half an hour
    python scripts/bench/planner.py --quick                # batch 16 alone
    python scripts/bench/planner.py --only xsum cnn        # these workloads alone

A line says `ok`, or what limits it: `samples` where a microbatch holds so few that some room is left,
`dependencies` where a stream of full microbatches has fewer positions than the distance between a job's steps needs.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from planner_workloads import LLAMA_70B, WORKLOADS, make_jobs

from lorafusion_megatron.scheduler.build import PlanOptions, build_schedule
from lorafusion_megatron.scheduler.cost import CostModel, Rates, equal_loads, split_loads
from lorafusion_megatron.scheduler.report import PlanReport, report_plan
from lorafusion_megatron.scheduler.split import best_layers

RATES = Rates(fixed=150e-6, layer_token=3.104e-6, output_token=4.094e-6)
COST = CostModel(
    forward=replace(RATES, layer_fixed=80e-6, layer_square=4.096e-11),
    backward=replace(RATES, layer_fixed=120e-6, layer_square=1.024e-10),
)
"""Llama 3.1 70B on an H100 as it was estimated when the figures of docs/scheduler.md were first taken; kept, so that
they can be compared. The estimate in the package has moved since, as GPUs were measured."""
SAMPLES = 2048
"""Samples of a job: 64 optimizer steps at batch 32, 256 at batch 8."""
TILE = 64


def plan(jobs: list, options: PlanOptions) -> tuple[PlanReport, float, float]:
    """The report and the wall and processor seconds of planning."""
    wall, processor = time.perf_counter(), time.process_time()
    schedule = build_schedule(jobs, options)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return report_plan(schedule, jobs, options), wall, processor


def options_for(stages: int, capacity: int, *, split: bool = False, **changes: object) -> PlanOptions:
    """Stages of equal work, or the best split of whole layers."""
    layers = LLAMA_70B.num_layers
    loads = split_loads(best_layers(COST, layers, stages)) if split else equal_loads(layers, stages)
    return PlanOptions(token_capacity=capacity, padding_multiple=TILE, stages=stages, cost=COST, loads=loads, **changes)  # type: ignore[arg-type]


def verdict(report: PlanReport) -> str:
    """Whether bubbles and microbatches hold, or what is in the way."""
    allowed = max(0.03 + report.split_bound, report.lemma_bound + 0.01)
    faults = []
    if report.bubble_share > allowed:
        faults.append(f"bubbles {100 * (report.bubble_share - allowed):.1f} points over")
    if report.microbatches > 1.02 * report.fewest_microbatches:
        room = report.fewest_microbatches >= report.lemma_positions * 1.5
        faults.append(f"more microbatches: {'samples' if room else 'dependencies'}")
    return "; ".join(faults) or "ok"


def workloads(names: list[str], batches: list[int], rows: list[dict], out: Path | None, effort: str) -> None:
    """A line for each workload, batch, capacity, number of stages, and split; ``out`` is written after each."""
    print(
        f"{'workload':9}{'batch':>6}{'capacity':>9}{'stages':>7}{'split':>7}{'bubbles':>9}{'of split':>9}"
        f"{'of lemma':>9}{'microb.':>8}{'tokens':>7}{'lengths':>8}{'lemma':>6}{'noops':>6}{'plan s':>7}"
    )
    for name, batch, capacity, stages in product(names, batches, (4096, 6144, 8192), (2, 4, 8)):
        jobs = make_jobs(WORKLOADS[name], SAMPLES // batch, batch)
        for split in (False, True) if stages == 4 and capacity == 8192 else (False,):
            report, wall, _ = plan(jobs, options_for(stages, capacity, split=split, effort=effort))
            print(
                f"{name:9}{batch:6}{capacity:9}{stages:7}{'whole' if split else 'equal':>7}{report.bubble_share:9.2%}"
                f"{report.split_bound:9.2%}{report.lemma_bound:9.2%}{report.microbatches:8}"
                f"{report.fewest_microbatches:7}{report.packing_bound:8}{report.lemma_positions:6}{report.noops:6}"
                f"{wall:7.2f}  {verdict(report)}",
                flush=True,
            )
            rows.append(
                {"workload": name, "batch": batch, "capacity": capacity, "stages": stages, "split": split}
                | {"planning_seconds": wall, "verdict": verdict(report)}
                | asdict(report)
            )
            if out:
                out.write_text(json.dumps(rows, indent=1))


def baselines() -> None:
    """The three schedules side by side where the paper compares them: 4 stages, batch 16."""
    for name in WORKLOADS:
        jobs = make_jobs(WORKLOADS[name], SAMPLES // 16, 16)
        shares = []
        for kind in ("staggered", "round_robin", "sequential"):
            report, _, _ = plan(jobs, options_for(4, 8192, schedule=kind))
            shares.append(f"{kind} {report.bubble_share:.2%} in {report.predicted_seconds:.0f} s")
        print(f"{name:9}", "; ".join(shares), flush=True)


def planning_time() -> None:
    """The peer's case: 4 jobs, batch 16, 4 stages, capacity 8,192; and a first window of 4 steps a job."""
    for name in WORKLOADS:
        for steps in (4, 40, 400):
            jobs = make_jobs(WORKLOADS[name], steps, 16)
            report, wall, processor = plan(jobs, options_for(4, 8192))
            over = report.microbatches / report.fewest_microbatches - 1
            print(
                f"{name:9}{64 * steps:7} samples planned in {wall:.2f} s ({processor:.2f} s of processor), "
                f"{over:+.1%} microbatches",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 16 alone")
    parser.add_argument(
        "--only", nargs="+", choices=list(WORKLOADS), help="these workloads, without the planning times"
    )
    parser.add_argument("--effort", choices=("normal", "high"), default="normal", help="of the workloads' plans")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    args = parser.parse_args()
    rows: list[dict] = []
    if not args.only:
        planning_time()
        baselines()
    workloads(args.only or list(WORKLOADS), [16] if args.quick else [8, 16, 32], rows, args.json, args.effort)
    held = sum(row["verdict"] == "ok" for row in rows)
    bubbles = sum("bubbles" not in row["verdict"] for row in rows)
    print(f"{bubbles} of {len(rows)} hold the bubble share, {held} also the number of microbatches")


if __name__ == "__main__":
    main()
