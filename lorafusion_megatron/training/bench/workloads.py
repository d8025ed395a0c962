"""What is measured: model shapes by name, and four jobs whose samples are as long as those of known data sets."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ...errors import UserError
from ...scheduler.options import REFERENCE_MODEL
from ...types import GlobalBatch, ModelSpec, Sample

LONGEST = 4096
SHORTEST = 32

SHAPES: Mapping[str, ModelSpec] = {
    "llama-3.1-8b": REFERENCE_MODEL,
    "qwen2.5-32b": ModelSpec(
        family="qwen2",
        num_layers=64,
        hidden_size=5120,
        ffn_hidden_size=27648,
        num_attention_heads=40,
        num_query_groups=8,
        head_dim=128,
        vocab_size=152064,
        max_position_embeddings=32768,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
    ),
    "llama-3.1-70b": ModelSpec(
        family="llama",
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
    ),
    "tiny": ModelSpec(
        family="llama",
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=160,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=512,
        max_position_embeddings=LONGEST,
        norm_epsilon=1e-5,
        rope_theta=10000.0,
    ),
}
"""Dimensions as the models' own config.json has them; ``tiny`` is for trying the command out."""

LENGTHS: Mapping[str, tuple[float, float]] = {"xsum": (6.0, 0.6), "cnn": (6.7, 0.45), "wikisum": (7.2, 0.7)}
"""Logarithm's mean and deviation of the length in tokens, article and summary together. Means after clipping: 477, 886
and 1,813, with XSum's 524 + 30 tokens and CNN/DailyMail's 781 + 56 words as reported by their authors."""

WORKLOADS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "xsum": (("xsum",),) * 4,
    "cnn": (("cnn",),) * 4,
    "wikisum": (("wikisum",),) * 4,
    "mixed": (("xsum", "cnn", "wikisum"),) * 4,
    "heterogeneous": (("xsum",), ("cnn",), ("wikisum",), ("xsum", "cnn", "wikisum")),
}
"""Per workload, for each of four jobs the data sets that its samples come from in equal parts."""


def shape(name: str, layers: int | None) -> ModelSpec:
    """A model by name, cut to ``layers``.

    Raises:
        UserError: there is no such shape, or it has fewer layers.
    """
    if name not in SHAPES:
        raise UserError(
            f"model {name!r}", rule=f"known shapes: {', '.join(SHAPES)}", remedy="choose one of them", key="--model"
        )
    spec = SHAPES[name]
    if layers is None:
        return spec
    if not 1 <= layers <= spec.num_layers:
        raise UserError(
            f"{layers} layers", rule=f"{name} has {spec.num_layers}", remedy="give at most that many", key="--layers"
        )
    return replace(spec, num_layers=layers)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one job: random tokens of given lengths, every token but the first a label."""

    lengths: np.ndarray
    seed: int
    vocab_size: int
    path: str

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a row."""
        return np.random.default_rng((self.seed, row)).integers(0, self.vocab_size, int(self.lengths[row]))

    def label_mask(self, row: int) -> np.ndarray:
        """Which tokens are labels."""
        return np.ones(int(self.lengths[row]), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Four jobs with their global batches."""

    name: str
    rows: Mapping[int, Rows]
    batches: tuple[tuple[GlobalBatch, ...], ...]
    """Per job, in step order."""

    @property
    def tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(sample.tokens for job in self.batches for batch in job for sample in batch.samples)

    def first(self, steps: int) -> "Workload":
        """The first ``steps`` optimizer steps of every job."""
        return replace(self, batches=tuple(job[:steps] for job in self.batches))


def make_workload(
    name: str, *, tokens: int, batch_size: int, vocab_size: int, seed: int = 0, longest: int = LONGEST
) -> Workload:
    """A workload of about ``tokens`` tokens: as many optimizer steps a job, the same for all, as come nearest to it.

    Raises:
        UserError: there is no such workload.
    """
    if name not in WORKLOADS:
        raise UserError(
            f"workload {name!r}", rule=f"known: {', '.join(WORKLOADS)}", remedy="choose some of them", key="--workloads"
        )
    rng = np.random.default_rng(seed)
    most = max(1, tokens // (len(WORKLOADS[name]) * batch_size * SHORTEST))
    drawn = [_lengths(sources, most * batch_size, rng, longest) for sources in WORKLOADS[name]]
    per_step = [
        sum(int(lengths[s * batch_size : (s + 1) * batch_size].sum()) for lengths in drawn) for s in range(most)
    ]
    steps = max(1, int(np.abs(np.cumsum(per_step) - tokens).argmin()) + 1)
    rows, batches = {}, []
    for job, lengths in enumerate(drawn):
        rows[job] = Rows(lengths=lengths, seed=seed * 1000 + job, vocab_size=vocab_size, path=f"{name}, job {job}")
        batches.append(tuple(_batch(job, step, lengths, batch_size) for step in range(1, steps + 1)))
    return Workload(name=name, rows=rows, batches=tuple(batches))


def _lengths(sources: tuple[str, ...], count: int, rng: np.random.Generator, longest: int) -> np.ndarray:
    means, deviations = zip(*(LENGTHS[source] for source in sources), strict=True)
    which = np.arange(count) % len(sources)
    drawn = rng.lognormal(np.array(means)[which], np.array(deviations)[which])
    return rng.permutation(np.clip(drawn, SHORTEST, longest).astype(np.int64))


def _batch(job: int, step: int, lengths: np.ndarray, size: int) -> GlobalBatch:
    rows = range((step - 1) * size, step * size)
    labels = int(sum(lengths[row] - 1 for row in rows))
    samples = tuple(
        Sample(job=job, step=step, position=position, row=row, tokens=int(lengths[row]), batch_label_tokens=labels)
        for position, row in enumerate(rows)
    )
    return GlobalBatch(job=job, step=step, samples=samples, label_tokens=labels)
