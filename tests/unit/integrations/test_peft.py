"""A PEFT model with fused linears against itself without."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.peft import fuse, unfuse


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def peft_model(drop: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=5, lora_alpha=7, lora_dropout=drop, target_modules=["up", "down"], init_lora_weights=False, **options
    )
    return get_peft_model(Net(), config)


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def loss_and_grads(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, copy.deepcopy(trainable(model))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_same_numbers(options):
    model = peft_model(**options)
    x = torch.randn(3, 7, 24)
    want = loss_and_grads(model, x)
    report = fuse(model)
    assert (report.fused, report.left, report.backend) == (2, {}, "torch")
    got = loss_and_grads(model, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert fuse(model).fused == 2
    assert unfuse(model) == 2
    assert unfuse(model) == 0
    torch.testing.assert_close(loss_and_grads(model, x), want, rtol=0, atol=0)


def test_training_follows_the_unfused_model():
    models = [peft_model(), peft_model()]
    fuse(models[1])
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(5):
            loss = model(torch.randn(8, 24)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-7)


def test_dropout_is_seeded_and_off_in_eval():
    model = peft_model(0.5)
    fuse(model)
    x = torch.randn(64, 24)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    unfused = copy.deepcopy(model)
    unfuse(unfused)
    torch.testing.assert_close(model(x), unfused(x))


def test_checkpointing_draws_the_same_masks():
    model = peft_model(0.5)
    fuse(model)
    x = torch.randn(16, 24, requires_grad=True)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().mean().backward()
        grads.append(copy.deepcopy(trainable(model)))
    torch.testing.assert_close(grads[1], grads[0])


def test_adapters_in_fp32_beside_a_16_bit_base():
    model = peft_model()
    model.base_model.model.up.base_layer.bfloat16()
    model.base_model.model.down.base_layer.bfloat16()
    x = torch.randn(32, 24, dtype=torch.bfloat16)
    want = loss_and_grads(model, x)
    fuse(model)
    got = loss_and_grads(model, x)
    for name, grad in got[2].items():
        assert grad.dtype == torch.float32
        assert (grad - want[2][name]).norm() < 0.03 * want[2][name].norm()
    assert (got[0] - want[0]).norm() < 0.02 * want[0].norm()


def test_autocast():
    model = peft_model()
    x = torch.randn(32, 24)
    with torch.autocast("cpu", torch.bfloat16):
        want = loss_and_grads(model, x)
        fuse(model)
        got = loss_and_grads(model, x)
    assert got[0].dtype == want[0].dtype == torch.bfloat16
    assert (got[0] - want[0]).norm() < 0.03 * want[0].norm()


def test_what_is_not_covered_takes_pefts_forward():
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    x = torch.randn(6, 24)
    fuse(model)
    assert model.base_model.model.up.forward._one_adapter() == "default"
    model.base_model.set_adapter(["default", "second"])
    assert model.base_model.model.up.forward._one_adapter() is None
    both = model(x)
    with model.disable_adapter():
        plain = model(x)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    merged = model(x)
    model.unmerge_adapter()
    unfuse(model)
    torch.testing.assert_close(merged, model(x), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(both, model(x))
    with model.disable_adapter():
        torch.testing.assert_close(plain, model(x))


def test_dora_and_trained_bases_are_left_with_a_reason(caplog):
    dora = peft_model(use_dora=True)
    x = torch.randn(4, 24)
    want = dora(x)
    fuse(dora)
    torch.testing.assert_close(dora(x), want)
    trained = peft_model()
    trained.base_model.model.up.base_layer.weight.requires_grad_()
    report = fuse(trained)
    assert (report.fused, report.left) == (1, {"the base layer is trained too": 1})
    assert "1 LoRA layers keep PEFT's forward: the base layer is trained too" in caplog.text


def test_not_a_peft_model():
    with pytest.raises(UserError, match="Net has no LoRA layers; fuse works on PEFT models; get_peft_model first"):
        fuse(Net())


def test_a_backend_that_cannot_compute_the_model_is_refused_before_anything_changes():
    model = peft_model()
    backend = SimpleNamespace(name="triton", reason_unsupported=lambda x, weight: "the kernels need a GPU")
    with pytest.raises(UserError, match=r"the triton backend can.t compute .*: the kernels need a GPU.*leave it out"):
        fuse(model, backend=backend)
    assert unfuse(model) == 0
