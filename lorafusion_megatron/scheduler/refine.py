"""Moves samples between positions until no move lowers the time that stages wait for their neighbours.

Where few microbatches make up a round, one long sample makes its microbatch longer than its neighbours and every
stage waits for it. The samples beside it can then go to positions further off, or shorter ones can take their place,
within the span that the dependency distance leaves each job's step.
"""

from collections.abc import Iterator, Sequence

from lorafusion_megatron.scheduler.packing import Bin
from lorafusion_megatron.scheduler.rows import Row
from lorafusion_megatron.scheduler.waits import find_peaks, waiting_time
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import Sample

LEAST_GAIN = 0.002
"""Share of a position's time that a move must save to be worth making."""

Place = tuple[int, int]
"""(position, replica)."""


class _State:
    """The stream as bins, with each step's positions."""

    def __init__(self, rows: Sequence[Row], weights: Weights, capacity: int, distance: int, width: int) -> None:
        self.weights, self.capacity, self.distance, self.width = weights, capacity, distance, width
        self.bins = [[self._bin(part) for part in row.parts] for row in rows]
        self.empty_steps = [row.empty_steps for row in rows]
        self.parts = [[self._time(b) for b in bins] for bins in self.bins]
        self.times = [max(parts) for parts in self.parts]
        self.spans: dict[tuple[int, int], dict[int, int]] = {}
        for position, row in enumerate(rows):
            for part in row.parts:
                for sample in part:
                    self._count(sample, position, 1)
            for step in row.empty_steps:
                self.spans.setdefault(step, {})[position] = 1

    def _bin(self, part: Sequence[Sample]) -> Bin:
        out = Bin()
        for sample in part:
            out.add(sample, self.weights.multiple)
        return out

    def _time(self, b: Bin) -> float:
        return self.weights.fixed + self.weights.variable(b.tokens, b.squares) if b.samples else 0.0

    def _count(self, sample: Sample, position: int, change: int) -> None:
        counts = self.spans.setdefault((sample.job, sample.step), {})
        counts[position] = counts.get(position, 0) + change
        if not counts[position]:
            del counts[position]

    def span(self, sample: Sample) -> tuple[int, int]:
        """First and last position where a sample of this step may stand."""
        before = self.spans.get((sample.job, sample.step - 1))
        after = self.spans.get((sample.job, sample.step + 1))
        first = max(before) + self.distance if before else 0
        return first, (min(after) - self.distance if after else len(self.times) - 1)

    def changed_time(self, place: Place, out: Sample | None, into: Sample | None) -> float | None:
        """Time of the microbatch after an exchange; None where it would overflow."""
        position, replica = place
        b, multiple = self.bins[position][replica], self.weights.multiple
        tokens, squares, count = b.tokens, b.squares, len(b.samples)
        if out is not None:
            tokens = b.grown(out.job, -out.tokens, multiple)
            squares -= out.tokens**2
            count -= 1
        if into is not None:
            if out is not None and out.job == into.job:
                tokens = b.grown(out.job, into.tokens - out.tokens, multiple)
            else:
                tokens += b.grown(into.job, into.tokens, multiple) - b.tokens
            squares += into.tokens**2
            count += 1
        if tokens > self.capacity:
            return None
        return self.weights.fixed + self.weights.variable(tokens, squares) if count else 0.0

    def position_time(self, place: Place, time: float) -> float:
        """Time of the position if the microbatch at ``place`` took ``time``."""
        position, replica = place
        return max(time, *(other for index, other in enumerate(self.parts[position]) if index != replica), 0.0)

    def gain(self, changes: dict[int, float]) -> float:
        """Waiting time saved by new times of some positions."""
        reach = self.width - 1
        low, high = max(0, min(changes) - reach), max(changes) + reach + 1
        before = self.times[low:high]
        after = before.copy()
        for position, time in changes.items():
            after[position - low] = time
        # At the ends the windows reach over the edge: pad so that the first and last positions count as often.
        pad = [0.0] * reach
        return waiting_time(pad + before + pad, self.width) - waiting_time(pad + after + pad, self.width)

    def apply(self, source: Place, sample: Sample, target: Place, other: Sample | None) -> None:
        """Move ``sample`` to ``target``, and ``other`` back."""
        for place, out, into in ((source, sample, other), (target, other, sample)):
            position, replica = place
            kept = [s for s in self.bins[position][replica].samples if s is not out]
            self.bins[position][replica] = b = self._bin(kept + ([into] if into else []))
            self.parts[position][replica] = self._time(b)
            self.times[position] = max(self.parts[position])
        for moved, start, end in ((sample, source[0], target[0]), (other, target[0], source[0])):
            if moved is not None:
                self._count(moved, start, -1)
                self._count(moved, end, 1)

    def rows(self) -> list[Row]:
        """The stream as rows."""
        return [
            Row(tuple(tuple(b.samples) for b in bins), empty)
            for bins, empty in zip(self.bins, self.empty_steps, strict=True)
        ]


