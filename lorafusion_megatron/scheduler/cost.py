"""Predicted time of a microbatch on a pipeline stage.

``seconds = fixed + layers * (layer_fixed + layer_token * T + layer_square * Q) + output * output_token * T``
with T the padded tokens and Q the sum of squared sample lengths (attention never crosses samples).
"""

import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.types import Microbatch, ModelSpec

SMALLEST, LARGEST = 1e-18, 1e6
"""Seconds between which a rate lies that is not 0; sums and products of such ones stay finite."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of one direction (forward or backward) per unit of work on one device."""

    fixed: float = 0.0
    """Per microbatch and stage: sending, receiving, Python."""
    layer_fixed: float = 0.0
    """Per microbatch and layer: kernel launches."""
    layer_token: float = 0.0
    """Per token and layer: the linears."""
    layer_square: float = 0.0
    """Per squared sample length and layer: attention."""
    output_token: float = 0.0
    """Per token: output layer and loss."""


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What one chunk of the model holds; fractions stand for stages of equal work."""

    layers: float
    output: float = 0.0
    """1 where the output layer stands."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The features of a microbatch that its time depends on."""

    tokens: int
    """Padded tokens; 0 for a no-op microbatch."""
    squares: int
    """Sum of squared sample lengths."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One timed forward or backward of a chunk, for `fit_cost_model`."""

    backward: bool
    layers: int
    output: bool
    load: Load
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """What a device reaches on this kind of work; the defaults are an H100's in bfloat16.

    Note: read off profiles of training Qwen2.5 32B's and Llama 3.1 8B's shapes, at the clock that the card's power
    limit leaves then (docs/benchmarks.md).
    """

    linear_flops: float = 690e12
    """The linears of a block, flop/s."""
    output_flops: float = 750e12
    """The output layer, flop/s."""
    attention_flops: float = 400e12
    """Flash attention forward, flop/s; its backward does 2.5 times the work at the same rate."""
    memory_bytes: float = 2.4e12
    """Reads and writes of device memory, byte/s."""
    adapter_bytes: float = 1.4e12
    """Bytes of the linears' inputs and outputs that the adapters' passes take, byte/s, with what the products lose to
    the adapters' part in them: 1.9e12 in the one model's runs, 1.2e12 for the other's linears one by one, nearly
    the same for ranks up to 32."""
    launch_seconds: float = 4e-6
    """Per kernel."""
    stage_seconds: float = 150e-6
    """Per microbatch, stage and direction: pipeline messages and Python."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Forward and backward rates of a model on a device."""

    forward: Rates
    backward: Rates

    def seconds(self, load: Load, stage: StageLoad, *, backward: bool) -> float:
        """Time of one direction of a microbatch on a chunk, in seconds; a no-op takes ``fixed``."""
        rates = self.backward if backward else self.forward
        if load.tokens == 0:
            return rates.fixed
        layer = rates.layer_fixed + rates.layer_token * load.tokens + rates.layer_square * load.squares
        return rates.fixed + stage.layers * layer + stage.output * rates.output_token * load.tokens

    def both(self, stage: StageLoad) -> tuple[float, float, float]:
        """Forward plus backward on ``stage`` as (seconds per microbatch, per token, per squared length)."""
        f, b = self.forward, self.backward
        return (
            f.fixed + b.fixed + stage.layers * (f.layer_fixed + b.layer_fixed),
            stage.layers * (f.layer_token + b.layer_token) + stage.output * (f.output_token + b.output_token),
            stage.layers * (f.layer_square + b.layer_square),
        )

    def save(self, path: Path) -> None:
        """Write the model as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def check(self) -> None:
        """Check that plans can be made with it.

        Raises:
            ValueError: a rate is no number of seconds, or layers take no longer for more tokens.
        """
        rates = {f"{side}.{name}": rate for side, values in asdict(self).items() for name, rate in values.items()}
        for name, rate in rates.items():
            is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
            if not is_number or not (rate == 0 or SMALLEST <= rate <= LARGEST):
                raise ValueError(
                    f"{name} is {reprlib.repr(rate)}, and must be seconds: 0, or from {SMALLEST:g} to {LARGEST:g}"
                )
        if not any(rates[f"{side}.layer_{what}"] for side in ("forward", "backward") for what in ("token", "square")):
            raise ValueError("layers take no longer for more tokens")

    @classmethod
    def load(cls, path: Path, *, key: str = "--cost-model") -> "CostModel":
        """Read what `save` wrote.

        Args:
            path: the file.
            key: where it was given, for messages.

        Raises:
            UserError: the file is missing or is not a saved cost model.
        """
        try:
            data = json.loads(path.read_text())
            found = cls(forward=Rates(**data["forward"]), backward=Rates(**data["backward"]))
            found.check()
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(
                f"{path} ({error})",
                rule="a cost model is the JSON file that `plan --calibrate` writes",
                remedy="calibrate again or leave the option out",
                key=key,
            ) from None
        return found


def equal_loads(layers: int, chunks: int) -> tuple[StageLoad, ...]:
    """Chunks of equal work: each an equal share of the layers and of the output layer."""
    return (StageLoad(layers=layers / chunks, output=1 / chunks),) * chunks


def split_loads(layers: Sequence[int]) -> tuple[StageLoad, ...]:
    """Chunks of whole layers, the output layer on the last."""
    return tuple(StageLoad(layers=count, output=float(i == len(layers) - 1)) for i, count in enumerate(layers))


def load_of(microbatch: Microbatch, padding_multiple: int) -> Load:
    """Features of a microbatch."""
    return Load(
        tokens=microbatch.padded_tokens(padding_multiple),
        squares=sum(sample.tokens**2 for sample in microbatch.samples),
    )


def default_cost_model(spec: ModelSpec, *, tensor_parallel: int = 1, device: DeviceRates | None = None) -> CostModel:
    """Predict the rates from a model's dimensions: a frozen base with LoRA, so backward has no weight gradients.

    Per token and layer the linears take ``2 * parameters`` flop forward and as much backward; causal attention
    takes ``2 * heads * head_dim * L^2`` forward and 2.5 times that backward; the output layer ``2 * hidden * vocab``
    each way and three bytes of a logit. Adapters on all linears of a block read the linears' inputs forward and
    backward, and their outputs' gradients backward; half of that in each direction. The output layer has none.

    Args:
        spec: the base model.
        tensor_parallel: ranks that share each layer.
        device: what the device reaches; an H100 by default.

    Returns:
        Rates of one rank.

    Note: within 10 to 20 % of a real run at best; `plan --calibrate` measures instead. The balance of a plan
    depends on the ratios alone.
    """
    device = device or DeviceRates()
    hidden, width = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    groups = spec.num_query_groups * spec.head_dim
    features = spec.ffn_hidden_size
    parameters = hidden * (2 * width + 2 * groups) + 3 * hidden * features
    inputs = 2 * hidden + width + features
    outputs = width + 2 * groups + 2 * features + 2 * hidden
    linear = (
        2 * parameters / device.linear_flops
        # Norms, rotary embedding and additions: 30 hidden rows a direction; SwiGLU: 3 and 5 of its features.
        + (60 * hidden + 8 * features) / device.memory_bytes
        + (2 * inputs + outputs) / device.adapter_bytes
    ) / tensor_parallel
    square = 2 * width / device.attention_flops / tensor_parallel
    output = (2 * hidden / device.output_flops + 3 / device.memory_bytes) * spec.vocab_size / tensor_parallel
    common = {"fixed": device.stage_seconds, "layer_token": linear, "output_token": output}
    return CostModel(
        forward=Rates(**common, layer_fixed=20 * device.launch_seconds, layer_square=square),
        backward=Rates(**common, layer_fixed=30 * device.launch_seconds, layer_square=2.5 * square),
    )


def fit_cost_model(rows: Iterable[Measurement]) -> CostModel:
    """Fit the rates to measured times by non-negative least squares of the relative error.

    Args:
        rows: forwards and backwards of microbatches of several sizes, on chunks with and without the output layer.

    Returns:
        The cost model; a rate that the rows say nothing about, or one too small to count, is 0.

    Raises:
        ValueError: fewer than 5 rows of a direction.
    """
    rows = list(rows)
    return CostModel(
        forward=_fit_rates([row for row in rows if not row.backward]),
        backward=_fit_rates([row for row in rows if row.backward]),
    )


def _fit_rates(rows: Sequence[Measurement]) -> Rates:
    names = [field.name for field in fields(Rates)]
    if len(rows) < len(names):
        raise ValueError(f"{len(rows)} measurements of a direction can't fit {len(names)} rates")
    features = np.array(
        [
            (1, r.layers, r.layers * r.load.tokens, r.layers * r.load.squares, int(r.output) * r.load.tokens)
            for r in rows
        ],
        dtype=np.float64,
    )
    seconds = np.array([row.seconds for row in rows])
    features /= seconds[:, None]
    scale = np.where(features.any(axis=0), np.abs(features).max(axis=0), 1.0)
    solution = _non_negative_least_squares(features / scale, np.ones(len(rows))) / scale
    solution[solution < SMALLEST] = 0.0
    return Rates(**dict(zip(names, solution.tolist(), strict=True)))


def _non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Lawson and Hanson's active-set method: min |matrix x - target| with x >= 0."""
    size = matrix.shape[1]
    x, active = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[active] = -np.inf
        if gradient.max() <= 1e-10:
            break
        active[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(size)
            trial[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            if trial[active].min() > 0:
                x = trial
                break
            blocked = active & (trial <= 0)
            step = (x[blocked] / (x[blocked] - trial[blocked])).min()
            x = x + step * (trial - x)
            active &= x > 1e-14
            if not active.any():
                break
    return x
