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
    """Sums of squares and losses on their way over the stages of plain 1F1B.

    Stage 0 runs forward j + S right after backward j, so the total of a step that ends at position j rides with the
    activations of position j + S; of the last S positions nothing is sent, and `collect` fetches those at the end.

    Args:
        group: the pipeline.
        ends: position -> how many steps end there.
        device: where the sums are.
    """

    def __init__(self, group: dist.ProcessGroup, ends: Callable[[int], int], device: torch.device) -> None:
        self.group, self.ends, self.device = group, ends, device
        self.stages, self.stage = group.size(), group.rank()
        self._partial: dict[int, torch.Tensor] = {}
        self._totals: dict[int, torch.Tensor] = {}

    def buffer(self, position: int) -> torch.Tensor | None:
        """Room for the sums of the steps that end at ``position``: fp64 ``[steps, 2]``; None where none ends."""
        count = self.ends(position) if position >= 0 else 0
        return torch.zeros(count, 2, dtype=torch.float64, device=self.device) if count else None

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
        """What goes to the stage behind with the activations of ``position``."""
        buffer = self.buffer(position - self.stages)
        return buffer if buffer is None else self._totals.get(position - self.stages, buffer)

    def from_behind(self, position: int, sums: torch.Tensor) -> None:
        """Sums that came with the gradient of ``position``."""
        self._partial[position] = sums

    def from_before(self, position: int, sums: torch.Tensor) -> None:
        """Totals that came with the activations of ``position``."""
        self._totals[position - self.stages] = sums

    def total(self, position: int) -> torch.Tensor:
        """fp64 ``[steps, 2]``: totals of the steps that end at ``position``, once they are here."""
        return self._totals[position]

    def collect(self, num_microbatches: int) -> None:
        """Fetch the totals that no activation carried; every stage calls it when its schedule is over."""
        rest = [p for p in range(max(0, num_microbatches - self.stages), num_microbatches) if self.ends(p)]
        if not rest:
            return
        empty = [self.buffer(p) for p in rest]
        parts = [self._totals.get(p, room) for p, room in zip(rest, empty, strict=True)]
        joined = torch.cat([part for part in parts if part is not None])
        dist.broadcast(joined, src=dist.get_global_rank(self.group, 0), group=self.group)
        self._totals |= dict(zip(rest, joined.split([self.ends(p) for p in rest]), strict=True))


class PlannedCommunicator(P2PCommunicator):
    """Megatron's communicator without its exchange of shapes.

    Args:
        group: the pipeline.
        config: Megatron's configuration of the model.
        rows: position -> rows of its activations on this rank (under sequence parallel a share of the tokens).
        num_microbatches: positions of the stream.
        chunks: model chunks of a stage.
        mail: rides with the messages; plain 1F1B alone.
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
        assert mail is None or chunks == 1
        self._rows, self.mail = rows, mail
        first, last = group.rank() == 0, group.rank() == group.size() - 1
        table = _table(num_microbatches, chunks, group.size())
        inner = [position for position, chunk in table if chunk < chunks - 1]
        everything = [position for position, _ in table]
        # The first stage receives what the last one made of all chunks but the last; backward it is the other way.
        self._forwards = iter(inner if first else everything)
        self._gradients = iter(inner if last else everything)
        self._sent = {"next": iter(everything), "prev": iter(everything)}

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
        sends: list[dist.P2POp] = []
        receives: list[dist.P2POp] = []
        from_prev = from_next = None
        if tensor_send_next is not None:
            position = next(self._sent["next"])
            sends += self._ops(dist.isend, self.next_rank, tensor_send_next, self._downward(position))
        if tensor_send_prev is not None:
            position = next(self._sent["prev"])
            sends += self._ops(dist.isend, self.prev_rank, tensor_send_prev, self._upward(position))
        if recv_prev:
            position = next(self._forwards)
            from_prev = self._empty(position)
            receives += self._ops(dist.irecv, self.prev_rank, from_prev, self._from_before(position))
        if recv_next:
            position = next(self._gradients)
            from_next = self._empty(position)
            receives += self._ops(dist.irecv, self.next_rank, from_next, self._from_behind(position))
        for work in dist.batch_isend_irecv([*sends, *receives]) if sends or receives else ():
            work.wait()
        return from_prev, from_next, None

    def _downward(self, position: int) -> torch.Tensor | None:
        return None if self.mail is None else self.mail.downward(position)

    def _upward(self, position: int) -> torch.Tensor | None:
        return None if self.mail is None else self.mail.upward(position)

    def _from_before(self, position: int) -> torch.Tensor | None:
        """Room for the totals that come with the activations of ``position``."""
        if self.mail is None:
            return None
        totals = self.mail.buffer(position - self.mail.stages)
        if totals is not None:
            self.mail.from_before(position, totals)
        return totals

    def _from_behind(self, position: int) -> torch.Tensor | None:
        """Room for the sums that come with the gradient of ``position``."""
        if self.mail is None:
            return None
        sums = self.mail.buffer(position)
        if sums is not None:
            self.mail.from_behind(position, sums)
        return sums

    def _ops(self, kind: Any, peer: int | None, *tensors: torch.Tensor | None) -> list[dist.P2POp]:
        return [dist.P2POp(kind, tensor, peer, self.pp_group) for tensor in tensors if tensor is not None]

    def _shape(self, position: int) -> list[int]:
        return [self._rows(position), 1, self.config.hidden_size]

    def _empty(self, position: int) -> torch.Tensor:
        return torch.empty(
            self._shape(position),
            requires_grad=True,
            device=torch.cuda.current_device(),
            dtype=self.config.pipeline_dtype,
        )


def _table(num_microbatches: int, chunks: int, stages: int) -> list[tuple[int, int]]:
    """(position, chunk) of the forwards in the order of Megatron's schedule; backwards reverse the chunks."""
    if chunks == 1:
        return [(position, 0) for position in range(num_microbatches)]
    return list(schedules.get_schedule_table(num_microbatches, chunks, stages))
