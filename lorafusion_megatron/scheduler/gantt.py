"""A picture of a simulated schedule: stages over time, coloured by job, optimizer steps marked."""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.simulate import Timeline
from lorafusion_megatron.types import Schedule

PNG_POSITIONS = 72
"""Microbatches that a PNG shows, from the first; more could not be told apart."""
HTML_POSITIONS = 4000
"""Microbatches that an HTML page shows; it can be zoomed."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One job's part of an op."""

    stage: int
    start: float
    stop: float
    bottom: float
    """Share of the lane's height below it, 0 to 1: jobs that share a microbatch share its height by tokens."""
    height: float
    job: int
    """-1 for a no-op."""
    backward: bool
    microbatch: int


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A job's optimizer step on a stage."""

    stage: int
    at: float
    job: int
    step: int


def job_colors(count: int) -> list[str]:
    """Distinct colours as ``#rrggbb``: hues a golden angle apart."""
    colors = []
    for index in range(count):
        red, green, blue = colorsys.hls_to_rgb((0.58 + 0.381966 * index) % 1.0, 0.52 - 0.1 * (index // 6 % 2), 0.62)
        colors.append(f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}")
    return colors


def draw_gantt(path: Path, schedule: Schedule, timeline: Timeline, names: Sequence[str], title: str) -> None:
    """Draw a timeline to ``.png`` (the first microbatches) or ``.html`` (one page by itself, to zoom and point at).

    Args:
        path: file to write; its suffix chooses.
        schedule: the plan.
        timeline: its simulation.
        names: per job index its name.
        title: heading.

    Raises:
        UserError: another suffix, or matplotlib is missing for a PNG.
    """
    if path.suffix not in (".png", ".html"):
        raise UserError(f"--gantt {path}", rule="the file must end in .png or .html", remedy="rename it", key="--gantt")
    limit = PNG_POSITIONS if path.suffix == ".png" else HTML_POSITIONS
    boxes, marks = lay_out(schedule, timeline, limit)
    if schedule.num_microbatches > limit:
        title = f"{title} — the first {limit} of {schedule.num_microbatches} microbatches"
    draw = _draw_png if path.suffix == ".png" else _write_html
    draw(path, boxes, marks, len(timeline.stages), names, title)


def lay_out(schedule: Schedule, timeline: Timeline, limit: int) -> tuple[list[Box], list[Mark]]:
    """Boxes and marks of the first ``limit`` microbatches (of the first replica)."""
    shares: list[list[tuple[int, float]]] = []
    for microbatch in schedule.replicas[0][:limit]:
        tokens: dict[int, int] = {}
        for sample in microbatch.samples:
            tokens[sample.job] = tokens.get(sample.job, 0) + sample.tokens
        total = sum(tokens.values())
        shares.append([(job, count / total) for job, count in tokens.items()] or [(-1, 1.0)])
    boxes, marks = [], []
    for stage, ops in enumerate(timeline.stages):
        left = dict.fromkeys(range(limit), timeline.pipeline.virtual_stages)
        for event in ops:
            position = event.op.microbatch
            if position >= limit:
                continue
            bottom = 0.0
            for job, share in shares[position]:
                boxes.append(
                    Box(
                        stage=stage,
                        start=event.start,
                        stop=event.stop,
                        bottom=bottom,
                        height=share,
                        job=job,
                        backward=event.op.backward,
                        microbatch=position,
                    )
                )
                bottom += share
            if event.op.backward:
                left[position] -= 1
                if not left[position]:
                    marks += [
                        Mark(stage=stage, at=event.stop, job=end.job, step=end.step)
                        for end in schedule.ends_at.get(position, ())
                    ]
    return boxes, marks


def _draw_png(
    path: Path, boxes: Sequence[Box], marks: Sequence[Mark], stages: int, names: Sequence[str], title: str
) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch, Rectangle
    except ImportError:
        raise UserError(
            f"--gantt {path}",
            rule="a PNG needs matplotlib, which is not installed",
            remedy="pip install 'lorafusion-megatron[plot]', or write .html",
            key="--gantt",
        ) from None
    colors = job_colors(len(names))
    figure = Figure(figsize=(18, 1.4 + 0.75 * stages), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for box in boxes:
        color = colors[box.job] if box.job >= 0 else "#dddddd"
        axes.add_patch(
            Rectangle(
                (box.start, box.stage + 0.1 + 0.8 * box.bottom),
                box.stop - box.start,
                0.8 * box.height,
                facecolor=color,
                alpha=1.0 if box.backward else 0.55,
                linewidth=0,
            )
        )
    edges = {(box.stage, box.start, box.stop, box.backward, box.microbatch) for box in boxes}
    for stage, start, stop, _, microbatch in edges:
        axes.add_patch(Rectangle((start, stage + 0.1), stop - start, 0.8, fill=False, edgecolor="white", linewidth=0.6))
        axes.text((start + stop) / 2, stage + 0.5, str(microbatch), ha="center", va="center", fontsize=5, color="#222")
    for mark in marks:
        axes.plot([mark.at], [mark.stage + 0.06], marker="v", markersize=5, color=colors[mark.job], markeredgecolor="k")
    axes.set_xlim(0, max((box.stop for box in boxes), default=1.0))
    axes.set_ylim(stages, 0)
    axes.set_yticks([stage + 0.5 for stage in range(stages)], [f"stage {stage}" for stage in range(stages)])
    axes.set_xlabel("predicted seconds (pale: forward, full: backward, white: idle)")
    axes.set_title(title, fontsize=10)
    handles: list[Patch | Line2D] = [Patch(color=color, label=name) for color, name in zip(colors, names, strict=True)]
    handles += [Patch(color="#dddddd", label="no-op")]
    handles += [Line2D([], [], marker="v", linestyle="", color="w", markeredgecolor="k", label="optimizer step")]
    axes.legend(
        handles=handles, ncols=min(8, len(handles)), loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8
    )
    figure.savefig(path)


def _write_html(
    path: Path, boxes: Sequence[Box], marks: Sequence[Mark], stages: int, names: Sequence[str], title: str
) -> None:
    data = {
        "title": title,
        "names": list(names),
        "colors": job_colors(len(names)),
        "stages": stages,
        "boxes": [
            [b.stage, round(b.start, 6), round(b.stop, 6), round(b.bottom, 3), round(b.height, 3), b.job,
             int(b.backward), b.microbatch]
            for b in boxes
        ],
        "marks": [[m.stage, round(m.at, 6), m.job, m.step] for m in marks],
    }  # fmt: skip
    # "</" would end the script element early, wherever it stands in a job's name.
    path.write_text(_PAGE.replace("@DATA@", json.dumps(data).replace("</", "<\\/")), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Schedule</title><style>
body { font: 13px system-ui, sans-serif; margin: 16px; color: #222; background: #fff }
h1 { font-size: 15px; font-weight: 600 } canvas { width: 100%; border: 1px solid #ddd; cursor: grab }
#legend span { display: inline-block; margin-right: 14px } #legend i { display: inline-block; width: 12px; height: 12px;
margin-right: 5px; vertical-align: -1px } #tip { height: 1.4em; margin: 6px 0; font-variant-numeric: tabular-nums }
</style></head><body><h1 id="title"></h1><div id="legend"></div><div id="tip">Wheel zooms, drag moves, pointing tells.
</div><canvas id="view"></canvas><script>
"use strict";
const data = @DATA@;
const view = document.getElementById("view"), tip = document.getElementById("tip"), context = view.getContext("2d");
document.getElementById("title").textContent = data.title;
const legend = document.getElementById("legend");
data.names.forEach((name, job) => {
  const item = document.createElement("span"), swatch = document.createElement("i");
  swatch.style.background = data.colors[job]; item.append(swatch, name); legend.append(item);
});
const note = document.createElement("span");
note.textContent = "pale: forward, full: backward, grey: no-op, white: idle, triangle: optimizer step";
legend.append(note);
const lane = 56, left = 60, end = data.boxes.reduce((most, box) => Math.max(most, box[2]), 0);
let from = 0, to = Math.min(end, data.boxes.length ? end * 60 / (1 + data.boxes[data.boxes.length - 1][7]) : 1);
function draw() {
  const ratio = devicePixelRatio || 1, width = view.clientWidth, height = lane * data.stages + 24;
  view.style.height = height + "px"; view.width = width * ratio; view.height = height * ratio;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const scale = (width - left) / (to - from), x = time => left + (time - from) * scale;
  context.font = "11px system-ui, sans-serif"; context.textAlign = "center"; context.textBaseline = "middle";
  for (const [stage, start, stop, bottom, share, job, backward, position] of data.boxes) {
    if (stop < from || start > to) continue;
    const top = stage * lane + 8, high = lane - 14;
    context.globalAlpha = backward ? 1 : 0.5; context.fillStyle = job < 0 ? "#ccc" : data.colors[job];
    context.fillRect(x(start), top + bottom * high, Math.max(0.5, (stop - start) * scale - 0.5), share * high);
    context.globalAlpha = 1;
    if (bottom === 0 && (stop - start) * scale > 24) {
      context.fillStyle = "#111"; context.fillText(position, x((start + stop) / 2), top + high / 2);
    }
  }
  for (const [stage, at, job] of data.marks) {
    if (at < from || at > to) continue;
    const top = stage * lane + 8; context.fillStyle = data.colors[job]; context.strokeStyle = "#000";
    context.beginPath(); context.moveTo(x(at), top + 3); context.lineTo(x(at) - 5, top - 6);
    context.lineTo(x(at) + 5, top - 6); context.closePath(); context.fill(); context.stroke();
  }
  context.fillStyle = "#fff"; context.fillRect(0, 0, left, height); context.fillStyle = "#222";
  for (let stage = 0; stage < data.stages; stage++) context.fillText("stage " + stage, left / 2, (stage + 0.5) * lane);
  for (let tick = 0; tick <= 10; tick++) {
    const time = from + (to - from) * tick / 10;
    context.fillText(time.toPrecision(4) + " s", Math.min(x(time), width - 24), height - 8);
  }
}
const timeAt = event => from + (event.offsetX - left) / (view.clientWidth - left) * (to - from);
view.addEventListener("wheel", event => {
  event.preventDefault();
  const middle = timeAt(event), factor = Math.exp(event.deltaY / 400);
  from = Math.max(0, middle - (middle - from) * factor); to = Math.min(end, middle + (to - middle) * factor); draw();
}, { passive: false });
view.addEventListener("mousemove", event => {
  if (event.buttons) {
    const span = to - from, shift = event.movementX / (view.clientWidth - left) * span;
    from = Math.max(0, Math.min(end - span, from - shift)); to = from + span; draw(); return;
  }
  const time = timeAt(event), stage = Math.floor(event.offsetY / lane);
  const hits = data.boxes.filter(box => box[0] === stage && box[1] <= time && time < box[2]);
  const jobs = hits.map(box => box[5] < 0 ? "no-op" : data.names[box[5]] + " " + Math.round(100 * box[4]) + " %");
  tip.textContent = hits.length ? (hits[0][6] ? "backward " : "forward ") + hits[0][7] + " on stage " + stage + ": "
    + jobs.join(", ") + "; " + (1000 * (hits[0][2] - hits[0][1])).toFixed(2) + " ms" : "idle";
});
addEventListener("resize", draw); draw();
</script></body></html>
"""
