"""Packs all jobs in one stream: each position takes the most urgent job's samples and fills up from the others.

Blocks of (group, step) meet at borders where a microbatch is left half full; here there are no borders. Positions are
made one after the other. A job is open while its current step has samples left; it opens when its previous step
ended the dependency distance before. The most urgent open job gives its longest samples first, so that its step ends
and its next one can start; the last few samples are those, of whatever open job, that bring the microbatch closest to
the target time.

The target follows the supply. Where the open samples would run out before another job opens, smaller microbatches
are made instead of no-ops: four jobs of one microbatch a step on eight stages make eleven small microbatches a round
and not four full ones and seven bubbles.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from lorafusion_megatron.scheduler.closest import closest_sum
from lorafusion_megatron.scheduler.packing import Bin
from lorafusion_megatron.scheduler.rows import Row, Samples, noop_row
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import GlobalBatch, padded

Entry = tuple[int, int, int]
"""(tokens, index of the job, index in its current global batch): orders samples by length."""

OPEN_WORK = 8.0
"""Targets' worth of samples (times replicas) to choose from. More fills no better and takes longer per microbatch."""
GOOD_ENOUGH = 0.002
"""Share of the target that ends the search for the last samples: differing less costs a pipeline nothing."""
FOREIGN = 0.001
"""Share of the target that a sample of another job must bring the microbatch closer than one of the urgent job."""
FINAL_STRETCH = 1.02
"""The last microbatches of a window may be this much longer than the target, rather than be one more."""
LEAST_TARGET = 0.3
"""As a share of the target: still smaller microbatches would pay more fixed cost than they save."""


@dataclass(frozen=True, kw_only=True)
class FlowLimits:
    """What a stream is packed for."""

    capacity: int
    """Padded tokens of a microbatch."""
    replicas: int
    distance: int
    weights: Weights
    target: float
    """Predicted time that a microbatch should take, without its fixed part."""
    least: float = LEAST_TARGET
    """The supply never lowers the target below this share of it."""
    follow: bool = False
    """Fill up to the longest of the last ``distance`` microbatches: beside it a longer one costs no time."""


