"""From a run file to everything that training needs, before any process group is made."""

import sys
from dataclasses import dataclass

import torch

from ..config.run import RunConfig
from ..data.dataset import JobDataset
from ..errors import UserError
from ..lora.autograd import Backend
from ..lora.layout import LinearLayout
from ..mcore.gpu import claim_gpu
from ..models.projections import row_of_projection, row_projection, target_linears
from ..scheduler.options import PlanOptions
from ..types import ModelSpec, Topology
from .cpu_dtype import slow_dtype_note
from .hosts import check_launcher, world_size
from .inputs import load_inputs, row_cache
from .planning import choose_layers, cost_model, padding_multiple, plan_options
from .printing import Printer
from .row_cache import RowCache


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked run."""

    run: RunConfig
    spec: ModelSpec
    topology: Topology
    datasets: dict[str, JobDataset]
    """Training rows of each job of the run file, by name."""
    eval_datasets: dict[str, JobDataset]
    """Validation rows of those that have some, by name."""
    rows: RowCache
    """Where all of them are kept."""
    device: str
    transformer_impl: str
    transformer_reason: str
    """Why that implementation, where the run file left it to us."""
    backend: Backend
    layers_per_chunk: tuple[int, ...]
    plan_options: PlanOptions
    """What its windows are planned for."""
    padding_multiple: int
    """Rows that each job's part of a microbatch is padded to."""
    notes: tuple[str, ...]
    """What is allowed but may surprise: rows that train nothing, keys without effect."""

    @property
    def row_multiple(self) -> int:
        """Rows that a whole microbatch is padded to: sequence parallel splits them over TP."""
        return self.topology.tensor_parallel if self.topology.sequence_parallel else 1


def prepare(run: RunConfig, *, gpu: torch.device | None = None) -> Prepared:
    """Read and check everything that a run names; makes no process group, and where it raises leaves nothing behind.

    Args:
        run: the run.
        gpu: where this rank's model is already; None: the rank takes its own (`claim_gpu`).

    Raises:
        UserError: whatever is wrong.
    """
    check_launcher()
    rows = row_cache(run, write=True, say=Printer(sys.stderr).line)
    try:
        return _prepare(run, rows, gpu)
    except UserError:
        rows.discard()
        raise


def _prepare(run: RunConfig, rows: RowCache, gpu: torch.device | None) -> Prepared:
    device = choose_device(run)
    if device == "cuda":
        if gpu is None:
            claim_gpu()
        else:
            torch.cuda.set_device(gpu)
    transformer_impl, reason = choose_transformer(run, device)
    backend = choose_backend(run, device)
    padding = padding_multiple(run.runtime, backend.tile)
    inputs = load_inputs(run, rows, padding_multiple=padding)
    spec = inputs.spec
    cost = cost_model(run, spec)
    layers, advice = choose_layers(run, spec, cost, inputs.datasets)
    slow = slow_dtype_note(run.base_model.dtype, device)
    topology = run.topology(world_size())
    return Prepared(
        run=run,
        spec=spec,
        topology=topology,
        datasets={run.jobs[index].name: dataset for index, dataset in inputs.datasets.items()},
        eval_datasets={run.jobs[index].name: dataset for index, dataset in inputs.eval_datasets.items()},
        rows=rows,
        notes=(*inputs.notes, *advice, *([slow] if slow else [])),
        device=device,
        transformer_impl=transformer_impl,
        transformer_reason=reason,
        backend=backend,
        padding_multiple=padding,
        layers_per_chunk=layers,
        plan_options=plan_options(
            run, layers=layers, replicas=topology.data_parallel, padding_multiple=padding, cost=cost
        ),
    )


def choose_device(run: RunConfig) -> str:
    """ "cuda" or "cpu".

    Raises:
        UserError: cuda was asked for and there is none.
    """
    wanted = run.runtime.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device cuda",
            rule="PyTorch sees no GPU on this machine",
            remedy="use auto or cpu, or mend the driver",
            key="runtime.device",
        )
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def choose_backend(run: RunConfig, device: str) -> Backend:
    """The LoRA backend of a run.

    Raises:
        UserError: triton was asked for where it can't run.
    """
    from ..lora.reference import TorchBackend

    wanted = run.runtime.lora_backend
    if wanted == "torch" or (wanted == "auto" and device == "cpu"):
        return TorchBackend()
    if device == "cpu":
        raise UserError(
            "lora_backend triton with device cpu",
            rule="the Triton kernels need a GPU",
            remedy="use auto or torch",
            key="runtime.lora_backend",
        )
    from ..lora.triton_backend import TritonBackend

    return TritonBackend()


def choose_transformer(run: RunConfig, device: str) -> tuple[str, str]:
    """(local or transformer_engine, why).

    Raises:
        UserError: Transformer Engine was asked for where it can't run.
    """
    wanted = run.model.transformer_impl
    if wanted == "local":
        return "local", "asked for"
    if device == "cpu":
        reason: str | None = "there is no GPU"
    else:
        from ..mcore.build import transformer_engine_missing

        reason = transformer_engine_missing()
    if reason is None:
        return "transformer_engine", "installed"
    if wanted == "transformer_engine":
        raise UserError(
            "transformer_impl transformer_engine",
            rule=reason,
            remedy="install transformer-engine[pytorch], or use auto or local",
            key="model.transformer_impl",
        )
    return "local", reason


def linear_layouts(spec: ModelSpec, tp_rank: int, tp_size: int) -> dict[str, LinearLayout]:
    """Every linear that a job may target, with the layout of this rank's rows."""
    return {
        name: LinearLayout(
            projections=tuple(projection.name for projection in linear.projections),
            projection_rows=tuple(projection.out_features for projection in linear.projections),
            row_projection=torch.from_numpy(row_projection(spec, name, tp_rank, tp_size)),
            row_index=torch.from_numpy(row_of_projection(spec, name, tp_rank, tp_size)),
        )
        for name, linear in target_linears(spec).items()
    }
