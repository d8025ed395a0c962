"""What there is to know about one data file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One data file of one job and how to read it."""

    path: Path
    """The file."""
    key: str
    """The YAML key that named it: ``jobs[0].dataset.path``."""
    model: Path
    """Hugging Face model folder, whose tokenizer and chat template serve; opened only if the rows hold text."""
    vocab_size: int
    """Ids must lie below this."""
    max_length: int | None = None
    """Longest row in tokens; None: no limit here."""
    max_length_key: str = "max_length"
    """The YAML key of that limit."""
    truncate: bool = False
    """Whether longer rows lose their tail instead of being an error."""
    chat_template: str | None = None
    """Jinja chat template or a file that holds one; None: the model's."""
    chat_template_key: str = "chat_template"
    """The YAML key of that."""
    trust_remote_code: bool = False
    """Whether a tokenizer in the model folder may run its own Python code."""
