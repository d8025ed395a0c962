"""``bench e2e``: tokens per second of four LoRA jobs on one model, by this package and by the ways of others.

torchrun --nproc-per-node 2 -m lorafusion_megatron.cli.main bench e2e --model qwen2.5-32b --layers 16 --pipeline 2
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..errors import UserError

DEFAULT_WORKLOADS = "xsum,cnn,wikisum,mixed,heterogeneous"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", default="llama-3.1-8b", help="shape: llama-3.1-8b, qwen2.5-32b, llama-3.1-70b, tiny")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages: as many as torchrun started")
    parser.add_argument("--layout", help="layers per stage, with commas between; default: balanced by predicted time")
    parser.add_argument("--workloads", default=DEFAULT_WORKLOADS, help="with commas between")
    parser.add_argument("--only", help="variants to run, with commas between; default: all")
    parser.add_argument("--capacity", type=int, default=4096, help="most padded tokens of a microbatch")
    parser.add_argument("--sizes", default="1024,2048,4096", help="microbatch sizes at which baselines are tried")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a global batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=120_000, help="about how many tokens a run trains")
    parser.add_argument("--baseline-tokens", type=int, default=60_000, help="the same for flushed variants")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each variant, in turn")
    parser.add_argument("--seconds", type=float, help="start no workload after that many")
    parser.add_argument("--profile", action="store_true", help="run each variant once more and list its kernels' times")
    parser.add_argument("--clocks", action="store_true", help="read each run's clock and power (nvidia-smi)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--transformer-impl", choices=("auto", "transformer_engine", "local"), default="auto")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--out", metavar="DIR", help="write e2e.json, the pictures and the timelines there")


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write what was asked for."""
    import torch

    from ..mcore import parallel
    from ..training.bench.workloads import make_workload, shape
    from ..training.hosts import world_size
    from ..types import Topology
    from .bench_common import numbers

    spec = shape(args.model, args.layers)
    if world_size() != args.pipeline:
        raise UserError(
            f"{world_size()} processes for {args.pipeline} stages",
            rule="every stage is a process",
            remedy=f"start with torchrun --nproc-per-node {args.pipeline}",
            key="--pipeline",
        )
    sizes = numbers(args.sizes, key="--sizes")
    longest = min(4096, args.capacity // 64 * 64)
    workloads = [
        make_workload(name, tokens=args.tokens, batch_size=args.batch_size, vocab_size=spec.vocab_size, longest=longest)
        for name in args.workloads.split(",")
    ]
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    topology = Topology(pipeline_parallel=args.pipeline)
    groups = parallel.start(topology, device=device, seed=1234, timeout_minutes=10.0)
    failed = True
    try:
        _measure(args, spec, topology, groups, workloads, sizes)
        failed = False
    finally:
        parallel.stop(failed=failed)
    return 0


def _measure(
    args: argparse.Namespace, spec: Any, topology: Any, groups: Any, workloads: list[Any], sizes: list[int]
) -> None:
    """Every workload with every variant; what is known is written after each."""
    from ..scheduler.cost import default_cost_model, split_loads
    from ..scheduler.options import PlanOptions
    from ..training.bench.measure import Bench
    from ..training.bench.report import rows, summary, table
    from ..training.bench.variants import variants
    from ..training.throughput import matmul_rate

    setting = _setting(args, spec, topology, groups)
    options = PlanOptions(
        token_capacity=args.capacity,
        padding_multiple=setting.backend.tile,
        stages=args.pipeline,
        cost=default_cost_model(spec),
        loads=split_loads(setting.layers_per_chunk),
    )
    header = _header(args, setting, matmul_rate(groups.device))
    started = time.monotonic()

    def tell(text: str) -> None:
        if groups.is_first:
            print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    tell(json.dumps(header))
    bench = Bench(setting, groups, watching=args.clocks)
    chosen = [v for v in variants(args.capacity, sizes) if _wanted(v, args.only)]
    results: dict[str, Any] = {}
    for workload in workloads:
        if groups.broadcast(args.seconds is not None and time.monotonic() - started > args.seconds):
            break
        results[workload.name] = outcomes = bench.run(
            workload, chosen, options, repeats=args.repeats, baseline_tokens=args.baseline_tokens, tell=tell
        )
        if groups.is_first:
            print(f"\n{workload.name}", table(rows(outcomes, spec, args.pipeline, header["matmul_flops"])), sep="\n")
            print("  ".join(f"{name} {value:.3f}" for name, value in summary(outcomes).items()) + "\n", flush=True)
            if args.out:  # after every workload: a run that is cut off leaves what it has
                _write(Path(args.out), header, results, workload.name)
        if args.profile:
            _profile(bench, workload, outcomes, tell, args.out)
    if groups.is_first:
        print(_memory(args, setting, results), flush=True)


def _profile(bench: Any, workload: Any, outcomes: list[Any], tell: Any, out: str | None) -> None:
    """Each variant's kernels; whole with ``--out``, the longest of the last stage in the terminal."""
    from ..training.bench.profile import describe

    for outcome in outcomes:
        if outcome.failure:
            continue
        stages = bench.profile(outcome, workload)
        tell(f"{workload.name}, {outcome.variant.name}: kernels of stage {len(stages) - 1}\n{describe(stages[-1])}\n")
        if out and bench.groups.is_first:
            Path(out).mkdir(parents=True, exist_ok=True)
            whole = [f"stage {stage}: {describe(times, most=1000)}" for stage, times in enumerate(stages)]
            name = f"kernels_{workload.name}_{outcome.variant.name.replace(' ', '_')}.txt"
            Path(out, name).write_text("\n\n".join(whole) + "\n")


def _setting(args: argparse.Namespace, spec: Any, topology: Any, groups: Any) -> Any:
    import torch

    from ..training.bench.measure import Setting, make_adapters, make_backend
    from .bench_common import numbers

    return Setting(
        spec=spec,
        topology=topology,
        layers_per_chunk=tuple(numbers(args.layout, key="--layout")) if args.layout else _balanced(spec, args),
        transformer_impl=_transformer(args, groups),
        dtype=getattr(torch, args.dtype),
        backend=make_backend(groups.device),
        adapters=make_adapters(4, rank=args.rank, alpha=args.alpha, dropout=args.dropout),
    )


def _memory(args: argparse.Namespace, setting: Any, results: dict[str, Any]) -> str:
    """Predicted and measured peaks of "both", a line a stage."""
    from ..training.memory import MemoryOptions, describe, predict_memory

    options = MemoryOptions(
        layers_per_chunk=setting.layers_per_chunk,
        stages=args.pipeline,
        token_capacity=args.capacity,
        dtype_bytes=setting.dtype.itemsize,
        fused_mlp=hasattr(setting.backend, "fuses_swiglu"),
    )
    measured = [o.peak_bytes for found in results.values() for o in found if o.variant.name == "both" and o.peak_bytes]
    peaks = {stage: max(peak[stage] for peak in measured) for stage in range(args.pipeline)} if measured else None
    predicted = predict_memory(setting.spec, list(setting.adapters.values()), options)
    return "memory of 'both' (and the eager adapters beside it)\n" + describe(predicted, peaks)


def _header(args: argparse.Namespace, setting: Any, matmul: float) -> dict[str, Any]:
    import torch

    return {
        "model": args.model,
        "layers_per_stage": setting.layers_per_chunk,
        "gpus": args.pipeline,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformer_impl": setting.transformer_impl,
        "backend": setting.backend.name,
        "capacity": args.capacity,
        "batch_size": args.batch_size,
        "rank": args.rank,
        "alpha": args.alpha,
        "dropout": args.dropout,
        "vocabulary": setting.spec.vocab_size,
        "matmul_flops": matmul,
    }


def _write_json(folder: Path, header: dict[str, Any], results: dict[str, Any]) -> None:
    from ..training.bench.report import rows, summary
    from ..training.bench.workloads import shape

    spec = shape(header["model"], sum(header["layers_per_stage"]))
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        name: {"summary": summary(found), "rows": rows(found, spec, header["gpus"], header["matmul_flops"])}
        for name, found in results.items()
    }
    (folder / "e2e.json").write_text(json.dumps({"run": header, "workloads": body}, indent=1) + "\n")


