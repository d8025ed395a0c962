"""Silences what Megatron says on every start about choices that are not the user's; nothing else.

Imports nothing of Megatron: most of it is said while Megatron is imported, so this has to come before.
"""

import logging
import warnings

EXPECTED_WARNINGS = (
    (r"Transformer Engine and Apex are not installed\. Falling back to", r"megatron\.core\."),
    (r"Apex is not installed\. Falling back to Torch Norm", r"megatron\.core\."),
    (r"full scope is deprecated\. Use empty cuda_graph_modules", r"megatron\.core\."),
)
"""(message, module). Megatron's optimizers are not used, the norm is ours, and no CUDA graph is asked for: the third
comes of a default of TransformerConfig."""

EXPECTED_RECORDS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Logger -> how the record begins. The second is about building extensions, which nothing here does."""


def quiet_megatron() -> None:
    """Drop exactly the warnings and log records above in this process; idempotent."""
    for message, module in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning, module=module)
    for name, start in EXPECTED_RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Drop) for known in logger.filters):
            logger.addFilter(_Drop(start))


class _Drop(logging.Filter):
    """Drops records that begin with a text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)
