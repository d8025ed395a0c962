"""The tokenized rows of one job, packed into three flat arrays."""

import hashlib
import json
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt


class JobDataset:
    """Rows of token ids with the label tokens marked.

    Args:
        path: where the rows came from, for messages.
        ids: int32 ``[tokens of all rows]``.
        labels: bool, same shape: whether the token is a label (something the loss asks the model to predict).
        offsets: int64 ``[rows + 1]``: row r holds the tokens ``offsets[r]`` to ``offsets[r + 1]``.
        rows_truncated: how many rows lost their tail to ``max_length``.
        unread: what rows have that their chat template never mentions: ``tools``, ``reasoning_content``, …

    Note: 5 bytes a token and 24 a row; a million rows of 500 tokens take 2.5 GB, on disk where they are mapped from
        there (`open`).
    """

    def __init__(
        self,
        *,
        path: Path,
        ids: npt.NDArray[np.int32],
        labels: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        rows_truncated: int = 0,
        unread: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.unread = tuple(sorted(unread))
        """What rows have that their chat template never mentions."""
        self.rows_truncated = rows_truncated
        """Rows cut to ``max_length``."""
        self._ids, self._labels, self._offsets = ids, labels, offsets
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        """int64 ``[rows]``: tokens of each row, at least 1."""
        # The first token of a row is predicted from nothing, so it never counts.
        counted = np.add.reduceat(labels, offsets[:-1], dtype=np.int64)
        self.label_tokens: npt.NDArray[np.int64] = counted - labels[offsets[:-1]]
        """int64 ``[rows]``: label tokens of each row that something precedes."""

    def __len__(self) -> int:
        return len(self.lengths)

    def save(self, folder: Path) -> None:
        """Write what `open` maps into an existing folder."""
        for name, values in (("ids", self._ids), ("labels", self._labels), ("offsets", self._offsets)):
            np.save(folder / f"{name}.npy", values)
        told = {"truncated": self.rows_truncated, "unread": self.unread, "digest": self.digest}
        (folder / "rows.json").write_text(json.dumps(told))

    @classmethod
    def open(cls, folder: Path, path: Path) -> "JobDataset":
        """The rows in a folder that `save` wrote, mapped into memory: processes of one host share them.

        Args:
            folder: that folder; it must stay as it is as long as the rows are used.
            path: where the rows came from.

        Raises:
            OSError, ValueError: it is missing, or not whole; whatever NumPy raises where a file is damaged.
        """
        ids, labels, offsets = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ids", "labels", "offsets")
        )
        whole = ids.dtype == np.int32 and labels.dtype == np.bool_ and offsets.dtype == np.int64
        if not whole or not len(ids) == len(labels) == offsets[-1]:
            raise ValueError(f"{folder} is not whole")
        told = json.loads((folder / "rows.json").read_text())
        rows = cls(
            path=path,
            ids=ids,
            labels=labels,
            offsets=offsets,
            rows_truncated=int(told["truncated"]),
            unread=map(str, told["unread"]),
        )
        rows.__dict__["digest"] = str(told["digest"])
        return rows

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all rows and labels: two data sets with the same one train the same."""
        digest = hashlib.sha256()
        for values in (self._offsets, self._ids, self._labels):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @property
    def rows_without_labels(self) -> int:
        """Rows that keep their place in the order but add nothing."""
        return int((self.label_tokens == 0).sum())

    @property
    def total_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self._offsets[-1])

    def ids(self, row: int) -> npt.NDArray[np.int32]:
        """int32 ``[lengths[row]]``: token ids of a row (a view)."""
        return self._ids[self._offsets[row] : self._offsets[row + 1]]

    def label_mask(self, row: int) -> npt.NDArray[np.bool_]:
        """bool ``[lengths[row]]``: whether each token of a row is a label (a view)."""
        return self._labels[self._offsets[row] : self._offsets[row + 1]]


class DatasetBuilder:
    """Takes rows one by one and makes a `JobDataset`; nothing is copied at the end."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._labels = bytearray()
        self._offsets = array("q", [0])
        self.rows_truncated = 0
        """Rows that the caller cut."""
        self.unread: set[str] = set()
        """What rows have that their chat template never mentions."""

    def append(self, ids: list[int], labels: list[bool]) -> None:
        """Add a row; both lists have one entry per token."""
        self._ids.extend(ids)
        self._labels.extend(labels)
        self._offsets.append(len(self._ids))

    def extend(self, other: "DatasetBuilder") -> None:
        """Add the rows of another one."""
        before = len(self._ids)
        self._ids.extend(other._ids)
        self._labels.extend(other._labels)
        self._offsets.extend(before + offset for offset in other._offsets[1:])
        self.rows_truncated += other.rows_truncated
        self.unread |= other.unread

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def build(self, path: Path) -> JobDataset:
        """The data set of the rows so far (at least one)."""
        return JobDataset(
            path=path,
            ids=np.frombuffer(self._ids, dtype=np.int32),
            labels=np.frombuffer(self._labels, dtype=np.bool_),
            offsets=np.frombuffer(self._offsets, dtype=np.int64),
            rows_truncated=self.rows_truncated,
            unread=self.unread,
        )
