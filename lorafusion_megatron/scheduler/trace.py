"""A simulated schedule as a Chrome trace, which Perfetto shows."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorafusion_megatron.scheduler.simulate import Timeline
from lorafusion_megatron.types import Schedule


def describe_microbatch(schedule: Schedule, position: int, names: Sequence[str]) -> dict[str, object]:
    """Jobs, steps and tokens of a position (of the first replica)."""
    parts: dict[str, int] = {}
    for sample in schedule.replicas[0][position].samples:
        label = f"{names[sample.job]} step {sample.step}"
        parts[label] = parts.get(label, 0) + sample.tokens
    return {"microbatch": position, "tokens": parts}


def write_trace(path: Path, schedule: Schedule, timeline: Timeline, names: Sequence[str]) -> None:
    """Write the timeline in the Chrome trace format: one row a stage, optimizer steps as instants.

    Args:
        path: file to write.
        schedule: the plan.
        timeline: its simulation.
        names: per job index its name.
    """
    events: list[dict[str, object]] = []
    for stage, ops in enumerate(timeline.stages):
        events.append({"name": "process_name", "ph": "M", "pid": stage, "args": {"name": f"stage {stage}"}})
        seen: dict[int, int] = {}
        for event in ops:
            position = event.op.microbatch
            kind = "backward" if event.op.backward else "forward"
            noop = position in timeline.noops
            events.append(
                {
                    "name": f"{'no-op ' if noop else ''}{kind} {position}",
                    "cat": "noop" if noop else kind,
                    "ph": "X",
                    "ts": 1e6 * event.start,
                    "dur": 1e6 * (event.stop - event.start),
                    "pid": stage,
                    "tid": 0,
                    "args": describe_microbatch(schedule, position, names) | {"chunk": event.op.chunk},
                }
            )
            if event.op.backward:
                seen[position] = seen.get(position, 0) + 1
                if seen[position] == timeline.pipeline.virtual_stages:
                    events += [
                        {
                            "name": f"{names[end.job]} optimizer step {end.step}",
                            "cat": "optimizer",
                            "ph": "i",
                            "s": "p",
                            "ts": 1e6 * event.stop,
                            "pid": stage,
                            "tid": 0,
                        }
                        for end in schedule.ends_at.get(position, ())
                    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
