"""The space map of metadata blocks, which counts the blocks that it is made of.

Changing a count may allocate a block (to shadow a bitmap), and that changes a count.  The kernel's way out, kept here
to the letter because it decides every block number: while one change is under way, further changes are only queued;
allocations take the next block behind a cursor, so that none is given out twice before its count is set.

While the map is created or extended it cannot count at all: then blocks are given out one after the other
(*bootstrapping*), and counted afterwards.  Source: docs/design.md, "Space maps".
"""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING

from persistent_data.block_manager import METADATA_INDEX
from persistent_data.btree import BTree
from persistent_data.btree_spine import ValueType
from persistent_data.errors import CorruptMetadata, InvalidArgument, MetadataError, NoFreeMetadataBlock
from persistent_data.layout import (
    INDEX_ENTRY,
    INDEX_HEADER_SIZE,
    MAX_METADATA_BITMAPS,
    MAX_METADATA_BLOCKS,
    REF_COUNT_VALUE,
    SPACE_MAP_ROOT,
)
from persistent_data.space_map_common import BitmapCounts, IndexEntry, nr_bitmaps

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistent_data.transaction_manager import TransactionManager

_MAX_QUEUED = 1024


class IndexBlock:
    """All index entries, in memory; one block on disk holds them."""

    def __init__(self, tm: TransactionManager, root: int, entries: list[IndexEntry]) -> None:
        self._tm = tm
        self.root = root
        self._entries = entries
        self._old_bitmaps = [entry.blocknr for entry in entries]
        self.changed = False
        self.load = self.read = self._entries.__getitem__

    @classmethod
    def create(cls, tm: TransactionManager) -> IndexBlock:
        """Allocate the block, with no entry in it."""
        return cls(tm, tm.new_block(METADATA_INDEX).block, [])

    @classmethod
    def open(cls, tm: TransactionManager, root: int, nr_entries: int) -> IndexBlock:
        """Read the first *nr_entries* entries of block *root*."""
        data = tm.read_block(root, METADATA_INDEX).data[INDEX_HEADER_SIZE:]
        fields = INDEX_ENTRY.iter_unpack(data[: nr_entries * INDEX_ENTRY.size])
        return cls(tm, root, [IndexEntry(index, *entry) for index, entry in enumerate(fields)])

    def save(self, entry: IndexEntry) -> None:
        self.changed = True
        self._entries[entry.index : entry.index + 1] = [entry]

    def commit(self) -> int:
        if self.changed:
            view, _ = self._tm.shadow_block(self.root, METADATA_INDEX)
            # Only now: shadowing the block has changed counts, and with them entries.
            self.root = view.block
            packed = b"".join(entry.pack() for entry in self._entries)
            view.data[INDEX_HEADER_SIZE : INDEX_HEADER_SIZE + len(packed)] = packed
            self.changed = False
        return self.root

    def committed_bitmap(self, index: int) -> int:
        return self._old_bitmaps[index]

    def note_commit(self) -> None:
        self._old_bitmaps = [entry.blocknr for entry in self._entries]


