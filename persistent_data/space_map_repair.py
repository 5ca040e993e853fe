"""Make both space maps of a device say what was counted, without touching a block that is in use.

Whatever changes is written to a block that nothing refers to, as in a commit; the caller's superblock then names the
new indices.  Until that is written the old maps are whole, wherever the work is cut off.  Which blocks are free is not
taken from the maps, which are wrong, but from the counts.

Source: docs/format.md, "Space maps".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.checksum import BITMAP_SALT, BTREE_NODE_SALT, INDEX_SALT, block_checksum
from persistent_data.errors import CorruptMetadata, NoFreeMetadataBlock
from persistent_data.layout import (
    BITMAP_HEADER_SIZE,
    BLOCKNR,
    BLOCKNR_OFFSET,
    CHECKSUM,
    ENTRIES_PER_BITMAP,
    INDEX_ENTRY,
    INDEX_HEADER_SIZE,
)
from persistent_data.node_check import CHECKSUM_ERROR, Node, check_node
from persistent_data.space_map_check import (
    bitmap_fault,
    decode_counts,
    encode_counts,
    none_free_before_is_too_high,
    nr_free_is_wrong,
)

if TYPE_CHECKING:
    from bufio.device import ReadableBuffer
    from persistent_data.block_reader import BlockReader
    from persistent_data.ref_counts import RefCounts
    from persistent_data.space_map_check import Index


class CountedMap:
    """A space map whose structure is sound, and the counts that it should have.

    :ivar expected: the references found by counting
    :ivar index: the index as it is on the device
    :ivar nr_allocated: from the map's root
    """

    __slots__ = ("expected", "index", "nr_allocated")

    def __init__(self, expected: RefCounts, index: Index, nr_allocated: int) -> None:
        self.expected = expected
        self.index = index
        self.nr_allocated = nr_allocated


class MapRepair:
    """What becomes of one map.

    :ivar bitmap_root: block of the index
    :ivar nr_allocated: blocks in use
    :ivar nr_leaks: blocks that were counted as in use and are not
    """

    __slots__ = ("bitmap_root", "nr_allocated", "nr_leaks")

    def __init__(self, bitmap_root: int, nr_allocated: int, nr_leaks: int) -> None:
        self.bitmap_root = bitmap_root
        self.nr_allocated = nr_allocated
        self.nr_leaks = nr_leaks


class Repair:
    """What has to be written, and what the superblock has to say once that is durable.

    :ivar writes: (metadata block, content), the bitmaps before the indices; none of the blocks is in use
    :ivar is_needed: false when both maps are right already
    """

    __slots__ = ("data", "is_needed", "metadata", "writes")

    def __init__(
        self, writes: list[tuple[int, ReadableBuffer]], data: MapRepair, metadata: MapRepair, is_needed: bool
    ) -> None:
        self.writes = writes
        self.data = data
        self.metadata = metadata
        self.is_needed = is_needed


def plan_repair(reader: BlockReader, data: CountedMap, metadata: CountedMap) -> Repair:
    """Find out what it takes to correct the counts of both maps, nr_free, none_free_before and nr_allocated.

    Only counts of blocks without references may be wrong.  Nothing is written.

    :raises CorruptMetadata: a part of the maps is not as it was when it was counted, or has several references
    :raises NoFreeMetadataBlock: there are too few blocks that nothing refers to
    :raises OSError: the device cannot be read
    """
    return _Planner(reader, data, metadata).plan()


class _Hints:
    """nr_free and none_free_before of every bitmap as they should be, and where those of the index will not do."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.entries: list[tuple[int, int]] = []
        self.wrong: set[int] = set()

    def add(self, counts: bytearray) -> None:
        """Take the counts of the next bitmap."""
        number = len(self.entries)
        nr_zero, first_zero = counts.count(0), counts.find(0)
        # As the kernel counts: entries behind the end of the map are free.
        nr_free = ENTRIES_PER_BITMAP - len(counts) + nr_zero
        self.entries.append((nr_free, first_zero if first_zero >= 0 else len(counts)))
        if nr_free_is_wrong(self._index.nr_free[number], nr_zero, len(counts)) or none_free_before_is_too_high(
            self._index.none_free_before[number], first_zero
        ):
            self.wrong.add(number)


