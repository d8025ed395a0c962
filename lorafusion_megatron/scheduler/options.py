"""What a plan depends on besides the samples."""

from dataclasses import dataclass

from lorafusion_megatron.errors import UserError

SCHEDULES = ("staggered", "round_robin", "sequential")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Limits and shape of the pipeline that a schedule is made for."""

    token_capacity: int
    """Padded tokens that a microbatch may hold."""
    padding_multiple: int = 1
    """Each job's rows of a microbatch are padded up to a multiple of this (the kernel's tile)."""
    stages: int = 1
    """Pipeline stages."""
    virtual_stages: int = 1
    """Model chunks per stage; above 1 the interleaved schedule runs."""
    replicas: int = 1
    """Data-parallel replicas."""
    schedule: str = "staggered"
    """staggered | round_robin | sequential"""

    def __post_init__(self) -> None:
        for key in ("token_capacity", "padding_multiple", "stages", "virtual_stages", "replicas"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} is {getattr(self, key)}", rule="it must be at least 1", remedy="raise it")
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"schedule '{self.schedule}'", rule="it must be one of " + ", ".join(SCHEDULES), remedy="choose one",
                key="runtime.schedule",
            )  # fmt: skip
