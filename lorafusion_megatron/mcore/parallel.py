"""Process groups: Megatron's, and the gloo group that carries objects between all ranks of a run."""

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from ..types import Topology
from . import cpu_compat
from .gpu import claim_gpu, make_workspaces

LAST_SECONDS = 20
"""What a rank that failed has to tell of it and end."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups that adapters' steps reduce over, and this rank's place in the run."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    model: dist.ProcessGroup
    """All tensor and pipeline ranks of one replica: the norm of an adapter is over these."""
    objects: dist.ProcessGroup
    """gloo, all ranks: plans and reports, from the main thread."""
    saves: dist.ProcessGroup
    """gloo, all ranks: shards on their way to a file, from the saving thread."""
    votes: dist.ProcessGroup
    """gloo, all ranks: whether to stop."""
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return dist.get_rank() == 0

    @property
    def size(self) -> int:
        """Ranks of the run."""
        return dist.get_world_size()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
        """Every rank's value on rank 0, by rank; None elsewhere. ``group``: objects, unless given."""
        out: list[Any] | None = [None] * dist.get_world_size() if self.is_first else None
        dist.gather_object(value, out, dst=0, group=group or self.objects)
        return out


def start(topology: Topology, *, device: str, seed: int, timeout_minutes: float) -> Groups:
    """Join the run that torchrun started and make Megatron's process groups.

    Args:
        topology: sizes of the groups, which fill the run's ranks.
        device: "cuda" or "cpu".
        seed: of Megatron's own random states (unused by a frozen base; kept deterministic).
        timeout_minutes: after which a collective with a lost rank raises instead of hanging.

    Raises:
        UserError: this host has fewer GPUs than ranks.
    """
    rank, world = int(os.environ.get("RANK", "0")), topology.world_size
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world == 1 and "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0"
    timeout = timedelta(minutes=timeout_minutes)
    if device == "cuda":
        local = claim_gpu()
    else:
        cpu_compat.install()
        local = torch.device("cpu")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=world, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor_parallel,
        pipeline_model_parallel_size=topology.pipeline_parallel,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline,
        context_parallel_size=topology.context_parallel,
        distributed_timeout_minutes=timeout_minutes,  # its hint says int, but it makes a timedelta of it
        create_gloo_process_groups=device != "cuda",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return join(device=local, timeout_minutes=timeout_minutes)


def join(*, device: torch.device, timeout_minutes: float) -> Groups:
    """The groups of a rank where Megatron's own are made; every rank calls it.

    Args:
        device: where this rank's model is.
        timeout_minutes: of the groups that are added here.

    Note: NCCL makes a communicator when it is first used, and a rank then waits for the others. Made in the middle of a
    window, with messages under way that another rank waits for, that can lock up; so all are made here, and cuBLAS'
    workspaces with them.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        make_workspaces(device)
        _make_communicators(device)
    return Groups(
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        objects=dist.new_group(backend="gloo", timeout=timeout),
        saves=dist.new_group(backend="gloo", timeout=timeout),
        votes=dist.new_group(backend="gloo", timeout=timeout),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


def _make_communicators(device: torch.device) -> None:
    """Use every group that training reduces over or sends within once."""
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
        parallel_state.get_model_parallel_group(),
    ):
        if group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    _connect_stages(parallel_state.get_pipeline_model_parallel_group(), device)
    torch.cuda.synchronize(device)


def _connect_stages(group: dist.ProcessGroup, device: torch.device) -> None:
    """Send a number to both neighbours: NCCL connects two ranks at their first message."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    ops = []
    for step in (1, -1):
        to, source = (dist.get_global_rank(group, (rank + way) % size) for way in (step, -step))
        ops += [
            dist.P2POp(dist.isend, torch.zeros(1, device=device), to, group),
            dist.P2POp(dist.irecv, torch.zeros(1, device=device), source, group),
        ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def stop(*, failed: bool = False) -> None:
    """Leave the run and undo what `start` did to the process.

    Args:
        failed: this rank leaves on its own. The others may then be in the middle of a message, and NCCL's clean end
            waits for them while they wait for this rank: its communicators are left as they are, and the process is
            ended by SIGALRM if it still lives `LAST_SECONDS` later. Launchers end the other ranks once it has ended.
    """
    if failed and dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "nccl":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LAST_SECONDS)
        return
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    cpu_compat.uninstall()
