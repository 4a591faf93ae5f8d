"""Chunks and blocks of an index range, as integers.

Nothing here knows an array, a tensor or a task: geometry is frozen data that can be
tested exhaustively.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MOST_BYTES = 2**63 - 1
"""What no number of bytes exceeds: sizes of files and of memory have 63 bits."""


@dataclass(frozen=True)
class Chunks:
    """``range(total)`` cut into consecutive pieces of ``size``, the last one ragged.

    Parameters
    ----------
    total : int
        Number of samples, at least 1.
    size : int
        Samples per piece, at least 1; a larger size than ``total`` gives one piece.

    Examples
    --------
    >>> [(c.start, c.stop) for c in Chunks(7, 3)]
    [(0, 3), (3, 6), (6, 7)]
    >>> len(Chunks(7, 3)), Chunks(7, 3)[2]
    (3, range(6, 7))
    """

    total: int
    size: int

    def __post_init__(self) -> None:
        if self.total < 1 or self.size < 1:
            raise ValueError(f"total and size must be at least 1; got {self.total} and {self.size}")

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def __getitem__(self, index: int) -> range:
        if not 0 <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        return range(index * self.size, min((index + 1) * self.size, self.total))

    def __iter__(self) -> Iterator[range]:
        return (self[i] for i in range(len(self)))

    def within(self, start: int, stop: int) -> Iterator[range]:
        """Pieces of ``range(start, stop)``, cut at this grid's own boundaries.

        >>> [(c.start, c.stop) for c in Chunks(10, 4).within(4, 10)]
        [(4, 8), (8, 10)]
        """
        while start < stop:
            end = min(stop, (start // self.size + 1) * self.size)
            yield range(start, end)
            start = end


def balanced(total: int, at_most: int) -> Chunks:
    """Cut ``total`` into the fewest pieces of at most ``at_most``, made nearly equal.

    >>> [len(c) for c in balanced(10, 4)]
    [4, 4, 2]
    >>> [len(c) for c in balanced(9, 4)]
    [3, 3, 3]
    """
    pieces = -(-total // max(1, at_most))
    return Chunks(total, -(-total // pieces))
