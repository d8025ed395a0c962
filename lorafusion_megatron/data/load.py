"""From a data file to a `JobDataset`: rows read, tokenized, checked and packed."""

from itertools import islice

from lorafusion_megatron.data.dataset import DatasetBuilder, JobDataset
from lorafusion_megatron.data.encode import encode_rows
from lorafusion_megatron.data.parallel import WorkerLostError, encode_apart
from lorafusion_megatron.data.reader import read_rows
from lorafusion_megatron.data.rows import RowTokenizer
from lorafusion_megatron.data.source import DataSource
from lorafusion_megatron.errors import UserError


def load_dataset(source: DataSource, *, workers: int = 1) -> JobDataset:
    """Read, tokenize and check a whole data file.

    Args:
        source: the file.
        workers: processes that tokenize; 1: this one. The data set and the errors are the same.

    Raises:
        UserError: no row, a bad row, rows of two kinds, an id outside the vocabulary, a row longer than
            ``max_length``, or no label token in any row; with the place of the row.
    """
    builder = _encode(source) if workers == 1 else _encode_apart(source, workers)
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


def _encode(source: DataSource) -> DatasetBuilder:
    builder = DatasetBuilder()
    encode_rows(read_rows(source.path, key=source.key), RowTokenizer(source), source, builder)
    return builder


def _encode_apart(source: DataSource, workers: int) -> DatasetBuilder:
    tokenizer, builder = RowTokenizer(source), DatasetBuilder()
    rows = read_rows(source.path, key=source.key)
    encode_rows(islice(rows, 1), tokenizer, source, builder)  # tells the kind, and loads the tokenizer if it is needed
    try:
        for part in encode_apart(rows, source, tokenizer.first_row, workers=workers):
            builder.extend(part)
    except WorkerLostError:  # killed for its memory, or no more processes are allowed
        return _encode(source)
    return builder
