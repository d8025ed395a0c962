"""The frozen data that all layers share: samples, microbatches, schedules, adapters, model dimensions.

Imports nothing of ours and no torch, so that planning and validation work without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of a job's data at one optimizer step."""

    job: int
    """Index of the job in the run."""
    step: int
    """Optimizer step of the job that it belongs to, counted from 1."""
    position: int
    """Place within the global batch, from 0. With (job, step) it names the sample: a row can come twice."""
    row: int
    """Row of the job's data set."""
    tokens: int
    """Length in tokens, without padding; at least 1."""
    batch_label_tokens: int
    """Label tokens of the whole global batch over all replicas: the divisor of the step's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """The samples of one job between two optimizer steps, in data order.

    Samples without a label token are left out of ``samples`` (they add nothing); ``samples`` may be empty.
    """

    job: int
    step: int
    samples: tuple[Sample, ...]
    label_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The rows ``start`` to ``stop`` (padding included) of a microbatch, which belong to one job."""

    job: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Packed samples that run through the pipeline together; without samples it is a no-op microbatch.

    Samples of one job are contiguous, jobs ascend, and within a job (step, position) ascends, so that the rows
    of each job form one segment. A microbatch never holds two steps of one job.
    """

    samples: tuple[Sample, ...] = ()

    @property
    def is_noop(self) -> bool:
        """Whether it is an empty filler."""
        return not self.samples

    def segments(self, padding_multiple: int) -> tuple[Segment, ...]:
        """One segment a job, each padded up to ``padding_multiple`` rows."""
        out: list[Segment] = []
        start = stop = 0
        job: int | None = None
        for sample in self.samples:
            if job is not None and sample.job != job:
                stop = start + padded(stop - start, padding_multiple)
                out.append(Segment(job=job, start=start, stop=stop))
                start = stop
            job = sample.job
            stop += sample.tokens
        if job is not None:
            out.append(Segment(job=job, start=start, stop=start + padded(stop - start, padding_multiple)))
        return tuple(out)

    def padded_tokens(self, padding_multiple: int) -> int:
        """Rows of the microbatch after each job's rows were padded; 0 for a no-op microbatch."""
        segments = self.segments(padding_multiple)
        return segments[-1].stop if segments else 0

    def rows(self, padding_multiple: int, row_multiple: int) -> int:
        """Rows as they are packed: `padded_tokens`, or one ``padding_multiple`` for a no-op microbatch, rounded up to
        ``row_multiple``, over which sequence parallelism splits them."""
        return padded(self.padded_tokens(padding_multiple) or padding_multiple, row_multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """Where a job's optimizer step falls: after the microbatch at ``position`` on every replica."""

    job: int
    step: int
    position: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The order of all microbatches of a window: data that passes transform and the runtime obeys."""

    replicas: tuple[tuple[Microbatch, ...], ...]
    """Per data-parallel replica its microbatches in order; all replicas have equally many."""
    step_ends: tuple[StepEnd, ...]
    """Every (job, step) of the window once, by (position, job)."""
    distance: int
    """Least distance in positions from the end of a job's step to the first microbatch of its next one."""
    token_capacity: int
    padding_multiple: int
    replayed_ends: tuple[StepEnd, ...] = ()
    """Where steps end that were done before a stop, and whose microbatches run again for the sake of other jobs."""

    @property
    def num_microbatches(self) -> int:
        """Positions of the stream."""
        return len(self.replicas[0])

    @cached_property
    def ends_at(self) -> Mapping[int, tuple[StepEnd, ...]]:
        """Position -> the steps that end there."""
        out: dict[int, tuple[StepEnd, ...]] = {}
        for end in self.step_ends:
            out[end.position] = (*out.get(end.position, ()), end)
        return out


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One LoRA adapter: what PEFT's ``LoraConfig`` says of it."""

    name: str
    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...]
    """Hugging Face projection names (one A each) or Megatron module names (one A shared over a fused linear)."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that carry the adapter, from 0; None for all (PEFT's name)."""
    seed: int
    """Seed of initial values and dropout masks; does not depend on the other jobs."""

    @property
    def scaling(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; fp32 everywhere (``alpha / r`` rounds in bf16)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Dimensions and switches of a decoder-only base model, as its Hugging Face ``config.json`` gives them."""

    family: str
    """llama | mistral | qwen2 | qwen3"""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Mapping[str, float] | None = None
    """llama3 scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings."""
    tied: bool = False
    """Whether the output layer shares the embedding's weight."""
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """How the ranks of a run are arranged."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int | None = None
    context_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step of one job did; equal on all ranks."""

    job: int
    step: int
    loss: float
    """Sum of cross-entropy over the global batch's label tokens divided by their number, before the step."""
    grad_norm: float
    lr: float
    skipped: bool = False
    """True where the gradient was not finite and the step was left out."""
    extra: Mapping[str, float] = field(default_factory=dict)


def padded(tokens: int, multiple: int) -> int:
    """``tokens`` rounded up to a multiple of ``multiple``."""
    return -(-tokens // multiple) * multiple
