"""Predicted peak memory of a pipeline stage: what is frozen, what the adapters keep, what microbatches in flight hold.

Knows no torch: `plan` prints it for machines that this one is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..config.run import RunConfig
from ..models.projections import target_linears
from ..types import AdapterSpec, ModelSpec

ADAPTER_BYTES = 4 + 4 + 8
"""Per adapter parameter beside its own: fp32 master, fp32 gradient, two fp32 moments."""
SNAPSHOT_BYTES = 4 + 8
"""Per adapter parameter of a checkpoint on its way to the disk: copies of the master and both moments."""
LIBRARY_BYTES = 600 << 20
"""Workspaces of matrix and attention libraries and of a communicator that PyTorch's allocator hands out."""
WIDEST_FUSED = 64
"""Columns of an adapter on one linear up to which the MLP runs as one (`triton_backend.WIDEST_JOINT`)."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What the prediction depends on beside the model."""

    layers_per_chunk: Sequence[int]
    stages: int
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    token_capacity: int
    dtype_bytes: int = 2
    recompute: str | None = None
    """None | selective | full"""
    fused_mlp: bool = False
    """Whether the backend computes the MLP's activation again in backward where the adapters allow it (Triton)."""
    checkpoints: bool = False
    """Whether checkpoints are saved while the pipeline is full."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Predicted bytes of one rank of a stage."""

    weights: int
    adapters: int
    snapshot: int
    """Copies of one checkpoint."""
    activations: int
    """Of the microbatches in flight: at most as many as there are stages behind, and one."""
    logits: int
    """Of one microbatch on the last stage, with the gradient in their place."""
    transient: int
    """The largest thing that lives within one layer's forward or backward alone."""

    @property
    def total(self) -> int:
        """The peak."""
        parts = self.weights + self.adapters + self.snapshot + self.activations + self.logits + self.transient
        return parts + LIBRARY_BYTES


def predict_memory(spec: ModelSpec, adapters: Sequence[AdapterSpec], options: MemoryOptions) -> list[StageMemory]:
    """Peak memory of every stage.

    Args:
        spec: the base model.
        adapters: all that are mounted at once.
        options: layout, capacity, recompute.

    Returns:
        One entry a stage, in order.

    Note: counts what each operation saves for backward, a full microbatch everywhere. Measured runs stay within about
        10 % of it; the allocator's fragments and the CUDA context (about 0.5 GiB outside of PyTorch) are not in it.
    """
    out = []
    options = replace(options, fused_mlp=options.fused_mlp and _mlp_fuses(spec, adapters, options))
    chunks = len(options.layers_per_chunk)
    for stage in range(options.stages):
        mine = range(stage, chunks, options.stages)
        starts = [sum(options.layers_per_chunk[:chunk]) for chunk in mine]
        numbers = {n + i for chunk, n in zip(mine, starts, strict=True) for i in range(options.layers_per_chunk[chunk])}
        layers = len(numbers)
        first, last = 0 in mine, chunks - 1 in mine
        parameters = sum(
            _adapter(spec, adapter, len(numbers.intersection(adapter.layers_to_transform or numbers)), options)
            for adapter in adapters
        )
        own = 0 if options.dtype_bytes == 4 else options.dtype_bytes
        out.append(
            StageMemory(
                weights=_weights(spec, layers, first, last, options),
                adapters=parameters * (ADAPTER_BYTES + own),
                snapshot=parameters * SNAPSHOT_BYTES if options.checkpoints else 0,
                activations=_in_flight(stage, chunks, options) * _activations(spec, layers / len(mine), options),
                logits=_logits(spec, options) if last else 0,
                transient=_transient(spec, options),
            )
        )
    return out


def predict_run_memory(run: RunConfig, spec: ModelSpec, layers_per_chunk: Sequence[int]) -> list[StageMemory]:
    """`predict_memory` for a run file with all its jobs mounted."""
    model = run.model
    adapters = [run.adapter_spec(index) for index in range(len(run.jobs))]
    options = MemoryOptions(
        layers_per_chunk=layers_per_chunk,
        stages=model.pipeline_model_parallel_size,
        tensor_parallel=model.tensor_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        token_capacity=run.runtime.token_capacity,
        dtype_bytes=4 if run.base_model.dtype == "float32" else 2,
        recompute=model.recompute_granularity,
        fused_mlp=run.runtime.lora_backend != "torch" and run.runtime.device != "cpu",
        checkpoints=run.checkpoint.save_interval is not None,
    )
    return predict_memory(spec, adapters, options)


def _mlp_fuses(spec: ModelSpec, adapters: Sequence[AdapterSpec], options: MemoryOptions) -> bool:
    """Whether every microbatch's MLP runs as one in every layer, whichever adapters are in it."""
    if spec.mlp_bias or spec.ffn_hidden_size // options.tensor_parallel % 16:
        return False
    columns = [_columns(spec, adapter, name) for adapter in adapters for name in ("linear_fc1", "linear_fc2")]
    everywhere = all(
        set(range(spec.num_layers)).issubset(a.layers_to_transform or range(spec.num_layers)) for a in adapters
    )
    return everywhere and all(0 < wide <= WIDEST_FUSED for wide in columns)


