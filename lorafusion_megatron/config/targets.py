"""Names of the linears that an adapter can target: Hugging Face's, Megatron's, and how they overlap."""

from lorafusion_megatron.config.rules import require, show

HF_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Hugging Face projections; each has an A of its own."""

FUSED_TARGETS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron module -> the projections that it holds; such a target has one A over the whole module."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear of every block."""


def check_targets(key: str, targets: tuple[str, ...]) -> None:
    """Check that every target exists, none comes twice and none lies within another.

    Raises:
        UserError: naming the candidates or the two that overlap.
    """
    candidates = ", ".join((*HF_TARGETS, *FUSED_TARGETS, ALL_LINEAR))
    require(
        bool(targets),
        key=key,
        given="no target is given",
        rule="an adapter needs at least one target linear",
        remedy=f"choose among {candidates}",
    )
    for target in targets:
        require(
            target in HF_TARGETS or target in FUSED_TARGETS,
            key=key,
            given=f"{show(target)} matches no linear of the model",
            rule="only linears of transformer blocks can be targets (embeddings, norms and the output layer cannot)",
            remedy=f"choose among {candidates}",
        )
    require(
        len(set(targets)) == len(targets),
        key=key,
        given=f"{show(next((t for t in targets if targets.count(t) > 1), ''))} is given twice",
        rule="each target may come once",
        remedy="remove the second",
    )
    for fused, parts in FUSED_TARGETS.items():
        inside = [part for part in parts if part in targets]
        require(
            fused not in targets or not inside,
            key=key,
            given=f"{fused} and {', '.join(inside)} are both given",
            rule=f"{fused} already holds {', '.join(parts)}",
            remedy=f"keep either {fused} (one A for all) or the projections (one A each)",
        )
