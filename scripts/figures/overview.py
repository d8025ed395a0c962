"""Draws docs/images/overview.svg: three jobs on four pipeline stages, one after the other and together.

Both timelines are real: the package's planner made them and its simulator ran them.

    python scripts/figures/overview.py [FILE]
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from lorafusion_megatron.scheduler.build import build_schedule
from lorafusion_megatron.scheduler.gantt import lay_out
from lorafusion_megatron.scheduler.options import PlanOptions
from lorafusion_megatron.scheduler.report import simulate_schedule
from lorafusion_megatron.scheduler.simulate import Timeline
from lorafusion_megatron.types import GlobalBatch, Sample, Schedule

COLORS = ["#2f6fb0", "#e08a1e", "#3f9a5d"]
NAMES = ["job A, short samples", "job B, mixed", "job C, long samples"]
MEDIANS, STEPS, BATCH, STAGES, CAPACITY = [350, 800, 1500], 3, 8, 4, 4096
OUTPUT = Path(__file__).parents[2] / "docs/images/overview.svg"


def make_jobs() -> list[list[GlobalBatch]]:
    """Three jobs whose samples differ in length."""
    rng = np.random.default_rng(3)
    jobs = []
    for job, median in enumerate(MEDIANS):
        steps = []
        for step in range(1, STEPS + 1):
            lengths = np.clip(median * np.exp(0.5 * rng.standard_normal(BATCH)), 64, CAPACITY).astype(int)
            samples = tuple(
                Sample(job=job, step=step, position=i, row=i, tokens=int(n), batch_label_tokens=int(lengths.sum()))
                for i, n in enumerate(lengths)
            )
            steps.append(GlobalBatch(job=job, step=step, samples=samples, label_tokens=int(lengths.sum())))
        jobs.append(steps)
    return jobs


def draw(axes: Axes, schedule: Schedule, timeline: Timeline, seconds: float) -> None:
    """One timeline: a lane a stage, forwards light and backwards dark, optimizer steps as ticks."""
    boxes, marks = lay_out(schedule, timeline, schedule.num_microbatches)
    for stage in range(STAGES):
        axes.add_patch(Rectangle((0, stage + 0.08), timeline.seconds, 0.84, color="#e6e6e6", linewidth=0))
    for box in boxes:
        if box.job < 0:
            continue
        axes.add_patch(
            Rectangle(
                (box.start, box.stage + 0.08 + 0.84 * box.bottom),
                box.stop - box.start,
                0.84 * box.height,
                facecolor=COLORS[box.job],
                alpha=1.0 if box.backward else 0.55,
                edgecolor="white",
                linewidth=0.5,
            )
        )
    for mark in marks:
        axes.plot([mark.at, mark.at], [mark.stage + 0.02, mark.stage + 0.98], color="black", linewidth=1.3)
        axes.plot(
            [mark.at], [mark.stage + 0.04], marker="v", markersize=3.5, color=COLORS[mark.job], mec="black", mew=0.4
        )
    axes.set_xlim(0, seconds * 1.002)
    axes.set_ylim(STAGES, 0)
    axes.set_yticks([stage + 0.5 for stage in range(STAGES)], [f"stage {stage}" for stage in range(STAGES)])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    """Plan, simulate, draw."""
    matplotlib.rcParams |= {"svg.hashsalt": "overview", "font.family": "sans-serif", "svg.fonttype": "none"}
    jobs = make_jobs()
    timelines = {}
    for kind in ("sequential", "staggered"):
        options = PlanOptions(token_capacity=CAPACITY, stages=STAGES, schedule=kind)
        schedule = build_schedule(jobs, options)
        timelines[kind] = (schedule, simulate_schedule(schedule, options))
    longest = max(timeline.seconds for _, timeline in timelines.values())
    figure = Figure(figsize=(11, 4.7), layout="constrained")
    alone, together = figure.subplots(2, 1)
    for axes, kind, words in (
        (alone, "sequential", "One job after the other: the pipeline drains at every optimizer step"),
        (together, "staggered", "Together: while one job's step finishes, the others fill the stages"),
    ):
        schedule, timeline = timelines[kind]
        draw(axes, schedule, timeline, longest)
        axes.set_title(f"{words}. Idle: {timeline.bubble_share:.0%}", loc="left", fontsize=11)
        axes.set_xticks([])
    together.set_xlabel("time →", loc="left")
    patches = [Patch(color=color, label=name) for color, name in zip(COLORS, NAMES, strict=True)]
    patches += [
        Patch(facecolor="#777777", alpha=0.55, label="forward"),
        Patch(facecolor="#777777", label="backward"),
        Patch(color="#e6e6e6", label="idle"),
        Line2D([], [], color="black", marker="v", markersize=4, label="optimizer step"),
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    ratio = timelines["sequential"][1].seconds / timelines["staggered"][1].seconds
    together.text(
        timelines["staggered"][1].seconds, STAGES / 2, f"  the same steps,\n  {ratio:.2f} times as fast", va="center"
    )
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=110)
    print(f"wrote {output}: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
