"""The learning rate of each step."""

import math

import pytest

from lorafusion_megatron.config import lr_at


def test_constant_after_a_linear_warmup() -> None:
    rates = [lr_at(step, total=10, lr=0.4, warmup=4) for step in range(1, 11)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 6)


def test_linear_reaches_the_least_rate_at_the_last_step() -> None:
    rates = [lr_at(step, total=6, lr=1.0, min_lr=0.2, warmup=2, style="linear") for step in range(1, 7)]
    assert rates == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine() -> None:
    rates = [lr_at(step, total=4, lr=3.0, min_lr=1.0, style="cosine") for step in range(1, 5)]
    half = math.sqrt(0.5)
    assert rates == pytest.approx([2 + half, 2.0, 2 - half, 1.0])


def test_a_job_of_one_step_and_steps_past_the_end() -> None:
    assert lr_at(1, total=1, lr=1.0, min_lr=0.25, style="cosine") == 0.25
    assert lr_at(9, total=4, lr=1.0, min_lr=0.25, style="linear") == 0.25
    assert lr_at(1, total=1, lr=1.0, warmup=1, style="linear") == 1.0


@pytest.mark.parametrize("style", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 2), (8, 2), (6, 5)])
def test_equals_the_formula_of_the_design(style: str, total: int, warmup: int) -> None:
    lr, low = 2e-3, 2e-4
    for step in range(1, total + 1):
        if step <= warmup:
            expected = lr * step / warmup
        elif style == "constant":
            expected = lr
        else:
            done = (step - warmup) / (total - warmup)
            share = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[style]
            expected = low + (lr - low) * share
        assert lr_at(step, total=total, lr=lr, min_lr=low, warmup=warmup, style=style) == pytest.approx(expected)
