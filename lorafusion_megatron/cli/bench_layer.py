"""``bench layer``: what LoRA costs in a whole transformer block of Llama-8B's shape, packed attention included."""

import argparse
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..kernels import dropout
from ..lora.adapters import LinearAdapter, LinearAdapters
from ..lora.autograd import lora_linear
from ..lora.routing import RoutedSegment, Routing, build_routing
from ..lora.swiglu_mlp import swiglu_mlp
from ..lora.triton_backend import TritonBackend
from .bench_common import (
    Candidate,
    add_common_arguments,
    bar_chart,
    machine,
    measure,
    numbers,
    require_gpu,
    table,
    write_json,
)

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM = 4096, 14336, 32, 8, 128
KEYS = ("tokens", "sequences", "r", "adapters", "dropout")
LINEARS = {
    "qkv": (HIDDEN, ((HEADS * HEAD_DIM), GROUPS * HEAD_DIM, GROUPS * HEAD_DIM)),
    "o": (HEADS * HEAD_DIM, (HIDDEN,)),
    "gate_up": (HIDDEN, (FFN, FFN)),
    "down": (FFN, (HIDDEN,)),
}
"""Name -> (in, out of each projection)."""

Linear = Callable[[str, torch.Tensor], torch.Tensor]
Mlp = Callable[[torch.Tensor], torch.Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--tokens", default="8192", help="rows of the microbatch")
    parser.add_argument("--sequences", type=int, default=8, help="packed sequences of equal length")
    parser.add_argument("--rank", default="16", help="ranks")
    parser.add_argument("--adapters", default="1,4", help="adapters that share the microbatch")
    parser.add_argument("--dropout", default="0.1", help="drop probabilities")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all cases and print a table."""
    require_gpu()
    header, rows, names, reasons = machine(), [], [], {}
    print("  ".join(f"{key} {value}" for key, value in header.items()), flush=True)
    backend = TritonBackend()
    cases = itertools.product(
        numbers(args.tokens, key="--tokens"),
        numbers(args.rank, key="--rank"),
        numbers(args.adapters, key="--adapters"),
        numbers(args.dropout, float, key="--dropout"),
    )
    for tokens, rank, adapters, drop in cases:
        block = Block(tokens, args.sequences, rank, adapters, drop)
        times, failed = measure(block.candidates(backend), block.upstream, repeats=args.repeats)
        row = dict(zip(KEYS, (tokens, args.sequences, rank, adapters, drop), strict=True)) | times
        rows.append(row)
        names += [name for name in times if name not in names]
        reasons |= failed
        print(table([row], list(times), KEYS), flush=True)
    for name, reason in reasons.items():
        print(f"{name} failed: {reason}")
    write_json(args.json, header, rows)
    title = f"Llama-8B block, {header['gpu']}, torch {header['torch']}, triton {header['triton']}"
    bar_chart(args.plot, title, rows, [name for name in names if name != "frozen"], KEYS)
    return 0


class Block:
    """A frozen block with an adapter for each of the seven projections of each job.

    Note: sequences of equal length let plain flash attention stand for the packed one; its cost is the same for all.
    """

    def __init__(self, tokens: int, sequences: int, rank: int, adapters: int, drop: float) -> None:
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.tokens, self.sequences, self.rank, self.drop = tokens, sequences, rank, drop
        self.x = torch.randn(tokens, HIDDEN, **options).requires_grad_()
        self.upstream = torch.randn(tokens, HIDDEN, **options)
        self.norms = [torch.ones(HIDDEN, **options) for _ in range(2)]
        self.weights = {name: torch.randn(sum(outs), k, **options) * 0.02 for name, (k, outs) in LINEARS.items()}
        position = torch.arange(tokens, device="cuda") % (tokens // sequences)
        inverse = 500000.0 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        angle = torch.cat((position[:, None] * inverse, position[:, None] * inverse), dim=-1)
        self.rotary = angle.cos().to(torch.bfloat16)[:, None], angle.sin().to(torch.bfloat16)[:, None]
        tiles = tokens // TritonBackend.tile
        cuts = [i * tiles // adapters * TritonBackend.tile for i in range(adapters)] + [tokens]
        self.spans = list(itertools.pairwise(cuts))
        self.factors = {
            name: [
                [
                    (
                        (torch.randn(rank, k, **options) * 0.02).requires_grad_(),
                        (torch.randn(out, rank, **options) * 0.02).requires_grad_(),
                    )
                    for out in outs
                ]
                for _ in range(adapters)
            ]
            for name, (k, outs) in LINEARS.items()
        }

    def forward(self, linear: Linear, mlp: Mlp | None = None) -> torch.Tensor:
        """The block with its linears computed by ``linear(name, x)``, or its MLP as one by ``mlp(x)``."""
        x = self.x
        qkv = linear("qkv", F.rms_norm(x, (HIDDEN,), self.norms[0]))
        q, k, v = qkv.view(self.tokens, HEADS + 2 * GROUPS, HEAD_DIM).split((HEADS, GROUPS, GROUPS), dim=1)
        cos, sin = self.rotary
        q, k = (t * cos + torch.cat((-t[..., HEAD_DIM // 2 :], t[..., : HEAD_DIM // 2]), dim=-1) * sin for t in (q, k))
        q, k, v = (t.reshape(self.sequences, -1, t.shape[1], HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear("o", mixed.transpose(1, 2).reshape(self.tokens, HEADS * HEAD_DIM))
        normed = F.rms_norm(x, (HIDDEN,), self.norms[1])
        if mlp is not None:
            return x + mlp(normed)
        gate, up = linear("gate_up", normed).chunk(2, dim=-1)
        return x + linear("down", F.silu(gate) * up)

    def frozen(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """No adapter."""
        return F.linear(x, self.weights[name])

    def eager(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """PEFT's formula: each projection its own A and B, each adapter on its rows."""
        parts = []
        for (start, stop), projections in zip(self.spans, self.factors[name], strict=True):
            rows = x[start:stop]
            parts.append(
                torch.cat([F.linear(F.linear(F.dropout(rows, self.drop), a), b) * 2.0 for a, b in projections], dim=-1)
            )
        return F.linear(x, self.weights[name]) + torch.cat(parts)

    def adapters(self, name: str, module_key: int) -> LinearAdapters:
        """The same factors as the backends take them: the projections' A below each other, B block-sparse."""
        k, outs = LINEARS[name]
        by_slot = {}
        for slot, projections in enumerate(self.factors[name]):
            a = torch.cat([a.detach() for a, _ in projections])
            b = torch.block_diag(*(b.detach() for _, b in projections)).contiguous()
            by_slot[slot] = LinearAdapter(
                a=a,
                b=b,
                grad_a=torch.zeros_like(a, dtype=torch.float32),
                grad_b=torch.zeros_like(b, dtype=torch.float32),
                scaling=2.0,
                dropout=self.drop,
                projections=tuple(range(len(outs))),
                rank=self.rank,
            )
        of_row = torch.repeat_interleave(torch.arange(len(outs)), torch.tensor(outs)).to("cuda", torch.int32)
        return LinearAdapters(
            name=name,
            module_key=module_key,
            in_features=k,
            out_features=sum(outs),
            row_projection=of_row if len(outs) > 1 else None,
            by_slot=by_slot,
        )

    def routing(self) -> Routing:
        """Routing of the spans."""
        position = torch.arange(self.tokens)
        zero = torch.zeros_like(position)
        keys = dropout.row_keys(zero + 1234, zero + 1, zero, position).cuda()
        segments = [RoutedSegment(slot=i, start=a, stop=b) for i, (a, b) in enumerate(self.spans)]
        return build_routing(segments, num_tokens=self.tokens, tile=TritonBackend.tile, row_keys=keys)

    def candidates(self, backend: TritonBackend) -> list[Candidate]:
        """Frozen, ours, eager."""
        adapters = {name: self.adapters(name, 1000 + i) for i, name in enumerate(LINEARS)}
        routing, anchor = self.routing(), torch.empty(0, device="cuda", requires_grad=True)

        def ours(name: str, x: torch.Tensor) -> torch.Tensor:
            return lora_linear(x, self.weights[name], adapters[name], routing, backend=backend, anchor=anchor)

        fc1, fc2 = adapters["gate_up"], adapters["down"]
        weight1, weight2 = self.weights["gate_up"], self.weights["down"]

        def mlp(x: torch.Tensor) -> torch.Tensor:
            return swiglu_mlp(x, weight1, weight2, fc1, fc2, routing, backend=backend, anchor=anchor)

        whole = mlp if backend.fuses_swiglu(fc1, fc2, routing) else None
        factors = [t for jobs in self.factors.values() for job in jobs for pair in job for t in pair]
        return [
            Candidate(name="frozen", forward=lambda: self.forward(self.frozen), inputs=[self.x]),
            Candidate(name="ours", forward=lambda: self.forward(ours, whole), inputs=[self.x]),
            Candidate(name="eager", forward=lambda: self.forward(self.eager), inputs=[self.x, *factors]),
        ]
