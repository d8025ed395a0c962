"""A CPU without instructions for bfloat16 takes many times as long with it: the run says so, the demo avoids it."""

import pytest

from lorafusion_megatron.training import cpu_dtype


@pytest.mark.parametrize(
    ("dtype", "device", "cost", "told"),
    [
        ("bfloat16", "cpu", 64.0, "takes 64.0 times as long"),
        ("bfloat16", "cpu", 0.4, None),
        ("bfloat16", "cuda", 64.0, None),
        ("float32", "cpu", 64.0, None),
    ],
)
def test_a_slow_dtype_is_told(
    monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, cost: float, told: str | None
) -> None:
    monkeypatch.setattr(cpu_dtype, "bfloat16_cost", lambda: cost)
    note = cpu_dtype.slow_dtype_note(dtype, device)
    assert note is None if told is None else told in str(note)
    assert note is None or "base_model.dtype=float32" in note


@pytest.mark.parametrize(("cost", "dtype"), [(64.0, "float32"), (0.4, "bfloat16")])
def test_the_demo_takes_the_faster_dtype(monkeypatch: pytest.MonkeyPatch, cost: float, dtype: str) -> None:
    monkeypatch.setattr(cpu_dtype, "bfloat16_cost", lambda: cost)
    assert cpu_dtype.fastest_dtype() == dtype


def test_the_cost_is_of_the_times_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"torch.bfloat16": 0.3, "torch.float32": 0.1}
    monkeypatch.setattr(cpu_dtype, "_seconds", lambda dtype: seconds[str(dtype)])
    assert cpu_dtype.bfloat16_cost() == pytest.approx(3)


def test_it_is_measured_on_this_cpu() -> None:
    assert 0.01 < cpu_dtype.bfloat16_cost() < 10_000
