"""What is replaced in Megatron while a run of jobs is enabled, each with its reason; undone as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One attribute of a Megatron module or class and what stands in for it."""

    owner: Any
    attribute: str
    value: Any


INHERITED = object()
"""Before a patch the owner had no attribute of its own: it is deleted again."""


class Patches:
    """Replaced attributes, and what was there before."""

    def __init__(self) -> None:
        self._saved: list[Patch] = []

    def install(self, patches: Sequence[Patch]) -> None:
        """Put stand-ins in place."""
        for patch in patches:
            before = vars(patch.owner).get(patch.attribute, INHERITED)
            self._saved.append(Patch(owner=patch.owner, attribute=patch.attribute, value=before))
            setattr(patch.owner, patch.attribute, patch.value)

    def remove(self) -> None:
        """Put everything back, last replaced first."""
        while self._saved:
            patch = self._saved.pop()
            if patch.value is INHERITED:
                delattr(patch.owner, patch.attribute)
            else:
                setattr(patch.owner, patch.attribute, patch.value)


def local_layers() -> list[Patch]:
    """The local layer spec for packed samples and sequence parallel: its own attention and norm refuse them.

    Methods of the provider are replaced, not the functions that build specs: a script imported those by name before.
    """
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import transformer_block

    from ...mcore.local_spec import PackedAttention, RMSNorm

    return [
        Patch(owner=LocalSpecProvider, attribute="core_attention", value=lambda self: PackedAttention),
        Patch(owner=LocalSpecProvider, attribute="layer_norm", value=lambda self, *_, **__: RMSNorm),
        # The norm behind the last layer, where a spec names layers only.
        Patch(owner=transformer_block, attribute="LayerNormImpl", value=RMSNorm),
    ]


def training_loop(session: Any) -> list[Patch]:
    """Megatron's own loop around the jobs: one iteration is one window of the plan.

    Args:
        session: a `session.Session`.
    """
    from megatron.core import num_microbatches_calculator as microbatches
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.training import initialize, one_logger_utils, training
    from megatron.training.models import dist_utils

    replaced = {
        # Both ways to build a model end in one of these two: the last moment before the DDP wrapper.
        (training, "wrap_model_chunks_with_ddp"): session.wrapping(training.wrap_model_chunks_with_ddp),
        (dist_utils, "_ddp_wrap"): session.wrapping(dist_utils._ddp_wrap),
        # A rank without trainable parameters: Megatron's own empty optimizer. Adapters have theirs.
        (training, "get_megatron_optimizer"): lambda *_, **__: ChainedOptimizer([]),
        # Rows come from the jobs; the index of Megatron's data sets need not even be compiled.
        (training, "build_train_valid_test_data_iterators"): session.data_iterators,
        (initialize, "_compile_dependencies"): lambda: None,
        (microbatches, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"): session.microbatches,
        (training, "train_step"): session.train_step,
        (training, "training_log"): session.logging(training.training_log),
        (training, "consume_seqlen_stats_in_iteration"): session.window_tokens,
        (training, "checkpoint_and_decide_exit"): session.deciding_exit(training.checkpoint_and_decide_exit),
        (training, "save_checkpoint"): session.save_checkpoint,
        (training, "load_checkpoint"): session.load_checkpoint,
        # The last call of both ways out, the end of `pretrain` and an exit from the loop.
        (one_logger_utils, "finish"): session.leaving(one_logger_utils.finish),
    }
    return [Patch(owner=owner, attribute=name, value=value) for (owner, name), value in replaced.items()]
