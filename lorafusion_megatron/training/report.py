"""What a run tells of itself while it goes on: ``status.json``, the timeline, the idle share of its stages."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..mcore.parallel import Groups
from ..mcore.stream import WindowResult
from ..scheduler.cost import load_of
from ..types import ModelSpec, Schedule
from .jobs import Job
from .output import chrome_trace, write_json
from .progress import Progress
from .throughput import Throughput, flops_per_token, matmul_rate

KEPT_SPANS = 100_000
"""Newest spans that the timeline keeps: about 40 MB, however many days a run lasts."""


class RunReport:
    """Rank 0's report of a run; the other ranks take part in gathering.

    Args:
        folder: the run's folder.
        groups: this rank's groups.
        progress: told of each window.
        jobs: all jobs by index.
        layers_per_chunk: of the model, in the data's order.
        spec: the base model.
        seconds_ahead: of this rank's clock (`clock.seconds_ahead`).
    """

    def __init__(
        self,
        folder: Path,
        groups: Groups,
        progress: Progress,
        jobs: Mapping[int, Job],
        layers_per_chunk: Sequence[int],
        spec: ModelSpec,
        seconds_ahead: float = 0.0,
    ) -> None:
        self._ahead = seconds_ahead
        self._folder, self._groups, self._progress, self._jobs = folder, groups, progress, jobs
        self._layers = layers_per_chunk
        self._spans: deque[dict[str, Any]] = deque(maxlen=KEPT_SPANS)
        self._bubble_share: float | None = None
        self._flops = flops_per_token(spec)
        self._peak = matmul_rate(groups.device)
        self._unwritten: set[str] = set()
        """Files whose last writing failed, which was told."""
        self.speed: dict[str, float] = {}
        """Of the last window: tokens per second and GPU, idle share, share of the GPU's matrix rate (rank 0)."""

    def left_over(self, requests: Sequence[str]) -> None:
        """The run ends: say which jobs were stopped, how those that are paused can go on, and what came too late.

        Args:
            requests: names of files that wait in the inbox.
        """
        if requests:
            self._progress.note(
                f"{', '.join(requests)} in {self._folder / 'inbox'} came too late: the next start of the same command "
                "reads it"
            )
        for job in self._jobs.values():
            if job.status == "stopped":
                self._progress.note(f"{job.name} is stopped at step {job.applied} of {job.num_steps}: {job.reason}")
            if job.status == "paused":
                self._progress.note(
                    f"{job.name} is paused at step {job.applied} of {job.num_steps}: to go on, lorafusion-megatron job "
                    f"resume {self._folder} {job.name} and the same command again"
                )

    def window(self, schedule: Schedule, result: WindowResult) -> None:
        """A window ended: idle share of the stages' time in it, and its part of the timeline."""
        result = result.earlier(self._ahead) if self._ahead else result
        mine = (self._groups.pp_rank, self._groups.dp_rank, self._groups.tp_rank, result)
        everyone = self._groups.gather(mine)
        if everyone is None:
            return
        wall = max(r.stopped for *_, r in everyone) - min(r.started for *_, r in everyone)
        busy = sum(r.busy_seconds for *_, r in everyone) / len(everyone)
        self._bubble_share = max(0.0, 1.0 - busy / wall)
        self._progress.window_done(bubble_share=self._bubble_share, seconds=wall)
        throughput = Throughput(
            tokens=sum(s.tokens for replica in schedule.replicas for m in replica[: result.cut] for s in m.samples),
            seconds=wall,
            processes=len(everyone),
            flops_per_token=self._flops,
            peak_flops=self._peak,
            bubble_share=self._bubble_share,
        )
        self.speed = throughput.values()
        if self._groups.device.type == "cuda":
            self._progress.note(str(throughput))
        for stage, replica, tensor, part in everyone:
            if not replica and not tensor:
                self._spans.extend(self._span(stage, span, schedule) for span in part.spans)

    def status(self, state: str, *, window: int, last_checkpoint: str | None) -> None:
        """Replace ``status.json``. ``state``: running | stopped | done."""
        if not self._groups.is_first:
            return
        jobs = [
            {
                "name": job.name,
                "status": job.status,
                "reason": job.reason,
                "step": job.applied,
                "num_steps": job.num_steps,
            }
            for job in self._jobs.values()
        ]
        value = {
            "state": state,
            "window": window,
            "bubble_share": self._bubble_share,
            "speed": self.speed,
            "last_checkpoint": last_checkpoint,
            "jobs": jobs,
        }
        self._write("status.json", value)

    def timeline(self) -> None:
        """Write ``trace.json``."""
        if self._groups.is_first:
            stages = [f"stage {stage}" for stage in range(self._groups.pp_size)]
            self._write("trace.json", chrome_trace(list(self._spans), stages))

    def _write(self, name: str, value: Any) -> None:
        try:
            write_json(self._folder / name, value)
        except OSError as error:
            if name not in self._unwritten:
                self._progress.note(f"{name} could not be written ({error}); the run goes on")
            self._unwritten.add(name)
        else:
            self._unwritten.discard(name)

    def _span(self, stage: int, span: Any, schedule: Schedule) -> dict[str, Any]:
        microbatch = schedule.replicas[0][span.position]
        jobs = Counter(self._jobs[sample.job].name for sample in microbatch.samples)
        chunk = span.chunk * self._groups.pp_size + stage
        load = load_of(microbatch, schedule.padding_multiple)
        return {
            "stage": stage,
            "kind": span.kind,
            "name": f"{span.kind[0].upper()}{span.position} {'+'.join(jobs) or 'no-op'}",
            "start": span.start,
            "stop": span.stop,
            "args": {
                "position": span.position,
                "chunk": span.chunk,
                "samples": dict(jobs),
                "tokens": load.tokens,
                "squares": load.squares,
                "layers": self._layers[chunk],
                "output": chunk == len(self._layers) - 1,
            },
        }