def _columns(spec: ModelSpec, adapter: AdapterSpec, linear: str) -> int:
    """Columns of an adapter on a linear: its rank, for each projection where these have an A of their own."""
    if linear in adapter.target_modules:
        return adapter.rank
    return adapter.rank * sum(p.name in adapter.target_modules for p in target_linears(spec)[linear].projections)


def describe(memory: Sequence[StageMemory], measured: Mapping[int, int] | None = None) -> str:
    """A line a stage: ``stage 0: 31.20 GiB predicted (weights 14.10, adapters 0.60, …), 30.80 GiB measured``."""
    lines = []
    for stage, part in enumerate(memory):
        parts = {
            "weights": part.weights,
            "adapters": part.adapters,
            "snapshot": part.snapshot,
            "activations": part.activations,
            "logits": part.logits,
            "transient": part.transient,
            "libraries": LIBRARY_BYTES,
        }
        text = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
        line = f"stage {stage}: {part.total / 2**30:.2f} GiB predicted ({text})"
        if measured is not None and stage in measured:
            line += f", {measured[stage] / 2**30:.2f} GiB measured"
        lines.append(line)
    return "\n".join(lines)


def _widths(spec: ModelSpec, options: MemoryOptions) -> tuple[float, float, float, float]:
    """Query, key (and value), and feed-forward widths on one rank; share of the tokens outside of the linears."""
    tp = options.tensor_parallel
    share = 1 / tp if options.sequence_parallel else 1.0
    heads, groups = spec.num_attention_heads * spec.head_dim / tp, spec.num_query_groups * spec.head_dim / tp
    return heads, groups, spec.ffn_hidden_size / tp, share


def _weights(spec: ModelSpec, layers: int, first: bool, last: bool, options: MemoryOptions) -> int:
    heads, groups, ffn, _ = _widths(spec, options)
    layer = spec.hidden_size * (2 * heads + 2 * groups + 3 * ffn + 2)
    vocabulary = spec.hidden_size * spec.vocab_size / options.tensor_parallel
    tables = 1 if spec.tied and first and last else int(first) + int(last)
    return int((layers * layer + tables * vocabulary) * options.dtype_bytes)


def _adapter(spec: ModelSpec, adapter: AdapterSpec, layers: int, options: MemoryOptions) -> int:
    """Parameters of one adapter on one rank: the replicated factor whole, the other one split."""
    tp, size = options.tensor_parallel, 0.0
    for name, linear in target_linears(spec).items():
        columns = _columns(spec, adapter, name)
        rows = sum(p.out_features for p in linear.projections)
        split_out = name in ("linear_qkv", "linear_fc1")
        inner = linear.projections[0].in_features
        size += columns * (inner / (1 if split_out else tp) + rows / (tp if split_out else 1))
    return int(layers * size)


def _in_flight(stage: int, chunks: int, options: MemoryOptions) -> int:
    """Microbatches (of one chunk each) whose activations a stage holds at once, as Megatron's warmup has them."""
    behind = options.stages - stage - 1
    virtual = chunks // options.stages
    return 1 + (behind if virtual == 1 else 2 * behind + (virtual - 1) * options.stages)


def _activations(spec: ModelSpec, layers: float, options: MemoryOptions) -> int:
    """Saved for backward by the layers of one chunk for one full microbatch.

    Per token, in elements: both norms' inputs and outputs (4 hidden), queries, keys, values and the attention's output
    (2 heads + 2 groups), gate, up and, unless it is made again, the activation (3 or 2 ffn). Full recompute keeps each
    layer's input alone, selective recompute all but what attention saves besides its inputs.
    """
    heads, groups, ffn, share = _widths(spec, options)
    if options.recompute == "full":
        per_token = spec.hidden_size * share
    else:
        gathered = 2 * spec.hidden_size if options.sequence_parallel else 0
        per_token = 4 * spec.hidden_size * share + gathered + 2 * heads + 2 * groups
        per_token += (2 if options.fused_mlp else 3) * ffn
    return int(options.token_capacity * layers * per_token * options.dtype_bytes)


def _logits(spec: ModelSpec, options: MemoryOptions) -> int:
    return int(options.token_capacity * spec.vocab_size / options.tensor_parallel * options.dtype_bytes)


def _transient(spec: ModelSpec, options: MemoryOptions) -> int:
    """Gradients of the feed-forward's widest tensors in one layer's backward; with full recompute the layer itself."""
    _, _, ffn, _ = _widths(spec, options)
    wide = options.token_capacity * (3 * ffn + 2 * spec.hidden_size) * options.dtype_bytes
    if options.recompute != "full":
        return int(wide)
    return int(wide) + _activations(spec, 1, replace(options, recompute=None))
