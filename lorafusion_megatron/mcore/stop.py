"""Agreeing on where to stop, and on what to leave out, while the pipeline runs.

A signal reaches one rank, or each at another moment; all must stop at the same place of the stream. Every
``interval`` positions each rank adds its own wish to an asynchronous reduction and reads the result one interval
later. By then every rank has joined: stage 0 runs the forward of position j only after the last stage ran that of
j - S, so an interval of at least S positions never makes a stage wait.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from .parallel import Groups


class StopVote:
    """One window's votes. `at` is called before the first chunk's forward of every position, on every rank.

    Args:
        groups: this rank's groups; the vote goes over all ranks.
        wished: whether this rank wants to stop.
        behind: whether this rank wants the next interval's checkpoints to be left out.
        leave_out: told (first, last) of the positions after which none is to be made, on every rank alike.
        lead: positions between the decision and the stop, so that a rank knows the shapes that it is to receive
            before it asks for them.
        interval: positions between two votes; at least the number of stages.
    """

    def __init__(
        self,
        groups: Groups,
        wished: Callable[[], bool],
        *,
        lead: int,
        interval: int,
        behind: Callable[[], bool] = lambda: False,
        leave_out: Callable[[int, int], None] = lambda first, last: None,
    ) -> None:
        self._groups, self._wished, self._behind, self._leave_out = groups, wished, behind, leave_out
        self.lead, self.interval = lead, interval
        self.position: int | None = None
        """First position that does not count any more; None while nobody wants to stop."""
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def at(self, position: int) -> None:
        """Vote and read the vote before."""
        if position % self.interval or self.position is not None:
            return
        if self._vote is not None:
            flags, work = self._vote
            work.wait()
            stop, behind = flags.tolist()
            if behind:
                self._leave_out(position + self.lead, position + self.lead + self.interval - 1)
            if stop:
                self.position = position + self.lead
                return
        flags = torch.tensor([int(self._wished()), int(self._behind())], dtype=torch.int32)
        self._vote = (flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._groups.votes, async_op=True))

    def finish(self) -> bool:
        """Whether somebody wished to stop, asked after the window; every rank calls it."""
        if self._vote is not None:
            self._vote[1].wait()
        return anyone(self._groups, wished=self._wished() or self.position is not None)


def anyone(groups: Groups, *, wished: bool) -> bool:
    """Whether any rank wishes to stop, asked while the pipeline is empty; every rank calls it."""
    flag = torch.tensor([int(wished)], dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=groups.votes)
    return bool(flag.item())
