"""Speed figures, by hand."""

import pytest

from lorafusion_megatron.training.bench.workloads import shape
from lorafusion_megatron.training.throughput import Throughput, flops_per_token

FIGURES = {"tokens": 12_000, "seconds": 3.0, "processes": 2, "flops_per_token": 1e10, "bubble_share": 0.25}


def test_flops_are_four_a_parameter_that_a_token_meets():
    """Llama 3.1 8B: 6,979,321,856 parameters in the linears and 525,336,576 in the output layer."""
    assert flops_per_token(shape("llama-3.1-8b", None)) == 4 * (6_979_321_856 + 525_336_576)


def test_rates_are_per_gpu_and_against_the_rate_of_the_matrix_units():
    throughput = Throughput(peak_flops=4e13, **FIGURES)
    assert throughput.tokens_per_second_per_gpu == 2000.0
    assert throughput.model_flops_share == pytest.approx(0.5)
    assert throughput.values() == {
        "tokens_per_second_per_gpu": 2000.0,
        "bubble_share": 0.25,
        "model_flops_share": pytest.approx(0.5),
    }
    assert str(throughput) == (
        "2,000 tokens/s per GPU, 20 TFLOP/s per GPU: 50.0% of what one large matrix product reaches"
    )


def test_without_a_gpu_there_is_no_share():
    throughput = Throughput(peak_flops=0.0, **FIGURES)
    assert throughput.model_flops_share is None
    assert "model_flops_share" not in throughput.values()
    assert str(throughput) == "2,000 tokens/s per GPU"
