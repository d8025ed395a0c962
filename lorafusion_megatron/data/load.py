"""From a data file to a `JobDataset`: rows read, tokenized, checked and packed."""

from lorafusion_megatron.data.dataset import DatasetBuilder, JobDataset
from lorafusion_megatron.data.reader import read_rows
from lorafusion_megatron.data.rows import RowTokenizer
from lorafusion_megatron.data.source import DataSource
from lorafusion_megatron.errors import UserError


def load_dataset(source: DataSource) -> JobDataset:
    """Read, tokenize and check a whole data file.

    Raises:
        UserError: no row, a bad row, rows of two kinds, an id outside the vocabulary, a row longer than
            ``max_length``, or no label token in any row; with the place of the row.
    """
    tokenizer = RowTokenizer(source)
    builder = DatasetBuilder()
    for place, row in read_rows(source.path, key=source.key):
        ids, labels = tokenizer.tokens(row, place)
        _check_ids(ids, place, source)
        if source.max_length is not None and len(ids) > source.max_length:
            if not source.truncate:
                raise _too_long(len(ids), place, source)
            ids, labels = ids[: source.max_length], labels[: source.max_length]
            builder.rows_truncated += 1
        builder.append(ids, labels)
    if not len(builder):
        raise UserError(
            f"{source.path} holds no row", rule="a job needs at least one", remedy="check the file", key=source.key
        )
    dataset = builder.build(source.path)
    if dataset.rows_without_labels == len(dataset):
        cut = f" ({dataset.rows_truncated} of them cut to max_length)" if dataset.rows_truncated else ""
        raise UserError(
            f"none of the {len(dataset)} rows of {source.path}{cut} has a label token",
            rule="training needs tokens to predict: completions, or assistant turns, after at least one token",
            remedy="check the rows, or raise max_length where they were cut",
            key=source.key,
        )
    return dataset


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
