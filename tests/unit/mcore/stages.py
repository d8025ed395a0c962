"""Stages of a pipeline without processes."""


class Group:
    """A pipeline's process group, as far as a stage asks."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """This stage."""
        return self._rank

    def size(self) -> int:
        """All stages."""
        return self._size
