"""The learning rate as a pure function of the step."""

import math


def lr_at(step: int, *, total: int, lr: float, min_lr: float = 0.0, warmup: int = 0, style: str = "constant") -> float:
    """Learning rate of one optimizer step.

    ``lr * step / warmup`` while ``step <= warmup``; then ``lr`` (constant), or with
    ``f = (step - warmup) / (total - warmup)`` and ``c = (1 + cos(pi f)) / 2`` (cosine) or ``1 - f`` (linear):
    ``min_lr + (lr - min_lr) * c``.

    Args:
        step: optimizer step of the job, counted from 1.
        total: optimizer steps of the whole job.
        lr: the peak.
        min_lr: where the decay ends.
        warmup: steps of linear warmup.
        style: constant | cosine | linear.

    Returns:
        The rate; ``min_lr`` for steps past ``total`` of a decaying style.
    """
    if warmup and step <= warmup:
        return lr * step / warmup
    if style == "constant":
        return lr
    fraction = min(1.0, (step - warmup) / (total - warmup))
    coefficient = 0.5 * (1 + math.cos(math.pi * fraction)) if style == "cosine" else 1 - fraction
    return min_lr + (lr - min_lr) * coefficient
