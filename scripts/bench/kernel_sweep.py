"""Sweep the launch settings of every kernel on one GPU: what the defaults in the package were chosen from.

    python scripts/bench/kernel_sweep.py [--tokens 8192] [--rank 16] [--adapters 1] [--json FILE]

Per Llama-8B shape: each kernel's settings with their time in microseconds (CUDA-graph replay, cold L2, median), the
best first, beside cuBLAS' frozen products and the time that the bytes alone would take.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable

import torch
import triton

from lorafusion_megatron.kernels import dropout, tables
from lorafusion_megatron.kernels.down import down
from lorafusion_megatron.kernels.dy_pass import dy_pass
from lorafusion_megatron.kernels.factor_grad import factor_grad, gradient_parts
from lorafusion_megatron.kernels.product import ProductConfig, product
from lorafusion_megatron.kernels.product_hopper import hopper_product
from lorafusion_megatron.kernels.swiglu import swiglu_down, swiglu_grad

SHAPES = {"o": (4096, 4096), "qkv": (4096, 6144), "fc1": (4096, 28672), "fc2": (14336, 4096)}
TILE = 64
TILES = (
    {"block_m": 128, "block_n": 256, "stages": 3, "warps": 8},
    {"block_m": 256, "block_n": 128, "stages": 3, "warps": 8},
)
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def replay_us(run: Callable[[], object], flush: torch.Tensor, repeats: int = 13) -> float:
    """Median microseconds of a CUDA-graph replay with a cold L2."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


