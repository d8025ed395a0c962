"""Multi-adapter LoRA: routing, adapter bank, autograd functions, functional form, module."""
