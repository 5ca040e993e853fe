"""Reference counts found by counting: one byte for each block, and a dictionary for the few that need more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_BYTE_MAX = 255


class RefCounts:
    """How often each of *nr_blocks* blocks was seen.

    Memory is one byte a block, and no more of that than was touched: the operating system provides pages on demand.
    """

    __slots__ = ("counts", "excess", "nr_blocks")

    def __init__(self, nr_blocks: int) -> None:
        self.nr_blocks = nr_blocks
        self.counts = bytearray(nr_blocks)
        self.excess: dict[int, int] = {}
        """What goes beyond 255, by block."""

    def __getitem__(self, block: int) -> int:
        count = self.counts[block]
        return count if count < _BYTE_MAX else count + self.excess.get(block, 0)

    def add(self, block: int) -> None:
        """Count *block* once more; it is one of ours."""
        if self.counts[block] == _BYTE_MAX:
            self.excess[block] = self.excess.get(block, 0) + 1
        else:
            self.counts[block] += 1

    def add_all(self, blocks: Iterable[int]) -> list[int]:
        """Count each of *blocks*, which are not negative, once more; return those that are not ours."""
        outside: list[int] = []
        counts = self.counts
        rest = iter(blocks)
        while True:
            block = -1
            try:
                for block in rest:
                    counts[block] += 1
                return outside
            except ValueError:
                self.excess[block] = self.excess.get(block, 0) + 1
            except IndexError:
                outside.append(block)

    def any_shared(self) -> bool:
        """Tell whether some block was counted more than once."""
        return self.counts.count(0) + self.counts.count(1) != self.nr_blocks
