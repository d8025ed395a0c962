"""The one number that passes balance: predicted time of a microbatch on the stage that takes longest."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorafusion_megatron.scheduler.cost import CostModel, StageLoad
from lorafusion_megatron.types import Sample, padded


@dataclass(frozen=True, kw_only=True)
class Weights:
    """``fixed + per_token * padded tokens + per_square * sum of squared lengths``, in seconds."""

    fixed: float = 0.0
    per_token: float = 1.0
    per_square: float = 0.0
    multiple: int = 1
    """Padding multiple of a job's rows."""

    def variable(self, tokens: int, squares: int) -> float:
        """Weight without ``fixed`` of padded tokens and squared lengths."""
        return self.per_token * tokens + self.per_square * squares

    def sample(self, tokens: int) -> float:
        """Weight of one sample without its padding."""
        return self.per_token * tokens + self.per_square * tokens * tokens

    def longest(self, budget: float) -> int:
        """Longest sample whose weight is at most ``budget``, in tokens."""
        if budget <= 0:
            return 0
        if self.per_square == 0:
            return int(budget / self.per_token)
        half = self.per_token / (2 * self.per_square)
        return int(math.sqrt(half * half + budget / self.per_square) - half)

    def part(self, samples: Iterable[Sample]) -> float:
        """Weight of a microbatch; 0 for a no-op."""
        rows: dict[int, int] = {}
        squares = 0
        for sample in samples:
            rows[sample.job] = rows.get(sample.job, 0) + sample.tokens
            squares += sample.tokens * sample.tokens
        if not rows:
            return 0.0
        return self.fixed + self.variable(sum(padded(count, self.multiple) for count in rows.values()), squares)


def bottleneck_weights(
    cost: CostModel, loads: Sequence[StageLoad], stages: int, samples: Sequence[Sample], multiple: int
) -> Weights:
    """Weights on the stage that takes longest over ``samples``.

    Args:
        cost: predicted rates.
        loads: per chunk of the model what it holds.
        stages: pipeline stages; stage s holds the chunks s, s + stages, …
        samples: the window's samples.
        multiple: padding multiple.
    """
    tokens = sum(sample.tokens for sample in samples)
    squares = sum(sample.tokens**2 for sample in samples)

    def stage(index: int) -> tuple[float, float, float]:
        fixed, per_token, per_square = zip(*(cost.both(load) for load in loads[index::stages]), strict=True)
        return sum(fixed), sum(per_token), sum(per_square)

    fixed, per_token, per_square = max(map(stage, range(stages)), key=lambda r: r[1] * tokens + r[2] * squares)
    return Weights(fixed=fixed, per_token=per_token, per_square=per_square, multiple=multiple)
