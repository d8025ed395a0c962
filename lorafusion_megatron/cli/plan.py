"""``plan``: the schedule of a run before it starts, beside the schedules that other systems use."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafusion_megatron.errors import UserError

if TYPE_CHECKING:
    from lorafusion_megatron.config import RunConfig
    from lorafusion_megatron.data import GlobalBatches
    from lorafusion_megatron.scheduler.options import PlanOptions
    from lorafusion_megatron.scheduler.report import PlanReport
    from lorafusion_megatron.types import GlobalBatch, ModelSpec, Schedule

FIGURES = ("microbatches", "noops", "fill", "predicted_seconds", "bubble_share", "split_bound", "lemma_bound")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("run_file", metavar="RUN.yaml", help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the run file")
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help='plan for {"job": [tokens of each row, …]} instead of the data'
    )
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="data-parallel replicas (default 1)")
    parser.add_argument("--cost-model", type=Path, metavar="FILE", help="measured rates instead of an H100's estimate")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="RUN_DIR",
        help="fit the rates to the timeline of a run that was made, write RUN_DIR/cost_model.json and plan with it",
    )
    parser.add_argument("--gantt", type=Path, metavar="FILE", help="draw the first window to a .png or .html")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the first window for Perfetto (.json)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@dataclass(frozen=True)
class _Work:
    """What is to be planned."""

    run: "RunConfig"
    spec: "ModelSpec"
    sources: Mapping[int, "GlobalBatches"]
    options: "PlanOptions"
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [job.name for job in self.run.jobs]


@dataclass(frozen=True)
class _Planned:
    """A run planned with one kind of schedule."""

    report: "PlanReport"
    first: "Schedule"
    windows: int
    seconds: float


def run(args: argparse.Namespace) -> int:
    """Plan the whole run with each kind of schedule and print the figures; 0 unless something is wrong."""
    from lorafusion_megatron.scheduler.options import SCHEDULES

    _check_options(args)
    work = _load(args)
    with _Bar(len(SCHEDULES) * sum(source.num_steps for source in work.sources.values())) as bar:
        planned = {kind: _plan(work, kind, bar) for kind in SCHEDULES}
    if args.json:
        figures = {kind: {name: getattr(plan.report, name) for name in FIGURES} for kind, plan in planned.items()}
        print(json.dumps({"planning_seconds": planned["staggered"].seconds, **figures}))
    else:
        print(_summary(work, planned))
    # The figures are out by now, whatever happens to the pictures.
    _draw(args, work, planned[work.run.runtime.schedule])
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raise before any work where something would end it after a file was written."""
    if args.replicas < 1:
        raise UserError(f"replicas {args.replicas}", rule="it must be at least 1", remedy="raise it", key="--replicas")
    for path, key, suffixes in ((args.gantt, "--gantt", (".png", ".html")), (args.trace, "--trace", (".json",))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            rule = f"its name must end in {' or '.join(suffixes)}"
            raise UserError(str(path), rule=rule, remedy="rename it", key=key)
        with _written(path, key):
            if not path.parent.is_dir():
                raise UserError(str(path), rule="its folder must exist", remedy=f"make {path.parent}", key=key)
            if path.is_dir():
                rule = "it must be a file, and is a folder"
                raise UserError(str(path), rule=rule, remedy="give another name", key=key)


@contextmanager
def _written(path: Path, key: str) -> Iterator[None]:
    """Turn what the system says against a picture's file into a line of its own."""
    try:
        yield
    except OSError as error:
        given = f"{path} can't be written ({error.strerror or error})"
        raise UserError(given, rule="the picture must be writable", remedy="give another place", key=key) from None


def _load(args: argparse.Namespace) -> _Work:
    """Read the run file, the model's dimensions and the lengths."""
    from lorafusion_megatron.config import load_run
    from lorafusion_megatron.models.config import read_model_spec
    from lorafusion_megatron.scheduler.cost import CostModel
    from lorafusion_megatron.training.calibrate import calibrate, save_rates
    from lorafusion_megatron.training.inputs import job_batches, load_inputs, row_cache
    from lorafusion_megatron.training.memory import describe, predict_run_memory
    from lorafusion_megatron.training.planning import (
        choose_layers,
        cost_model,
        expected_tile,
        padding_multiple,
        plan_options,
    )

    run_config = load_run(args.run_file, args.overrides)
    padding = padding_multiple(run_config.runtime, expected_tile(run_config.runtime))
    notes: tuple[str, ...] = ()
    if args.lengths is None:
        inputs = load_inputs(run_config, row_cache(run_config, write=False), padding_multiple=padding)
        spec, datasets, notes = inputs.spec, dict(inputs.datasets), inputs.notes
    else:
        spec = read_model_spec(run_config.base_model.path)
        datasets = dict(enumerate(_given_lengths(args.lengths, run_config, padding)))
        notes = tuple(
            f"{job.name}: a global batch of {job.train.global_batch_size} takes some of the {len(rows)} rows more than "
            "once"
            for job, rows in zip(run_config.jobs, datasets.values(), strict=True)
            if job.train.global_batch_size > len(rows)
        )
    if args.calibrate:
        file = args.calibrate / "cost_model.json"
        cost, error = calibrate(args.calibrate)
        notes += (f"{file}: rates fitted to {args.calibrate}, median error {error:.1%}; use it as runtime.cost_model",)
    else:
        cost = CostModel.load(args.cost_model) if args.cost_model else cost_model(run_config, spec)
    layers, advice = choose_layers(run_config, spec, cost, datasets)
    options = plan_options(run_config, layers=layers, replicas=args.replicas, padding_multiple=padding, cost=cost)
    sources = {index: job_batches(run_config, index, rows) for index, rows in datasets.items()}
    if args.calibrate:  # all that may be wrong was looked at
        save_rates(cost, file)
    memory = describe(predict_run_memory(run_config, spec, layers)).splitlines()
    return _Work(run_config, spec, sources, options, (*notes, *advice, *(f"memory, {line}" for line in memory)))


@dataclass(frozen=True)
class _GivenLengths:
    """Rows of which only the lengths are known: what `GlobalBatches` reads of a data set."""

    lengths: np.ndarray

    @property
    def label_tokens(self) -> np.ndarray:
        """Every token after the first counts, and at least one."""
        return np.maximum(1, self.lengths - 1)

    def __len__(self) -> int:
        return len(self.lengths)


def _given_lengths(path: Path, run_config: "RunConfig", padding: int) -> Iterator[_GivenLengths]:
    """The rows' lengths of each job of the run, from a JSON file."""
    from lorafusion_megatron.types import padded

    rule = '--lengths takes a JSON object {"job": [length in tokens, …]} with every job of the run'
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error})", rule=rule, remedy="check it", key="--lengths") from None
    names = [job.name for job in run_config.jobs]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        found = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise UserError(f"{path} holds {found}", rule=rule, remedy=f"give exactly {', '.join(names)}", key="--lengths")
    capacity = run_config.runtime.token_capacity
    for name in names:
        lengths = given[name]
        valid = isinstance(lengths, list) and lengths and all(type(n) is int and n > 0 for n in lengths)
        if not valid:
            raise UserError(
                f"the lengths of {name}", rule="they are whole numbers from 1, at least one", remedy="mend them",
                key="--lengths",
            )  # fmt: skip
        if padded(max(lengths), padding) > capacity:
            raise UserError(
                f"a sample of {max(lengths)} tokens in {name}",
                rule=f"a microbatch holds {capacity} tokens in multiples of {padding}",
                remedy="raise runtime.token_capacity or shorten the sample",
                key="--lengths",
            )
        yield _GivenLengths(np.array(lengths, dtype=np.int64))


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises ValueError where a key comes twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in found if names.count(name) > 1)!r} comes twice")
    return found


