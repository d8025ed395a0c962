"""Plain PEFT, then the same model with fused LoRA linears: the same losses, fewer milliseconds.

    python scripts/examples/peft_speedup.py            # a Llama of 8 layers of width 2048 on a GPU, a tiny one on a CPU

Needs transformers and peft; downloads nothing.
"""

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorafusion_megatron.integrations.peft import fuse, unfuse

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
WIDTH, LAYERS, BATCH, LENGTH, STEPS = (2048, 8, 8, 1024, 20) if GPU else (64, 2, 2, 64, 4)


def train(model: torch.nn.Module) -> tuple[list[float], float]:
    """A few optimizer steps from the same start; losses and milliseconds a step after a warm-up."""
    torch.manual_seed(1)
    tokens = torch.randint(1000, (BATCH, LENGTH), device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, start = [], 0.0
    for step in range(STEPS):
        if step == 3:
            torch.cuda.synchronize() if GPU else None
            start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    last = [loss.item() for loss in losses]
    return last, (time.perf_counter() - start) / (STEPS - 3) * 1e3


def main() -> None:
    """Train twice and compare."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 32, num_key_value_heads=WIDTH // 32,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(DEVICE, DTYPE)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    start = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    plain, plain_ms = train(model)

    model.load_state_dict(start, strict=False)
    print(fuse(model))
    fused, fused_ms = train(model)
    unfuse(model)

    print(f"PEFT   {plain_ms:7.2f} ms a step, losses {plain[0]:.4f} ... {plain[-1]:.4f}")
    print(f"fused  {fused_ms:7.2f} ms a step, losses {fused[0]:.4f} ... {fused[-1]:.4f}")
    worst = max(abs(a - b) for a, b in zip(plain, fused, strict=True))
    print(f"{plain_ms / fused_ms:.2f} times as fast; largest difference of a loss {worst:.2g}")


if __name__ == "__main__":
    main()
