"""What a plan depends on besides the samples."""

from dataclasses import dataclass, field

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.scheduler.cost import CostModel, StageLoad, default_cost_model, equal_loads
from lorafusion_megatron.scheduler.order import Pipeline
from lorafusion_megatron.types import ModelSpec

SCHEDULES = ("staggered", "round_robin", "sequential")

REFERENCE_MODEL = ModelSpec(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    norm_epsilon=1e-5,
    rope_theta=500000.0,
)
"""Llama 3.1 8B: whose balance of linears and attention is assumed where no cost model is given."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Limits and shape of the pipeline that a schedule is made for."""

    token_capacity: int
    """Padded tokens that a microbatch may hold."""
    padding_multiple: int = 1
    """Each job's rows of a microbatch are padded up to a multiple of this (the kernel's tile)."""
    stages: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks per stage; above 1 the interleaved schedule runs."""
    replicas: int = 1
    """Data-parallel replicas."""
    schedule: str = "staggered"
    """staggered | round_robin | sequential"""
    effort: str = "normal"
    """normal | high: whether a stream that idles above 3 % is annealed long."""
    cost: CostModel | None = None
    """Predicted rates; a reference model's on an H100 by default (only the ratios matter for the plan)."""
    loads: tuple[StageLoad, ...] | None = None
    """Per chunk of the model, in the model's order, what it holds; equal work by default."""
    solver_seconds: float = 0.05
    """Limit for the exact solver on one block, in its deterministic time; 0 leaves it out."""
    smooth: bool = True
    """Reorder positions so that neighbours take similar time."""
    pipeline: Pipeline = field(init=False)

    def __post_init__(self) -> None:
        for key in ("token_capacity", "padding_multiple", "stages", "virtual_stages", "replicas"):
            value = getattr(self, key)
            if value < 1:
                raise UserError(f"{key} {value}", rule="it must be at least 1", remedy="raise it", key=key)
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"schedule '{self.schedule}'",
                rule="it must be one of " + ", ".join(SCHEDULES),
                remedy="choose one of them",
                key="runtime.schedule",
            )
        object.__setattr__(self, "pipeline", Pipeline(stages=self.stages, virtual_stages=self.virtual_stages))
        if self.loads is not None and len(self.loads) != self.pipeline.chunks:
            raise ValueError(f"{len(self.loads)} chunk loads for {self.pipeline.chunks} chunks")

    @property
    def cost_model(self) -> CostModel:
        """The given cost model or the reference."""
        return self.cost or default_cost_model(REFERENCE_MODEL)

    @property
    def chunk_loads(self) -> tuple[StageLoad, ...]:
        """The given loads or chunks of equal work."""
        return self.loads or equal_loads(REFERENCE_MODEL.num_layers, self.pipeline.chunks)
