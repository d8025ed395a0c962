"""Moves samples between positions by threshold accepting, many places of the stream at once.

Hill climbing (`refine.py`) stops where few samples make up a round: each long sample sits in a local optimum, and the
way out leads over worse streams. Here a move is also accepted where it costs less than a threshold that falls to
nothing (Dueck and Scheuer, "Threshold accepting", 1990). What one move changes is `waiting_time` of at most
``2 * reach + width`` neighbours, so moves that far apart are weighed together, as arrays.

Each step owns a window of positions; windows of a job's neighbouring steps are the dependency distance apart, so
no move within them can break it. A border between two windows moves by one position where no sample is in the way.

Times are whole multiples of 1 / RESOLUTION of the mean: sums are exact, and the result is the same on any machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorafusion_megatron.scheduler.rows import Row
from lorafusion_megatron.scheduler.weights import Weights
from lorafusion_megatron.types import Sample

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

CANDIDATES = 16
"""Moves weighed per place, of which the best is taken: costs twice the time of one."""
RESOLUTION = 1 << 20
SWAPS = 0.6
"""Share of moves that exchange two samples."""
EXCHANGE_EVERY = 2
"""Rounds after which neighbouring positions are exchanged."""
EXCHANGE_GAP = 6
"""Positions that exchange their microbatches stand at most this far apart."""


@dataclass(frozen=True, kw_only=True)
class Cooling:
    """How long and how hot a stream is annealed."""

    rounds: int
    """How often each place is looked at."""
    threshold: float
    """What a move may add at first, as a share of a position's mean time."""
    reach: int = 12
    """Positions around the middle of a place that its move may touch."""
    borders_every: int = 4
    """Rounds after which the borders between steps move."""
    exchange: bool = False
    """Exchange whole positions too."""


