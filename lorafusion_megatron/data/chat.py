"""Chat templates: messages to text, and which characters of it the assistant said."""

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafusion_megatron.errors import UserError

TOOLS, TOOL_CALLS = "tools", "tool_calls"
TURN_EXTRAS = (TOOL_CALLS, "reasoning_content")
"""What a turn may hold beside its role and content."""

type Message = dict[str, object]
type Span = tuple[int, int]


class _Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}…{% endgeneration %}``, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (the name and type are Jinja's)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.marked: list[tuple[int, str]] = []
        """Where each begins in the text so far, and what it is."""

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = str(caller())
        # Jinja hands out the blocks before this one first, so their length is where this one begins.
        start = sum(map(len, self.blocks))
        self.marked.append((start, text))
        return text


class ChatTemplate:
    """A model's chat template in a sandbox.

    Args:
        text: the Jinja text.
        special_tokens: ``bos_token`` and the like, which templates write.
        today: what ``strftime_now`` tells, which some templates write into the system's turn (Llama 3.2). Not the time
            of reading: rows must be the same on every rank and at every start.
        key: the YAML key of the data file, for messages.
        template_key: the YAML key of the template, for messages.

    Raises:
        UserError: the text is not a template.

    Note: what the assistant said is what ``{% generation %}`` marks. Most templates don't have that tag; then it is
        what each assistant turn adds to the text of the turns before it (with the generation prompt), up to the
        end-of-sequence token. That is exact only if the text of the first turns begins the text of all: templates
        that rewrite earlier turns (Qwen3 drops their thinking) are refused for such rows.
    """

    def __init__(
        self, text: str, special_tokens: dict[str, str], *, today: datetime.datetime, key: str, template_key: str
    ) -> None:
        self._special_tokens, self._key, self._template_key = special_tokens, key, template_key
        self._unread = {name for name in (TOOLS, *TURN_EXTRAS) if name not in text}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = today.strftime
        self._generation: Any = environment.extensions[_Generation.identifier]
        self._marks = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text))
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(
                f"the chat template is no template ({error})", rule="it is Jinja", remedy="mend it", key=template_key
            ) from None

    def render(
        self, messages: Sequence[Message], place: str, *, tools: object = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of the messages; ``place`` is for messages of errors.

        Raises:
            UserError: the template refuses or breaks on them.
        """
        blocks: list[str] = []
        self._generation.blocks, self._generation.marked = blocks, []
        variables = {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            for block in self._template.generate(messages=list(messages), **variables, **self._special_tokens):
                blocks.append(block)  # one by one: the generation tag looks at what is there so far
        except Exception as error:  # a template is a program of somebody else and can raise anything
            raise UserError(
                f"{place}: the chat template does not take these messages ({str(error)[:160]})",
                rule="roles and their order must be what the model's template allows",
                remedy="mend the row, or give another dataset.chat_template",
                key=self._key,
            ) from None
        return "".join(blocks)

    def assistant_spans(self, messages: Sequence[Message], place: str, tools: object = None) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters (from, to) of it that are the assistant's.

        Raises:
            UserError: the template does not take the messages, or rewrites earlier turns.
        """
        if TOOL_CALLS in self._unread and any(map(_only_calls, messages)):
            raise UserError(
                f"{place}: a turn has tool_calls and no content, and the chat template knows nothing of tool_calls",
                rule="a template must write what the assistant says",
                remedy="give a dataset.chat_template that does, or rows with content",
                key=self._key,
            )
        full = self.render(messages, place, tools=tools)
        if self._marks:
            return full, self._marked_spans(full)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self.render(messages[:index], place, tools=tools, add_generation_prompt=True)
                after = self.render(messages[: index + 1], place, tools=tools)
            except UserError as error:
                raise UserError(
                    f"{place}: the chat template takes the conversation, but not what stands before message {index} "
                    f"alone ({error.given})",
                    rule="the assistant's turns can be told apart only by what each adds",
                    remedy="give a dataset.chat_template with {% generation %} marks",
                    key=self._key,
                ) from None
            if not (after.startswith(before) and full.startswith(after)):
                raise UserError(
                    f"{place}: with message {index} the chat template rewrites what it wrote for the ones before",
                    rule="the assistant's turns can be told apart only if earlier text stays",
                    remedy="give a dataset.chat_template with {% generation %} marks, or rows of one assistant turn",
                    key=self._key,
                )
            spans.append((len(before), self._turn_end(full, len(before), len(after))))
        return full, spans

    def unread(self, messages: Sequence[Message], tools: object = None) -> set[str]:
        """What a conversation has beside its content that the template never mentions: nothing is trained of it."""
        found = {TOOLS} if tools else set()
        return self._unread & found.union(name for name in TURN_EXTRAS for message in messages if message.get(name))

    def _marked_spans(self, text: str) -> list[Span]:
        """Where what the template marked stands in the text."""
        spans = [(start, start + len(marked)) for start, marked in self._generation.marked]
        for (start, stop), (_, marked) in zip(spans, self._generation.marked, strict=True):
            if text[start:stop] != marked:
                raise UserError(
                    "the chat template marks {% generation %} within a macro, a set block or a filter",
                    rule="only marks in what the template writes itself can be found in the text",
                    remedy="move the mark out of it",
                    key=self._template_key,
                )
        return spans

    def _turn_end(self, text: str, start: int, stop: int) -> int:
        """Where a turn ends: after its end-of-sequence token, if only white space follows that."""
        eos = self._special_tokens.get("eos_token")
        if not eos:
            return stop
        last = text.rfind(eos, start, stop)
        return last + len(eos) if last >= 0 and not text[last + len(eos) : stop].strip() else stop


def _only_calls(message: Message) -> bool:
    """Whether all that a turn says is its tool calls: many exporters write the content beside them as ""."""
    return bool(message.get(TOOL_CALLS)) and not str(message.get("content") or "").strip()


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False, **kwargs: Any
) -> str:
    """Jinja's own filter escapes HTML; templates mean plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys, **kwargs)
