"""PEFT, Megatron-LM pretraining scripts, Megatron-Bridge."""
