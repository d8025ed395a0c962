"""Megatron's options of the base model: what a base model needs, whether a script gave it, and how to write it."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

from ...config.run import RunConfig
from ...errors import UserError
from ...types import ModelSpec

FUSED_LOSS = "Megatron's fused cross-entropy rounds its gradient to bfloat16, whatever the type"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The value that an option must have."""

    option: str
    """As it is written to get the value; the value follows where the option takes one."""
    attribute: str
    value: object
    words: tuple[str, ...]
    """What to write on the command line; empty where the default is right or another option's words say it."""


def model_options(spec: ModelSpec, run: RunConfig) -> Iterator[Wanted]:
    """Every option that the base model settles."""
    heads, groups = spec.num_attention_heads, spec.num_query_groups
    for option, attribute, value in (
        ("--num-layers", "num_layers", spec.num_layers),
        ("--hidden-size", "hidden_size", spec.hidden_size),
        ("--ffn-hidden-size", "ffn_hidden_size", spec.ffn_hidden_size),
        ("--num-attention-heads", "num_attention_heads", heads),
        ("--kv-channels", "kv_channels", spec.head_dim),
        ("--norm-epsilon", "layernorm_epsilon", spec.norm_epsilon),
        ("--rotary-base", "rotary_base", spec.rope_theta),
        ("--normalization", "normalization", "RMSNorm"),
        ("--position-embedding-type", "position_embedding_type", "rope"),
        ("--hidden-dropout", "hidden_dropout", 0.0),
        ("--attention-dropout", "attention_dropout", 0.0),
    ):
        number = f"{value:g}" if isinstance(value, float) and value != int(value) else str(_whole(value))
        yield Wanted(option=option, attribute=attribute, value=value, words=(option, number))
    yield _switch("--group-query-attention", "group_query_attention", groups != heads, asked_by=True)
    if groups != heads:
        option = "--num-query-groups"
        yield Wanted(option=option, attribute="num_query_groups", value=groups, words=(option, str(groups)))
    biases = spec.proj_bias or spec.mlp_bias
    yield _switch("--swiglu", "swiglu", True, asked_by=True)
    yield _switch("--disable-bias-linear", "add_bias_linear", biases, asked_by=False)
    yield _switch("--add-qkv-bias", "add_qkv_bias", spec.qkv_bias or biases, asked_by=True, silent=biases)
    yield _switch("--qk-layernorm", "qk_layernorm", spec.qk_norm, asked_by=True)
    yield _switch("--bf16", "bf16", run.base_model.dtype == "bfloat16", asked_by=True)
    yield Wanted(option="--rotary-percent", attribute="rotary_percent", value=1.0, words=())
    yield _switch("--rotary-interleaved", "rotary_interleaved", False, asked_by=True)


def check_model_options(args: Namespace, spec: ModelSpec, run: RunConfig) -> None:
    """Compare a script's options with the base model.

    Args:
        args: Megatron's parsed and validated arguments.
        spec: the base model.
        run: the run file.

    Raises:
        UserError: an option differs; the message names it and the right value.
    """
    for wanted in model_options(spec, run):
        given = getattr(args, wanted.attribute)
        if wanted.attribute == "add_qkv_bias" and args.add_bias_linear:
            continue  # Megatron's switch for all biases covers this one
        if given != wanted.value:
            write = " ".join(wanted.words) if wanted.words else f"leave {wanted.option} out"
            raise _disagrees(wanted.option, f"{wanted.attribute} is {given}", spec, run, write)
    if args.cross_entropy_loss_fusion and not args.bf16:
        raise UserError(
            "got True in an fp32 run",
            rule=FUSED_LOSS,
            remedy="remove the option, or use --bf16 and base_model.dtype: bfloat16",
            key="--cross-entropy-loss-fusion",
        )
    if not args.untie_embeddings_and_output_weights and not spec.tied:
        option = "--untie-embeddings-and-output-weights"
        raise _disagrees(option, "the output layer is tied to the embedding", spec, run, option)
    vocabulary = args.padded_vocab_size or args.vocab_size
    if vocabulary < spec.vocab_size:
        option = "--vocab-size"
        raise _disagrees(option, f"the padded vocabulary has {vocabulary} entries", spec, run, _vocabulary(spec))


def command_line(spec: ModelSpec, run: RunConfig) -> list[str]:
    """Megatron's options for a base model, ready to be pasted: what an ordinary script needs to build it."""
    words = [word for wanted in model_options(spec, run) for word in wanted.words]
    if not spec.tied:
        words.append("--untie-embeddings-and-output-weights")
    words += ["--max-position-embeddings", str(spec.max_position_embeddings)]
    words += ["--seq-length", str(min(spec.max_position_embeddings, run.runtime.token_capacity))]
    words += ["--micro-batch-size", "1", "--tokenizer-type", "NullTokenizer", *_vocabulary(spec).split()]
    return words


def _vocabulary(spec: ModelSpec) -> str:
    return f"--vocab-size {spec.vocab_size}"


def _switch(option: str, attribute: str, value: bool, *, asked_by: bool, silent: bool = False) -> Wanted:
    """An option without a value; giving it makes the attribute ``asked_by``."""
    return Wanted(
        option=option, attribute=attribute, value=value, words=(option,) if value is asked_by and not silent else ()
    )


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) else value


def _disagrees(option: str, given: str, spec: ModelSpec, run: RunConfig, write: str) -> UserError:
    return UserError(
        given,
        rule=f"the base model ({spec.family}, {run.base_model.path}) needs another value",
        remedy=f"write {write}" if not write.startswith("leave") else write,
        key=option,
    )
