"""Rows to token ids, each checked."""

from collections.abc import Iterable

from lorafusion_megatron.data.dataset import DatasetBuilder
from lorafusion_megatron.data.rows import RowTokenizer
from lorafusion_megatron.data.source import DataSource
from lorafusion_megatron.errors import UserError

type Row = tuple[str, dict[str, object]]
"""``file:line``, and the JSON object there."""


def encode_rows(rows: Iterable[Row], tokenizer: RowTokenizer, source: DataSource, builder: DatasetBuilder) -> None:
    """Tokenize rows, check them and add them to a data set.

    Raises:
        UserError: a bad row, an id outside the vocabulary, or a row longer than ``max_length``; with the row's place.
    """
    for place, row in rows:
        ids, labels = tokenizer.tokens(row, place)
        _check_ids(ids, place, source)
        if source.max_length is not None and len(ids) > source.max_length:
            if not source.truncate:
                raise _too_long(len(ids), place, source)
            ids, labels = ids[: source.max_length], labels[: source.max_length]
            builder.rows_truncated += 1
        builder.append(ids, labels)
    builder.unread |= tokenizer.unread


def _check_ids(ids: list[int], place: str, source: DataSource) -> None:
    if not ids:
        raise UserError(
            f"{place} has no token", rule="a row needs at least one", remedy="remove the row", key=source.key
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= source.vocab_size:
        raise UserError(
            f"{place} holds token id {low if low < 0 else high}",
            rule=f"ids of this model lie between 0 and {source.vocab_size - 1}",
            remedy="tokenize the data with the tokenizer of this model",
            key=source.key,
        )


def _too_long(tokens: int, place: str, source: DataSource) -> UserError:
    return UserError(
        f"{place} has {tokens} tokens, max_length is {source.max_length}",
        rule="a row must fit into max_length",
        remedy=f"raise {source.max_length_key}, shorten the row, or set dataset.truncate: true",
        key=source.key,
    )
