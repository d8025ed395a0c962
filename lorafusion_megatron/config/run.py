"""The run file as a whole: base model, parallel layout, runtime, jobs, output."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from lorafusion_megatron.config.job import MAX_COUNT, MAX_SEED, JobConfig
from lorafusion_megatron.config.rules import in_range, require, show
from lorafusion_megatron.types import AdapterSpec, Topology


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """The frozen model that all jobs share."""

    path: Path
    """Hugging Face model folder: config.json, safetensors, tokenizer."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the frozen weights and of activations; adapters keep fp32 masters."""
    trust_remote_code: bool = False
    """Whether Python code in the model folder may run (tokenizers alone use it)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """How the model lies over the ranks; Megatron's own names."""

    not_supported: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "num_experts",
            "num_moe_experts",
            "moe_router_topk",
            "moe_grouped_gemm",
        ),
        "base models with experts are not supported",
    )

    tensor_model_parallel_size: int = 1
    """Ranks that share each linear."""
    pipeline_model_parallel_size: int = 1
    """Stages."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks per stage of the interleaved schedule; null: one, plain 1F1B."""
    context_parallel_size: int = 1
    """Ranks that share each sequence; only 1 is supported yet."""
    sequence_parallel: bool = False
    """Whether activations outside the linears are split over the tensor-parallel ranks."""
    recompute_granularity: Literal["selective", "full"] | None = None
    """Which activations are computed again in backward instead of kept."""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Megatron's layers; auto: Transformer Engine where it works, else local."""
    pipeline_layout: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers per stage (per chunk with virtual stages), in model order; auto: balanced by cost."""

    def __post_init__(self) -> None:
        in_range("tensor_model_parallel_size", self.tensor_model_parallel_size, low=1, high=MAX_COUNT)
        in_range("pipeline_model_parallel_size", self.pipeline_model_parallel_size, low=1, high=MAX_COUNT)
        in_range("virtual_pipeline_model_parallel_size", self.virtual_pipeline_model_parallel_size, low=1, high=1024)
        in_range("context_parallel_size", self.context_parallel_size, low=1, high=MAX_COUNT)
        require(
            self.context_parallel_size == 1,
            key="context_parallel_size",
            given=f"got {self.context_parallel_size}",
            rule="context parallelism is not supported yet",
            remedy="set it to 1; long samples fit better with sequence_parallel and recompute_granularity: full",
        )
        require(
            self.virtual_pipeline_model_parallel_size in (None, 1) or self.pipeline_model_parallel_size > 1,
            key="virtual_pipeline_model_parallel_size",
            given=f"{self.virtual_pipeline_model_parallel_size} chunks on one stage",
            rule="interleaving needs at least two stages",
            remedy="set it to null or raise pipeline_model_parallel_size",
        )
        if self.pipeline_layout != "auto":
            for index, layers in enumerate(self.pipeline_layout):
                in_range(f"pipeline_layout[{index}]", layers, low=0, high=MAX_COUNT)
            require(
                len(self.pipeline_layout) == self.chunks,
                key="pipeline_layout",
                given=f"{len(self.pipeline_layout)} entries for {self.chunks} stages (chunks included)",
                rule="every stage needs its number of layers",
                remedy=f"give {self.chunks} numbers, or auto",
            )

    @property
    def chunks(self) -> int:
        """Model chunks over all stages."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the jobs run together."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is one."""
    token_capacity: int = 8192
    """Padded tokens per microbatch."""
    padding_multiple: int | None = None
    """Rows that each job's part of a microbatch is padded to; null: what the LoRA backend needs."""
    schedule: Literal["staggered", "round_robin", "sequential"] = "staggered"
    """staggered: packs jobs together; the others are the orders that other systems use, as baselines."""
    lora_backend: Literal["auto", "triton", "torch"] = "auto"
    """auto: the Triton kernels on cuda, else PyTorch."""
    seed: int = 1234
    """Seed that the jobs' seeds derive from."""
    cost_model: Path | None = None
    """Measured rates that `plan --calibrate` wrote, to balance by; null: an estimate for an H100."""
    plan_effort: Literal["normal", "high"] = "normal"
    """high: a window that would idle above 3 % is planned 20 to 50 times as long, 10 to 60 s on one processor, for up
    to 3 points less; it pays where windows train for minutes. The first window, and one that follows a job's coming or
    going, waits for its plan."""
    max_window_microbatches: int = 512
    """Microbatches planned at once; jobs come and go at the borders of such windows."""
    distributed_timeout_minutes: float = 10.0
    """How long a collective waits for a lost rank."""

    def __post_init__(self) -> None:
        in_range("token_capacity", self.token_capacity, low=1, high=MAX_COUNT)
        in_range("padding_multiple", self.padding_multiple, low=1, high=65536)
        in_range("seed", self.seed, low=0, high=MAX_SEED)
        in_range("max_window_microbatches", self.max_window_microbatches, low=1, high=MAX_COUNT)
        in_range("distributed_timeout_minutes", self.distributed_timeout_minutes, low=0, above=True, high=1e5)
        require(
            self.token_capacity >= (self.padding_multiple or 1),
            key="padding_multiple",
            given=f"padding_multiple {self.padding_multiple} with token_capacity {self.token_capacity}",
            rule="one padded row block must fit into a microbatch",
            remedy="lower padding_multiple or raise token_capacity",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run writes and how it resumes."""

    save: Path = field(metadata={"output": True})
    """Folder of the run."""
    save_interval: int | None = None
    """Optimizer steps of a job between two kept steps; null: at the end and on a stop alone."""
    keep: int = 2
    """Kept steps per job."""
    resume: Literal["auto", "never"] = "auto"
    """auto: from the newest whole checkpoint under save, if there is one."""

    def __post_init__(self) -> None:
        in_range("save_interval", self.save_interval, low=1, high=MAX_COUNT)
        in_range("keep", self.keep, low=1, high=MAX_COUNT)


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """What a run reports besides metrics.jsonl."""

    log_interval: int = 1
    """Optimizer steps of a job between two lines of the log."""
    log_format: Literal["auto", "lines", "json"] = "auto"
    """What rank 0 prints; auto: a live table in a terminal, lines elsewhere; json: one JSON object a line."""
    tensorboard_dir: Path | None = field(default=None, metadata={"output": True})
    """Folder of TensorBoard events; null: none."""
    wandb_project: str | None = None
    """Weights & Biases project; null: none."""

    def __post_init__(self) -> None:
        in_range("log_interval", self.log_interval, low=1, high=MAX_COUNT)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run file."""

    base_model: BaseModelConfig
    """The frozen model."""
    model: ModelConfig = ModelConfig()
    """Its layout over the ranks."""
    runtime: RuntimeConfig = RuntimeConfig()
    """How the jobs run together."""
    jobs: tuple[JobConfig, ...]
    """The jobs."""
    checkpoint: CheckpointConfig
    """Output."""
    logger: LoggerConfig = LoggerConfig()
    """Reports."""

    def __post_init__(self) -> None:
        require(
            bool(self.jobs), key="jobs", given="no job is given", rule="a run needs at least one", remedy="add a job"
        )
        seen: dict[str, int] = {}
        for index, job in enumerate(self.jobs):
            first = seen.setdefault(job.name.lower(), index)
            require(
                first == index,
                key=f"jobs[{index}].name",
                given=f"{show(job.name)} is also the name of jobs[{first}]",
                rule="names are folders and must differ, also where upper and lower case are one",
                remedy="rename one of the jobs",
            )

    def job_seed(self, index: int) -> int:
        """Seed of a job: its own, or 63 bits of SHA-256 over runtime.seed and its name.

        Note: the place in the run file has no part in it, so a job draws the same numbers in any company.
        """
        job = self.jobs[index]
        if job.seed is not None:
            return job.seed
        digest = hashlib.sha256(f"{self.runtime.seed}/{job.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") & MAX_SEED

    def adapter_spec(self, index: int) -> AdapterSpec:
        """The adapter of a job."""
        job = self.jobs[index]
        return AdapterSpec(
            name=job.name,
            rank=job.peft.r,
            alpha=job.peft.lora_alpha,
            dropout=job.peft.lora_dropout,
            use_rslora=job.peft.use_rslora,
            target_modules=job.peft.target_modules,
            layers_to_transform=job.peft.layers_to_transform,
            seed=self.job_seed(index),
        )

    def topology(self, world_size: int) -> Topology:
        """How ``world_size`` ranks are arranged.

        Raises:
            UserError: the ranks don't fill whole replicas.
        """
        model = self.model
        replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
        require(
            world_size >= replica and world_size % replica == 0,
            key="model",
            given=f"{world_size} ranks for tensor {model.tensor_model_parallel_size} x pipeline "
            f"{model.pipeline_model_parallel_size}",
            rule=f"the number of ranks must be a multiple of {replica}",
            remedy=f"start {replica} ranks (torchrun --nproc-per-node) or change the sizes",
        )
        return Topology(
            tensor_parallel=model.tensor_model_parallel_size,
            pipeline_parallel=model.pipeline_model_parallel_size,
            virtual_pipeline=model.virtual_pipeline_model_parallel_size,
            context_parallel=model.context_parallel_size,
            data_parallel=world_size // replica,
            sequence_parallel=model.sequence_parallel and model.tensor_model_parallel_size > 1,
        )
