"""An adapter of one factor on a run of one rank: what a saver and a checkpoint need of them."""

from types import SimpleNamespace

import torch

from lorafusion_megatron.lora.layout import FactorPlace

GROUPS = SimpleNamespace(dp_rank=0, saves=None, device=torch.device("cpu"), gather=lambda value, group: [value])


class OneFactor:
    """As `AdapterShard`: A ``[2, 3]`` of one projection."""

    numel = 6
    places = (
        FactorPlace(
            layer=0,
            projection="q_proj",
            factor="A",
            full_shape=(2, 3),
            at=0,
            shape=(2, 3),
            column=0,
            full_column=0,
            width=3,
            runs=((0, 0, 2),),
        ),
    )

    def __init__(self) -> None:
        self.master, self.grad = torch.arange(6.0), torch.ones(7)
