"""Stages' messages as NCCL takes them: a group ends only when its peers have posted the other sides, in order.

Megatron's own schedules run on every stage by themselves, with the communicator of the package; what they exchange is
recorded and then played. gloo would buffer small messages, and so hide a lock-up.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.process_groups_config import ProcessGroupCollection

from lorafusion_megatron.mcore import p2p
from lorafusion_megatron.mcore.device_steps import bears_side_reductions
from tests.unit.mcore.stages import Group

LAYOUTS = [(2, 1), (3, 1), (4, 1), (2, 2), (2, 4), (3, 2), (4, 2), (4, 3)]
CONFIG = {
    "hidden_size": 1,
    "pipeline_dtype": torch.float32,
    "overlap_p2p_comm": False,
    "batch_p2p_comm": True,
    "overlap_p2p_comm_warmup_flush": False,
    "calculate_per_token_loss": True,
    "variable_seq_lengths": True,
    "cuda_graph_impl": "none",
}


class _Config(SimpleNamespace):
    """Megatron's configuration: what is not named is off."""

    def __getattr__(self, name: str) -> None:
        return None


@pytest.fixture
def alone(monkeypatch):
    """Lets a schedule run on one stage without process groups or a GPU."""
    for module in (schedules, p2p_communication):
        monkeypatch.setattr(module, "is_pp_first_stage", lambda group: group.rank() == 0)
        monkeypatch.setattr(module, "is_pp_last_stage", lambda group: group.rank() == group.size() - 1)
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(schedules, "get_model_type", lambda model: None)
    make_zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: make_zeros(*a, **k))
    return monkeypatch


class _Stage(p2p.PlannedCommunicator):
    """A stage's communicator that records groups, each a list of (sends?, peer, what), and forwards and backwards: None
    or the position whose steps end with one."""

    def record(self) -> list:
        self.groups: list = []
        return self.groups

    def _communicate(self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, **rest):
        self.directions = ["forward"] * recv_prev + ["backward"] * recv_next
        return super()._communicate(
            tensor_send_next=tensor_send_next,
            tensor_send_prev=tensor_send_prev,
            recv_prev=recv_prev,
            recv_next=recv_next,
            **rest,
        )

    def batch(self, ops):
        directions, group, direction = iter(self.directions), [], ""
        for kind, tensor, peer, _ in ops:
            # Activations and gradients have three dimensions, mail has two and goes with what stands before it.
            if tensor.ndim == 3:
                direction = tensor.direction if kind == "send" else next(directions)
            group.append((kind == "send", peer, (direction, tuple(tensor.shape))))
        self.groups.append(group)
        return []


def _run(monkeypatch, stage: int, stages: int, chunks: int, count: int, ends, *, forward_only: bool) -> list:
    """The groups that a stage's schedule exchanges."""
    group = Group(stage, stages)
    config = _Config(
        **CONFIG,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        microbatch_group_size_per_vp_stage=stages,
    )
    mail = None
    if not forward_only:
        mail = p2p.NormMail(group, ends, torch.device("cpu"), num_microbatches=count, chunks=chunks)
    comm = _Stage(group, config, rows=lambda position: position + 1, num_microbatches=count, chunks=chunks, mail=mail)
    groups = comm.record()
    forwards = iter(p2p._table(count, chunks, stages))
    backwards = iter([(position, chunks - 1 - chunk) for position, chunk in p2p._table(count, chunks, stages)])

    def made(position: int, direction: str) -> torch.Tensor:
        tensor = torch.zeros(position + 1, 1, 1)
        tensor.direction = direction
        return tensor

    def forward_step(*_, **__):
        groups.append(None)
        return made(next(forwards)[0], "forward"), torch.tensor(0)

    def backward_step(*_, **__):
        position, chunk = next(backwards)
        over = chunk == 0 and ends(position)
        groups.append(position if over else None)
        if over:
            mail.add(position, [torch.ones(2, dtype=torch.float64)] * ends(position))
        return made(position, "backward")

    fake = SimpleNamespace(
        isend="send", irecv="receive", P2POp=lambda *op: op, batch_isend_irecv=comm.batch, ProcessGroup=object
    )
    monkeypatch.setattr(p2p, "dist", fake)
    monkeypatch.setattr(schedules, "forward_step", forward_step)
    monkeypatch.setattr(schedules, "backward_step", backward_step)
    monkeypatch.setattr(schedules, "get_model_config", lambda model: config)
    collection = ProcessGroupCollection()
    collection.tp, collection.cp, collection.pp = Group(0, 1), Group(0, 1), group
    models = [torch.nn.Module() for _ in range(chunks)]
    schedule = (
        schedules.forward_backward_pipelining_with_interleaving
        if chunks > 1
        else schedules.forward_backward_pipelining_without_interleaving
    )
    schedule(
        forward_step_func=None,
        data_iterator=[None] * chunks if chunks > 1 else None,
        model=models if chunks > 1 else models[0],
        num_microbatches=count,
        seq_length=8,
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=comm,
        pg_collection=collection,
    )
    return groups


