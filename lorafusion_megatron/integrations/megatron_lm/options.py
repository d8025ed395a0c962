"""Options of Megatron that a frozen base with adapters can't obey: refused by name, never ignored."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import UserError


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One option and when it is refused."""

    option: str
    attribute: str
    rule: str
    allowed: Callable[[object], bool] = lambda value: not value
    remedy: str = "remove the option"


def _one(value: object) -> bool:
    return value in (None, 1)


FROZEN = "the base is frozen: it has neither gradients nor an optimizer (each adapter brings its own)"
BLOCKS = "adapters are taken over in plain attention and MLP blocks"
STATE = "--save holds the jobs' state, written at once by every rank together"
WHOLE = "a checkpoint of jobs is saved and loaded whole"
STEP = "it looks into Megatron's own training step, which a window replaces"
PLAIN = "no supported base model computes this, and the adapters would be trained on another model"
STREAM = "microbatches come from the plan, which Megatron's schedules run in their plain order"

REFUSALS = (
    Refusal(
        option="--context-parallel-size",
        attribute="context_parallel_size",
        allowed=_one,
        rule="context parallelism is not supported: packed samples are not split over ranks",
        remedy="set it to 1; long samples fit better with --sequence-parallel and --recompute-granularity full",
    ),
    Refusal(
        option="--hybrid-context-parallel",
        attribute="hybrid_context_parallel",
        rule="context parallelism is not supported",
    ),
    Refusal(option="--num-experts", attribute="num_experts", rule="base models with experts are not supported"),
    Refusal(
        option="--expert-model-parallel-size",
        attribute="expert_model_parallel_size",
        allowed=_one,
        rule="base models with experts are not supported",
    ),
    Refusal(option="--mtp-num-layers", attribute="mtp_num_layers", rule=BLOCKS),
    Refusal(option="--multi-latent-attention", attribute="multi_latent_attention", rule=BLOCKS),
    Refusal(option="--hybrid-layer-pattern", attribute="hybrid_layer_pattern", rule=BLOCKS),
    Refusal(option="--experimental-attention-variant", attribute="experimental_attention_variant", rule=BLOCKS),
    Refusal(option="--heterogeneous-layers-config-path", attribute="heterogeneous_layers_config_path", rule=BLOCKS),
    Refusal(option="--use-transformer-engine-op-fuser", attribute="use_transformer_engine_op_fuser", rule=BLOCKS),
    Refusal(
        option="--transformer-impl",
        attribute="transformer_impl",
        allowed=lambda value: value in ("local", "transformer_engine"),
        rule="the other layers can't be trained",
        remedy="use local or transformer_engine",
    ),
    Refusal(option="--spec", attribute="spec", rule="the layers' spec is Megatron's local or Transformer Engine's"),
    Refusal(
        option="--fp8-format", attribute="fp8", rule="the adapters' products have no fp8 form", remedy="use --bf16"
    ),
    Refusal(
        option="--fp4-format", attribute="fp4", rule="the adapters' products have no fp4 form", remedy="use --bf16"
    ),
    Refusal(option="--fp16", attribute="fp16", rule="adapters' losses are not scaled", remedy="use --bf16"),
    Refusal(option="--use-distributed-optimizer", attribute="use_distributed_optimizer", rule=FROZEN),
    Refusal(option="--overlap-grad-reduce", attribute="overlap_grad_reduce", rule=FROZEN),
    Refusal(option="--overlap-param-gather", attribute="overlap_param_gather", rule=FROZEN),
    Refusal(option="--optimizer-cpu-offload", attribute="optimizer_cpu_offload", rule=FROZEN),
    Refusal(option="--use-precision-aware-optimizer", attribute="use_precision_aware_optimizer", rule=FROZEN),
    Refusal(option="--defer-embedding-wgrad-compute", attribute="defer_embedding_wgrad_compute", rule=FROZEN),
    Refusal(option="--delay-wgrad-compute", attribute="delay_wgrad_compute", rule=FROZEN),
    Refusal(option="--use-megatron-fsdp", attribute="use_megatron_fsdp", rule=FROZEN),
    Refusal(option="--use-torch-fsdp2", attribute="use_torch_fsdp2", rule=FROZEN),
    Refusal(
        option="--cuda-graph-impl",
        attribute="cuda_graph_impl",
        allowed=lambda value: value in (None, "none"),
        rule="microbatches differ in length",
        remedy="set it to none",
    ),
    Refusal(
        option="--tp-comm-overlap",
        attribute="tp_comm_overlap",
        rule="the linears that it splits are taken over with their adapters",
    ),
    Refusal(
        option="--cpu-offloading-num-layers",
        attribute="cpu_offloading_num_layers",
        rule="the taken-over linears save their input themselves",
        remedy="remove the option, or use --recompute-granularity full",
    ),
    Refusal(
        option="--fine-grained-activation-offloading",
        attribute="fine_grained_activation_offloading",
        rule="the taken-over linears save their input themselves",
        remedy="remove the option, or use --recompute-granularity full",
    ),
    Refusal(
        option="--recompute-modules",
        attribute="recompute_modules",
        allowed=lambda value: set(value or ()) <= {"core_attn"},
        rule="adapters are recomputed with whole layers, or not at all",
        remedy="use core_attn alone, or --recompute-granularity full",
    ),
    Refusal(option="--sft", attribute="sft", rule="each job of the run file names its own rows"),
    Refusal(option="--perform-rl-step", attribute="perform_rl_step", rule=STREAM),
    Refusal(option="--skip-train", attribute="skip_train", rule="the jobs are trained"),
    Refusal(option="--iterations-to-skip", attribute="iterations_to_skip", rule=STREAM),
    Refusal(option="--step-batch-size-schedule", attribute="step_batch_size_schedule", rule=STREAM),
    Refusal(
        option="--microbatch-group-size-per-virtual-pipeline-stage",
        attribute="microbatch_group_size_per_vp_stage",
        allowed=lambda value: value is None,
        rule=STREAM,
    ),
    Refusal(option="--overlap-p2p-communication-warmup-flush", attribute="overlap_p2p_comm_warmup_flush", rule=STREAM),
    Refusal(option="--yaml-cfg", attribute="yaml_cfg", rule="options are checked one by one", remedy="give options"),
    Refusal(option="--lazy-mpu-init", attribute="lazy_mpu_init", rule="process groups are needed at once"),
    Refusal(
        option="--init-model-with-meta-device",
        attribute="init_model_with_meta_device",
        rule="the base model's weights are read into the allocated model",
    ),
    Refusal(
        option="--use-checkpoint-args",
        attribute="use_checkpoint_args",
        rule="a checkpoint of jobs holds no options of the model",
    ),
    Refusal(
        option="--pretrained-checkpoint",
        attribute="pretrained_checkpoint",
        rule="the base comes from base_model.path of the run file",
    ),
    Refusal(option="--ckpt-convert-format", attribute="ckpt_convert_format", rule=STATE),
    Refusal(option="--async-save", attribute="async_save", rule=STATE),
    Refusal(option="--non-persistent-save-interval", attribute="non_persistent_save_interval", rule=STATE),
    Refusal(option="--save-retain-interval", attribute="save_retain_interval", rule=STATE),
    Refusal(option="--ckpt-step", attribute="ckpt_step", rule="a run goes on from its newest checkpoint"),
    Refusal(option="--finetune", attribute="finetune", rule=WHOLE),
    Refusal(option="--no-load-optim", attribute="no_load_optim", rule=WHOLE),
    Refusal(option="--no-save-optim", attribute="no_save_optim", rule=WHOLE),
    Refusal(option="--qk-clip", attribute="qk_clip", rule=FROZEN),
    Refusal(
        option="--activation-func-clamp-value",
        attribute="activation_func_clamp_value",
        allowed=lambda value: value is None,
        rule=PLAIN,
    ),
    Refusal(option="--glu-linear-offset", attribute="glu_linear_offset", rule=PLAIN),
    Refusal(
        option="--rotary-seq-len-interpolation-factor",
        attribute="rotary_seq_len_interpolation_factor",
        allowed=_one,
        rule=PLAIN,
    ),
    Refusal(
        option="--no-rope-freq",
        attribute="no_rope_freq",
        allowed=lambda value: not any(value) if isinstance(value, list) else not value,
        rule=PLAIN,
    ),
    Refusal(option="--use-mup", attribute="use_mup", rule=PLAIN),
    Refusal(option="--attention-output-gate", attribute="attention_output_gate", rule=PLAIN),
    Refusal(option="--apply-layernorm-1p", attribute="layernorm_zero_centered_gamma", rule=PLAIN),
    Refusal(
        option="--softmax-type", attribute="softmax_type", allowed=lambda value: value in (None, "vanilla"), rule=PLAIN
    ),
    Refusal(option="--window-size", attribute="window_size", rule=PLAIN),
    Refusal(option="--qk-l2-norm", attribute="qk_l2_norm", rule=PLAIN),
    Refusal(
        option="--apply-residual-connection-post-layernorm",
        attribute="apply_residual_connection_post_layernorm",
        rule=PLAIN,
    ),
    Refusal(
        option="--fp32-residual-connection",
        attribute="fp32_residual_connection",
        rule="adapters take their input in the type of the base model's weights",
    ),
    Refusal(
        option="--te-precision-config-file",
        attribute="te_precision_config_file",
        rule="the adapters' products have no quantized form",
        remedy="use --bf16",
    ),
    Refusal(
        option="--mlp-chunks-for-training",
        attribute="mlp_chunks_for_training",
        allowed=_one,
        rule="an MLP is given the rows that its adapters are routed by, whole",
        remedy="remove the option; --recompute-granularity full saves more memory",
    ),
    Refusal(option="--save-activations-interval", attribute="save_activations_interval", rule=STEP),
    Refusal(option="--save-dgrads-interval", attribute="save_dgrads_interval", rule=STEP),
    Refusal(option="--save-params-interval", attribute="save_params_interval", rule=STEP),
    Refusal(option="--save-wgrads-interval", attribute="save_wgrads_interval", rule=STEP),
)
"""In the order in which they are checked. An attribute that a release lacks can't have been asked for."""

