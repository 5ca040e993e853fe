"""What every space map promises: it counts the references to each block and finds blocks that nobody refers to.

Counts are changed for half-open ranges ``[begin, end)``.  Source: docs/design.md, "Space maps".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable


class SpaceMap(Protocol):
    """Reference counts of blocks ``0 .. nr_blocks - 1``.

    Every method that takes a block raises :class:`~persistent_data.errors.InvalidArgument` for one out of range.
    """

    @property
    def nr_blocks(self) -> int:
        """Blocks that are counted."""

    @property
    def nr_free(self) -> int:
        """Blocks that could be allocated, give or take what was freed since the last commit."""

    def get_count(self, block: int) -> int:
        """Return the number of references to *block*."""

    def set_count(self, block: int, count: int) -> None:
        """Give *block* that many references."""

    def more_than_one(self, block: int) -> bool:
        """Tell whether *block* is shared."""

    def inc(self, begin: int, end: int) -> None:
        """Add one reference to each block of a range."""

    def dec(self, begin: int, end: int) -> None:
        """Take one reference from each block of a range.

        :raises InvalidArgument: one of them has none
        """

    def new_block(self) -> int:
        """Return a block that was free, now with one reference.

        It is free in the last commit too, so that what a crash would return to stays whole.

        :raises NoFreeBlock: there is none
        """

    def extend(self, extra_blocks: int) -> None:
        """Count that many blocks more, all of them free."""

    def commit(self) -> None:
        """Write what changed.  Blocks freed before this may be allocated after it."""

    def root_blob(self) -> bytes:
        """Return the 32 bytes from which the map, as last committed, can be opened again."""


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Join neighbours of a list: each stretch in which a number is the one before plus one becomes ``(begin, end)``."""
    result = []
    begin = end = -1
    for block in blocks:
        if block == end:
            end += 1
        else:
            if begin != end:
                result.append((begin, end))
            begin, end = block, block + 1
    if begin != end:
        result.append((begin, end))
    return result