class _Flow:
    """The jobs' queues, the samples that may be taken now, and the microbatches made so far."""

    def __init__(self, batches: Sequence[Sequence[GlobalBatch]], limits: FlowLimits) -> None:
        self.limits, self.weights = limits, limits.weights
        self.queues = [deque(job) for job in batches]
        self.names = [job[0].job if job else -1 for job in batches]
        self.counts = [len(job) for job in batches]
        self.current: list[Samples] = [()] * len(batches)
        self.own: list[list[Entry]] = [[] for _ in batches]
        self.pool: list[Entry] = []
        self.work = [0.0] * len(batches)
        self.total = 0.0
        self.opened: list[tuple[float, int]] = []
        self.waiting = [(self.urgency(job), job) for job, queue in enumerate(self.queues) if queue]
        heapify(self.waiting)
        self.sleeping: deque[tuple[int, int, float]] = deque()
        self.recent: deque[float] = deque(maxlen=max(1, limits.distance - 1))

    def urgency(self, job: int) -> float:
        """When the job's current step is due, as a share of the window: all jobs end together, staggered."""
        done = self.counts[job] - len(self.queues[job])
        return (done + (job + 1) / len(self.queues)) / self.counts[job]

    def open_jobs(self, position: int) -> None:
        """Open jobs, the most urgent first, until there is enough to choose from."""
        while self.sleeping and self.sleeping[0][0] <= position:
            job = self.sleeping.popleft()[1]
            heappush(self.waiting, (self.urgency(job), job))
        wanted = OPEN_WORK * self.limits.target * self.limits.replicas
        while self.waiting and self.total < wanted:
            item = heappop(self.waiting)
            job = item[1]
            self.current[job] = self.queues[job][0].samples
            entries = sorted((s.tokens, job, index) for index, s in enumerate(self.current[job]))
            self.own[job] = entries
            self.pool = sorted(self.pool + entries)
            self.work[job] = self.batch_work(job)
            self.total += self.work[job]
            insort(self.opened, item)

    def batch_work(self, job: int) -> float:
        return sum(self.weights.sample(sample.tokens) for sample in self.queues[job][0].samples)

    def close_steps(self, position: int) -> tuple[tuple[int, int], ...]:
        """End the steps without samples left; return those that never had one."""
        empty = []
        for item in [item for item in self.opened if not self.own[item[1]]]:
            job = item[1]
            self.opened.remove(item)
            batch = self.queues[job].popleft()
            if not batch.samples:
                empty.append((batch.job, batch.step))
            if self.queues[job]:
                self.sleeping.append((position + self.limits.distance, job, self.batch_work(job)))
        return tuple(empty)

    def target(self, position: int) -> float:
        """Time that the microbatches at ``position`` should take: no more than the supply lasts for."""
        limits = self.limits
        target = limits.target
        if limits.follow and self.recent:
            target = max(target, max(self.recent))
        if self.waiting:
            return target
        supply, least = self.total, float("inf")
        for start, _, work in self.sleeping:
            least = min(least, supply / (start - position))
            supply += work
        urgent = self.opened[0][1]
        if limits.distance > 1 and len(self.queues[urgent]) > 1:
            # Even if the urgent job ended right now, the others must last until its next step may start.
            least = min(least, (supply - self.work[urgent]) / (limits.distance - 1))
        elif not self.sleeping and supply:
            # The end of the window: spread what is left evenly.
            return supply / limits.replicas / -(-supply // (FINAL_STRETCH * target * limits.replicas))
        return max(min(target, least / limits.replicas), limits.least * limits.target)

    def take(self, microbatch: Bin, entry: Entry) -> None:
        tokens, job, index = entry
        for entries in (self.pool, self.own[job]):
            del entries[bisect_right(entries, entry) - 1]
        weight = self.weights.sample(tokens)
        # Sums of many differences drift: what is empty weighs exactly nothing.
        self.work[job] = self.work[job] - weight if self.own[job] else 0.0
        self.total = self.total - weight if self.pool else 0.0
        microbatch.add(self.current[job][index], self.weights.multiple)

    def longest_fitting(self, entries: list[Entry], room: int) -> Entry | None:
        at = bisect_right(entries, (room, len(self.own), 0))
        return entries[at - 1] if at else None

    def fill(self, target: float) -> Bin:
        """Make one microbatch of about ``target``."""
        weights, capacity, multiple = self.weights, self.limits.capacity, self.weights.multiple
        microbatch = Bin()
        while self.pool:
            urgent = next(job for _, job in self.opened if self.own[job])
            rest = target - weights.variable(microbatch.tokens, microbatch.squares)
            if not microbatch.samples:
                self.take(microbatch, self.own[urgent][-1])
                continue
            if rest < weights.sample(self.pool[0][0]) / 2:
                break
            if rest < 2.2 * weights.sample(self.pool[len(self.pool) // 2][0]):
                # The last one to three samples decide how close the target is met.
                for entry in self.closest(microbatch, rest, urgent):
                    self.take(microbatch, entry)
                break
            longest = weights.longest(rest)
            found = self.longest_fitting(
                self.own[urgent], min(longest, microbatch.room(self.names[urgent], capacity, multiple))
            ) or self.longest_fitting(self.pool, min(longest, microbatch.room(-1, capacity, multiple)))
            if found is None:
                break
            self.take(microbatch, found)
        return microbatch

    def closest(self, microbatch: Bin, rest: float, urgent: int) -> list[Entry]:
        """The one to three open samples whose weight comes closest to ``rest``."""
        capacity, multiple = self.limits.capacity, self.weights.multiple
        # What weighs more than twice the rest is worse than nothing.
        pool = self.pool[: bisect_right(self.pool, (self.weights.longest(2 * rest), len(self.own), 0))]
        if len(pool) > 48:
            pool = [pool[index * (len(pool) - 1) // 47] for index in range(48)]

        def padded_weight(chosen: tuple[int, ...]) -> float | None:
            """Weight of the microbatch with these samples of the pool too; None where they don't fit."""
            rows = dict(microbatch.rows)
            squares = microbatch.squares
            for index in chosen:
                tokens, job, _ = pool[index]
                name = self.names[job]
                rows[name] = rows.get(name, 0) + tokens
                squares += tokens * tokens
            tokens = sum(padded(count, multiple) for count in rows.values())
            if tokens > capacity:
                return None
            grown = self.weights.variable(tokens, squares)
            return grown - self.weights.variable(microbatch.tokens, microbatch.squares)

        values = [self.weights.sample(tokens) for tokens, _, _ in pool]
        foreign = FOREIGN * self.limits.target
        penalties = [0.0 if job == urgent else foreign for _, job, _ in pool]
        tolerance = GOOD_ENOUGH * self.limits.target
        return [pool[index] for index in closest_sum(values, rest, tolerance, padded_weight, penalties)]


def flow_rows(batches: Sequence[Sequence[GlobalBatch]], limits: FlowLimits) -> list[Row]:
    """Pack the jobs' global batches into one stream of positions.

    Args:
        batches: per job its global batches in step order.
        limits: capacity, distance, target.

    Returns:
        Rows in order; distance and capacity hold.

    Note: 20 to 100 us a sample, whatever the number of jobs.
    """
    flow = _Flow(batches, limits)
    rows: list[Row] = []
    while any(flow.queues):
        flow.open_jobs(len(rows))
        if not flow.opened:
            rows.append(noop_row(limits.replicas))
            flow.recent.append(0.0)
            continue
        target = flow.target(len(rows))
        bins = [flow.fill(target) for _ in range(limits.replicas)]
        flow.recent.append(max(limits.weights.variable(b.tokens, b.squares) for b in bins))
        empty = flow.close_steps(len(rows))
        rows.append(Row(tuple(tuple(b.samples) for b in bins), empty))
    return rows