def _play(stages: list[list], stalls: int | None = None) -> bool:
    """Every stage waits in each group until all of it is matched; what is matched must be the same message.

    Args:
        stages: what each recorded.
        stalls: a stage whose host, before it computes, waits for the reductions of steps that have ended there, which
            end when every stage has come to theirs.

    Returns:
        Whether all came to their end; False where they wait for each other for ever.
    """
    ended: list[set[int]] = [set() for _ in stages]
    sent: dict[tuple[int, int], list] = {}
    wanted: dict[tuple[int, int], list] = {}
    at, waits = [0] * len(stages), [None] * len(stages)
    moved = True
    while moved:
        moved = False
        for rank, groups in enumerate(stages):
            while at[rank] < len(groups):
                event = groups[at[rank]]
                if not isinstance(event, list):
                    if rank == stalls and any(ended[rank] - others for others in ended):
                        break
                    ended[rank] |= set() if event is None else {event}
                    at[rank], moved = at[rank] + 1, True
                    continue
                if waits[rank] is None:
                    waits[rank], moved = [], True
                    for sends, peer, what in event:
                        mine, other = (sent, wanted) if sends else (wanted, sent)
                        pair = (rank, peer) if sends else (peer, rank)
                        mine.setdefault(pair, []).append(what)
                        waits[rank].append((other, pair, len(mine[pair])))
                if any(len(other.get(pair, [])) < number for other, pair, number in waits[rank]):
                    break
                waits[rank], moved = None, True
                at[rank] += 1
    if at != [len(groups) for groups in stages]:
        return False
    assert sent == wanted
    return True


@pytest.mark.parametrize(("stages", "chunks"), LAYOUTS)
def test_no_stage_waits_for_ever_and_every_message_meets_its_own_receive(alone, stages, chunks):
    counts = [stages * groups for groups in (1, 2, 5)] if chunks > 1 else [1, 2, 3, 7]
    for count in counts:
        for ends in (lambda position: 0, lambda position: position % 3, lambda position: int(position % 5 == 4)):
            assert _play([_run(alone, r, stages, chunks, count, ends, forward_only=False) for r in range(stages)])
        assert _play([_run(alone, r, stages, chunks, count, lambda _: 0, forward_only=True) for r in range(stages)])


@pytest.mark.parametrize(("stages", "chunks"), LAYOUTS)
def test_where_a_host_that_stalls_while_steps_are_reduced_locks_the_pipeline(alone, stages, chunks):
    """With data parallelism norms are reduced on the side where a host that waits for it does no harm."""
    count = 5 * stages
    recorded = [_run(alone, r, stages, chunks, count, lambda _: 1, forward_only=False) for r in range(stages)]
    stuck = [rank for rank in range(stages) if not _play(recorded, stalls=rank)]
    assert (not stuck) == bears_side_reductions(stages, chunks)
