"""Reference counts on disk: two bits a block in bitmaps, an index of the bitmaps, larger counts in an overflow tree.

Both kinds of space map are made of a :class:`BitmapCounts`; they differ in where the index is kept and in what happens
when a change to the counts needs blocks itself.  Source: docs/format.md, "Space maps"; the order of every allocation is
the kernel's (docs/design.md, "Space maps").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from persistent_data.block_manager import BITMAP
from persistent_data.errors import CorruptMetadata, InvalidArgument, KeyNotFound
from persistent_data.layout import (
    BITMAP_HEADER_SIZE,
    ENTRIES_PER_BITMAP,
    ENTRIES_PER_BYTE,
    INDEX_ENTRY,
    OVERFLOW_COUNT,
    REF_COUNT_VALUE,
)

if TYPE_CHECKING:
    from persistent_data.block_manager import View
    from persistent_data.btree import BTree
    from persistent_data.btree_node import Node
    from persistent_data.transaction_manager import TransactionManager

    class IndexStore(Protocol):
        """Where the index entries are: in an index block, or in a tree behind a small cache."""

        changed: bool

        def load(self, index: int, /) -> IndexEntry:
            """Return the entry of bitmap *index*.

            Whoever changes it in place, before anything else happens, sets its ``dirty`` and the store's ``changed``.
            May make room for it, which changes the transaction: for calls that change something.
            """

        def read(self, index: int, /) -> IndexEntry:
            """Return the entry of bitmap *index*, changing nothing whatsoever."""

        def save(self, entry: IndexEntry) -> None:
            """Replace the entry of a bitmap."""

        def commit(self) -> int:
            """Write what changed; return the index block or the root of the tree."""

        def committed_bitmap(self, index: int) -> int:
            """Return the block of bitmap *index* as of the last commit."""

        def note_commit(self) -> None:
            """Make the present state the last commit's."""


class IndexEntry:
    """Where bitmap *index* is, and what is known of it without looking; see docs/format.md, "Index entry".

    ``dirty`` is for an index that is written entry by entry: changed since that was last done.
    """

    __slots__ = ("blocknr", "dirty", "index", "none_free_before", "nr_free")

    def __init__(self, index: int, blocknr: int, nr_free: int, none_free_before: int) -> None:
        self.index = index
        self.blocknr = blocknr
        self.nr_free = nr_free
        self.none_free_before = none_free_before
        self.dirty = False

    def copy(self) -> IndexEntry:
        """Return another object with the same content."""
        return IndexEntry(self.index, self.blocknr, self.nr_free, self.none_free_before)

    def pack(self) -> bytes:
        """Return the entry as it stands on disk."""
        return INDEX_ENTRY.pack(self.blocknr, self.nr_free, self.none_free_before)


# The two bits of an entry as they stand in their byte: the high bit of the count is the lower one.
_FREE, _TWO, _ONE, _MANY = range(4)
_ALL_ONE = _ONE * 0b01010101
_COUNTS = (0, 2, 1, OVERFLOW_COUNT)
_CODES = (_FREE, _ONE, _TWO, _MANY)
_MASK_32_BITS = 0xFFFFFFFF

_IS_BUSY = [bytes(1 if byte >> shift & 3 else 0 for byte in range(256)) for shift in (0, 2, 4, 6)]
"""For each entry of a byte, a translation from the byte to whether that entry is in use."""


