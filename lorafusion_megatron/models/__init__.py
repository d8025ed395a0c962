"""Hugging Face <-> Megatron weights; PEFT export and import."""