def _plan(work: _Work, kind: str, bar: "_Bar") -> _Planned:
    """Plan all windows of the run with one kind of schedule, as training would."""
    from lorafusion_megatron.scheduler.build import build_schedule
    from lorafusion_megatron.scheduler.report import combine_reports, report_plan

    options = replace(work.options, schedule=kind)
    reports, first, seconds = [], None, 0.0
    for batches in _windows(work):
        started = time.perf_counter()
        schedule = build_schedule(batches, options)
        seconds += time.perf_counter() - started
        first = first or schedule
        reports.append(report_plan(schedule, batches, options))
        bar.advance(sum(map(len, batches)))
    assert first is not None, "a run has at least one step"
    return _Planned(combine_reports(reports), first, len(reports), seconds)


def _windows(work: _Work) -> Iterator[list[list["GlobalBatch"]]]:
    """The windows that training plans, one after another; nothing of the earlier ones is kept."""
    from lorafusion_megatron.training.windows import least_tokens, window_shares

    done = dict.fromkeys(work.sources, 0)
    tokens = {
        index: float(source.dataset.lengths.mean()) * source.global_batch_size for index, source in work.sources.items()
    }
    budget = float(work.run.runtime.max_window_microbatches * work.options.token_capacity * work.options.replicas)
    while True:
        left = {i: source.num_steps - done[i] for i, source in work.sources.items() if source.num_steps > done[i]}
        if not left:
            return
        until_eval = {index: work.run.jobs[index].eval.steps_until_next(done[index]) for index in left}
        per_step = {index: tokens[index] for index in left}
        shares = window_shares(left, per_step, budget, until_eval, least_tokens(work.options))
        yield [[work.sources[i].batch(done[i] + 1 + step) for step in range(count)] for i, count in shares.items()]
        for index, count in shares.items():
            done[index] += count