def nr_bitmaps(nr_blocks: int) -> int:
    """Return how many bitmaps it takes to count *nr_blocks* blocks."""
    return -(-nr_blocks // ENTRIES_PER_BITMAP)


class BitmapCounts:
    """The counts of blocks ``0 .. nr_blocks - 1``, and the search for one that is free.

    ``nr_allocated`` is the number of blocks with a count above zero.
    """

    def __init__(
        self,
        tm: TransactionManager,
        index: IndexStore,
        overflow: BTree,
        ref_count_root: int,
        nr_blocks: int,
        nr_allocated: int,
    ) -> None:
        self.tm = tm
        self.index = index
        self._load = index.load
        self.nr_blocks = nr_blocks
        self.nr_allocated = nr_allocated
        self.ref_count_root = ref_count_root
        self._overflow = overflow
        self._peek = tm.bm.peek
        self._client = tm.bm.client
        self._exclusive = tm.exclusive
        self.old_nr_blocks = nr_blocks
        self.old_nr_allocated = nr_allocated
        self._busy_index = -1
        self._busy = bytearray()
        self._old_busy = bytearray()
        self._last_bitmap: View | None = None
        self._last_index = -1

    # Reading

    def get_count(self, block: int) -> int:
        """Return the count of *block*; :raises InvalidArgument: it is beyond the map."""
        code = self.get_code(block)
        return self._overflow_count(block) if code == _MANY else _COUNTS[code]

    def more_than_two(self, block: int) -> bool:
        """Tell whether the count of *block* is in the overflow tree."""
        return self.get_code(block) == _MANY

    def get_code(self, block: int) -> int:
        """Return the two bits of *block* as they stand in the bitmap."""
        self.check_range(block, block + 1)
        index, bit = divmod(block, ENTRIES_PER_BITMAP)
        blocknr = self.index.read(index).blocknr
        buffer = self._peek(blocknr)
        if buffer is not None and buffer.aux is not None and buffer.aux.validator is BITMAP:
            buffer.referenced = self._client.epoch
            data: memoryview = buffer.data
        else:
            data = self.tm.read_block(blocknr, BITMAP).data
        return data[BITMAP_HEADER_SIZE + (bit >> 2)] >> (bit & 3) * 2 & 3

    def is_free(self, block: int) -> bool:
        """Tell whether the count of *block* is zero.  As ``get_code``, but quick for many blocks of one bitmap."""
        index = block // ENTRIES_PER_BITMAP
        view = self._last_bitmap
        if view is None or index != self._last_index or view.buffer.aux is not view or not 0 <= block < self.nr_blocks:
            self.check_range(block, block + 1)
            view = self.tm.read_block(self.index.read(index).blocknr, BITMAP)
            # It stays the right one for as long as it is cached: a bitmap that is shadowed is moved, never copied.
            self._last_bitmap = view
            self._last_index = index
        bit = block - index * ENTRIES_PER_BITMAP
        return not view.data[BITMAP_HEADER_SIZE + (bit >> 2)] >> (bit & 3) * 2 & 3

    def check_range(self, begin: int, end: int) -> None:
        """:raises InvalidArgument: unless ``[begin, end)`` is a range of counted blocks"""
        if not 0 <= begin <= end <= self.nr_blocks:
            raise InvalidArgument(
                f"blocks [{begin}..{end}] are not within the {self.nr_blocks} blocks of the space map"
            )

    def _overflow_count(self, block: int) -> int:
        try:
            value = self._overflow.lookup(self.ref_count_root, [block])
        except KeyNotFound:
            raise CorruptMetadata(
                self.ref_count_root, f"count of block {block} is missing from the overflow tree", number=22
            ) from None
        assert isinstance(value, bytes)
        count: int = REF_COUNT_VALUE.unpack(value)[0]
        return count

    # Searching

    def find_common_free(self, begin: int) -> int:
        """Return the first block from *begin* on that is free both now and in the last commit, -1 if there is none.

        The hints of the index are trusted as the kernel trusts them: a bitmap said to be full is passed over, and
        nothing is looked for below ``none_free_before``.
        """
        index, bit = divmod(begin, ENTRIES_PER_BITMAP)
        count = nr_bitmaps(self.nr_blocks)
        while index < count:
            entry = self._load(index)
            if entry.nr_free:
                if index != self._busy_index:
                    self._make_busy(index, entry.blocknr)
                first = entry.none_free_before
                found = self._busy.find(0, bit if bit > first else first)
                if found >= 0:
                    return index * ENTRIES_PER_BITMAP + found
            index += 1
            bit = 0
        return -1

    def _make_busy(self, index: int, blocknr: int) -> None:
        """Spread bitmap *index* into one byte a block: 1 if it is in use now or was at the last commit, else 0."""
        nr_entries = min(ENTRIES_PER_BITMAP, self.nr_blocks - index * ENTRIES_PER_BITMAP)
        busy = self._spread(blocknr, nr_entries)
        if index >= nr_bitmaps(self.old_nr_blocks):
            self._old_busy = bytearray(nr_entries)
        else:
            old = self.index.committed_bitmap(index)
            self._old_busy = bytearray(busy) if old == blocknr else self._spread(old, nr_entries)
            if old != blocknr:
                either = int.from_bytes(busy, "little") | int.from_bytes(self._old_busy, "little")
                busy[:] = either.to_bytes(nr_entries, "little")
        self._busy = busy
        self._busy_index = index

    def _spread(self, blocknr: int, nr_entries: int) -> bytearray:
        spread = bytearray(nr_entries + 3 & ~3)
        first = BITMAP_HEADER_SIZE
        packed = bytes(self.tm.read_block(blocknr, BITMAP).data[first : first + len(spread) // ENTRIES_PER_BYTE])
        for entry, table in enumerate(_IS_BUSY):
            spread[entry::ENTRIES_PER_BYTE] = packed.translate(table)
        del spread[nr_entries:]
        return spread

    # Changing

    def swap(self, block: int, begin: int) -> int:
        """Find a free block from *begin* on, give it a reference, and take the only one of *block*.

        Only if all of that needs no other block at all and no other bitmap than the one under the cursor is searched;
        else nothing is done and -1 returned.  This is ``find_common_free``, ``inc_one`` and ``dec_one`` in one, for the
        block that every shadowing replaces: one of the last commit, so that nobody can be given it before the next.
        """
        new_index = begin // ENTRIES_PER_BITMAP
        if new_index != self._busy_index or block >= self.nr_blocks:
            return -1
        exclusive = self._exclusive
        new_entry = self._load(new_index)
        if new_entry.blocknr not in exclusive or not new_entry.nr_free:
            return -1
        new_buffer = self._peek(new_entry.blocknr)
        index = block // ENTRIES_PER_BITMAP
        if index == new_index:
            entry, buffer = new_entry, new_buffer
        else:
            entry = self._load(index)
            if entry.blocknr not in exclusive:
                return -1
            buffer = self._peek(entry.blocknr)
        if buffer is None or new_buffer is None:
            return -1
        data = buffer.data
        bit = block - index * ENTRIES_PER_BITMAP
        at = BITMAP_HEADER_SIZE + (bit >> 2)
        shift = (bit & 3) * 2
        byte = data[at]
        if byte >> shift & 3 != _ONE:
            return -1
        first = new_entry.none_free_before
        start = begin - new_index * ENTRIES_PER_BITMAP
        new_bit = self._busy.find(0, start if start > first else first)
        if new_bit < 0:
            return -1
        data[at] = byte & ~(3 << shift)
        new_buffer.data[BITMAP_HEADER_SIZE + (new_bit >> 2)] |= _ONE << (new_bit & 3) * 2
        self._busy[new_bit] = 1
        if first == new_bit:
            new_entry.none_free_before = new_bit + 1
        if bit < entry.none_free_before:
            entry.none_free_before = bit
        # One more and one less: nr_allocated stays as it is.
        epoch = self._client.epoch
        if index != new_index:
            new_entry.nr_free -= 1
            new_entry.dirty = True
            entry.nr_free = entry.nr_free + 1 & _MASK_32_BITS
            new_buffer.referenced = epoch
            if not new_buffer.dirty:
                self._client.mark_dirty(new_buffer)
        entry.dirty = True
        self.index.changed = True
        buffer.referenced = epoch
        if not buffer.dirty:
            self._client.mark_dirty(buffer)
        return new_index * ENTRIES_PER_BITMAP + new_bit

    def inc_one(self, block: int) -> bool:
        """Add a reference to *block* if that needs no other block at all; False if it does, with nothing done."""
        index = block // ENTRIES_PER_BITMAP
        entry = self._load(index)
        if entry.blocknr not in self._exclusive or block >= self.nr_blocks:
            return False
        buffer = self._peek(entry.blocknr)
        if buffer is None:
            return False
        data = buffer.data
        bit = block - index * ENTRIES_PER_BITMAP
        at = BITMAP_HEADER_SIZE + (bit >> 2)
        shift = (bit & 3) * 2
        byte = data[at]
        code = byte >> shift & 3
        if code == _FREE:
            self._took(bit, entry)
            data[at] = byte | _ONE << shift
        elif code == _ONE:
            data[at] = byte ^ 3 << shift
        else:
            return False
        entry.dirty = self.index.changed = True
        buffer.referenced = self._client.epoch
        if not buffer.dirty:
            self._client.mark_dirty(buffer)
        return True

    def dec_one(self, block: int) -> bool:
        """Take a reference from *block* if that needs no other block at all; False if it does, with nothing done."""
        index = block // ENTRIES_PER_BITMAP
        entry = self._load(index)
        if entry.blocknr not in self._exclusive or block >= self.nr_blocks:
            return False
        buffer = self._peek(entry.blocknr)
        if buffer is None:
            return False
        data = buffer.data
        bit = block - index * ENTRIES_PER_BITMAP
        at = BITMAP_HEADER_SIZE + (bit >> 2)
        shift = (bit & 3) * 2
        byte = data[at]
        code = byte >> shift & 3
        if code == _ONE:
            # As _gave_back; written out because every removal of a mapping does this for its data block.
            self.nr_allocated -= 1
            entry.nr_free = entry.nr_free + 1 & _MASK_32_BITS
            if bit < entry.none_free_before:
                entry.none_free_before = bit
            if index == self._busy_index:
                self._busy[bit] = self._old_busy[bit]
            data[at] = byte & ~(3 << shift)
        elif code == _TWO:
            data[at] = byte ^ 3 << shift
        else:
            return False
        entry.dirty = self.index.changed = True
        buffer.referenced = self._client.epoch
        if not buffer.dirty:
            self._client.mark_dirty(buffer)
        return True

    def inc(self, begin: int, end: int) -> None:
        """Add a reference to each block of ``[begin, end)``, one bitmap after the other."""
        self.check_range(begin, end)
        while begin < end:
            index, bit = divmod(begin, ENTRIES_PER_BITMAP)
            chunk_end = min(end, begin - bit + ENTRIES_PER_BITMAP)
            self._inc_chunk(index, bit, bit + chunk_end - begin)
            begin = chunk_end

    def dec(self, begin: int, end: int) -> None:
        """Take a reference from each block of ``[begin, end)``, one bitmap after the other.

        :raises InvalidArgument: one of them has none
        """
        self.check_range(begin, end)
        while begin < end:
            index, bit = divmod(begin, ENTRIES_PER_BITMAP)
            chunk_end = min(end, begin - bit + ENTRIES_PER_BITMAP)
            self._dec_chunk(index, bit, bit + chunk_end - begin)
            begin = chunk_end

    def _shadow_bitmap(self, entry: IndexEntry) -> memoryview:
        view, _ = self.tm.shadow_block(entry.blocknr, BITMAP)
        entry.blocknr = view.block
        return view.data

    def _inc_chunk(self, index: int, bit: int, end: int) -> None:
        # A copy: searches made by allocations in here must still see the entry as it was.
        entry = self._load(index).copy()
        data = self._shadow_bitmap(entry)
        whole = self._whole_bytes(data, bit, end, _FREE)
        leaf: Node | None = None
        while bit < end:
            if whole is not None and bit == whole[0]:
                count = whole[1] - bit
                data[BITMAP_HEADER_SIZE + bit // 4 : BITMAP_HEADER_SIZE + whole[1] // 4] = bytes([_ALL_ONE]) * (
                    count // 4
                )
                self.nr_allocated += count
                entry.nr_free = entry.nr_free - count & _MASK_32_BITS
                if bit <= entry.none_free_before < whole[1]:
                    entry.none_free_before = whole[1]
                if index == self._busy_index:
                    self._busy[bit : whole[1]] = b"\1" * count
                bit = whole[1]
                continue
            at = BITMAP_HEADER_SIZE + (bit >> 2)
            shift = (bit & 3) * 2
            code = data[at] >> shift & 3
            block = index * ENTRIES_PER_BITMAP + bit
            if code == _FREE:
                data[at] |= _ONE << shift
                self._took(bit, entry)
            elif code == _ONE:
                data[at] ^= 3 << shift
            elif code == _TWO:
                leaf = None
                data[at] |= _MANY << shift
                self._insert_overflow(block, OVERFLOW_COUNT)
            else:
                leaf = self._overflow_leaf(block, leaf)
                self._add_to_overflow(leaf, block, 1)
            bit += 1
        self.index.save(entry)

    def _dec_chunk(self, index: int, bit: int, end: int) -> None:
        entry = self._load(index).copy()
        data = self._shadow_bitmap(entry)
        whole = self._whole_bytes(data, bit, end, _ALL_ONE)
        leaf: Node | None = None
        while bit < end:
            if whole is not None and bit == whole[0]:
                count = whole[1] - bit
                data[BITMAP_HEADER_SIZE + bit // 4 : BITMAP_HEADER_SIZE + whole[1] // 4] = bytes(count // 4)
                self.nr_allocated -= count
                entry.nr_free = entry.nr_free + count & _MASK_32_BITS
                entry.none_free_before = min(entry.none_free_before, bit)
                if index == self._busy_index:
                    self._busy[bit : whole[1]] = self._old_busy[bit : whole[1]]
                bit = whole[1]
                continue
            at = BITMAP_HEADER_SIZE + (bit >> 2)
            shift = (bit & 3) * 2
            code = data[at] >> shift & 3
            block = index * ENTRIES_PER_BITMAP + bit
            if code == _FREE:
                raise InvalidArgument(f"block {block} has no reference to give up")
            if code == _ONE:
                data[at] &= ~(3 << shift)
                self._gave_back(bit, entry)
            elif code == _TWO:
                data[at] ^= 3 << shift
            else:
                leaf = self._overflow_leaf(block, leaf)
                if self._add_to_overflow(leaf, block, -1) < OVERFLOW_COUNT:
                    leaf = None
                    self._remove_overflow(block)
                    data[at] ^= (_MANY ^ _TWO) << shift
            bit += 1
        self.index.save(entry)

    def set_count(self, block: int, count: int) -> None:
        """Give *block* a count, whatever it had; :raises InvalidArgument: the block is beyond the map."""
        self.check_range(block, block + 1)
        index, bit = divmod(block, ENTRIES_PER_BITMAP)
        entry = self._load(index).copy()
        data = self._shadow_bitmap(entry)
        at = BITMAP_HEADER_SIZE + (bit >> 2)
        shift = (bit & 3) * 2
        old = data[at] >> shift & 3
        data[at] = data[at] & ~(3 << shift) | _CODES[min(count, OVERFLOW_COUNT)] << shift
        if count >= OVERFLOW_COUNT:
            self._insert_overflow(block, count)
        elif old == _MANY:
            self._remove_overflow(block)
        if count and old == _FREE:
            self._took(bit, entry)
        elif not count and old != _FREE:
            self._gave_back(bit, entry)
        self.index.save(entry)

    def _took(self, bit: int, entry: IndexEntry) -> None:
        self.nr_allocated += 1
        entry.nr_free = entry.nr_free - 1 & _MASK_32_BITS
        if entry.none_free_before == bit:
            entry.none_free_before = bit + 1
        if entry.index == self._busy_index:
            self._busy[bit] = 1

    def _gave_back(self, bit: int, entry: IndexEntry) -> None:
        self.nr_allocated -= 1
        entry.nr_free = entry.nr_free + 1 & _MASK_32_BITS
        if bit < entry.none_free_before:
            entry.none_free_before = bit
        if entry.index == self._busy_index:
            self._busy[bit] = self._old_busy[bit]

    def _whole_bytes(self, data: memoryview, bit: int, end: int, value: int) -> tuple[int, int] | None:
        """Return the part of ``[bit, end)`` that fills whole bytes, if each of these bytes is *value*."""
        first = bit + 3 & ~3
        last = end & ~3
        if last - first < ENTRIES_PER_BITMAP // 1024:
            return None
        found = bytes(data[BITMAP_HEADER_SIZE + first // 4 : BITMAP_HEADER_SIZE + last // 4])
        return (first, last) if found.count(value) == len(found) else None

    # Counts of three and more

    def _overflow_leaf(self, block: int, leaf: Node | None) -> Node:
        """Return the leaf that has the count of *block*, with the way to it shadowed; *leaf* if that is the one."""
        if leaf is not None and leaf.contains(block):
            return leaf
        self.ref_count_root, leaf = self._overflow.shadow_leaf_of(self.ref_count_root, block)
        return leaf

    def _add_to_overflow(self, leaf: Node, block: int, change: int) -> int:
        """Change a count in its leaf, in place, and return it.  A count that falls below three is left as it was."""
        index = leaf.lower_bound(block)
        value = leaf.value(index)
        assert isinstance(value, bytes)
        count: int = REF_COUNT_VALUE.unpack(value)[0] + change
        if count >= OVERFLOW_COUNT:
            leaf.set_value(index, REF_COUNT_VALUE.pack(count))
        return count

    def _insert_overflow(self, block: int, count: int) -> None:
        self.ref_count_root = self._overflow.insert(self.ref_count_root, [block], REF_COUNT_VALUE.pack(count))

    def _remove_overflow(self, block: int) -> None:
        self.ref_count_root = self._overflow.remove(self.ref_count_root, [block])

    # Size and commit

    def extend(self, extra_blocks: int) -> None:
        """Count *extra_blocks* more, with new bitmaps as needed."""
        old_count = nr_bitmaps(self.nr_blocks)
        self.nr_blocks += extra_blocks
        self._busy_index = -1
        for index in range(old_count, nr_bitmaps(self.nr_blocks)):
            self.tm.bm.begin_operation()
            bitmap = self.tm.new_block(BITMAP)
            self.index.save(IndexEntry(index, bitmap.block, ENTRIES_PER_BITMAP, 0))

    def commit(self) -> None:
        """Write the index if it changed."""
        self.index.commit()

    def note_commit(self) -> None:
        """Make the present state the last commit's: what was freed before may be found from now on."""
        self.old_nr_blocks = self.nr_blocks
        self.old_nr_allocated = self.nr_allocated
        self.index.note_commit()
        self._busy_index = -1