@dataclass(frozen=True)
class _Moves:
    """Sample ``one`` goes from ``source`` to ``target``, and ``other`` back where ``swap``."""

    place: Ints
    one: Ints
    other: Ints
    swap: Bools
    source: Ints
    target: Ints

    def pick(self, chosen: Ints) -> "_Moves":
        return _Moves(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Changed:
    """Padded tokens, squares and time of a move's two positions after it."""

    tokens: tuple[Ints, Ints]
    squares: tuple[Ints, Ints]
    times: tuple[Ints, Ints]


class _Stream:
    """The stream of one replica as arrays: steps g by (job, step), samples i by step."""

    def __init__(
        self, rows: Sequence[Row], weights: Weights, capacity: int, distance: int, width: int, reach: int
    ) -> None:
        self.weights, self.capacity, self.distance, self.width, self.reach = weights, capacity, distance, width, reach
        self.count = len(rows)
        placed = sorted(
            ((sample.job, sample.step, sample.position), position, sample)
            for position, row in enumerate(rows)
            for sample in row.parts[0]
        )
        self.samples: list[Sample] = [sample for _, _, sample in placed]
        self.at = np.array([position for _, position, _ in placed])
        self.length = np.array([sample.tokens for sample in self.samples])
        keys = np.array([(sample.job, sample.step) for sample in self.samples])
        self.first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
        self.size = np.diff(np.r_[self.first, len(self.samples)])
        names, self.job = np.unique(keys[:, 0], return_inverse=True)
        self.jobs = len(names)
        self.owner = self.job[self.first]
        self._make_windows()
        self._make_loads()

    def _make_windows(self) -> None:
        """Windows of the steps, ``low`` to ``high``, and which step of a job a position belongs to."""
        begin = np.minimum.reduceat(self.at, self.first)
        end = np.maximum.reduceat(self.at, self.first)
        follows = self.owner[1:] == self.owner[:-1]
        border = (end[:-1] + self.distance + begin[1:]) // 2
        self.low = np.r_[0, np.where(follows, border, 0)]
        self.high = np.r_[np.where(follows, border - self.distance, self.count - 1), self.count - 1]
        self.pairs = np.flatnonzero(follows)
        self.step_at = np.zeros((self.count, self.jobs), np.int64)
        for step, (low, job) in enumerate(zip(self.low, self.owner, strict=True)):
            # What lies between two windows counts to the first: nothing of the job may stand there.
            self.step_at[low:, job] = step

    def _make_loads(self) -> None:
        self.rows = np.zeros((self.count, self.jobs), np.int64)
        np.add.at(self.rows, (self.at, self.job), self.length)
        self.tokens = self._padded(self.rows).sum(axis=1)
        self.squares = np.zeros(self.count, np.int64)
        np.add.at(self.squares, self.at, self.length**2)
        self.scale = 1.0
        total = math.fsum(self._seconds(self.tokens, self.squares).tolist())
        self.scale = RESOLUTION * self.count / max(1e-300, total)
        # Positions of no time on both sides, so that every move has all of its neighbours.
        self.edge = 2 * (self.reach + self.width)
        self.times = np.pad(self._time(self.tokens, self.squares), self.edge)

    def _padded(self, rows: Ints) -> Ints:
        multiple = self.weights.multiple
        return -(-rows // multiple) * multiple

    def _seconds(self, tokens: Ints, squares: Ints) -> Floats:
        seconds = self.weights.fixed + self.weights.per_token * tokens + self.weights.per_square * squares
        return np.where(tokens > 0, seconds, 0.0)

    def _time(self, tokens: Ints, squares: Ints) -> Ints:
        return np.rint(self._seconds(tokens, squares) * self.scale).astype(np.int64)

    def draw(self, middles: Ints, random: Floats) -> _Moves:
        """Moves about ``middles``, those left out that the windows or the reach forbid."""
        step = self.step_at[middles, (random[0] * self.jobs).astype(np.int64)]
        one = self.first[step] + (random[1] * self.size[step]).astype(np.int64)
        source = self.at[one]
        low = np.maximum(self.low[step], source - self.reach)
        high = np.minimum(self.high[step], source + self.reach)
        target = low + (random[2] * (high - low + 1)).astype(np.int64)
        theirs = self.step_at[target, (random[3] * self.jobs).astype(np.int64)]
        other = self.first[theirs] + (random[4] * self.size[theirs]).astype(np.int64)
        swap = random[5] < SWAPS
        target = np.where(swap, self.at[other], target)
        allowed = (source != target) & (target >= self.low[step]) & (target <= self.high[step])
        allowed &= (abs(source - middles) <= self.reach) & (abs(target - middles) <= self.reach)
        allowed &= ~swap | ((source >= self.low[theirs]) & (source <= self.high[theirs]))
        return _Moves(np.arange(len(middles)), one, other, swap, source, target).pick(np.flatnonzero(allowed))

    def rows_change(self, moves: _Moves) -> tuple[Ints, Ints]:
        """Tokens that the first job's rows lose at the source, and that the second job's rows gain there."""
        back = np.where(moves.swap, self.length[moves.other], 0)
        same = self.job[moves.one] == self.job[moves.other]
        return self.length[moves.one] - np.where(same, back, 0), np.where(same, 0, back)

    def weigh(self, moves: _Moves) -> _Changed:
        """What the moves' positions hold afterwards."""
        lost, gained = self.rows_change(moves)
        mine, theirs = self.job[moves.one], self.job[moves.other]

        def tokens(position: Ints, sign: int) -> Ints:
            own, guest = self.rows[position, mine], self.rows[position, theirs]
            grown = self._padded(own + sign * lost) - self._padded(own)
            shrunk = np.where(gained > 0, self._padded(guest - sign * gained) - self._padded(guest), 0)
            return self.tokens[position] + grown + shrunk

        back = np.where(moves.swap, self.length[moves.other], 0)
        squares = self.length[moves.one] ** 2 - back**2
        all_tokens = (tokens(moves.source, -1), tokens(moves.target, 1))
        all_squares = (self.squares[moves.source] - squares, self.squares[moves.target] + squares)
        times = (self._time(all_tokens[0], all_squares[0]), self._time(all_tokens[1], all_squares[1]))
        return _Changed(all_tokens, all_squares, times)

    def cost(self, moves: _Moves, changed: _Changed, middles: Ints) -> Ints:
        """Waiting time that each move adds."""
        reach = self.reach + self.width - 1
        places = len(middles) // CANDIDATES
        around = self.times[self.edge + middles[:places, None] + np.arange(-reach, reach + 1)]
        before = _waiting(around, self.width)
        place = moves.place % places
        after = around[place]
        index, shift = np.arange(len(place)), reach - middles[moves.place]
        after[index, moves.source + shift] = changed.times[0]
        after[index, moves.target + shift] = changed.times[1]
        return _waiting(after, self.width) - before[place]

    def apply(self, moves: _Moves, changed: _Changed, chosen: Ints) -> None:
        """Make the chosen moves, at most one a place."""
        moves = moves.pick(chosen)
        lost, gained = self.rows_change(moves)
        mine, theirs = self.job[moves.one], self.job[moves.other]
        for position, sign, end in ((moves.source, -1, 0), (moves.target, 1, 1)):
            self.rows[position, mine] += sign * lost
            self.rows[position, theirs] -= sign * gained
            self.tokens[position] = changed.tokens[end][chosen]
            self.squares[position] = changed.squares[end][chosen]
            self.times[self.edge + position] = changed.times[end][chosen]
        self.at[moves.one] = moves.target
        self.at[moves.other[moves.swap]] = moves.source[moves.swap]

    def exchange(self, random: Floats, threshold: float) -> None:
        """Exchange the microbatches of two near positions, at places that don't touch each other.

        Args:
            random: [3, places]; the first of each row decides where the places lie.
            threshold: time that an exchange may add, times the third number.
        """
        apart = EXCHANGE_GAP + self.width
        first = np.arange(int(random[0, 0] * apart), self.count - EXCHANGE_GAP, apart)
        second = first + 1 + (random[1, : len(first)] * EXCHANGE_GAP).astype(np.int64)
        late = (self.rows[first] == 0) | (self.high[self.step_at[first]] >= second[:, None])
        early = (self.rows[second] == 0) | (self.low[self.step_at[second]] <= first[:, None])
        allowed = np.flatnonzero((late & early).all(axis=1))
        first, second, random = first[allowed], second[allowed], random[2, allowed]
        around = self.times[self.edge + first[:, None] + np.arange(1 - self.width, self.width + EXCHANGE_GAP)]
        before = _waiting(around, self.width)
        index, other = np.arange(len(first)), self.width - 1 + second - first
        around[index, self.width - 1] = self.times[self.edge + second]
        around[index, other] = self.times[self.edge + first]
        chosen = np.flatnonzero(_waiting(around, self.width) - before < threshold * random)
        self._exchange(first[chosen], second[chosen])

    def _exchange(self, first: Ints, second: Ints) -> None:
        here, there = np.r_[first, second], np.r_[second, first]
        for loads, edge in ((self.rows, 0), (self.tokens, 0), (self.squares, 0), (self.times, self.edge)):
            loads[edge + here] = loads[edge + there]
        position = np.arange(self.count)
        position[here] = there
        self.at = position[self.at]

    def shift_borders(self, parity: int, random: Floats) -> None:
        """Move every other border between two steps of a job by one, where no sample is in the way."""
        before = self.pairs[self.pairs % 2 == parity]
        job, low, high = self.owner[before], self.low[before + 1], self.high[before]
        later = random[before] < 0.5
        up = before[later & (self.rows[low, job] == 0) & (self.high[before + 1] > low)]
        self.step_at[self.low[up + 1], self.owner[up]] = up
        down = before[~later & (self.rows[high, job] == 0) & (high > self.low[before])]
        self.step_at[self.low[down + 1] - 1, self.owner[down]] = down + 1
        for moved, change in ((up, 1), (down, -1)):
            self.low[moved + 1] += change
            self.high[moved] += change

    def result(self) -> list[Row]:
        parts: list[list[Sample]] = [[] for _ in range(self.count)]
        for sample, position in zip(self.samples, self.at.tolist(), strict=True):
            parts[position].append(sample)
        return [Row((tuple(part),)) for part in parts]


def _waiting(times: Ints, width: int) -> Ints:
    """`waiting_time` of each row."""
    have = 1
    while 2 * have <= width:
        times = np.maximum(times[:, :-have], times[:, have:])
        have *= 2
    if have < width:
        times = np.maximum(times[:, : have - width], times[:, width - have :])
    return times.sum(axis=1)


def anneal_rows(
    rows: Sequence[Row], weights: Weights, *, capacity: int, distance: int, width: int, cooling: Cooling
) -> list[Row]:
    """Lower the time that stages wait for their neighbours by moves that may also cost a little at first.

    In each round, at places ``2 * reach + width`` positions apart, the move that adds least to `waiting_time` is made
    if it adds less than ``threshold * mean time * left^2 * u``, with u drawn from [0, 1) and ``left`` the share of
    rounds to come.

    Args:
        rows: a valid stream of one replica; no step without a sample.
        weights: predicted time of a microbatch.
        capacity: padded tokens of a microbatch.
        distance: dependency distance.
        width: how many neighbours wait for each other.
        cooling: rounds and threshold.

    Returns:
        A valid stream of as many positions. Its waiting time may be greater where few rounds are made: compare.

    Note: 0.1 to 0.2 ms a round for 1,000 samples, 0.4 ms for 8,000; twice that with ``reach`` 8 and exchanges. Draws
    come from a fixed seed.
    """
    stream = _Stream(rows, weights, capacity, distance, width, cooling.reach)
    rng = np.random.default_rng(0)
    apart = 2 * cooling.reach + width
    for turn in range(cooling.rounds):
        left = 1 - turn / cooling.rounds
        threshold = cooling.threshold * RESOLUTION * left * left
        middles = np.arange(int(rng.integers(apart)), stream.count, apart)
        places = len(middles)
        middles = np.tile(middles, CANDIDATES)
        random = rng.random((7, len(middles)))
        moves = stream.draw(middles, random)
        if len(moves.place):
            changed = stream.weigh(moves)
            cost = stream.cost(moves, changed, middles) - threshold * random[6, moves.place]
            fits = (changed.tokens[0] <= capacity) & (changed.tokens[1] <= capacity)
            chosen = _best_of_each(np.where(fits, cost, np.inf), moves.place, places)
            stream.apply(moves, changed, chosen)
        if turn % cooling.borders_every == 0:
            stream.shift_borders(int(rng.integers(2)), rng.random(len(stream.first)))
        if cooling.exchange and turn % EXCHANGE_EVERY == 0 and stream.count > EXCHANGE_GAP:
            stream.exchange(rng.random((3, stream.count)), threshold)
    return stream.result()


def _best_of_each(cost: Floats, place: Ints, places: int) -> Ints:
    """Per place the index of the move of least cost, if that is below zero."""
    table = np.zeros(CANDIDATES * places)
    index = np.zeros(CANDIDATES * places, np.int64)
    table[place], index[place] = cost, np.arange(len(place))
    best = table.reshape(CANDIDATES, places).argmin(axis=0) * places + np.arange(places)
    chosen: Ints = index[best[table[best] < 0]]
    return chosen