def _write(folder: Path, header: dict[str, Any], results: dict[str, Any], workload: str) -> None:
    """All figures so far, their bar chart, and the timelines of the workload that was measured last."""
    from ..training.bench.report import bar_chart, best_of, timeline_chart, trace

    _write_json(folder, header, results)
    title = (
        f"{header['model']} shape, layers {'+'.join(map(str, header['layers_per_stage']))}, {header['gpus']} x "
        f"{header['device']}, capacity {header['capacity']}, rank {header['rank']}"
    )
    bar_chart(folder / "e2e.png", title, results)
    names, outcomes = ("sequential", "round robin", "both"), results[workload]
    shown = [outcome for name in names if (outcome := best_of(outcomes, name)) is not None and outcome.spans]
    if shown:
        seconds = min(max(shown[-1].seconds[-1] * 0.6, 0.5), min(o.seconds[-1] for o in shown))
        timeline_chart(folder / f"timeline_{workload}.png", f"{workload}: {title}", shown, seconds)
    for outcome in outcomes:
        if outcome.spans:
            name = f"trace_{workload}_{outcome.variant.name.replace(' ', '_')}.json"
            (folder / name).write_text(json.dumps(trace(outcome)))


def _balanced(spec: Any, args: argparse.Namespace) -> tuple[int, ...]:
    from ..scheduler.cost import Load, default_cost_model
    from ..scheduler.split import best_layers

    load = Load(tokens=args.capacity, squares=args.capacity * 1024)
    return best_layers(default_cost_model(spec), spec.num_layers, args.pipeline, 1, load)


def _transformer(args: argparse.Namespace, groups: Any) -> str:
    from ..mcore.build import transformer_engine_missing

    if args.transformer_impl != "auto":
        return str(args.transformer_impl)
    return "transformer_engine" if groups.device.type == "cuda" and transformer_engine_missing() is None else "local"


def _wanted(variant: Any, only: str | None) -> bool:
    return only is None or any(word in (variant.name, variant.baseline_of) for word in only.split(","))
