"""The run file: dataclasses, checks, loader."""

from lorafusion_megatron.config.job import (
    DatasetConfig,
    EvalConfig,
    JobConfig,
    OptimizerConfig,
    PeftConfig,
    SchedulerConfig,
    TrainConfig,
)
from lorafusion_megatron.config.loader import load_run
from lorafusion_megatron.config.run import (
    BaseModelConfig,
    CheckpointConfig,
    LoggerConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
)
from lorafusion_megatron.config.schedule import lr_at

__all__ = [
    "BaseModelConfig",
    "CheckpointConfig",
    "DatasetConfig",
    "EvalConfig",
    "JobConfig",
    "LoggerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PeftConfig",
    "RunConfig",
    "RuntimeConfig",
    "SchedulerConfig",
    "TrainConfig",
    "load_run",
    "lr_at",
]
