"""``bench linear``: what a LoRA linear costs over its frozen linear, by every implementation at hand."""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..kernels import dropout
from ..lora.adapters import ALL_ROWS, LinearAdapter, LinearAdapters
from ..lora.autograd import lora_linear
from ..lora.routing import RoutedSegment, Routing, build_routing
from ..lora.triton_backend import TritonBackend
from .bench_common import (
    Candidate,
    add_common_arguments,
    bar_chart,
    host_microseconds,
    machine,
    measure,
    numbers,
    require_gpu,
    table,
    write_json,
)

SHAPES = {
    "llama-8b": ((4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096)),
    "square-8k": ((8192, 8192),),
    "llama-70b": ((8192, 8192), (8192, 10240), (8192, 57344), (28672, 8192)),
    "llama-70b-tp4": ((2048, 8192), (8192, 2560), (8192, 14336), (7168, 8192)),
    "qwen2.5-32b": ((5120, 5120), (5120, 7168), (5120, 55296), (27648, 5120)),
    "qwen2.5-32b-tp4": ((1280, 5120), (5120, 1792), (5120, 13824), (6912, 5120)),
}
"""(in, out) of linear_proj, linear_qkv, linear_fc1 and linear_fc2 on one rank."""
KEYS = ("tokens", "in", "out", "r", "adapters", "dropout")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MIXED = (8, 16, 32, 64)
"""Ranks that adapters take in turn under ``--rank mixed``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--shapes", default="llama-8b", help=f"names with commas between ({', '.join(SHAPES)}) or IN:OUT"
    )
    parser.add_argument("--tokens", default="8192", help="rows of the microbatch")
    parser.add_argument("--rank", default="16", help=f"ranks, or 'mixed' for {MIXED} in turn")
    parser.add_argument("--adapters", default="1,4,32", help="adapters that share the microbatch")
    parser.add_argument("--dropout", default="0.1", help="drop probabilities")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--peer", metavar="DIR", help="a checkout of CentML/lorafusion to measure beside")
    parser.add_argument("--host", action="store_true", help="also the host's microseconds for a call, at 64 tokens")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the eager formula too")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all cases and print a table."""
    require_gpu()
    shapes = _shapes(args.shapes)
    ranks = ["mixed" if word == "mixed" else numbers(word, key="--rank")[0] for word in args.rank.split(",")]
    cases = itertools.product(
        numbers(args.tokens, key="--tokens"),
        shapes,
        ranks,
        numbers(args.adapters, key="--adapters"),
        numbers(args.dropout, float, key="--dropout"),
    )
    header, rows, names, reasons = machine(), [], [], {}
    print("  ".join(f"{key} {value}" for key, value in header.items()), flush=True)
    backend = TritonBackend()
    for tokens, size, rank, adapters, drop in cases:
        case = Case(size=size, tokens=tokens, rank=rank, adapters=adapters, drop=drop, dtype=DTYPES[args.dtype])
        candidates = case.candidates(backend, compiled=args.compile, peer=args.peer)
        times, failed = measure(candidates, case.upstream, repeats=args.repeats)
        row = dict(zip(KEYS, (tokens, *size, rank, adapters, drop), strict=True)) | times
        rows.append(row)
        names += [name for name in times if name not in names]
        reasons |= failed
        print(table([row], list(times), KEYS), flush=True)
        if args.host:
            small = replace(case, tokens=max(1, adapters) * TritonBackend.tile)
            tried = [c for c in small.candidates(backend, compiled=False, peer=None) if c.name in times]
            row["host_us"] = host_microseconds(tried, small.upstream)
            print("host us:", "  ".join(f"{name} {value}" for name, value in row["host_us"].items()), flush=True)
    print("\n" + table(rows, names, KEYS))
    print(means(rows, names))
    for name, reason in reasons.items():
        print(f"{name} failed: {reason}")
    write_json(args.json, header, rows)
    title = f"{header['gpu']}, torch {header['torch']}, triton {header['triton']}, {args.dtype}"
    bar_chart(args.plot, title, rows, [name for name in names if name != "frozen"], KEYS)
    return 0


def means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Mean over the shapes of forward+backward over frozen, for each number of adapters, rank, tokens and dropout."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["tokens"], row["r"], row["adapters"], row["dropout"]), []).append(row)
    lines = ["mean over shapes of forward+backward over frozen:"]
    for (tokens, rank, adapters, drop), members in groups.items():
        cells = []
        for name in names:
            ratios = [row[name][1] / row["frozen"][1] for row in members if name in row]
            if len(ratios) == len(members):
                cells.append(f"{name} {sum(ratios) / len(ratios):.3f}")
        lines.append(f"  tokens {tokens} r {rank} adapters {adapters} dropout {drop}: " + "  ".join(cells))
    return "\n".join(lines)


