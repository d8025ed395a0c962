"""Looks at what every rank of a run really does in an interleaved pipeline."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lorafusion_megatron.mcore.window import Window
from lorafusion_megatron.scheduler.order import Pipeline
from tests.launch import command

LATE = 42


def train_and_watch(words: list[str], folder: str, shorter: int = 0) -> int:
    """Train; per rank keep how far each microbatch that begins a step was behind the end of the job's step before.

    A rank that is to run a microbatch before the step that it needs has ended there ends at once with status `LATE`.
    ``behind`` counts, at the first chunk's forward, the backwards that this rank had done since that end. The planner's
    dependency distance is made ``shorter`` by some positions.
    """
    if shorter:
        distance = Pipeline.distance
        Pipeline.distance = lambda self: distance(self) - shorter
    seen: Counter[str] = Counter()
    number, after, result = Window.numbered, Window.after_backward, Window.result
    done: dict[tuple[int, int], int] = {}
    backwards = 0

    def numbered(self: Window, batches: Iterator[Any], chunk: int) -> Iterator[Any]:
        for _, position, batch in number(self, batches, chunk):
            replica = self.schedule.replicas[0]
            for sample in replica[self.passes.positions[position]].samples:
                before = (sample.job, sample.step - 1)
                first = {s.step for s in replica[self.passes.positions[position]].samples if s.job == sample.job}
                assert first == {sample.step}
                if sample.step == 1:
                    continue
                seen["checked"] += 1
                if before not in done:
                    os._exit(LATE)
                if chunk == 0:
                    seen[f"behind {backwards - done[before]}"] += 1
            yield chunk, position, batch

    def after_backward(self: Window, start: Any) -> None:
        nonlocal backwards
        pending = {job: steps.applied + steps.pending for job, steps in self._steps.items()}
        after(self, start)
        backwards += 1
        for job, steps in self._steps.items():
            if steps.applied + steps.pending > pending[job]:
                done[job, steps.applied + steps.pending] = backwards

    def keep(self: Window, *marks: Any) -> Any:
        Path(folder, f"seen{dist.get_rank()}.json").write_text(json.dumps(seen))
        return result(self, *marks)

    Window.numbered, Window.after_backward, Window.result = numbered, after_backward, keep
    return command(words)
