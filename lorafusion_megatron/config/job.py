"""What the run file says of one job."""

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from lorafusion_megatron.config.rules import in_range, require, show
from lorafusion_megatron.config.schedule import lr_at
from lorafusion_megatron.config.targets import ALL_LINEAR, HF_TARGETS, check_targets

RESERVED = (
    "state",
    "inbox",
    "metrics.jsonl",
    "trace.json",
    "status.json",
    "events.jsonl",
    "cost_model.json",
    "run.lock",
    "tokenized",
    "wandb",
    "wandb_run_id",
)
"""What stands beside the jobs' folders under checkpoint.save."""
RESERVED_START = "earlier-"
"""What the names of folders there begin with into which an older run's results are moved."""
MAX_SEED = (1 << 63) - 1
MAX_COUNT = (1 << 31) - 1
"""Bound of counts: steps, rows and tokens are 32-bit in dropout keys and packed batches."""
MAX_BATCH = 1 << 16
"""Bound of samples per optimizer step: a plan of one such batch takes 10 s, and the time grows with the square."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The job's training data."""

    path: Path
    """JSONL (.jsonl), a JSON array (.json), or either with .gz."""
    shuffle: bool = True
    """Whether the rows come in an order of the job's own seed, a new one each epoch; false: in file order."""
    truncate: bool = False
    """Whether rows longer than max_length lose their tail; false: such a row is an error."""
    chat_template: str | None = field(default=None, metadata={"text_or_file": True})
    """Jinja chat template (it holds a brace), or a file of it; null: the model's own."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The job's adapter, in the words of PEFT's LoraConfig."""

    r: int = field(default=16, metadata={"alias": "dim"})
    """Rank; also spelled dim."""
    lora_alpha: float = field(default=32.0, metadata={"alias": "alpha"})
    """Numerator of the scale; also spelled alpha."""
    lora_dropout: float = field(default=0.0, metadata={"alias": "dropout"})
    """Probability that an input of A is dropped; also spelled dropout."""
    use_rslora: bool = False
    """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
    init_from: Path | None = None
    """Folder of a PEFT adapter to start from; null: A random, B zero."""
    target_modules: tuple[str, ...] = HF_TARGETS
    """Hugging Face projections (one A each), Megatron modules (one A over the fused linear), or all-linear."""
    layers_to_transform: tuple[int, ...] | None = None
    """Transformer layers, counted from 0, that get the adapter; null: all."""

    def __post_init__(self) -> None:
        in_range("r", self.r, low=1, high=1024)
        in_range("lora_alpha", self.lora_alpha, low=0, above=True)
        in_range("lora_dropout", self.lora_dropout, low=0, high=1, below=True)
        if self.target_modules == (ALL_LINEAR,):
            object.__setattr__(self, "target_modules", HF_TARGETS)
        check_targets("target_modules", self.target_modules)
        if self.layers_to_transform is not None:
            for index, layer in enumerate(self.layers_to_transform):
                in_range(f"layers_to_transform[{index}]", layer, low=0, high=MAX_COUNT)
            require(
                0 < len(set(self.layers_to_transform)) == len(self.layers_to_transform),
                key="layers_to_transform",
                given=f"got {show(list(self.layers_to_transform))}",
                rule="must name at least one layer, each once",
                remedy="give layer numbers, or null for all layers",
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, over this job's adapter alone."""

    lr: float = 2.0e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    adam_eps: float = 1.0e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the adapter's whole gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        in_range("lr", self.lr, low=0, above=True)
        in_range("weight_decay", self.weight_decay, low=0)
        in_range("adam_beta1", self.adam_beta1, low=0, high=1, below=True)
        in_range("adam_beta2", self.adam_beta2, low=0, high=1, below=True)
        in_range("adam_eps", self.adam_eps, low=0, above=True)
        in_range("clip_grad", self.clip_grad, low=0, remedy="give 0 for no clipping")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The course of the learning rate; `config.schedule.lr_at` has the formula."""

    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warmup."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear warmup."""
    min_lr: float = 0.0
    """Where cosine and linear end."""

    def __post_init__(self) -> None:
        in_range("lr_warmup_iters", self.lr_warmup_iters, low=0, high=MAX_COUNT)
        in_range("min_lr", self.min_lr, low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long the job trains."""

    global_batch_size: int
    """Samples per optimizer step over all data-parallel replicas, which need not divide it."""
    train_iters: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the data, rounded up to whole optimizer steps; give this or train_iters."""
    max_bad_steps: int = 3
    """Steps in a row with a gradient that is not finite after which the job is stopped."""

    def __post_init__(self) -> None:
        in_range("global_batch_size", self.global_batch_size, low=1, high=MAX_BATCH)
        in_range("train_iters", self.train_iters, low=1, high=MAX_COUNT)
        in_range("epochs", self.epochs, low=0, above=True, high=1e6)
        in_range("max_bad_steps", self.max_bad_steps, low=1, high=MAX_COUNT)
        both = self.train_iters is not None and self.epochs is not None
        require(
            not both,
            key="epochs",
            given=f"train_iters {self.train_iters} and epochs {self.epochs:g} are both given" if both else "",
            rule="a job's length is given once",
            remedy="set one of them to null",
        )
        require(
            self.train_iters is not None or self.epochs is not None,
            key="train_iters",
            given="neither train_iters nor epochs is given",
            rule="a job needs a length",
            remedy="give one of them",
        )

    def num_steps(self, rows: int) -> int:
        """Optimizer steps of the job over a data set of ``rows`` rows."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.epochs is not None
        # The number as it is written: 1.1 epochs of 50 rows are 55, not what is left of 55 in binary.
        return max(1, math.ceil(Fraction(str(self.epochs)) * rows / self.global_batch_size))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Validation and early stopping of the job."""

    path: Path | None = None
    """Validation rows, of any kind that training data may have; null: no validation."""
    interval: int | None = None
    """Optimizer steps between two validations."""
    patience: int | None = None
    """Validations without a better loss after which the job stops; null: never."""

    def __post_init__(self) -> None:
        in_range("interval", self.interval, low=1, high=MAX_COUNT)
        in_range("patience", self.patience, low=1, high=MAX_COUNT)
        for key, value in (("interval", self.interval), ("patience", self.patience)):
            require(
                value is None or self.path is not None,
                key=key,
                given=f"{key} {value} is given without a path",
                rule="validation needs rows",
                remedy="give eval.path, or set this key to null",
            )
        require(
            self.path is None or self.interval is not None,
            key="interval",
            given="a path is given without an interval",
            rule="validation needs to know when",
            remedy="give eval.interval in optimizer steps",
        )

    def steps_until_next(self, applied: int) -> float:
        """Optimizer steps from ``applied`` to the next validation, at which a window ends; infinity without any."""
        return math.inf if self.interval is None else self.interval - applied % self.interval


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """One LoRA job."""

    name: str
    """Folder of the job's adapter under checkpoint.save; the seeds derive from it too."""
    dataset: DatasetConfig
    """Training data."""
    max_length: int | None = None
    """Longest allowed sample in tokens; null: what the model and token_capacity allow."""
    seed: int | None = None
    """Seed of initial values, dropout and data order; null: from runtime.seed and the name, never from the place."""
    peft: PeftConfig = PeftConfig()
    """The adapter."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Learning rate."""
    train: TrainConfig
    """Length and batch."""
    eval: EvalConfig = EvalConfig()
    """Validation."""

    def __post_init__(self) -> None:
        name = self.name.lower()
        require(
            bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", self.name))
            and name not in RESERVED
            and not name.startswith(RESERVED_START),
            key="name",
            given=f"got {show(self.name)}",
            rule="a job's name becomes a folder: 1 to 128 of A-Z a-z 0-9 . _ -, no dot or dash in front, "
            f"none of {', '.join(RESERVED)}, and nothing that begins with {RESERVED_START}",
            remedy="rename the job",
        )
        in_range("max_length", self.max_length, low=2, high=MAX_COUNT)
        in_range("seed", self.seed, low=0, high=MAX_SEED)
        require(
            self.scheduler.min_lr <= self.optimizer.lr,
            key="scheduler.min_lr",
            given=f"min_lr {self.scheduler.min_lr:g} with lr {self.optimizer.lr:g}",
            rule="must not be above the peak learning rate",
            remedy="lower min_lr or raise optimizer.lr",
        )
        if self.train.train_iters is not None:
            self.check_warmup(self.train.train_iters)

    def check_length(self, rows: int, *, key: str = "") -> None:
        """Check what is known of a job's length once its rows are counted.

        Args:
            rows: rows of its data set.
            key: key path of the job, for messages.
        """
        steps = self.train.num_steps(rows)
        require(
            steps <= MAX_COUNT,
            key=f"{key}.train.epochs".lstrip("."),
            given=f"{steps} optimizer steps",
            rule=f"a job has at most {MAX_COUNT}",
            remedy="give fewer epochs or a larger global batch",
        )
        self.check_warmup(steps, key=key)

    def check_warmup(self, num_steps: int, *, key: str = "") -> None:
        """Check that the warmup ends before the job does (with epochs, known once the rows are counted).

        Args:
            num_steps: optimizer steps of the job.
            key: key path of the job, for the message.
        """
        require(
            self.scheduler.lr_warmup_iters < num_steps,
            key=f"{key}.scheduler.lr_warmup_iters".lstrip("."),
            given=f"{self.scheduler.lr_warmup_iters} warmup steps in a job of {num_steps}",
            rule="the warmup must end before the job does",
            remedy="lower lr_warmup_iters or train longer",
        )

    def lr_at(self, step: int, num_steps: int) -> float:
        """Learning rate of optimizer step ``step`` (from 1) out of ``num_steps``."""
        return lr_at(
            step,
            total=num_steps,
            lr=self.optimizer.lr,
            min_lr=self.scheduler.min_lr,
            warmup=self.scheduler.lr_warmup_iters,
            style=self.scheduler.lr_decay_style,
        )
