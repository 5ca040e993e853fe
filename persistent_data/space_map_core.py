"""A space map in memory: nothing on disk, no transactions.  An oracle for tests, and counts for scratch work."""

from __future__ import annotations

from collections import Counter

from persistent_data.errors import InvalidArgument, NoFreeBlock
from persistent_data.layout import SPACE_MAP_ROOT


class CoreSpaceMap:
    """Reference counts in a dictionary, with the promises of :class:`~persistent_data.space_map.SpaceMap`.

    Blocks freed since the last commit are not handed out again, as on disk.
    """

    def __init__(self, nr_blocks: int) -> None:
        self._nr_blocks = nr_blocks
        self._counts: Counter[int] = Counter()
        self._committed: set[int] = set()
        self._begin = 0

    @property
    def nr_blocks(self) -> int:
        return self._nr_blocks

    @property
    def nr_free(self) -> int:
        return self._nr_blocks - len(self._counts)

    def get_count(self, block: int) -> int:
        self._check(block, block + 1)
        count: int = self._counts[block]
        return count

    def set_count(self, block: int, count: int) -> None:
        self._check(block, block + 1)
        if count:
            self._counts[block] = count
        else:
            self._counts.pop(block, None)

    def more_than_one(self, block: int) -> bool:
        return self.get_count(block) > 1

    def inc(self, begin: int, end: int) -> None:
        self._check(begin, end)
        for block in range(begin, end):
            self._counts[block] += 1

    def dec(self, begin: int, end: int) -> None:
        self._check(begin, end)
        for block in range(begin, end):
            count = self._counts[block]
            if not count:
                raise InvalidArgument(f"block {block} has no reference to give up")
            self.set_count(block, count - 1)

    def new_block(self) -> int:
        candidates: list[int] = [*range(self._begin, self._nr_blocks), *range(self._begin)]
        for block in candidates:
            if block not in self._counts and block not in self._committed:
                self._counts[block] = 1
                self._begin = block + 1
                return block
        raise NoFreeBlock(f"all {self._nr_blocks} blocks are in use")

    def extend(self, extra_blocks: int) -> None:
        self._nr_blocks += extra_blocks

    def commit(self) -> None:
        self._committed = set(self._counts)

    def root_blob(self) -> bytes:
        return SPACE_MAP_ROOT.pack(self._nr_blocks, len(self._counts), 0, 0)

    def _check(self, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= self._nr_blocks:
            raise InvalidArgument(f"blocks [{begin}..{end}] are beyond the {self._nr_blocks} blocks of the map")