class _Planner:
    """One plan in the making."""

    def __init__(self, reader: BlockReader, data: CountedMap, metadata: CountedMap) -> None:
        self._reader = reader
        self._data = data
        self._metadata = metadata
        self._before = metadata.expected.counts
        self._counts = bytearray(self._before)
        """References to metadata blocks once the superblock names the new indices."""
        self._next_free = 0
        self._bitmaps: list[tuple[int, ReadableBuffer]] = []
        self._indices: list[tuple[int, ReadableBuffer]] = []

    def plan(self) -> Repair:
        data = self._plan_data()
        metadata = self._plan_metadata()
        is_needed = (
            bool(self._bitmaps or self._indices)
            or data.nr_allocated != self._data.nr_allocated
            or metadata.nr_allocated != self._metadata.nr_allocated
        )
        return Repair(self._bitmaps + self._indices, data, metadata, is_needed)

    def _move(self, block: int) -> int:
        """Find another place for *block*."""
        if self._before[block] != 1:
            raise CorruptMetadata(block, "a part of a space map has several references")
        # Free before, not just after: what the old superblock leads to stays as it is.
        place = self._before.find(0, self._next_free)
        if place < 0:
            raise NoFreeMetadataBlock("there are too few free metadata blocks to write corrected space maps to")
        self._next_free = place + 1
        self._counts[block] = 0
        self._counts[place] = 1
        return place

    def _read_bitmap(self, block: int) -> bytearray:
        content = bytearray(self._reader.read(block))
        fault = bitmap_fault(content, block)
        if fault is not None:
            raise CorruptMetadata(block, fault.rule)
        return content

    def _plan_data(self) -> MapRepair:
        expected, index = self._data.expected, self._data.index
        hints = _Hints(index)
        places: dict[int, int] = {}
        nr_leaks = 0
        for number, bitmap in enumerate(index.bitmaps):
            counts = _counts_of(expected.counts, number)
            hints.add(counts)
            content = self._read_bitmap(bitmap)
            codes = encode_counts(counts)
            if content[BITMAP_HEADER_SIZE:] != codes:
                nr_leaks += _nr_leaks(content, counts)
                content[BITMAP_HEADER_SIZE:] = codes
                places[number] = self._move(bitmap)
                self._bitmaps.append((places[number], _sealed(content, places[number], BITMAP_SALT)))
        root = index.path[-1]
        if places or hints.wrong:
            root = self._shadow_index(root, places, hints, is_root=True)
        return MapRepair(root, expected.nr_blocks - expected.counts.count(0), nr_leaks)

    def _shadow_index(self, block: int, places: dict[int, int], hints: _Hints, *, is_root: bool) -> int:
        """Move what has to change of the index tree below *block*; return where *block* is now."""
        content = bytearray(self._reader.read(block))
        node, faults = check_node(content, block, INDEX_ENTRY.size, is_root)
        if node is None:
            raise CorruptMetadata(block, faults[0].rule)
        if node.is_leaf:
            is_changed = self._update_leaf(node, content, places, hints)
        else:
            is_changed = False
            for i, child in enumerate(node.numbers()):
                place = self._shadow_index(child, places, hints, is_root=False)
                if place != child:
                    BLOCKNR.pack_into(content, node.values_offset + i * BLOCKNR.size, place)
                    is_changed = True
        if not is_changed:
            return block
        place = self._move(block)
        self._indices.append((place, _sealed(content, place, BTREE_NODE_SALT)))
        return place

    @staticmethod
    def _update_leaf(node: Node, content: bytearray, places: dict[int, int], hints: _Hints) -> bool:
        if places.keys().isdisjoint(node.keys) and hints.wrong.isdisjoint(node.keys):
            return False
        for i, number in enumerate(node.keys):
            offset = node.values_offset + i * INDEX_ENTRY.size
            bitmap = INDEX_ENTRY.unpack_from(content, offset)[0]
            INDEX_ENTRY.pack_into(content, offset, places.get(number, bitmap), *hints.entries[number])
        return True

    def _plan_metadata(self) -> MapRepair:
        index = self._metadata.index
        root = index.path[-1]
        contents = [self._read_bitmap(bitmap) for bitmap in index.bitmaps]
        nr_leaks = 0
        hints = _Hints(index)
        for number, content in enumerate(contents):
            counts = _counts_of(self._before, number)
            hints.add(counts)
            nr_leaks += _nr_leaks(content, counts)
        places: dict[int, int] = {}
        index_place = root
        if hints.wrong or self._dirty(contents, places):
            index_place = self._move(root)
        # Each move changes counts, perhaps in a bitmap that was right until then.  At last there are no more bitmaps.
        while dirty := self._dirty(contents, places):
            for number in dirty:
                places[number] = self._move(index.bitmaps[number])
        for number, place in places.items():
            contents[number][BITMAP_HEADER_SIZE:] = encode_counts(_counts_of(self._counts, number))
            self._bitmaps.append((place, _sealed(contents[number], place, BITMAP_SALT)))
        if index_place != root:
            self._indices.append((index_place, self._new_index(root, index_place, places)))
        return MapRepair(index_place, len(self._counts) - self._counts.count(0), nr_leaks)

    def _dirty(self, contents: list[bytearray], places: dict[int, int]) -> list[int]:
        """Return the numbers of bitmaps that have to change and have not been moved."""
        return [
            number
            for number, content in enumerate(contents)
            if number not in places and content[BITMAP_HEADER_SIZE:] != encode_counts(_counts_of(self._counts, number))
        ]

    def _new_index(self, root: int, place: int, places: dict[int, int]) -> bytearray:
        content = bytearray(self._reader.read(root))
        if CHECKSUM.unpack_from(content)[0] != block_checksum(content, INDEX_SALT):
            raise CorruptMetadata(root, CHECKSUM_ERROR)
        index = self._metadata.index
        hints = _Hints(index)
        for number, bitmap in enumerate(index.bitmaps):
            hints.add(_counts_of(self._counts, number))
            offset = INDEX_HEADER_SIZE + number * INDEX_ENTRY.size
            INDEX_ENTRY.pack_into(content, offset, places.get(number, bitmap), *hints.entries[number])
        return _sealed(content, place, INDEX_SALT)


def _counts_of(counts: bytearray, number: int) -> bytearray:
    """Return the counts that bitmap *number* stands for."""
    return counts[number * ENTRIES_PER_BITMAP : (number + 1) * ENTRIES_PER_BITMAP]


def _nr_leaks(bitmap: bytearray, counts: bytearray) -> int:
    """Return how many blocks *bitmap* has in use beyond those that are."""
    return counts.count(0) - decode_counts(bitmap[BITMAP_HEADER_SIZE:])[: len(counts)].count(0)


def _sealed(content: bytearray, place: int, salt: int) -> bytearray:
    """Give *content* the number and the checksum that it needs at block *place*."""
    BLOCKNR.pack_into(content, BLOCKNR_OFFSET, place)
    CHECKSUM.pack_into(content, 0, block_checksum(content, salt))
    return content
