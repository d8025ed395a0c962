"""Ranks that bring an adapter to rank 0 in small pieces."""

import torch
import torch.distributed as dist


def bring(piece: int) -> int:
    """Ranks 0 and 1 split an adapter by TP, rank 2 is a replica of rank 0, rank 3 a stage without adapters."""
    from lorafusion_megatron.lora.bank import AdapterShard
    from lorafusion_megatron.mcore import gather
    from lorafusion_megatron.mcore.parallel import Groups
    from tests.unit.lora.test_layout import shards

    dist.init_process_group("gloo")
    gather.PIECE = piece
    halves = shards(("q_proj", "v_proj", "down_proj"), 2)
    generator = torch.Generator().manual_seed(0)
    shapes = {place.key: place.full_shape for place in halves[0].places}
    whole = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for half in halves:
        half.load(whole)
    rank, empty = dist.get_rank(), AdapterShard(halves[0].spec, [], dtype=torch.float32)
    groups = Groups(
        **dict.fromkeys(("tensor", "data", "model", "objects", "votes", "saves"), dist.group.WORLD),
        **dict.fromkeys(("tp_rank", "tp_size", "pp_rank", "pp_size", "dp_size"), 0),
        dp_rank=int(rank == 2),
        device=torch.device("cpu"),
    )
    gatherer, shard = gather.FactorGatherer(groups), (*halves, halves[0], empty)[rank]
    for sign in (1, -1):  # one adapter after the other
        whole_of = gatherer.adapter(shard)
        for scale in (1, 2):  # one part of a checkpoint after the other
            # What a replica holds is not looked at.
            found = whole_of(shard.master * (sign * scale if rank != 2 else 0), None)
            assert (found is None) == (rank != 0)
            if found is not None:
                assert found.keys() == whole.keys()
                assert all(torch.equal(found[key], whole[key] * sign * scale) for key in whole)
    dist.destroy_process_group()
    return 0