WITHOUT_EFFECT = (
    *("--data-path", "--data-args-path", "--mock-data", "--split", "--train-data-path", "--dataloader-type"),
    *("--train-iters", "--train-samples", "--global-batch-size", "--optimizer", "--clip-grad", "--weight-decay"),
    *("--adam-beta1", "--adam-beta2", "--adam-eps", "--lr", "--min-lr", "--lr-decay-style", "--lr-decay-iters"),
    *("--lr-decay-samples", "--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction", "--lr-warmup-init"),
    *("--eval-iters", "--eval-interval", "--full-validation", "--log-num-zeros-in-grad", "--log-max-attention-logit"),
    *("--empty-unused-memory-level", "--rerun-mode"),
)
"""Options of ordinary scripts that the run file decides instead, or that look at gradients of the base."""


def without_effect(words: Sequence[str]) -> list[str]:
    """Those of a command line's options that have no effect in a run of jobs; it is told of them at its start."""
    given = {word.partition("=")[0] for word in words}
    return [option for option in WITHOUT_EFFECT if option in given]


def check_options(args: Namespace) -> None:
    """Refuse what can't be obeyed.

    Raises:
        UserError: an option is refused.
    """
    for refusal in REFUSALS:
        value = getattr(args, refusal.attribute, None)
        if not refusal.allowed(value):
            raise UserError(f"got {value}", rule=refusal.rule, remedy=refusal.remedy, key=refusal.option)
