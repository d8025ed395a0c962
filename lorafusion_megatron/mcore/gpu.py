"""This rank's GPU."""

import os

import torch
import torch.nn.functional as F

from ..errors import UserError


def claim_gpu() -> torch.device:
    """Make this rank's GPU the current one, before anything is made on a GPU.

    What is made on "cuda" before that (streams, events, tables) lies on the first GPU, whatever the rank: kernels of
    another one can't use it, and every rank takes memory there.

    Returns:
        The device with its index: ``LOCAL_RANK``, or 0 where each rank is shown one GPU alone, as SLURM binds them.

    Raises:
        UserError: this host has fewer GPUs than ranks.
    """
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    ranks = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # all of a host find the same, and one tells
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        local, ranks = 0, 1
    if ranks > count:
        raise UserError(
            f"{ranks} ranks on this host and {count} GPUs",
            rule="every rank needs a GPU of its own",
            remedy="start as many ranks a host as it has GPUs (torchrun --nproc-per-node), or look at "
            "CUDA_VISIBLE_DEVICES",
            key="LOCAL_RANK",
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def make_workspaces(device: torch.device) -> None:
    """Let cuBLAS take its workspaces: one (32 MiB on Hopper) for the calling thread and one for autograd's.

    It would take each at the first product that a thread hands it, which may be late in a run: of a linear without an
    adapter in the microbatch, or of one that this GPU's tuner gives to cuBLAS. Memory would jump after hours.

    Args:
        device: whose current stream training uses.
    """
    factor = torch.zeros(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(16, device=device, dtype=torch.bfloat16)
    # With a bias it is cuBLASLt, which has a workspace of its own where PyTorch is told so.
    F.linear(factor @ factor, factor, bias).sum().backward()
