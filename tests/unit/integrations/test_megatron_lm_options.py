"""Megatron's options beside a run file: refused by name, compared with the base model, obeyed in the layout."""

import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from lorafusion_megatron.config import load_run
from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_lm import add_arguments
from lorafusion_megatron.integrations.megatron_lm.base import configure
from lorafusion_megatron.integrations.megatron_lm.layout import run_with_layout
from lorafusion_megatron.integrations.megatron_lm.model_options import check_model_options, command_line, model_options
from lorafusion_megatron.integrations.megatron_lm.options import (
    REFUSALS,
    WITHOUT_EFFECT,
    check_options,
    without_effect,
)
from lorafusion_megatron.models.config import read_model_spec
from tests import tiny

GIVEN = {
    "--context-parallel-size": "2",
    "--num-experts": "4",
    "--expert-model-parallel-size": "2",
    "--mtp-num-layers": "1",
    "--hybrid-layer-pattern": "M*-",
    "--experimental-attention-variant": "dsa",
    "--heterogeneous-layers-config-path": "layers.json",
    "--transformer-impl": "inference_optimized",
    "--spec": "a.module function",
    "--fp8-format": "hybrid",
    "--fp4-format": "e2m1",
    "--cuda-graph-impl": "local",
    "--cpu-offloading-num-layers": "1",
    "--recompute-modules": "core_attn mlp",
    "--iterations-to-skip": "3",
    "--step-batch-size-schedule": "0:8",
    "--microbatch-group-size-per-virtual-pipeline-stage": "4",
    "--yaml-cfg": "args.yaml",
    "--pretrained-checkpoint": "somewhere",
    "--ckpt-convert-format": "torch_dist",
    "--non-persistent-save-interval": "5",
    "--save-retain-interval": "10",
    "--ckpt-step": "3",
    "--save-activations-interval": "5",
    "--save-dgrads-interval": "5",
    "--save-params-interval": "5",
    "--save-wgrads-interval": "5",
    "--activation-func-clamp-value": "0",
    "--glu-linear-offset": "1.0",
    "--rotary-seq-len-interpolation-factor": "4",
    "--no-rope-freq": "2",
    "--softmax-type": "off-by-one",
    "--window-size": "2,0",
    "--te-precision-config-file": "recipe.yaml",
    "--mlp-chunks-for-training": "2",
}
"""Option -> a value that is refused; the other refused options are switches."""


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Megatron's own parser, with the options of this package."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse(parser: argparse.ArgumentParser, words: str = "") -> argparse.Namespace:
    """Megatron's arguments, with what its validation derives that is looked at here."""
    args = parser.parse_args(shlex.split(words))
    args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank
    if args.kv_channels is None and args.hidden_size:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    return args


@pytest.fixture
def run_file(tmp_path):
    """Two jobs on a Llama of four layers, in fp32."""
    return tiny.tiny_run(tmp_path)


def loaded(run_file, *overrides):
    run = load_run(run_file, overrides)
    return run, read_model_spec(run.base_model.path)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.option)
def test_a_refused_option_is_one_of_megatrons_and_is_named(parser, refusal):
    value = GIVEN.get(refusal.option, "")
    args = parse(parser, f"{refusal.option} {value}")
    with pytest.raises(UserError) as error:
        check_options(args)
    assert error.value.key == refusal.option
    assert error.value.rule == refusal.rule
    assert str(error.value).startswith(f"{refusal.option}: got ")


def test_megatrons_defaults_are_not_refused(parser):
    check_options(parse(parser))


def test_options_that_say_what_is_so_anyway_are_not_refused(parser):
    words = "--rotary-seq-len-interpolation-factor 1 --mlp-chunks-for-training 1 --softmax-type vanilla"
    check_options(parse(parser, f"{words} --glu-linear-offset 0 --no-rope-freq [0,0,0,0]"))


def test_megatrons_fused_loss_is_refused_in_fp32_alone(parser, run_file):
    run, spec = loaded(run_file)
    args = parse(parser, f"{shlex.join(command_line(spec, run))} --cross-entropy-loss-fusion")
    with pytest.raises(UserError, match=r"^--cross-entropy-loss-fusion: got True in an fp32 run; .*bfloat16"):
        check_model_options(args, spec, run)
    run, spec = loaded(run_file, "base_model.dtype=bfloat16")
    args = parse(parser, f"{shlex.join(command_line(spec, run))} --cross-entropy-loss-fusion")
    check_model_options(args, spec, run)


def test_overrides_may_be_given_in_several_places(parser):
    args = parse(parser, "--lorafusion-set a=1 b=2 --bf16 --lorafusion-set c=3 --lorafusion-set")
    assert args.lorafusion_set == ["a=1", "b=2", "c=3"]
    assert parse(parser).lorafusion_set == []


def test_options_without_effect_are_megatrons_and_told_where_they_were_given(parser):
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(WITHOUT_EFFECT) <= known
    words = ["--lr", "1e-3", "--train-iters=10", "--hidden-size", "64", "--lr-wsd-decay-iters", "3"]
    assert without_effect(words) == ["--train-iters", "--lr"]


@pytest.mark.parametrize("words", ["", "--no-overlap-p2p-communication"])
def test_interleaved_stages_never_ask_for_messages_ahead(parser, words):
    args = parse(parser, f"--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 {words}")
    check_options(args)
    config = SimpleNamespace(
        overlap_p2p_comm=args.overlap_p2p_comm,
        batch_p2p_comm=not args.overlap_p2p_comm,
        overlap_p2p_comm_warmup_flush=True,
        microbatch_group_size_per_vp_stage=8,
        pipeline_model_parallel_size=4,
    )
    configure(config)
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (False, True)
    assert (config.overlap_p2p_comm_warmup_flush, config.microbatch_group_size_per_vp_stage) == (False, 4)


