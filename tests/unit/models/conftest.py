"""Tiny models in Hugging Face's format, made by Transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

SaveModel = Callable[..., Path]


def biases(family: str) -> dict[str, bool]:
    """The options of a family that give it every bias it can have."""
    return {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}.get(family, {})


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """``save_model(family, name="base", max_shard_size=..., dtype=..., **config)`` -> its directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def save(
        family: str,
        *,
        name: str = "base",
        max_shard_size: str = "5GB",
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(DIMENSIONS | config)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        return tmp_path / name

    return save