def _draw(args: argparse.Namespace, work: _Work, plan: _Planned) -> None:
    """Write the pictures that were asked for."""
    if args.gantt is None and args.trace is None:
        return
    from lorafusion_megatron.scheduler.gantt import draw_gantt
    from lorafusion_megatron.scheduler.report import simulate_schedule
    from lorafusion_megatron.scheduler.trace import write_trace

    timeline = simulate_schedule(plan.first, work.options)
    kind = work.run.runtime.schedule
    if args.gantt is not None:
        which = f", window 1 of {plan.windows}" if plan.windows > 1 else ""
        title = f"{kind}{which}: {timeline.bubble_share:.1%} idle"
        with _written(args.gantt, "--gantt"):
            draw_gantt(args.gantt, plan.first, timeline, work.names, title)
    if args.trace is not None:
        with _written(args.trace, "--trace"):
            write_trace(args.trace, plan.first, timeline, work.names)


def _summary(work: _Work, planned: Mapping[str, _Planned]) -> str:
    """Model, layout, a line per job, a line per schedule, notes."""
    options, chosen = work.options, planned["staggered"].report
    layers = [round(load.layers) for load in options.chunk_loads]
    jobs = [("job", "rows", "tokens", "batch", "steps", "microbatches")]
    for index, source in work.sources.items():
        jobs.append(
            (
                work.names[index],
                str(len(source.dataset)),
                str(chosen.job_tokens.get(index, 0)),
                str(source.global_batch_size),
                str(source.num_steps),
                str(chosen.job_microbatches.get(index, 0)),
            )
        )
    kinds = [("schedule", "microbatches", "no-ops", "fill", "predicted s", "bubbles", "of split", "of lemma")]
    for kind, plan in planned.items():
        r = plan.report
        shares = [f"{share:.1%}" for share in (r.bubble_share, r.split_bound, r.lemma_bound)]
        kinds.append((kind, str(r.microbatches), str(r.noops), f"{r.fill:.1%}", f"{r.predicted_seconds:.4g}", *shares))
    plan = planned["staggered"]
    # Padding left out: how much of it there is depends on the plan.
    fewest = -(-sum(chosen.job_tokens.values()) // options.token_capacity)
    lines = [
        f"layout  {options.stages} stages of layers {layers}, {options.replicas} replicas, token capacity "
        f"{options.token_capacity}, each job's rows padded to {options.padding_multiple}",
        f"planned {plan.windows} windows in {plan.seconds:.2f} s; at least {fewest} microbatches "
        f"by tokens, {chosen.packing_bound} by lengths, {chosen.lemma_positions} positions by dependencies",
        "",
        *_aligned(jobs),
        "",
        *_aligned(kinds),
    ]
    if work.notes:
        lines += ["", *(f"note: {note}" for note in work.notes)]
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


class _Bar:
    """A progress bar on stderr, from the first second on."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.progress: Any = None

    def advance(self, steps: int) -> None:
        """``steps`` more optimizer steps are planned."""
        self.done += steps
        if self.progress is None and time.perf_counter() - self.started > 1.0 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), transient=True)
            self.progress.start()
            self.task = self.progress.add_task("planning", total=self.total)
        if self.progress is not None:
            self.progress.update(self.task, completed=self.done)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