def refine_rows(
    rows: Sequence[Row], weights: Weights, *, capacity: int, distance: int, width: int, tries_per_sample: int = 12
) -> list[Row]:
    """Move single samples, or exchange two, from positions that others wait for to shorter ones.

    Args:
        rows: a valid stream.
        weights: predicted time of a microbatch.
        capacity: padded tokens of a microbatch.
        distance: dependency distance.
        width: how many neighbours wait for each other.
        tries_per_sample: moves to weigh, per sample of the stream; about 8 us each.

    Returns:
        A valid stream of as many positions and no greater waiting time.

    Note: hill climbing, the positions first that cost most waiting.
    """
    state = _State(rows, weights, capacity, distance, width)
    tries = tries_per_sample * sum(len(part) for row in rows for part in row.parts)
    while tries > 0:
        improved = False
        for position in _costly_positions(state):
            while tries > 0:
                tried, applied = _improve(state, position)
                tries -= tried
                if not applied:
                    break
                improved = True
        if not improved:
            break
    return state.rows()


def _costly_positions(state: _State) -> list[int]:
    """Positions that are longer than their neighbours, by the waiting they cause, most first."""
    times, width = state.times, state.width
    found = []
    for position, peak in enumerate(find_peaks(times, width)):
        if not peak:
            continue
        around = times[max(0, position - width + 1) : position + width]
        saved = state.gain({position: sum(around) / len(around)})
        if saved > LEAST_GAIN * times[position]:
            found.append((-saved, position))
    return [position for _, position in sorted(found)]


def _improve(state: _State, position: int) -> tuple[int, bool]:
    """Apply the best move out of a position's slowest microbatch; moves weighed, and whether there was one."""
    parts = state.parts[position]
    source = (position, parts.index(max(parts)))
    best_gain, best, tried = LEAST_GAIN * state.times[position], None, 1
    for sample in state.bins[position][source[1]].samples:
        for target in _targets(state, sample, position):
            for other in (None, *_exchangeable(state, target, sample, position)):
                theirs = state.changed_time(target, other, sample)
                if theirs is None or theirs >= state.times[position]:
                    continue
                mine = state.changed_time(source, sample, other)
                if mine is None:
                    continue
                tried += 1
                changes = {
                    position: state.position_time(source, mine),
                    target[0]: state.position_time(target, theirs),
                }
                gain = state.gain(changes)
                if gain > best_gain:
                    best_gain, best = gain, (source, sample, target, other)
    if best is None:
        return tried, False
    state.apply(*best)
    return tried, True


def _targets(state: _State, sample: Sample, position: int) -> Iterator[Place]:
    """Shorter microbatches within reach of a sample's step."""
    first, last = state.span(sample)
    for target in range(max(first, position - 2 * state.width), min(last, position + 2 * state.width) + 1):
        if target != position and state.times[target] < state.times[position]:
            parts = state.parts[target]
            yield target, parts.index(min(parts))


def _exchangeable(state: _State, target: Place, sample: Sample, position: int) -> Iterator[Sample]:
    """Shorter samples of another microbatch that may stand at ``position`` instead."""
    jobs_here = {s.job: s.step for b in state.bins[position] for s in b.samples}
    for other in state.bins[target[0]][target[1]].samples:
        if other.tokens >= sample.tokens:
            continue
        first, last = state.span(other)
        if first <= position <= last and jobs_here.get(other.job, other.step) == other.step:
            yield other
