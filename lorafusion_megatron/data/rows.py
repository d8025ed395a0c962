"""The kinds of data rows, and how each becomes token ids with labels."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np

from lorafusion_megatron.data.chat import ChatTemplate, Message
from lorafusion_megatron.data.source import DataSource
from lorafusion_megatron.data.tokenizer import TextTokenizer, read_chat_template
from lorafusion_megatron.errors import UserError

KINDS: dict[str, tuple[str, ...]] = {
    "tokenized": ("prompt_ids", "completion_ids"),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Kind of a row -> the fields that it must have. Other fields are ignored, except ``input`` of Alpaca rows and
``tools`` of messages."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of the Stanford Alpaca project, without and with an input."""

type Tokens = tuple[list[int], list[bool]]


def kind_of(row: dict[str, object], place: str, key: str) -> str:
    """Which kind a row is. Fields that are null count where no others do: tables of several kinds fill rows up.

    Raises:
        UserError: it fits none, or two.
    """
    fitting = [kind for kind, fields in KINDS.items() if all(row.get(field) is not None for field in fields)]
    fitting = fitting or [kind for kind, fields in KINDS.items() if all(field in row for field in fields)]
    if len(fitting) == 1:
        return fitting[0]
    kinds = ", ".join("+".join(fields) for fields in KINDS.values())
    found = ", ".join(sorted(str(name)[:40] for name in row)[:8]) or "no field"
    raise UserError(
        f"{place} has the fields {found}" if not fitting else f"{place} fits the kinds {' and '.join(fitting)}",
        rule=f"a row has the fields of one kind: {kinds}",
        remedy="rename or remove fields",
        key=key,
    )


class FirstRow(NamedTuple):
    """What the first row of a file tells of the others."""

    kind: str
    place: str
    """``file:line``, for messages."""
    tokenizer: TextTokenizer | None
    """Of the model, where the row needed it."""


