"""The kinds of data rows, and how each becomes token ids with labels."""

from pathlib import Path

from lorafusion_megatron.errors import UserError

KINDS: dict[str, tuple[str, ...]] = {
    "tokenized": ("prompt_ids", "completion_ids"),
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Kind of a row -> the fields that it must have."""


def kind_of(row: dict[str, object], place: str, key: str) -> str:
    """Which kind a row is.

    Raises:
        UserError: it fits none, or two.
    """
    fitting = [kind for kind, fields in KINDS.items() if all(field in row for field in fields)]
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


class RowTokenizer:
    """Turns the rows of one file into token ids and labels; the model's tokenizer is loaded at the first text.

    Args:
        model: Hugging Face model folder.
        chat_template: Jinja text or file; None: the model's.
        trust_remote_code: whether a tokenizer's own Python code may run.
        key: the YAML key of the file, for messages.
    """

    def __init__(self, model: Path, chat_template: str | None, trust_remote_code: bool, key: str) -> None:
        self._model, self._chat_template, self._trust, self._key = model, chat_template, trust_remote_code, key
        self._kind = ""
        self._first = ""

    def tokens(self, row: dict[str, object], place: str) -> tuple[list[int], list[bool]]:
        """Token ids of a row and which of them are labels.

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
        if kind == "tokenized":
            prompt, completion = (self._ids(row, field, place) for field in KINDS[kind])
            return prompt + completion, [False] * len(prompt) + [True] * len(completion)
        raise UserError(f"{place} is of kind {kind}", rule="text rows", remedy="tokenize", key=self._key)

    def _ids(self, row: dict[str, object], field: str, place: str) -> list[int]:
        ids = row[field]
        if isinstance(ids, list) and all(type(item) is int for item in ids):
            return ids
        raise UserError(
            f"{place}: {field} is not a list of token ids",
            rule="prompt_ids and completion_ids are lists of whole numbers",
            remedy="mend or remove the row",
            key=self._key,
        )
