"""The lists of :mod:`thinpool.leaf_lists` made by arrays, for large pools.  Importing it loads numpy."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np

from thinpool.leaf_lists import Leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from thinpool.pool_reader import PoolReader

WORTH_ARRAYS = 32
"""Leaves of a device from which on array operations are faster."""


class LeafArrays(Leaves):
    """The same as its base, which explains it, once :meth:`finish` has been called: until then chunks are just kept."""

    def __init__(self, pool: PoolReader) -> None:
        super().__init__(pool)
        self._chunk_blocks = array("I")
        self._chunk_keys = array("Q")
        self._chunk_sizes = array("Q")
        self._chunk_highs = array("Q")
        self._chunk_roots = bytearray()
        self._ends = array("I")
        self._end_highs = array("Q")

    def _add_chunk(self, leaves: tuple[int, ...], keys: tuple[int, ...], high: int, is_root: bool) -> int:
        self._chunk_blocks.extend(leaves)
        self._chunk_keys.extend(keys)
        self._chunk_sizes.append(len(leaves))
        self._chunk_highs.append(high)
        self._chunk_roots.append(is_root)
        return len(self._chunk_sizes) - 1

    def _end_at(self, chunk: int, high: int) -> None:
        self._ends.append(chunk)
        self._end_highs.append(high)

    def finish(self) -> None:
        """Make the lists."""
        if not self._chunk_sizes:
            return
        sizes = np.frombuffer(self._chunk_sizes, np.uint64).astype(np.int64)
        last = np.cumsum(sizes) - 1
        """Where the last leaf of each chunk is."""
        low = np.frombuffer(self._chunk_keys, np.uint64)
        high = np.empty_like(low)
        high[:-1] = low[1:] - np.uint64(1)
        high[last] = np.frombuffer(self._chunk_highs, np.uint64)

        # Numbers are given in the order in which leaves are met.
        distinct, first, places = np.unique(
            np.frombuffer(self._chunk_blocks, np.uint32), return_index=True, return_inverse=True
        )
        order = np.argsort(first)
        rank = np.empty(len(order), np.uint32)
        rank[order] = np.arange(len(order), dtype=np.uint32)
        leaves = rank[places]
        blocks = distinct[order]
        lowest = np.zeros(len(blocks), np.uint64)
        np.maximum.at(lowest, leaves, low)
        highest = np.full(len(blocks), np.iinfo(np.uint64).max)
        np.minimum.at(highest, leaves, high)
        if self._ends:
            ends = leaves[last[np.frombuffer(self._ends, np.uint32)]]
            np.minimum.at(highest, ends, np.frombuffer(self._end_highs, np.uint64))
        is_root = np.ones(len(blocks), np.uint8)
        is_root[leaves[np.repeat(np.frombuffer(self._chunk_roots, np.uint8) == 0, sizes)]] = 0
        numbers = np.zeros(len(self._numbers), np.uint32)
        numbers[blocks] = np.arange(1, len(blocks) + 1)

        self._numbers = _array("I", numbers)
        self.blocks = _array("I", blocks)
        self.lowest = _array("Q", lowest)
        self.highest = _array("Q", highest)
        self.is_root = bytearray(is_root)
        self.geometry = array("H", bytes(2 * len(blocks)))
        self._chunks = [_array("I", chunk) for chunk in np.split(leaves, last[:-1] + 1)]
        self._chunk_blocks, self._chunk_keys = array("I"), array("Q")

    def cut(self) -> None:
        """Find out which leaves always stand next to each other, and which occur more than once."""
        if not self._chunks:
            return
        sizes = np.frombuffer(self._chunk_sizes, np.uint64).astype(np.int64)
        last = np.cumsum(sizes) - 1
        leaves = np.concatenate([np.frombuffer(chunk, np.uint32) for chunk in self._chunks])
        begins, ends = leaves[last - sizes + 1], leaves[last]
        chunks = np.concatenate([np.frombuffer(device, np.uint32) for device in self._devices])
        uses = np.bincount(chunks, minlength=len(sizes))
        # Neighbours within chunks, whichever device has them, and where chunks of a device meet.
        within = np.ones(len(leaves) - 1, np.bool_)
        within[last[:-1]] = False
        device_ends = np.cumsum([len(device) for device in self._devices]) - 1
        following = np.append(begins[chunks[1:]], np.uint32(self._CUT))
        following[device_ends] = self._CUT
        first = begins[chunks[np.append(0, device_ends[:-1] + 1)]]
        a = np.concatenate((leaves[:-1][within], ends[chunks], np.full(len(first), self._CUT, np.uint32)))
        b = np.concatenate((leaves[1:][within], following, first))
        occurrences = np.zeros(len(self.blocks), np.int64)
        np.add.at(occurrences, leaves, np.repeat(uses, sizes))
        self._next = _array("I", self._only_neighbours(a, b))
        self._previous = _array("I", self._only_neighbours(b, a))
        self._occurrences = bytearray(np.minimum(occurrences, 2).astype(np.uint8))
        self._is_shared = occurrences > 1
        self._begins_shared = self._is_shared & self._are_heads()

    def _only_neighbours(self, leaves: NDArray[np.uint32], others: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return for each leaf the one of *others* that stands beside it, if it is always the same."""
        real = leaves != self._CUT
        leaves, others = leaves[real], others[real]
        least = np.full(len(self.blocks), self._CUT, np.uint32)
        np.minimum.at(least, leaves, others)
        most = np.zeros(len(self.blocks), np.uint32)
        np.maximum.at(most, leaves, others)
        return np.where(least == most, least, np.uint32(self._CUT))

    def _are_heads(self) -> NDArray[np.bool_]:
        """Tell for each leaf whether it begins a part."""
        previous = np.frombuffer(self._previous, np.uint32)
        following = np.frombuffer(self._next, np.uint32)
        heads: NDArray[np.bool_] = previous == self._CUT
        others = np.flatnonzero(~heads)
        heads[others] = following[previous[others]] != others
        return heads

    def shared_heads(self) -> list[int]:
        """Return the first leaves of all shared parts, ascending by metadata block."""
        if not self._occurrences:
            return []
        return sorted(np.flatnonzero(self._begins_shared).tolist(), key=self.blocks.__getitem__)

    def pieces(self, number: int) -> Iterator[array[int] | int]:
        """Yield what a device consists of."""
        chunks = [self._chunks[chunk] for chunk in self._devices[number]]
        if sum(map(len, chunks)) < WORTH_ARRAYS:
            yield from super().pieces(number)
            return
        leaves = np.concatenate([np.frombuffer(chunk, np.uint32) for chunk in chunks])
        if not self._occurrences:
            yield _array("I", leaves)
            return
        is_shared = self._is_shared[leaves]
        own_begins = ~is_shared & np.append(True, is_shared[:-1])
        own_ends = iter(np.flatnonzero(~is_shared & np.append(is_shared[1:], True)).tolist())
        for begin in np.flatnonzero(self._begins_shared[leaves] | own_begins).tolist():
            if is_shared[begin]:
                yield int(leaves[begin])
            else:
                yield _array("I", leaves[begin : next(own_ends) + 1])


def _array(typecode: str, values: NDArray[Any]) -> array[int]:
    """Return numbers as the array that the plain code expects."""
    result = array(typecode)
    result.frombytes(values.tobytes())
    return result