class RowTokenizer:
    """Turns the rows of one file into token ids and labels; the model's tokenizer is loaded at the first text.

    Args:
        source: the file, the model folder and the keys that named them.
        like: one for the same file that has seen its first row, perhaps in another process; this one goes on from it.

    Note: a prompt and its completion are tokenized apart, because that is how they meet at inference: no token
        reaches over the border. A conversation is tokenized as one text, as its template has it; a token counts as
        the assistant's if any character of it is. The end-of-sequence token is added to completions and texts where
        the model has one, never to messages (their template writes it) nor to tokenized rows.
    """

    def __init__(self, source: DataSource, *, like: "FirstRow | None" = None) -> None:
        self._source, self._key = source, source.key
        self._kind = like.kind if like else ""
        self._first = like.place if like else ""
        self.unread: set[str] = set()
        """What rows so far have that the chat template never mentions."""
        if like and like.tokenizer is not None:
            self.__dict__["_tokenizer"] = like.tokenizer
        self._by_kind: dict[str, Callable[[dict[str, object], str], Tokens]] = {
            "tokenized": self._tokenized,
            "messages": self._messages,
            "completion": self._completion,
            "alpaca": self._alpaca,
            "text": self._text,
        }

    def tokens(self, row: dict[str, object], place: str) -> Tokens:
        """Token ids of a row and which of them are labels.

        Args:
            row: the JSON object.
            place: ``file:line``, for messages.

        Raises:
            UserError: a bad row, or one of another kind than the rows before.
        """
        kind = kind_of(row, place, self._key)
        if self._kind and kind != self._kind:
            raise UserError(
                f"{place} is of kind {kind}, {self._first} is of kind {self._kind}",
                rule="all rows of a file are of one kind",
                remedy="split the file",
                key=self._key,
            )
        if not self._kind:
            self._kind, self._first = kind, place
        return self._by_kind[kind](row, place)

    @property
    def first_row(self) -> "FirstRow":
        """What the first row told; can be sent to another process."""
        return FirstRow(self._kind, self._first, self.__dict__.get("_tokenizer"))

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self._source.model, trust_remote_code=self._source.trust_remote_code, key=self._key)

    @cached_property
    def _template(self) -> ChatTemplate:
        return self._read_template(tools=False)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        return self._read_template(tools=True)

    def _read_template(self, *, tools: bool) -> ChatTemplate:
        source, tokenizer = self._source, self._tokenizer
        text = read_chat_template(
            source.model, source.chat_template, tokenizer.config, tools=tools, key=source.chat_template_key
        )
        return ChatTemplate(
            text,
            tokenizer.special_tokens,
            today=datetime.fromtimestamp(source.path.stat().st_mtime, UTC),
            key=self._key,
            template_key=source.chat_template_key,
        )

    def _tokenized(self, row: dict[str, object], place: str) -> Tokens:
        prompt, completion = (self._ids(row, field, place) for field in KINDS["tokenized"])
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _text(self, row: dict[str, object], place: str) -> Tokens:
        return self._prompt_and_completion("", self._string(row, "text", place))

    def _completion(self, row: dict[str, object], place: str) -> Tokens:
        prompt, completion = self._string(row, "prompt", place), self._string(row, "completion", place)
        return self._prompt_and_completion(prompt, completion)

    def _alpaca(self, row: dict[str, object], place: str) -> Tokens:
        fields = {name: self._string(row, name, place) for name in ("instruction", "output")}
        fields["input"] = self._string(row, "input", place) if row.get("input") is not None else ""
        prompt = (ALPACA_INPUT if fields["input"] else ALPACA).format_map(fields)
        return self._prompt_and_completion(prompt, fields["output"])

    def _prompt_and_completion(self, prompt: str, completion: str) -> Tokens:
        tokenizer = self._tokenizer
        before = tokenizer.bos_ids + (tokenizer.encode(prompt) if prompt else [])
        after = tokenizer.encode(completion) + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
        return before + after, [False] * len(before) + [True] * len(after)

    def _messages(self, row: dict[str, object], place: str) -> Tokens:
        messages, tools = self._conversation(row["messages"], place), self._tools(row.get("tools"), place)
        template = self._template if tools is None else self._tool_template
        text, spans = template.assistant_spans(messages, place, tools)
        self.unread |= template.unread(messages, tools)
        if not _is_unicode(text):  # from a field of the row that only the template reads
            raise UserError(
                f"{place}: the conversation holds half of a surrogate pair",
                rule="text must be Unicode",
                remedy="mend or remove the row",
                key=self._key,
            )
        ids, characters = self._tokenizer.encode_with_spans(text)
        starts, stops = np.fromiter(chain.from_iterable(characters), np.int64, 2 * len(ids)).reshape(-1, 2).T
        labels = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            labels |= (starts < stop) & (stops > start)
        return ids, labels.tolist()

    def _tools(self, value: object, place: str) -> object:
        """The tools of a row: objects, which data sets of one column type hold as JSON text; None: it has none."""
        try:
            tools = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            tools = value
        if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            return tools
        raise UserError(
            f"{place}: tools is not a list of objects",
            rule="each tool is a JSON object, its schema, or all of them JSON text of such a list",
            remedy="mend the row",
            key=self._key,
        )

    def _conversation(self, value: object, place: str) -> list[Message]:
        if isinstance(value, list) and value and all(map(_is_message, value)):
            return value
        raise UserError(
            f"{place}: messages is not a list of turns",
            rule='each turn has a "role" and a "content", both text; content may be null beside tool_calls',
            remedy="mend or remove the row",
            key=self._key,
        )

    def _string(self, row: dict[str, object], field: str, place: str) -> str:
        value = row[field]
        if isinstance(value, str) and _is_unicode(value):
            return value
        raise UserError(
            f"{place}: {field} is not text", rule="it must be a string", remedy="mend or remove the row", key=self._key
        )

    def _ids(self, row: dict[str, object], field: str, place: str) -> list[int]:
        ids = row[field]
        if isinstance(ids, list) and set(map(type, ids)) <= {int}:
            return ids
        raise UserError(
            f"{place}: {field} is not a list of token ids",
            rule="prompt_ids and completion_ids are lists of whole numbers",
            remedy="mend or remove the row",
            key=self._key,
        )


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    calls = value.get("tool_calls")
    texts = [value.get("role")]
    if value.get("content") is not None or not (isinstance(calls, list) and calls):
        texts.append(value.get("content"))
    return all(isinstance(text, str) and _is_unicode(text) for text in texts)


def _is_unicode(text: str) -> bool:
    """Whether a string has no lone surrogate, which JSON escapes can make and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
