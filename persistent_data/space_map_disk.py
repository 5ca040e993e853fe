"""The space map of data blocks.  Its own blocks are metadata blocks, so changing it never changes itself.

Source: docs/format.md, "Data index tree"; docs/design.md, "Space maps".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from persistent_data.btree import BTree
from persistent_data.btree_spine import ValueType
from persistent_data.errors import CorruptMetadata, InvalidArgument, KeyNotFound, NoFreeBlock
from persistent_data.layout import INDEX_ENTRY, REF_COUNT_VALUE, SPACE_MAP_ROOT
from persistent_data.space_map_common import BitmapCounts, IndexEntry

if TYPE_CHECKING:
    from persistent_data.transaction_manager import TransactionManager

_NR_SLOTS = 64
_GOLDEN_PRIME = 4294967291
_SLOT_FACTOR = _GOLDEN_PRIME % _NR_SLOTS
"""The kernel takes the product modulo 2**32, then modulo 64: so of the factor, too, only the low bits matter."""


def slot_of(index: int) -> int:
    """Return the slot in which the entry of bitmap *index* is kept."""
    return index * _SLOT_FACTOR % _NR_SLOTS


class IndexTree:
    """Index entries in a tree, behind a write-back cache of 64 slots.

    The cache is the kernel's, hash included: which entry is written back when decides which blocks are allocated.
    """

    def __init__(self, tm: TransactionManager, root: int) -> None:
        self._tree = BTree(tm, [ValueType(INDEX_ENTRY.size)])
        self._slots: list[IndexEntry | None] = [None] * _NR_SLOTS
        self.root = root
        self._old_root = root
        self.changed = False

    def load(self, index: int, /) -> IndexEntry:
        number = index * _SLOT_FACTOR % _NR_SLOTS  # slot_of, without a call
        entry = self._slots[number]
        if entry is not None:
            if entry.index == index:
                return entry
            if entry.dirty:
                self._write_back(entry)
        entry = self._slots[number] = self._lookup(self.root, index)
        return entry

    def read(self, index: int, /) -> IndexEntry:
        entry = self._slots[index * _SLOT_FACTOR % _NR_SLOTS]
        return entry if entry is not None and entry.index == index else self._lookup(self.root, index)

    def save(self, entry: IndexEntry) -> None:
        self.changed = True
        number = slot_of(entry.index)
        other = self._slots[number]
        if other is not None and other.index != entry.index and other.dirty:
            self._write_back(other)
        entry.dirty = True
        self._slots[number] = entry

    def commit(self) -> int:
        if self.changed:
            for entry in self._slots:
                if entry is not None and entry.dirty:
                    self._write_back(entry)
            self.changed = False
        return self.root

    def committed_bitmap(self, index: int) -> int:
        return self._lookup(self._old_root, index).blocknr

    def note_commit(self) -> None:
        self._old_root = self.root

    def _write_back(self, entry: IndexEntry) -> None:
        # Clean first: the insertion below may come back here for another entry, never for this one again.
        entry.dirty = False
        self.root = self._tree.insert(self.root, [entry.index], entry.pack())

    def _lookup(self, root: int, index: int) -> IndexEntry:
        try:
            value = self._tree.lookup(root, [index])
        except KeyNotFound:
            raise CorruptMetadata(
                root, f"bitmap {index} is missing from the index of the data space map", number=22
            ) from None
        assert isinstance(value, bytes)
        return IndexEntry(index, *INDEX_ENTRY.unpack(value))


class DiskSpaceMap:
    """Reference counts of data blocks, with the promises of :class:`~persistent_data.space_map.SpaceMap`."""

    def __init__(self, counts: BitmapCounts, index: IndexTree) -> None:
        self._counts = counts
        self._index = index
        self._begin = 0
        self._net = 0

    @classmethod
    def create(cls, tm: TransactionManager, nr_blocks: int) -> Self:
        """Make a map of *nr_blocks* free blocks."""
        index_root = BTree(tm, [ValueType(INDEX_ENTRY.size)]).empty()
        overflow = BTree(tm, [ValueType(REF_COUNT_VALUE.size)])
        index = IndexTree(tm, index_root)
        self = cls(BitmapCounts(tm, index, overflow, overflow.empty(), 0, 0), index)
        self._counts.extend(nr_blocks)
        self.commit()
        return self

    @classmethod
    def open(cls, tm: TransactionManager, blob: bytes) -> Self:
        """Open the map whose root is in the first 32 bytes of *blob*."""
        nr_blocks, nr_allocated, bitmap_root, ref_count_root = SPACE_MAP_ROOT.unpack_from(blob)
        index = IndexTree(tm, bitmap_root)
        overflow = BTree(tm, [ValueType(REF_COUNT_VALUE.size)])
        return cls(BitmapCounts(tm, index, overflow, ref_count_root, nr_blocks, nr_allocated), index)

    @property
    def nr_blocks(self) -> int:
        """Blocks that are counted, as of the last commit: an extension shows after the next one."""
        return self._counts.old_nr_blocks

    @property
    def nr_free(self) -> int:
        """Free blocks of the last commit less what was allocated since, net.

        Blocks freed since then count, although they cannot be allocated before the next commit.
        """
        return self._counts.old_nr_blocks - self._counts.old_nr_allocated - self._net

    def get_count(self, block: int) -> int:
        return self._counts.get_count(block)

    def more_than_one(self, block: int) -> bool:
        return self._counts.get_count(block) > 1

    def is_free(self, block: int) -> bool:
        """Tell whether *block* has no reference at all; cheaper than its count."""
        return self._counts.is_free(block)

    def set_count(self, block: int, count: int) -> None:
        before = self._counts.nr_allocated
        self._counts.set_count(block, count)
        self._net += self._counts.nr_allocated - before

    def inc(self, begin: int, end: int) -> None:
        counts = self._counts
        before = counts.nr_allocated
        if end - begin != 1 or not counts.inc_one(begin):
            counts.inc(begin, end)
        self._net += counts.nr_allocated - before

    def dec(self, begin: int, end: int) -> None:
        counts = self._counts
        before = counts.nr_allocated
        if end - begin != 1 or not counts.dec_one(begin):
            counts.dec(begin, end)
        self._net += counts.nr_allocated - before

    def new_block(self) -> int:
        counts = self._counts
        block = counts.find_common_free(self._begin)
        if block < 0:
            block = counts.find_common_free(0)
            if block < 0:
                raise NoFreeBlock(f"no block among {counts.nr_blocks} is free both now and in the last commit")
        self._begin = block + 1
        if not counts.inc_one(block):
            counts.inc(block, block + 1)
        self._net += 1
        return block

    def extend(self, extra_blocks: int) -> None:
        if extra_blocks < 0:
            raise InvalidArgument(f"a space map cannot be extended by {extra_blocks} blocks")
        self._counts.extend(extra_blocks)

    def commit(self) -> None:
        self._counts.commit()
        self._counts.note_commit()
        self._net = 0

    def root_blob(self) -> bytes:
        counts = self._counts
        return SPACE_MAP_ROOT.pack(counts.nr_blocks, counts.nr_allocated, self._index.root, counts.ref_count_root)