class Shape:
    """The operands of one linear with ``adapters`` equal adapters."""

    def __init__(self, size: tuple[int, int], tokens: int, rank: int, adapters: int) -> None:
        k, n = size
        self.tokens, self.k, self.n, self.rank = tokens, k, n, rank
        self.x, self.dy = torch.randn(tokens, k, **BF16), torch.randn(tokens, n, **BF16)
        self.w = torch.randn(n, k, **BF16) * 0.02
        self.s, self.ds = torch.randn(tokens, rank, **BF16), torch.randn(tokens, rank, **BF16)
        rows = {}
        for slot in range(adapters):
            rows[slot] = tables.SlotRow(
                a=torch.randn(rank, k, **BF16),
                b=torch.randn(n, rank, **BF16),
                grad_a=torch.zeros(rank, k, device="cuda"),
                grad_b=torch.zeros(n, rank, device="cuda"),
                columns=rank,
                threshold=dropout.threshold(0.1),
                scale=2.0 * dropout.keep_scale(0.1),
                rank=rank,
                projections=(-1,),
            )
        self.keep_alive = rows
        self.table, self.align = tables.slot_table(rows, torch.device("cuda")), tables.table_alignment(rows)
        share = tokens // adapters
        self.segments = [(slot, slot * share, (slot + 1) * share) for slot in range(adapters)]
        self.tile_slots = (torch.arange(tokens // TILE, device="cuda") * TILE // share).to(torch.int32)
        position = torch.arange(tokens)
        self.keys = dropout.row_keys(position * 0 + 7, position * 0 + 1, position * 0, position).cuda()
        self.counters = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")

    def chunks(self, rows: int) -> tuple[torch.Tensor, bool]:
        """Chunk table of the segments and whether one was cut."""
        table = tables.chunk_table(self.segments, rows_per_chunk=rows)
        return table.cuda(), table.shape[0] > len(self.segments)


def sweep_down(shape: Shape, z: torch.Tensor, drop: bool) -> Iterable[tuple[str, Callable[[], object]]]:
    """The pass over X."""
    for bk, stages, warps, splits in itertools.product((64, 128, 256), (3, 4, 6), (4, 8), (1, 2, 4)):
        if bk * stages * TILE * 2 > 200_000:
            continue
        yield (
            f"bk{bk} stages{stages} warps{warps} splits{splits}",
            lambda bk=bk, stages=stages, warps=warps, splits=splits: down(
                z, shape.table, shape.tile_slots, shape.keys, shape.counters, factor=0, width=shape.rank, tile=TILE,
                module_key=99, feature_offset=0, drop=drop, splits=splits, align=shape.align, overlap=True, block_k=bk,
                num_stages=stages, num_warps=warps,
            ),
        )  # fmt: skip


def sweep_grad(shape: Shape) -> Iterable[tuple[str, Callable[[], object]]]:
    """dA."""
    for bn, bt, stages, warps, rows in itertools.product((64, 128, 256), (64, 128), (3, 4), (4, 8), (256, 512, 1024)):
        if bn * bt * stages * 2 > 150_000 or shape.k // bn * shape.tokens // rows < 64:
            continue
        chunks, split = shape.chunks(rows)
        parts = gradient_parts(shape.x, shape.ds, shape.table, chunks, split=split)
        yield (
            f"bn{bn} bt{bt} stages{stages} warps{warps} rows{rows}",
            lambda bn=bn, bt=bt, stages=stages, warps=warps, chunks=chunks, parts=parts: factor_grad(
                shape.x, shape.ds, shape.table, chunks, shape.keys, shape.counters, parts, grad=2, row_projection=None,
                module_key=99, feature_offset=0, drop=True, align=shape.align, overlap=True, block_n=bn, block_t=bt,
                num_stages=stages, num_warps=warps,
            ),
        )  # fmt: skip


def sweep_dy(shape: Shape) -> Iterable[tuple[str, Callable[[], object]]]:
    """dS and dB."""
    for bn, bt, stages, warps, rows in itertools.product((256, 512), (32, 64, 128), (2, 3), (4, 8), (512, 1024, 2048)):
        if bn * bt * stages * 2 > 200_000 or shape.n // bn * shape.tokens // rows < 64:
            continue
        chunks, split = shape.chunks(rows)
        yield (
            f"bn{bn} bt{bt} stages{stages} warps{warps} rows{rows}",
            lambda bn=bn, bt=bt, stages=stages, warps=warps, chunks=chunks, split=split: dy_pass(
                shape.dy, shape.s, shape.table, chunks, shape.tile_slots, shape.counters, row_projection=None,
                tile=TILE, split=split, align=shape.align, overlap=True, block_n=bn,
                block_t=bt, num_stages=stages, num_warps=warps,
            ),
        )  # fmt: skip


def sweep_swiglu_down(fc1: Shape, fc2: Shape) -> Iterable[tuple[str, Callable[[], object]]]:
    """The activation with the pass over it."""
    for bk, stages, warps, splits in itertools.product((64, 128, 256), (2, 3, 4), (4, 8), (1, 2, 4)):
        if bk * stages * TILE * 4 > 200_000:
            continue
        yield (
            f"bk{bk} stages{stages} warps{warps} splits{splits}",
            lambda bk=bk, stages=stages, warps=warps, splits=splits: swiglu_down(
                fc1.dy, fc2.table, fc2.tile_slots, fc2.keys, fc2.counters, width=fc2.rank, tile=TILE, module_key=99,
                feature_offset=0, drop=True, splits=splits, align=fc2.align, overlap=True, block_k=bk,
                num_stages=stages, num_warps=warps,
            ),
        )  # fmt: skip


def sweep_swiglu_grad(fc1: Shape, fc2: Shape) -> Iterable[tuple[str, Callable[[], object]]]:
    """The activation's gradient with dS and dB of linear_fc1 and dA of linear_fc2."""
    settings = [
        (128, 64, 2, 8), (128, 32, 2, 8), (128, 32, 3, 8), (128, 32, 3, 4), (128, 32, 2, 4), (64, 64, 2, 4),
        (64, 64, 3, 4), (64, 64, 3, 8), (64, 32, 3, 4), (64, 128, 2, 8), (256, 32, 2, 8),
    ]  # fmt: skip
    for (bn, bt, stages, warps), rows in itertools.product(settings, (512, 1024, 2048)):
        chunks, split = fc1.chunks(rows)
        yield (
            f"bn{bn} bt{bt} stages{stages} warps{warps} rows{rows}",
            lambda bn=bn, bt=bt, stages=stages, warps=warps, chunks=chunks, split=split: swiglu_grad(
                fc1.dy, fc2.x, fc1.s, fc2.ds, (fc1.table, fc2.table), chunks, fc1.tile_slots, fc1.keys, fc1.counters,
                row_projection=None, tile=TILE, module_key=99, feature_offset=0, drop=True, split=split,
                aligns=(fc1.align, fc2.align), overlap=True, block_n=bn, block_t=bt, num_stages=stages,
                num_warps=warps,
            ),
        )  # fmt: skip


def sweep_product(shape: Shape, forward: bool) -> Iterable[tuple[str, Callable[[], object]]]:
    """The frozen product with the adapter's part."""
    properties = torch.cuda.get_device_properties(0)
    shared = {
        "factor": 1 if forward else 0, "tile": TILE, "module_key": 99, "feature_offset": 0, "drop": not forward,
        "align": shape.align, "programs": properties.multi_processor_count, "overlap": True,
    }  # fmt: skip
    z, q = (shape.x, shape.s) if forward else (shape.dy, shape.ds)
    operands = (z, shape.w, None, q, shape.table, shape.tile_slots, shape.keys)
    own = {"arrivals": torch.zeros(2, dtype=torch.int32, device="cuda"), "cache_bytes": properties.L2_cache_size}
    for group in (4, 8, 16, 32):
        yield f"hopper group {group}", lambda group=group: hopper_product(*operands, group=group, **own, **shared)
    for base, group in itertools.product(TILES, (8, 16)):
        config = ProductConfig(**base, group=group)
        yield (
            str(config),
            lambda config=config: product(*operands, config=config, pure=True, **shared),
        )


def best(
    runs: Iterable[tuple[str, Callable[[], object]]], flush: torch.Tensor, compile_only: bool
) -> list[tuple[float, str]]:
    """Times of all settings that run, the best first; what fails is named with its reason."""
    out = []
    for name, run in runs:
        try:
            run()
            torch.cuda.synchronize()
            out.append((0.0 if compile_only else round(replay_us(run, flush), 1), name))
        except Exception as error:
            out.append((float("inf"), f"{name}: {type(error).__name__} {str(error)[:60]}"))
    return sorted(out)


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--kernels", default="down,grad,dy,forward,dx,swiglu,swiglu grad")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache, time nothing")
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    rows = {}
    for name in args.shapes.split(","):
        shape = Shape(SHAPES[name], args.tokens, args.rank, args.adapters)
        kinds = {
            "cublas": (("forward", lambda s=shape: s.x @ s.w.t()), ("dx", lambda s=shape: s.dy @ s.w)),
            "down": sweep_down(shape, shape.x, True),
            "grad": sweep_grad(shape),
            "dy": sweep_dy(shape),
            "forward": sweep_product(shape, True),
            "dx": sweep_product(shape, False),
        }
        if name == "fc1":
            other = Shape(SHAPES["fc2"], args.tokens, args.rank, args.adapters)
            kinds |= {
                "swiglu": sweep_swiglu_down(shape, other),
                "swiglu grad": sweep_swiglu_grad(shape, other),
            }
        wanted = ["cublas", *args.kernels.split(",")]
        rows[name] = {kind: best(runs, flush, args.compile_only) for kind, runs in kinds.items() if kind in wanted}
        for kind, times in rows[name].items():
            moved = {"swiglu": 1.5 * shape.n, "swiglu grad": 2.5 * shape.n}
            floor = ({"down": shape.k, "grad": shape.k, "dy": shape.n} | moved).get(kind, 0) * args.tokens * 2 / 3e6
            print(f"{name:4} {kind:8} bytes {floor:4.0f} us", *(f"| {us} {what}" for us, what in times[:4]), flush=True)
        failed = [what for times in rows[name].values() for us, what in times if us == float("inf")]
        print(name, "failed:", len(failed), failed[:2], flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
