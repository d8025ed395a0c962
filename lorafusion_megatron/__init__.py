"""Fine-tune many LoRA jobs at once on one frozen Megatron-Core model."""

__version__ = "0.1.0"
