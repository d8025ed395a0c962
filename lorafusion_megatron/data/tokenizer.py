"""The base model's tokenizer, without Transformers where ``tokenizer.json`` is there."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorafusion_megatron.errors import UserError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """Text to token ids, as the tokenizer of a Hugging Face folder does it.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may run where ``tokenizer.json`` is missing.
        key: the YAML key that asked for it, for messages.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.

    Note: Transformers imports torch (4 s and 400 MB here), so ``tokenizer.json`` is read by the `tokenizers` library
        itself. A folder without that file goes through Transformers, which converts what it can.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool, key: str) -> None:
        self._key = key
        self.config = _read_json(folder / "tokenizer_config.json", key)
        """``tokenizer_config.json``; empty without one."""
        backend = self._from_file(folder) or self._from_transformers(folder, trust_remote_code)
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = self._special_tokens(folder)
        """Name (``eos_token``) -> its text, for chat templates."""
        self.bos_ids = self._bos_ids()
        """What stands before plain text: nothing, or the token that begins a sequence."""
        # Its other work is to take white space out of the tokens' spans, which would lose labels.
        backend.post_processor = None
        self.eos_id = self._eos_id(folder)
        """The token that ends a sequence; None where the model has none."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without tokens that its beginning or end would add."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters of ``text`` (from, to) that each stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _from_file(self, folder: Path) -> Any:
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{path} cannot be read ({str(error)[:120]})",
                rule="text rows need the model's tokenizer",
                remedy="copy the file anew, or give tokenized rows (prompt_ids, completion_ids)",
                key=self._key,
            ) from None

    def _from_transformers(self, folder: Path, trust_remote_code: bool) -> Any:
        from transformers import AutoTokenizer

        reason = "it has no fast form"
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
            if backend := getattr(loaded, "backend_tokenizer", None):
                return backend
        except Exception as error:  # whatever a folder makes Transformers raise: OSError, ValueError, ImportError, …
            reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"{folder} has no tokenizer that can be used ({reason})",
            rule="text rows need the model's tokenizer",
            remedy="add tokenizer.json to the folder, or give tokenized rows (prompt_ids, completion_ids)",
            key=self._key,
        )

    def _special_tokens(self, folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in (self.config, _read_json(folder / "special_tokens_map.json", self._key)):
            for name in _SPECIAL:
                value = source.get(name)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found.setdefault(name, text)
        return found

    def _bos_ids(self) -> list[int]:
        wanted = self.config.get("add_bos_token")
        bos = self._backend.token_to_id(self.special_tokens.get("bos_token", ""))
        if isinstance(wanted, bool):
            return [bos] if wanted and bos is not None else []
        plain = self.encode("a")
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        start = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
        return full[:start]

    def _eos_id(self, folder: Path) -> int | None:
        if "eos_token" in self.special_tokens:
            token: int | None = self._backend.token_to_id(self.special_tokens["eos_token"])
            return token
        ids = _read_json(folder / "config.json", self._key).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if type(first) is int else None


def read_chat_template(folder: Path, given: str | None, config: dict[str, Any], *, key: str) -> str:
    """The Jinja text of the chat template.

    Args:
        folder: the model folder, which may hold ``chat_template.jinja`` or name one in its ``tokenizer_config.json``.
        given: Jinja text or a file that holds it; goes before the model's own.
        config: ``tokenizer_config.json``.
        key: the YAML key of ``given``, for messages.

    Raises:
        UserError: there is none.
    """
    try:
        if given is not None:
            return given if "{" in given else Path(given).read_text(encoding="utf-8")
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the chat template cannot be read ({error.strerror if isinstance(error, OSError) else error})",
            rule="it is Jinja text or a file of it",
            remedy="check the path",
            key=key,
        ) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return template
    raise UserError(
        f"{folder} has no chat template",
        rule="rows with messages need one",
        remedy="give dataset.chat_template, or rows with prompt and completion",
        key=key,
    )


def _read_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    raise UserError(f"{path} is not a JSON object", rule="it must be one", remedy="copy the file anew", key=key)
