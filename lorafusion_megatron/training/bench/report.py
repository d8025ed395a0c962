"""What the benchmark says: a table, one JSON object, a bar chart and the timelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...types import ModelSpec
from ..output import chrome_trace
from ..throughput import flops_per_token
from .measure import Outcome

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756")
"""Of the jobs; microbatches of several jobs are grey."""
MIXED = "#9d9d9d"


def best_of(outcomes: Sequence[Outcome], name: str) -> Outcome | None:
    """The fastest outcome among those of a baseline, or of the variant of that name."""
    ran = [o for o in outcomes if name in (o.variant.baseline_of, o.variant.name) and o.seconds]
    return max(ran, key=lambda outcome: outcome.rate, default=None)


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The ratios that the goals are about: ours over each other way."""
    both = best_of(outcomes, "both")
    out = {}
    for name in ("no adapters", "sequential", "round robin", "kernels only", "schedule only"):
        other = best_of(outcomes, name)
        if both is not None and other is not None:
            out[f"both / {name}"] = both.rate / other.rate
    return out


def rows(outcomes: Sequence[Outcome], spec: ModelSpec, gpus: int, peak: float) -> list[dict[str, Any]]:
    """One row a variant, as numbers."""
    return [
        {
            "variant": o.variant.name,
            "tokens_per_s": round(o.rate, 1),
            "tokens_per_s_per_gpu": round(o.rate / gpus, 1),
            "seconds": [round(s, 4) for s in o.seconds],
            "tokens": o.tokens,
            "padded_tokens": o.plan.padded_tokens,
            "microbatches": o.plan.schedule.num_microbatches,
            "noops": o.plan.noops,
            "optimizer_steps": len(o.plan.schedule.step_ends),
            "bubble_share": round(o.bubble_share, 4),
            "tflops_per_gpu": round(o.rate * flops_per_token(spec) / gpus / 1e12, 1),
            "flops_share": round(o.rate * flops_per_token(spec) / gpus / peak, 4) if peak else None,
            "peak_gib": [round(peak / 2**30, 2) for peak in o.peak_bytes],
            "clock_mhz": [reading.clock_mhz for reading in o.readings],
            "watts": [reading.watts for reading in o.readings],
            "failure": o.failure,
        }
        for o in outcomes
    ]


def table(numbers: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    watched = any(row["watts"] for row in numbers)
    head = ("variant", "tokens/s", "bubbles", "fill", "steps", "TFLOP/s/GPU", "of matmul", "peak GiB")
    head += ("MHz", "W") if watched else ()
    lines = [head]
    for row in numbers:
        if row["failure"]:
            lines.append((row["variant"], row["failure"], *[""] * (len(head) - 2)))
            continue
        share = row["flops_share"]
        clocks = ["/".join(f"{value:.0f}" for value in row[name]) for name in ("clock_mhz", "watts")]
        lines.append(
            (
                row["variant"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['bubble_share']:.1%}",
                f"{row['tokens'] / row['padded_tokens']:.1%}",
                str(row["optimizer_steps"]),
                f"{row['tflops_per_gpu']:.0f}",
                "" if share is None else f"{share:.1%}",
                "/".join(f"{peak:.1f}" for peak in row["peak_gib"]),
                *(clocks if watched else ()),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def trace(outcome: Outcome) -> dict[str, Any]:
    """The timeline of an outcome's last repeat for Perfetto."""
    spans = [
        {
            "stage": stage,
            "kind": span.kind,
            "name": f"{span.kind[0].upper()}{span.position} {_jobs(outcome, span.position) or 'no-op'}",
            "start": span.start,
            "stop": span.stop,
            "args": {},
        }
        for stage, spans in enumerate(outcome.spans)
        for span in spans
    ]
    return chrome_trace(spans, [f"stage {stage}" for stage in range(len(outcome.spans))])


def bar_chart(path: Path, title: str, results: Mapping[str, Sequence[Outcome]]) -> None:
    """Tokens per second, a group of bars a workload; of each baseline its best size."""
    pyplot = _pyplot()
    order = ("sequential", "round robin", "kernels only", "schedule only", "both", "no adapters")
    names = [name for name in order if any(best_of(outcomes, name) for outcomes in results.values())]
    figure, axes = pyplot.subplots(figsize=(max(7.0, 2.2 * len(results)), 4.2), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        best = [best_of(outcomes, name) for outcomes in results.values()]
        heights = [outcome.rate if outcome else 0.0 for outcome in best]
        where = [i + place * width for i in range(len(results))]
        bars = axes.bar(where, heights, width, label=name, color="#bbbbbb" if name == "no adapters" else None)
        axes.bar_label(bars, [f"{height / 1000:.1f}" if height else "" for height in heights], fontsize=7, padding=2)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(results))], list(results))
    axes.set_ylabel("tokens/s (labels: thousands)")
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.3)
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    _save(figure, path)


def timeline_chart(path: Path, title: str, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Stages over time: forward light, backward dark, coloured by job; the same stretch of time for all."""
    pyplot = _pyplot()
    shown = [outcome for outcome in outcomes if outcome.spans]
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(11.0, 0.6 + 0.95 * len(shown)), layout="constrained", sharex=True, squeeze=False
    )
    for axes, outcome in zip(panels[:, 0], shown, strict=True):
        stages = len(outcome.spans)
        for stage, spans in enumerate(outcome.spans):
            for span in spans:
                if span.start < seconds and not span.noop:
                    color = _color(outcome, span.position)
                    axes.broken_barh(
                        [(span.start, min(span.stop, seconds) - span.start)], (stages - 1 - stage + 0.05, 0.9),
                        color=color, alpha=1.0 if span.kind == "backward" else 0.55, linewidth=0,
                    )  # fmt: skip
        axes.set_yticks([stages - 0.5 - stage for stage in range(stages)], [f"stage {s}" for s in range(stages)])
        axes.set_ylim(0, stages)
        axes.set_xlim(0, seconds)
        axes.set_title(
            f"{outcome.variant.name}: {outcome.rate:,.0f} tokens/s, {outcome.bubble_share:.1%} idle",
            fontsize=8, loc="left",
        )  # fmt: skip
        axes.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("seconds (colour: job, grey: several; light: forward, dark: backward)", fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _jobs(outcome: Outcome, position: int) -> str:
    samples = outcome.plan.schedule.replicas[0][position].samples
    return "+".join(dict.fromkeys(str(sample.job) for sample in samples))


def _color(outcome: Outcome, position: int) -> str:
    jobs = _jobs(outcome, position)
    return MIXED if "+" in jobs else COLORS[int(jobs or 0) % len(COLORS)]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    _pyplot().close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError(
            "matplotlib is not installed",
            rule="the pictures are drawn with it",
            remedy="pip install matplotlib, or leave --out away",
            key="--out",
        ) from None
    return pyplot
