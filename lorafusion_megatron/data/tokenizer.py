"""The base model's tokenizer, without Transformers where ``tokenizer.json`` is there."""

import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorafusion_megatron.data.conversion import convert_apart
from lorafusion_megatron.errors import UserError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Files of which a tokenizer that Transformers can load has at least one."""

ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""Where Transformers keeps a tokenizer's other chat templates."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextTokenizer:
    """Text to token ids, as the tokenizer of a Hugging Face folder does it.

    Args:
        folder: the model folder.
        trust_remote_code: whether Python code in the folder may run where ``tokenizer.json`` is missing.
        key: the YAML key that asked for it, for messages.

    Raises:
        UserError: there is no tokenizer, or it cannot be read.

    Note: Transformers takes a byte-level ``tokenizer.json`` (GPT-2's kind: Llama 3, Qwen, SmolLM2) as it stands, so
        the `tokenizers` library reads it here without torch. What Transformers builds anew from other files
        (SentencePiece's kind: Llama 2, Mistral) comes from Transformers itself.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool, key: str) -> None:
        self._key = key
        self.config = _read_json(folder / "tokenizer_config.json", key)
        """``tokenizer_config.json``; empty without one."""
        self.special_tokens: dict[str, str] = self._special_tokens(folder)
        """Name (``eos_token``) -> its text, for chat templates."""
        backend = self._from_file(folder) or self._from_transformers(folder, trust_remote_code)
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
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
        content = _read_json(path, self._key)
        if not content:
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise self._unusable(f"{path} cannot be read ({str(error)[:120]})", "copy the file anew") from None
        is_byte_level = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
        # Transformers adds tokens that other files declare.
        whole = all(tokenizer.token_to_id(token) is not None for token in self._declared(folder))
        return tokenizer if is_byte_level and whole else None

    def _declared(self, folder: Path) -> set[str]:
        """Tokens that files beside ``tokenizer.json`` name."""
        values: list[object] = [*self.special_tokens.values()]
        for source in (self.config, _read_json(folder / "special_tokens_map.json", self._key)):
            for name in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
                more = source.get(name) or []
                values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        values += _read_json(folder / "added_tokens.json", self._key)
        texts = (value.get("content") if isinstance(value, dict) else value for value in values)
        return {text for text in texts if isinstance(text, str) and text}

    def _from_transformers(self, folder: Path, trust_remote_code: bool) -> Any:
        if not any(os.path.isfile(folder / name) for name in _FILES):
            raise self._unusable(f"{folder} has no tokenizer", "add tokenizer.json to the folder")
        try:
            converted = convert_apart(folder, trust_remote_code=trust_remote_code)
        except ValueError as error:
            remedy = "add tokenizer.json to the folder"
            if "custom code" in str(error):
                remedy = "set base_model.trust_remote_code: true if you trust it"
            raise self._unusable(f"{folder} has no tokenizer that can be used ({error})", remedy) from None
        self.special_tokens |= converted["special_tokens"]
        return Tokenizer.from_str(converted["tokenizer"])

    def _unusable(self, given: str, remedy: str) -> UserError:
        return UserError(
            given,
            rule="text rows need the model's tokenizer",
            remedy=f"{remedy}, or give tokenized rows (prompt_ids, completion_ids)",
            key=self._key,
        )

    def _special_tokens(self, folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        sources = [self.config, _read_json(folder / "special_tokens_map.json", self._key)]
        if "added_tokens_decoder" not in self.config:
            sources.reverse()  # so Transformers has it
        for source in sources:
            for name in _SPECIAL:
                value = source.get(name)
                text = value.get("content") if isinstance(value, dict) else value
                if isinstance(text, str):
                    found.setdefault(name, text)
        return found

    def _bos_ids(self) -> list[int]:
        # As Transformers does: what tokenizer.json adds counts, whatever add_bos_token says.
        plain = self.encode("a")
        full: list[int] = self._backend.encode("a", add_special_tokens=True).ids
        start = next((n for n in range(len(full)) if full[n : n + len(plain)] == plain), 0)
        return full[:start]

    def _eos_id(self, folder: Path) -> int | None:
        if "eos_token" in self.special_tokens:
            token: int | None = self._backend.token_to_id(self.special_tokens["eos_token"])
            if token is None:
                name = self.special_tokens["eos_token"]
                raise self._unusable(f"{folder}: eos_token {name} is not in the vocabulary", "mend its files")
            return token
        ids = _read_json(folder / "config.json", self._key).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if type(first) is int else None


def read_chat_template(
    folder: Path, given: str | None, config: dict[str, Any], *, tools: bool = False, key: str
) -> str:
    """The Jinja text of the chat template.

    Args:
        folder: the model folder, which may hold ``chat_template.jinja`` and others under
            ``additional_chat_templates``, or name them in its ``tokenizer_config.json``.
        given: Jinja text or a file that holds it; goes before the model's own.
        config: ``tokenizer_config.json``.
        tools: whether it is for rows with tools, for which a model may have a template named ``tool_use``.
        key: the YAML key of ``given``, for messages.

    Raises:
        UserError: there is none.
    """
    try:
        if given is not None:
            return given if "{" in given else Path(given).read_text(encoding="utf-8")
        files = {path.stem: path for path in folder.glob(f"{ADDITIONAL_TEMPLATES}/*.jinja")}
        if (folder / "chat_template.jinja").is_file():
            files["default"] = folder / "chat_template.jinja"
        named: dict[object, object] = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, ValueError) as error:
        raise UserError(
            f"the chat template cannot be read ({error.strerror if isinstance(error, OSError) else error})",
            rule="it is Jinja text or a file of it",
            remedy="check the path",
            key=key,
        ) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = (entry for entry in template if isinstance(entry, dict))
        named = {entry.get("name"): entry.get("template") for entry in entries} | named
    elif template is not None:
        named = {"default": template} | named
    template = named.get("tool_use" if tools and "tool_use" in named else "default")
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
    given = f"{path} is not a JSON object"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        value, given = None, f"{path} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    raise UserError(given, rule="it must be a JSON object", remedy="copy the file anew", key=key)
