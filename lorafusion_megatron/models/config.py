"""Dimensions of a base model from the ``config.json`` of a Hugging Face directory; knows no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.models.checkpoint import checkpoint_files, read_json_object
from lorafusion_megatron.models.families import FAMILIES, Family, Sliding
from lorafusion_megatron.models.files import folder_fault
from lorafusion_megatron.types import ModelSpec

SUPPORTED = "Llama, Mistral, Qwen2, Qwen2.5 and dense Qwen3 are supported, in float32, float16 or bfloat16"
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_REMEDY = "convert the model, or give another base model"


def read_model_spec(path: str | Path, *, key: str = "base_model.path") -> ModelSpec:
    """Read the dimensions of the model in a Hugging Face directory.

    Args:
        path: directory with ``config.json`` and safetensors files.
        key: where the path was given, for messages.

    Returns:
        The dimensions, whichever of the two spellings of rotary parameters (Transformers 4 or 5) the file has.

    Raises:
        UserError: the directory or a file is missing, or the model is not one that can be trained here.
    """
    folder = Path(path)
    if (fault := folder_fault(folder)) is not None:
        raise UserError(
            f"{str(path)!r} {fault}",
            rule="a base model is a directory in Hugging Face's format",
            remedy="give the path of a downloaded model",
            key=key,
        )
    reader = _Reader(read_json_object(folder / "config.json", key=key), folder / "config.json", key)
    family = reader.family()
    checkpoint_files(folder, key=key)
    return _spec(reader, family)


class _Reader:
    """Typed access to the keys of one ``config.json``."""

    def __init__(self, config: Mapping[str, Any], file: Path, key: str) -> None:
        self.config, self.file, self.key = config, file, key

    def error(self, given: str, rule: str, remedy: str = _REMEDY) -> UserError:
        """An error about this file."""
        return UserError(f"{self.file}: {given}", rule=rule, remedy=remedy, key=self.key)

    def family(self) -> Family:
        """The family of the model, once nothing marks it as one that is not supported."""
        config = self.config
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise self.error(f"model_type {model_type!r}", SUPPORTED)
        family = FAMILIES[model_type]
        architectures = config.get("architectures") or [family.architecture]
        if family.architecture not in architectures:
            raise self.error(f"architectures {architectures}", f"{family.architecture} is the one that is supported")
        if config.get("quantization_config"):
            raise self.error("the checkpoint is quantized (quantization_config)", SUPPORTED)
        for name in ("num_experts", "num_local_experts"):
            if config.get(name):
                raise self.error(f"{name} is {config[name]}", f"mixtures of experts are not supported; {SUPPORTED}")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise self.error(f"hidden_act {activation!r}", "silu is the activation that is supported")
        return family

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{name} is {value!r}", "it must be a positive integer", "mend config.json")
        return value

    def number(self, values: Mapping[str, Any], name: str, default: float | None = None) -> float:
        """A positive number out of ``values``."""
        value = values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(f"{name} is {value!r}", "it must be a positive number", "mend config.json")
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean, false where it is absent."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} is {value!r}", "it must be true or false", "mend config.json")
        return bool(value)


def _spec(reader: _Reader, family: Family) -> ModelSpec:
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    groups = reader.integer("num_key_value_heads", _default(reader, family, "num_key_value_heads") or heads)
    if heads % groups:
        raise reader.error(
            f"{heads} attention heads over {groups} key/value heads", "they must divide", "mend config.json"
        )
    head_dim = reader.integer("head_dim", _default(reader, family, "head_dim") or hidden // heads)
    theta, scaling = _rope(reader)
    return ModelSpec(
        family=reader.config["model_type"],
        num_layers=reader.integer("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=reader.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=reader.integer("vocab_size"),
        max_position_embeddings=reader.integer("max_position_embeddings", family.defaults["max_position_embeddings"]),
        norm_epsilon=reader.number(reader.config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=reader.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(reader, family),
        **{
            name: source if isinstance(source, bool) else reader.flag(source)
            for name, source in family.switches.items()
        },
    )


def _default(reader: _Reader, family: Family, name: str) -> int | None:
    """Transformers' own default of a key that is absent; a key that is null is derived from others."""
    return None if name in reader.config else family.defaults.get(name)


def _rope(reader: _Reader) -> tuple[float, Mapping[str, float] | None]:
    """Base and llama3 scaling of the rotary embedding, from ``rope_parameters`` or the two older keys."""
    config = reader.config
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(values, dict):
        raise reader.error(f"rope parameters are {values!r}", "they must be an object", "mend config.json")
    theta = reader.number(values if values.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    partial = values.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise reader.error(f"partial_rotary_factor is {partial}", "the rotary embedding must span the whole head")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise reader.error(f"rope_type {kind!r}", "rotary embeddings of type default and llama3 are supported")
    return theta, {name: reader.number(values, name) for name in _LLAMA3_KEYS}


def _sliding_window(reader: _Reader, family: Family) -> int | None:
    """The window of all layers in tokens, None for full attention; a mixture of both is refused."""
    config = reader.config
    default = None if "sliding_window" in config else family.defaults.get("sliding_window")
    if family.sliding is Sliding.NEVER or (config.get("sliding_window") or default) is None:
        return None
    window = reader.integer("sliding_window", default)
    if family.sliding is Sliding.ALWAYS:
        return window
    if not reader.flag("use_sliding_window"):
        return None
    layers = reader.integer("num_hidden_layers")
    types = config.get("layer_types")
    if types is None:
        first = 0 if config.get("max_window_layers") == 0 else reader.integer("max_window_layers", 28)
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(0, layers - first)
    if types == ["full_attention"] * layers:
        return None
    if types == ["sliding_attention"] * layers:
        return window
    raise reader.error(
        "not all layers use the same kind of attention (layer_types, max_window_layers)",
        "either all layers or none use sliding-window attention",
    )
