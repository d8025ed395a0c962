"""Turns an existing Megatron-LM pretraining script into a run of many LoRA jobs by two added lines.

    from lorafusion_megatron.integrations import megatron_lm as lorafusion          # 1
    ...
    args = parse_and_validate_args(extra_args_provider=lorafusion.add_arguments)    # (a word in a line of yours)
    lorafusion.enable(args)                                                         # 2
    ...
    pretrain(...)

Without ``--lorafusion-config`` nothing happens: Megatron stays as it is, to the last attribute.
"""

from .entry import add_arguments, disable, enable

__all__ = ["add_arguments", "disable", "enable"]
