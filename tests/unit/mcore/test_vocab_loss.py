"""The loss over the vocabulary: values and gradients of PyTorch's own, in the logits' place."""

import pytest
import torch
import torch.nn.functional as F

from lorafusion_megatron.mcore import vocab_loss as module
from lorafusion_megatron.mcore.vocab_loss import vocab_loss


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 30])
def test_values_and_gradients_are_those_of_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)  # several chunks, and a last one that is not full
    torch.manual_seed(rows)
    logits = torch.randn(rows, 50, dtype=torch.float64).float() * 4
    labels, weights = torch.randint(0, 50, (rows,)), torch.rand(rows)
    want_in = logits.double().requires_grad_()
    want = F.cross_entropy(want_in, labels, reduction="none")
    (want * weights.double()).sum().backward()
    source = logits.clone().requires_grad_()
    loss = vocab_loss(source * 1.0, labels)  # the product's output is what backward may overwrite
    (loss * weights).sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(source.grad.double(), want_in.grad, rtol=1e-5, atol=1e-7)


def test_the_gradient_takes_the_place_of_the_logits():
    logits = (torch.randn(5, 11).requires_grad_() * 1.0).detach().requires_grad_()
    product = logits.view(5, 11)
    memory = product.data_ptr()
    vocab_loss(product, torch.arange(5)).sum().backward()
    assert logits.grad.data_ptr() == memory


def test_sixteen_bit_logits_are_summed_in_fp32():
    torch.manual_seed(0)
    logits = torch.randn(64, 4096).bfloat16()
    labels = torch.randint(0, 4096, (64,))
    loss = vocab_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="none"), rtol=1e-6, atol=1e-6)


def test_labels_of_other_ranks_add_nothing_here():
    """Half a vocabulary: the target's logit is 0 here, the sum is of this half alone."""
    logits = torch.randn(3, 10)
    loss = vocab_loss(logits[:, 5:].clone(), torch.tensor([0, 5, 9]), first=5)
    half = logits[:, 5:].logsumexp(-1)
    torch.testing.assert_close(loss, half - torch.stack((torch.tensor(0.0), logits[1, 5], logits[2, 9])))