@dataclass(kw_only=True)
class Case:
    """One linear with equal shares of the rows for each adapter."""

    size: tuple[int, int]
    tokens: int
    rank: int | str
    adapters: int
    drop: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        k, n = self.size
        options = {"device": "cuda", "dtype": self.dtype}
        self.x = torch.randn(self.tokens, k, **options).requires_grad_()
        self.weight = torch.randn(n, k, **options) * 0.02
        self.upstream = torch.randn(self.tokens, n, **options)
        ranks = [MIXED[i % len(MIXED)] if self.rank == "mixed" else int(self.rank) for i in range(self.adapters)]
        self.a = [(torch.randn(r, k, **options) * 0.02).requires_grad_() for r in ranks]
        self.b = [(torch.randn(n, r, **options) * 0.02).requires_grad_() for r in ranks]
        tile = TritonBackend.tile
        tiles = max(self.adapters, self.tokens // tile)
        cuts = [min(self.tokens, i * tiles // self.adapters * tile) for i in range(self.adapters)] + [self.tokens]
        self.spans = list(itertools.pairwise(cuts))

    def routing(self) -> Routing:
        """Routing of the spans, with keys as a job's tokens have them."""
        position = torch.arange(self.tokens)
        zero = torch.zeros_like(position)
        keys = dropout.row_keys(zero + 1234, zero + 1, zero, position).cuda()
        segments = [RoutedSegment(slot=i, start=a, stop=b) for i, (a, b) in enumerate(self.spans) if b > a]
        return build_routing(segments, num_tokens=self.tokens, tile=TritonBackend.tile, row_keys=keys)

    def linear_adapters(self) -> LinearAdapters:
        """The same factors as the backends take them."""
        k, n = self.size
        by_slot = {
            i: LinearAdapter(
                a=a.detach(),
                b=b.detach(),
                grad_a=torch.zeros_like(a, dtype=torch.float32),
                grad_b=torch.zeros_like(b, dtype=torch.float32),
                scaling=2.0,
                dropout=self.drop,
                projections=(ALL_ROWS,),
                rank=a.shape[0],
            )
            for i, (a, b) in enumerate(zip(self.a, self.b, strict=True))
        }
        return LinearAdapters(name="bench", module_key=12345, in_features=k, out_features=n, by_slot=by_slot)

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        """PEFT's formula, each adapter on its rows."""
        parts = []
        for (start, stop), a, b in zip(self.spans, self.a, self.b, strict=True):
            parts.append(F.linear(F.linear(F.dropout(x[start:stop], self.drop), a), b) * 2.0)
        return F.linear(x, self.weight) + (parts[0] if len(parts) == 1 else torch.cat(parts))

    def candidates(self, backend: TritonBackend, *, compiled: bool, peer: str | None) -> list[Candidate]:
        """Every implementation at hand."""
        adapters, routing = self.linear_adapters(), self.routing()
        anchor = torch.empty(0, device="cuda", requires_grad=True)

        def ours() -> torch.Tensor:
            return lora_linear(self.x, self.weight, adapters, routing, backend=backend, anchor=anchor)

        everything = [self.x, *self.a, *self.b]
        out = [
            Candidate(name="frozen", forward=lambda: F.linear(self.x, self.weight), inputs=[self.x]),
            Candidate(name="ours", forward=ours, inputs=[self.x]),
            Candidate(name="eager", forward=lambda: self.eager(self.x), inputs=everything),
        ]
        if compiled:
            function = torch.compile(self.eager)
            out.append(Candidate(name="compile", forward=lambda: function(self.x), inputs=everything))
        if peer and self.adapters <= 4:
            out += _peer(peer, self)
        unsloth = _unsloth(self)
        return [*out, Candidate(name="unsloth", forward=unsloth, inputs=everything)] if unsloth else out


def _shapes(text: str) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for word in text.split(","):
        if word in SHAPES:
            out += SHAPES[word]
        elif word.count(":") == 1:
            out.append(tuple(numbers(word.replace(":", ","), key="--shapes")))
        else:
            raise UserError(
                repr(word),
                rule="names no known shapes",
                remedy=f"one of {', '.join(SHAPES)}, or IN:OUT",
                key="--shapes",
            )
    return out


def _unsloth(case: Case) -> Callable[[], torch.Tensor] | None:
    """Unsloth's fused LoRA linear, where it is installed; it knows one adapter and no dropout."""
    if case.adapters > 1 or case.drop > 0.0:
        return None
    try:
        from unsloth.kernels.fast_lora import LoRA_W
    except ImportError:
        return None
    return lambda: LoRA_W.apply(case.x[None], case.weight, None, case.a[0], case.b[0], 2.0)[0]


def _peer(folder: str, case: Case) -> list[Candidate]:
    """The peer's ops out of a checkout: its multi-adapter one, and for one adapter its single-adapter one too."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        from lorafusion.ops import multi_lora
        from lorafusion.ops.lora_v1 import fused_linear_lora
    except Exception as error:
        raise UserError(
            f"{folder} does not import: {error}", rule="--peer needs a checkout of CentML/lorafusion that imports",
            remedy="check its requirements, or leave --peer out", key="--peer",
        ) from None  # fmt: skip
    count, share = case.adapters, case.tokens // case.adapters
    ranks = [a.shape[0] for a in case.a]
    info = multi_lora.prepare_multi_lora_batch_info(
        [share] * count, list(range(count)), ranks, [case.drop] * count, [2.0] * count,
        block_size_m=128, allow_empty_micro_batch_info=True,
    )  # fmt: skip

    def single() -> torch.Tensor:
        return fused_linear_lora(case.x[None], case.weight, case.a[0], case.b[0], 2.0, seed=1, dropout_p=case.drop)[0]

    def multi() -> torch.Tensor:
        return multi_lora.fused_linear_multi_lora(
            padded_x=case.x[None], linear_w=case.weight, lora_a_list=list(case.a), lora_b_list=list(case.b),
            seq_len_list=info.seq_len_list, padded_seq_len_list=info.padded_seq_len_list,
            block_to_lookup_table=info.block_to_lookup_table, block_to_dropout_p=info.block_to_dropout_p,
            block_to_alpha=info.block_to_alpha, enable_dropout=case.drop > 0, same_dropout_p_value=case.drop,
            max_r=max(ranks),
        )[0]  # fmt: skip

    everything = [case.x, *case.a, *case.b]
    out = [Candidate(name="peer multi", forward=multi, inputs=everything)]
    return [Candidate(name="peer", forward=single, inputs=everything), *out] if count == 1 else out