class MetadataSpaceMap:
    """Reference counts of metadata blocks, with the promises of :class:`~persistent_data.space_map.SpaceMap`.

    An object of this class is made first, then the transaction manager that uses it, then :meth:`create` or
    :meth:`open` gives it its content.
    """

    _counts: BitmapCounts
    _index: IndexBlock

    def __init__(self) -> None:
        self._begin = 0
        self._bootstrapping = False
        self._bootstrap_end = 0
        self._busy = False
        self._queue: deque[tuple[Callable[[int, int], None], int, int]] = deque()
        self._taken = 0
        self._threshold: tuple[int, Callable[[], None]] | None = None
        self._threshold_passed = False

    def create(self, tm: TransactionManager, nr_blocks: int, first_block: int) -> None:
        """Make a map of *nr_blocks* blocks, at most the format's maximum; those below *first_block* are in use."""
        self._begin = first_block
        self._bootstrap_end = min(nr_blocks, MAX_METADATA_BLOCKS)
        self._bootstrapping = True
        self._index = IndexBlock.create(tm)
        overflow = BTree(tm, [ValueType(REF_COUNT_VALUE.size)])
        self._counts = BitmapCounts(tm, self._index, overflow, overflow.empty(), 0, 0)
        self._counts.extend(self._bootstrap_end)
        self._bootstrapping = False
        self._queue.append((self._counts.inc, 0, self._begin))
        self._drain()
        self.commit()

    def open(self, tm: TransactionManager, blob: bytes) -> None:
        """Open the map whose root is in the first 32 bytes of *blob*.

        :raises CorruptMetadata: the root or the index block cannot be right
        """
        nr_blocks, nr_allocated, bitmap_root, ref_count_root = SPACE_MAP_ROOT.unpack_from(blob)
        if nr_blocks > MAX_METADATA_BLOCKS:
            raise CorruptMetadata(None, f"metadata space map of {nr_blocks} blocks, more than {MAX_METADATA_BLOCKS}")
        self._index = IndexBlock.open(tm, bitmap_root, nr_bitmaps(nr_blocks))
        overflow = BTree(tm, [ValueType(REF_COUNT_VALUE.size)])
        self._counts = BitmapCounts(tm, self._index, overflow, ref_count_root, nr_blocks, nr_allocated)

    @property
    def nr_blocks(self) -> int:
        """Blocks that are counted; an extension shows at once."""
        return self._counts.nr_blocks

    @property
    def nr_free(self) -> int:
        """Free blocks of the last commit less all allocations since; what was freed meanwhile does not count."""
        return self._counts.old_nr_blocks - self._counts.old_nr_allocated - self._taken

    # Counts

    def get_count(self, block: int) -> int:
        if self._bootstrapping:
            return 1 if block < self._begin else 0
        return self._counts.get_count(block) + self._pending(block)

    def more_than_one(self, block: int) -> bool:
        if self._bootstrapping:
            return False
        if not self._queue:
            code = self._counts.get_code(block)
            return code & 1 == 1
        pending = self._pending(block)
        if pending > 1 or self._counts.more_than_two(block):
            return True
        return self._counts.get_count(block) + pending > 1

    def set_count(self, block: int, count: int) -> None:
        if self._busy:
            raise InvalidArgument("counts of metadata blocks cannot be set while another count is being changed")
        self._busy = True
        try:
            self._counts.set_count(block, count)
            self._drain()
        finally:
            self._busy = False

    def inc(self, begin: int, end: int) -> None:
        if self._bootstrapping or self._busy:
            self._enqueue(self._counts.inc, begin, end)
        elif end - begin != 1 or not self._counts.inc_one(begin):
            self._do(self._counts.inc, begin, end)

    def dec(self, begin: int, end: int) -> None:
        if self._bootstrapping or self._busy:
            self._enqueue(self._counts.dec, begin, end)
        elif end - begin != 1 or not self._counts.dec_one(begin):
            self._do(self._counts.dec, begin, end)

    def _do(self, change: Callable[[int, int], None], begin: int, end: int) -> None:
        self._busy = True
        try:
            change(begin, end)
            self._drain()
        finally:
            self._busy = False

    def _enqueue(self, change: Callable[[int, int], None], begin: int, end: int) -> None:
        if len(self._queue) >= _MAX_QUEUED:
            raise MetadataError(errno.ENOMEM, "too many changes to the metadata space map at once")
        self._queue.append((change, begin, end))

    def _drain(self) -> None:
        was_busy = self._busy
        self._busy = True
        try:
            while self._queue:
                change, begin, end = self._queue[0]
                change(begin, end)
                # Not before: while it is under way it still counts as pending.
                self._queue.popleft()
        finally:
            self._busy = was_busy

    def _pending(self, block: int) -> int:
        inc = self._counts.inc
        return sum((1 if change == inc else -1) for change, begin, end in self._queue if begin <= block < end)

    # Allocation

    def new_block(self) -> int:
        if self._bootstrapping:
            if self._begin >= self._bootstrap_end:
                raise NoFreeMetadataBlock(f"{self._bootstrap_end} metadata blocks are too few for their own space map")
            self._begin += 1
            return self._begin - 1
        block = self._find_free()
        self._begin = block + 1
        self.inc(block, block + 1)
        self._taken += 1
        if self._threshold is not None:
            self._watch_threshold(self._threshold)
        return block

    def replace(self, block: int) -> int | None:
        """Allocate a block and drop the only reference to *block*, or do nothing at all and return None.

        *block* was in use at the last commit.

        None means that *block* is shared, or that it is not as easy as that.  Otherwise the effect is that of
        ``more_than_one``, ``new_block`` and ``dec`` one after the other.
        """
        if self._busy or self._bootstrapping:
            return None
        new = self._counts.swap(block, self._begin)
        if new < 0:
            return None
        self._begin = new + 1
        self._taken += 1
        if self._threshold is not None:
            self._watch_threshold(self._threshold)
        return new

    def _find_free(self) -> int:
        block = self._counts.find_common_free(self._begin)
        if block < 0:
            block = self._counts.find_common_free(0)
            if block < 0:
                raise NoFreeMetadataBlock(f"no free metadata block: all {self.nr_blocks} are in use")
        return block

    def _watch_threshold(self, threshold: tuple[int, Callable[[], None]]) -> None:
        passed = self.nr_free <= threshold[0]
        newly = passed and not self._threshold_passed
        self._threshold_passed = passed
        if newly:
            threshold[1]()

    def register_threshold(self, nr_free: int, callback: Callable[[], None]) -> None:
        """Call *callback* when an allocation leaves *nr_free* free blocks or fewer, where there were more before."""
        self._threshold = (nr_free, callback)
        self._threshold_passed = False

    # Size and commit

    def extend(self, extra_blocks: int) -> None:
        """Count that many more; the blocks that this takes come from the new area.

        :raises InvalidArgument: more than the format can count
        """
        total = self._counts.nr_blocks + extra_blocks
        if extra_blocks < 0 or nr_bitmaps(total) > MAX_METADATA_BITMAPS:
            raise InvalidArgument(f"the metadata space map counts at most {MAX_METADATA_BLOCKS} blocks, not {total}")
        mark = self._begin = self._counts.nr_blocks
        self._bootstrap_end = total
        self._bootstrapping = True
        try:
            self._counts.extend(extra_blocks)
            while True:
                self._enqueue(self._counts.inc, mark, self._begin)
                mark = self._begin
                self._drain()
                self._counts.commit()
                if self._begin == mark:
                    break
        finally:
            self._bootstrapping = False

    def commit(self) -> None:
        self._counts.commit()
        self._counts.note_commit()
        self._taken = 0

    def root_blob(self) -> bytes:
        counts = self._counts
        return SPACE_MAP_ROOT.pack(counts.nr_blocks, counts.nr_allocated, self._index.root, counts.ref_count_root)
