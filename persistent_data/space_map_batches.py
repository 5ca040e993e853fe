"""Space maps read as arrays: what :mod:`persistent_data.space_map_check` verifies, without a word on what is wrong.

Whatever it would report of a space map itself, whatever the severity, is
:class:`~persistent_data.block_batches.NotClean` here.  Comparing the counts is left to whoever did the counting.
"""

from __future__ import annotations

from struct import calcsize
from typing import TYPE_CHECKING, Any

import numpy as np

from persistent_data.batch_walk import BatchWalk
from persistent_data.block_batches import NotClean, require
from persistent_data.checksum import BITMAP_SALT
from persistent_data.layout import (
    BITMAP_HEADER_SIZE,
    BLOCK_HEADER,
    CODE_TO_COUNT,
    ENTRIES_PER_BITMAP,
    ENTRIES_PER_BYTE,
    OVERFLOW_COUNT,
    REF_COUNT_VALUE,
)
from persistent_data.node_batches import NodeBatches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bufio.device import Device
    from persistent_data.batch_walk import Level
    from persistent_data.block_batches import BlockBatches, Flags
    from persistent_data.space_map_check import Index

    Bytes = NDArray[np.uint8]

BITMAP_DTYPE = np.dtype(
    [
        (name, f"<u{calcsize('<' + code)}")
        for name, code in zip(("csum", "not_used", "blocknr"), BLOCK_HEADER.format.lstrip("<"), strict=True)
    ]
)
"""The header of a bitmap."""

_DECODED = np.array(
    [[CODE_TO_COUNT[byte >> 2 * i & 3] for i in range(ENTRIES_PER_BYTE)] for byte in range(256)], np.uint8
).view(np.uint32)[:, 0]
"""For each byte of a bitmap its four entries, a byte each."""


class Overflow:
    """The entries of an overflow tree, ascending by block.

    :ivar blocks: i8
    :ivar counts: u4, three or more
    :ivar levels: the nodes of the tree
    :raises NotClean: something is wrong with the tree or an entry
    """

    def __init__(self, device: Device, root: int, nr_metadata_blocks: int, nr_blocks: int) -> None:
        walk = BatchWalk(NodeBatches(device, REF_COUNT_VALUE.size), nr_metadata_blocks)
        parts = [nodes.entries() for nodes, _ in walk.leaves_in_key_order(root)]
        self.blocks = np.concatenate([keys for keys, _ in parts]).view(np.int64)
        self.counts = np.concatenate([counts for _, counts in parts])
        self.levels: list[Level] = walk.levels
        if ((self.blocks < 0) | (self.blocks >= nr_blocks) | (self.counts < OVERFLOW_COUNT)).any():
            raise NotClean(root)


class SpaceMapCounts:
    """The counts of a space map.

    Memory: a byte for each block, and no more of that is touched than the bitmaps have in use.

    :ivar nr_blocks: blocks whose references are counted
    :ivar entries: u1, one element more than *nr_blocks* or several: counts of three and more are 3; zeros at the end
    :ivar highest: the largest entry
    :param nr_allocated: from the space map's root
    :raises NotClean: something is wrong with a bitmap, or the hints of the index, the overflow tree or *nr_allocated*
        do not agree with it
    """

    def __init__(
        self, batches: BlockBatches, index: Index, overflow: Overflow, nr_blocks: int, nr_allocated: int
    ) -> None:
        self.nr_blocks = nr_blocks
        self.highest = 0
        self._index = index
        self._overflow = overflow
        self._nr_high = 0
        nr_bitmaps = len(index.bitmaps)
        self.entries: Bytes = np.zeros(nr_bitmaps * ENTRIES_PER_BITMAP + 1, np.uint8)
        self._rows = self.entries[:-1].reshape(nr_bitmaps, ENTRIES_PER_BITMAP)
        nr_used = self._read(batches)
        if nr_used != nr_allocated or self._nr_high != len(overflow.blocks):
            raise NotClean(0)
        if not (self.entries[overflow.blocks] == OVERFLOW_COUNT).all():
            raise NotClean(0)

    def _read(self, batches: BlockBatches) -> int:
        """Read the bitmaps and return how many blocks have a count."""
        bitmaps = np.array(self._index.bitmaps, np.int64)
        order = np.argsort(bitmaps)
        ascending = bitmaps[order]
        require(np.diff(ascending, prepend=-1) != 0, ascending)
        result = 0
        for begin, blocks, window_number in batches.fetch(ascending):
            n = len(blocks)
            window = batches.windows[window_number]
            header = window.rows[:n, :BITMAP_HEADER_SIZE].view(BITMAP_DTYPE)[:, 0]
            packed = window.rows[:n, BITMAP_HEADER_SIZE:]
            clean: Flags = window.checksums(n, BITMAP_SALT) == header["csum"]
            clean &= header["blocknr"] == blocks.view(np.uint64)
            clean &= header["not_used"] == 0
            require(clean, blocks)
            in_use = np.any(packed.view(np.uint64), axis=1).tolist()
            for place, number in enumerate(order[begin : begin + n].tolist()):
                nr_used = self._unpack(number, packed[place]) if in_use[place] else 0
                self._check(number, nr_used, int(blocks[place]))
                result += nr_used
        return result

    def _unpack(self, number: int, packed: Bytes) -> int:
        """Unpack the entries of bitmap *number*; return how many are not zero."""
        row = self._rows[number]
        # "clip" writes straight into the result; no index is out of range.
        np.take(_DECODED, packed, out=row.view(np.uint32), mode="clip")
        highest = int(row.max())
        self.highest = max(self.highest, highest)
        if highest == OVERFLOW_COUNT:
            self._nr_high += int(np.count_nonzero(row == OVERFLOW_COUNT))
        return int(np.count_nonzero(row))

    def _check(self, number: int, nr_used: int, block: int) -> None:
        """Compare bitmap *number*, which is in metadata block *block*, with its size and the hints of the index."""
        row = self._rows[number]
        nr_entries = min(ENTRIES_PER_BITMAP, self.nr_blocks - number * ENTRIES_PER_BITMAP)
        # Either is right: not every writer counts the entries beyond the end as free.
        nr_free = self._index.nr_free[number]
        hint = self._index.none_free_before[number]
        if (
            nr_free not in (nr_entries - nr_used, ENTRIES_PER_BITMAP - nr_used)
            or hint > ENTRIES_PER_BITMAP
            or row[: min(hint, nr_entries)].tobytes().find(0) >= 0
            or row[nr_entries:].any()
        ):
            raise NotClean(block)

    def total(self) -> int:
        """Return the sum of all counts."""
        low = int(self.entries.sum(dtype=np.int64)) - OVERFLOW_COUNT * self._nr_high
        return low + int(self._overflow.counts.sum(dtype=np.int64))

    def counts(self) -> NDArray[Any]:
        """Return all counts, and zeros at the end as in *entries*, in as few bytes each as hold the largest."""
        highest = int(self._overflow.counts.max(initial=OVERFLOW_COUNT))
        counts = self.entries.astype(np.min_scalar_type(highest))
        counts[self._overflow.blocks] = self._overflow.counts
        return counts
