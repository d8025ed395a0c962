"""Pipeline messages of which both sides know the shape beforehand, and the norms that ride with them.

Megatron exchanges the shape of every message before it, with a device synchronisation each way. Here the plan says
how many rows every microbatch has, and messages between two stages keep the schedule's order, so counting them names
them.

The norm of an adapter's gradient is a sum over the stages. It needs no collective: the gradient message of a step's
last microbatch carries the sum of the stages behind, and the activation message that stage 0 sends next carries the
total. Both sides know from the plan which messages carry something.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator


class NormMail:
    """Sums of squares and losses on their way over the stages.

    A step's sums are complete on a stage after the backward of its last microbatch on the first chunk. On stage 0 the
    total of a step that ends at position j is known after that backward, and rides with the activations of the first
    chunk that stage 0 sends next: in plain 1F1B those of position j + S. Nothing is sent after the last positions;
    `collect` fetches their totals at the end.

    Args:
        group: the pipeline.
        ends: position -> how many steps end there.
        device: where the sums are.
        num_microbatches: positions of the stream.
        chunks: model chunks of a stage.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ends: Callable[[int], int],
        device: torch.device,
        *,
        num_microbatches: int,
        chunks: int,
    ) -> None:
        self.group, self.ends, self.device = group, ends, device
        self.stage = group.rank()
        self._partial: dict[int, torch.Tensor] = {}
        self._totals: dict[int, torch.Tensor] = {}
        self._carried, self.left = _carried(group.size(), chunks, num_microbatches)

    def carried(self, position: int) -> Sequence[int]:
        """Positions whose totals ride with the first chunk's activations of ``position``."""
        return self._carried.get(position, ())

    def buffer(self, position: int) -> torch.Tensor | None:
        """Room for the sums of the steps that end at ``position``: fp64 ``[steps, 2]``; None where none ends."""
        return self._room(self.ends(position))

    def add(self, position: int, sums: Sequence[torch.Tensor]) -> None:
        """Add this stage's sums of the steps that end at ``position``, right after its backward."""
        mine = torch.stack(tuple(sums))
        behind = self._partial.pop(position, None)
        mine = mine if behind is None else mine + behind
        (self._totals if self.stage == 0 else self._partial)[position] = mine

    def upward(self, position: int) -> torch.Tensor | None:
        """What goes to the stage before with the gradient of ``position``."""
        buffer = self.buffer(position)
        return buffer if buffer is None else self._partial.pop(position, buffer)

    def downward(self, position: int) -> torch.Tensor | None:
        """What goes to the stage behind with the first chunk's activations of ``position``."""
        parts = [self._totals.get(ended, room) for ended, room in self._rooms(self.carried(position))]
        return torch.cat(parts) if parts else None

    def from_behind(self, position: int) -> torch.Tensor | None:
        """Room for the sums that come with the first chunk's gradient of ``position``."""
        sums = self.buffer(position)
        if sums is not None:
            self._partial[position] = sums
        return sums

    def from_before(self, position: int) -> torch.Tensor | None:
        """Room for the totals that come with the first chunk's activations of ``position``."""
        ended = [j for j in self.carried(position) if self.ends(j)]
        totals = self._room(sum(map(self.ends, ended)))
        if totals is not None:
            self._totals |= dict(zip(ended, totals.split([self.ends(j) for j in ended]), strict=True))
        return totals

    def total(self, position: int) -> torch.Tensor:
        """fp64 ``[steps, 2]``: totals of the steps that end at ``position``, once they are here."""
        return self._totals[position]

    def collect(self) -> None:
        """Fetch the totals that no activation carried; every stage calls it when its schedule is over."""
        rest = self._rooms(self.left)
        if not rest:
            return
        joined = torch.cat([self._totals.get(ended, room) for ended, room in rest])
        dist.broadcast(joined, src=dist.get_global_rank(self.group, 0), group=self.group)
        self._totals |= dict(zip([j for j, _ in rest], joined.split([len(room) for _, room in rest]), strict=True))

    def _rooms(self, positions: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        """(position, empty room) of those where steps end."""
        rooms = ((position, self.buffer(position)) for position in positions)
        return [(position, room) for position, room in rooms if room is not None]

    def _room(self, steps: int) -> torch.Tensor | None:
        return torch.zeros(steps, 2, dtype=torch.float64, device=self.device) if steps else None


class PlannedCommunicator(P2PCommunicator):
    """Megatron's communicator without its exchange of shapes.

    Args:
        group: the pipeline.
        config: Megatron's configuration of the model.
        rows: position -> rows of its activations on this rank (under sequence parallel a share of the tokens).
        num_microbatches: positions of the stream.
        chunks: model chunks of a stage.
        mail: rides with the messages.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        config: Any,
        *,
        rows: Callable[[int], int],
        num_microbatches: int,
        chunks: int = 1,
        mail: NormMail | None = None,
    ) -> None:
        super().__init__(group, config)
        self._rows, self.mail = rows, mail
        first, last = group.rank() == 0, group.rank() == group.size() - 1
        table = _table(num_microbatches, chunks, group.size())
        # (position, whether mail rides along) of each message. The last stage sends the first one what it made of all
        # chunks but the last, and gets the gradients of that; no mail goes that way.
        around = [(position, False) for position, chunk in table if chunk < chunks - 1]
        forwards = [(position, chunk == 0) for position, chunk in table]
        backwards = [(position, chunk == chunks - 1) for position, chunk in table]
        self._forwards = iter(around if first else forwards)
        self._gradients = iter(around if last else backwards)
        self._sent = {"next": iter(around if last else forwards), "prev": iter(around if first else backwards)}

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Send to and receive from both sides at once.

        Note: with model chunks on two stages both sides are one rank, which matches messages by their order alone:
        what goes forward is sent and received before what goes backward.
        """
        mail = self.mail
        sends: list[dist.P2POp] = []
        receives: list[dist.P2POp] = []
        from_prev = from_next = None
        if tensor_send_next is not None:
            position, rides = next(self._sent["next"])
            totals = mail.downward(position) if mail and rides else None
            sends += self._ops(dist.isend, self.next_rank, tensor_send_next, totals)
        if tensor_send_prev is not None:
            position, rides = next(self._sent["prev"])
            sums = mail.upward(position) if mail and rides else None
            sends += self._ops(dist.isend, self.prev_rank, tensor_send_prev, sums)
        if recv_prev:
            position, rides = next(self._forwards)
            from_prev = self._empty(position)
            totals = mail.from_before(position) if mail and rides else None
            receives += self._ops(dist.irecv, self.prev_rank, from_prev, totals)
        if recv_next:
            position, rides = next(self._gradients)
            from_next = self._empty(position)
            sums = mail.from_behind(position) if mail and rides else None
            receives += self._ops(dist.irecv, self.next_rank, from_next, sums)
        for work in dist.batch_isend_irecv([*sends, *receives]) if sends or receives else ():
            work.wait()
        return from_prev, from_next, None

    def _ops(self, kind: Any, peer: int | None, *tensors: torch.Tensor | None) -> list[dist.P2POp]:
        return [dist.P2POp(kind, tensor, peer, self.pp_group) for tensor in tensors if tensor is not None]

    def _empty(self, position: int) -> torch.Tensor:
        return torch.empty(
            (self._rows(position), 1, self.config.hidden_size),
            requires_grad=True,
            device=torch.cuda.current_device(),
            dtype=self.config.pipeline_dtype,
        )


def _table(num_microbatches: int, chunks: int, stages: int) -> list[tuple[int, int]]:
    """(position, chunk) of the forwards in the order of Megatron's schedule; backwards reverse the chunks."""
    if chunks == 1:
        return [(position, 0) for position in range(num_microbatches)]
    return list(schedules.get_schedule_table(num_microbatches, chunks, stages))


def _carried(stages: int, chunks: int, num_microbatches: int) -> tuple[dict[int, list[int]], list[int]]:
    """Position -> positions whose first chunk ran backward on stage 0 since its last forward of it; and those left.

    Note: stage 0 runs its warmup's forwards, then a forward and a backward in turn, then the rest of the backwards.
    """
    table = _table(num_microbatches, chunks, stages)
    warmup = min(stages - 1 if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages, len(table))
    carried: dict[int, list[int]] = {}
    waiting: list[int] = []
    for number, (position, chunk) in enumerate(table):
        before = table[number - warmup - 1 : number - warmup] if number > warmup else []
        waiting += [done for done, other in before if other == chunks - 1]
        if chunk == 0 and waiting:
            carried[position], waiting = waiting, []
    left = table[max(0, len(table) - warmup - 1) :]
    return carried, waiting + [done for done, other in left if other == chunks - 1]