def test_the_printed_options_build_the_base_model(parser, run_file):
    run, spec = loaded(run_file)
    args = parse(parser, shlex.join(command_line(spec, run)))
    check_model_options(args, spec, run)
    assert (args.num_layers, args.hidden_size, args.ffn_hidden_size) == (4, 32, 48)
    assert (args.num_attention_heads, args.num_query_groups, args.kv_channels) == (4, 2, 8)
    assert (args.seq_length, args.max_position_embeddings, args.vocab_size) == (128, 256, 64)
    assert args.untie_embeddings_and_output_weights
    assert not args.add_bias_linear
    assert not args.bf16


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-6},
        {"attention_bias": True},
    ],
)
def test_every_kind_of_base_model_can_be_written_in_options(parser, tmp_path, changes):
    base = tiny.write_base(tmp_path / "base", **changes)
    run, spec = loaded(tiny.write_run(tmp_path, [tiny.job(tmp_path, "a")], base=base), "base_model.dtype=bfloat16")
    args = parse(parser, shlex.join(command_line(spec, run)))
    check_model_options(args, spec, run)
    assert args.bf16
    assert args.qk_layernorm == (changes.get("model_type") == "qwen3")
    assert args.rotary_base == changes.get("rope_theta", 10000.0)


@pytest.mark.parametrize(
    ("words", "option", "write"),
    [
        ("--num-layers 3", "--num-layers", "--num-layers 4"),
        ("--hidden-size 64", "--hidden-size", "--hidden-size 32"),
        ("--ffn-hidden-size 96", "--ffn-hidden-size", "--ffn-hidden-size 48"),
        ("--num-attention-heads 8", "--num-attention-heads", "--num-attention-heads 4"),
        ("--num-query-groups 4", "--num-query-groups", "--num-query-groups 2"),
        ("--kv-channels 16", "--kv-channels", "--kv-channels 8"),
        ("--norm-epsilon 1e-6", "--norm-epsilon", "--norm-epsilon 1e-05"),
        ("--rotary-base 500000", "--rotary-base", "--rotary-base 10000"),
        ("--normalization LayerNorm", "--normalization", "--normalization RMSNorm"),
        ("--hidden-dropout 0.1", "--hidden-dropout", "--hidden-dropout 0"),
        ("--attention-dropout 0.1", "--attention-dropout", "--attention-dropout 0"),
        ("--rotary-percent 0.5", "--rotary-percent", "leave --rotary-percent out"),
        ("--qk-layernorm", "--qk-layernorm", "leave --qk-layernorm out"),
        ("--add-qkv-bias", "--add-qkv-bias", "leave --add-qkv-bias out"),
        ("--bf16", "--bf16", "leave --bf16 out"),
        ("--vocab-size 63", "--vocab-size", "--vocab-size 64"),
    ],
)
def test_an_option_that_differs_from_the_base_model_is_named_with_the_right_value(
    parser, run_file, words, option, write
):
    run, spec = loaded(run_file)
    args = parse(parser, f"{shlex.join(command_line(spec, run))} {words}")
    with pytest.raises(UserError) as error:
        check_model_options(args, spec, run)
    assert error.value.key == option
    assert write in error.value.remedy


def test_a_switch_that_was_forgotten_is_named(parser, run_file):
    run, spec = loaded(run_file)
    whole = command_line(spec, run)
    switches = [w.option for w in model_options(spec, run) if w.words == (w.option,)]
    assert {"--swiglu", "--disable-bias-linear", "--group-query-attention"} <= set(switches)
    for option in [*switches, "--untie-embeddings-and-output-weights"]:
        args = parse(parser, shlex.join(word for word in whole if word != option))
        with pytest.raises(UserError) as error:
            check_model_options(args, spec, run)
        assert (error.value.key, error.value.remedy) == (option, f"write {option}")


def test_the_scripts_options_lay_the_model_out(parser, run_file):
    run, _ = loaded(run_file)
    words = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"
    args = parse(parser, f"{words} --num-virtual-stages-per-pipeline-rank 2 --recompute-granularity full")
    model = run_with_layout(run, args).model
    assert model == replace(
        run.model,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        recompute_granularity="full",
    )
    same, _ = loaded(run_file, "model.pipeline_model_parallel_size=2")
    assert run_with_layout(same, args).model == model


def test_a_run_file_that_says_another_layout_than_the_script_is_refused(parser, run_file):
    run, _ = loaded(run_file, "model.pipeline_model_parallel_size=4")
    with pytest.raises(UserError, match=r"^--pipeline-model-parallel-size: model.pipeline_model_parallel_size is 4"):
        run_with_layout(run, parse(parser, "--pipeline-model-parallel-size 2"))
    uneven, _ = loaded(run_file, "model.pipeline_model_parallel_size=2", "model.pipeline_layout=[3, 1]")
    with pytest.raises(UserError, match=r"^model.pipeline_layout: "):
        run_with_layout(uneven, parse(parser, "--pipeline-model-parallel-size 2"))


def test_the_options_of_a_base_model_are_printed_by_a_command(run_file):
    command = [sys.executable, "-m", "lorafusion_megatron.integrations.megatron_lm"]
    done = subprocess.run([*command, str(run_file)], capture_output=True, text=True, timeout=60, check=True)
    run, spec = loaded(run_file)
    assert shlex.split(done.stdout) == command_line(spec, run)
    wrong = subprocess.run([*command, "nowhere.yaml"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("lorafusion-megatron: error: nowhere.yaml: ")
