"""Cross-entropy over a vocabulary that tensor parallelism may split, without a second copy of the logits.

    loss = log(sum_v exp(logit_v)) - logit_target;    d logit_v = (softmax_v - [v = target]) * d loss

The gradient overwrites the logits, which nothing else reads; fp32 temporaries span `ROWS` rows at a time.
"""

from typing import Any

import torch
import torch.distributed as dist

ROWS = 512
"""Rows per chunk: 512 x 152,064 fp32 values are 300 MB; the whole microbatch's would be 2.5 GB."""


class _VocabLoss(torch.autograd.Function):
    """Saves the logits themselves and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first: int, group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """fp32 ``[rows]``: log sum exp of a row's logits minus its label's; this rank's columns begin at ``first``."""
        local = labels - first
        mine = (local >= 0) & (local < logits.shape[-1])
        local = local.clamp(0, logits.shape[-1] - 1)
        largest = logits.amax(dim=-1).float()
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        sums = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
        for rows in _chunks(logits.shape[0]):
            sums[0, rows] = (logits[rows].float() - largest[rows, None]).exp_().sum(dim=-1)
        sums[1] = logits.gather(1, local[:, None])[:, 0].float().mul_(mine)
        if group is not None:
            dist.all_reduce(sums, group=group)
        norm = sums[0].log() + largest
        ctx.save_for_backward(logits, norm, local, mine)
        return norm - sums[1]

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, norm, local, mine = ctx.saved_tensors
        for rows in _chunks(logits.shape[0]):
            part = (logits[rows].float() - norm[rows, None]).exp_().mul_(d_loss[rows, None])
            part.scatter_add_(1, local[rows, None], (-d_loss[rows] * mine[rows])[:, None])
            logits[rows] = part.to(logits.dtype)
        return logits, None, None, None


def vocab_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, first: int = 0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Cross-entropy of every row.

    Args:
        logits: ``[rows, vocabulary of this rank]``; overwritten by backward, so nothing else may need them.
        labels: int64 ``[rows]``, over the whole vocabulary.
        first: the first of this rank's vocabulary rows.
        group: ranks that share the vocabulary; None where this one has all of it.

    Returns:
        fp32 ``[rows]``.

    Note: about five passes over the logits in plain PyTorch, any device and dtype; Transformer Engine's kernel, which
        is used where it is installed, takes two.
    """
    return _VocabLoss.apply(logits, labels, first, group)


def fused_vocab_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, first: int = 0, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """The same by Transformer Engine's kernel; ``first`` follows from the rank's place in ``group``."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    rows = logits.shape[0]
    return parallel_cross_entropy(
        logits.view(1, rows, -1), labels.view(1, rows), dist_process_group=group, overwrite_input=True
    ).view(rows)


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(rows, start + ROWS)) for start in range(0, rows, ROWS)]
