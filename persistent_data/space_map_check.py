"""Space maps read without trust, and compared with counts that were found by counting.

The parts: the index says where the bitmaps are, the bitmaps hold counts up to two, the overflow tree the higher ones.
Source: docs/format.md, "Space maps".
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from persistent_data.btree_walk import TreeKind
from persistent_data.checksum import BITMAP_SALT, INDEX_SALT, block_checksum, kind_of
from persistent_data.damage import ADVISORY, FATAL, NON_FATAL, Damage, Fault
from persistent_data.layout import (
    BITMAP_HEADER_SIZE,
    BLOCK_HEADER,
    CODE_TO_COUNT,
    COUNT_TO_CODE,
    ENTRIES_PER_BITMAP,
    ENTRIES_PER_BYTE,
    INDEX_ENTRY,
    INDEX_HEADER_SIZE,
    MAX_METADATA_BITMAPS,
    OVERFLOW_COUNT,
    REF_COUNT_VALUE,
)
from persistent_data.node_check import BLOCKNR_MISMATCH, CHECKSUM_ERROR, IO_ERROR, OUTSIDE_DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio.device import ReadableBuffer
    from persistent_data.block_reader import BlockReader
    from persistent_data.btree_walk import BTreeWalk
    from persistent_data.damage import Severity
    from persistent_data.node_check import Node
    from persistent_data.ref_counts import RefCounts

    Report = Callable[[Damage], None]

INDEX_CHECKSUM = "bad checksum in index block"
NOT_A_BITMAP = "not a bitmap"
INDEX_KEYS = "index does not name every bitmap once"
OVERFLOW_KEY = "overflow entry beyond the space map"
OVERFLOW_VALUE = "overflow entry below 3"
OVERFLOW_STRAY = "overflow entry for a block whose bitmap entry is not 3"
OVERFLOW_MISSING = "bitmap entry 3 without overflow entry"
BITS_BEYOND_END = "bitmap entries beyond the end are not zero"
HEADER_NOT_ZERO = "unused header word is not zero"
STRAY_INDEX_ENTRIES = "index entries behind the last bitmap are not zero"
NR_FREE = "nr_free is wrong"
NONE_FREE_BEFORE = "none_free_before is too high"
NR_ALLOCATED = "nr_allocated is wrong"

LEAK = "leak"
BAD_COUNT = "bad reference count"

_SATURATED = 255
"""In the counts that were found, this or more."""
_TO_CODE = bytes(COUNT_TO_CODE[min(count, OVERFLOW_COUNT)] for count in range(256))
_HIGH = bytes(min(count, OVERFLOW_COUNT) for count in range(256))


def nr_bitmaps(nr_blocks: int) -> int:
    """Return the number of bitmap blocks that a space map of *nr_blocks* blocks has."""
    return -(-nr_blocks // ENTRIES_PER_BITMAP)


def encode_counts(counts: ReadableBuffer) -> bytes:
    """Return the entries of a bitmap, as they stand on disk, for up to 16320 *counts* of one byte each."""
    codes = int.from_bytes(bytes(counts).translate(_TO_CODE), "little")
    codes |= codes >> 6
    codes |= codes >> 12
    return codes.to_bytes(ENTRIES_PER_BITMAP, "little")[::ENTRIES_PER_BYTE]


def decode_counts(payload: ReadableBuffer) -> bytearray:
    """Return one byte for each entry of a bitmap; 3 means three or more."""
    payload = bytes(payload)
    counts = bytearray(len(payload) * ENTRIES_PER_BYTE)
    for i in range(ENTRIES_PER_BYTE):
        to_count = bytes(CODE_TO_COUNT[byte >> 2 * i & 3] for byte in range(256))
        counts[i::ENTRIES_PER_BYTE] = payload.translate(to_count)
    return counts


class Overflow:
    """The entries of an overflow tree, ascending by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, array[int], array[int]]] = []
        self.blocks = array("Q")
        self.counts = array("I")

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        """Take a leaf of the tree; leaves come in any order."""
        if node.keys:
            counts = array("I", [count for (count,) in node.records(REF_COUNT_VALUE)])
            self._parts.append((node.keys[0], array("Q", node.keys), counts))
        return 0

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        """Ignore it: that a node of this tree is reached twice shows in its reference count."""

    def finish(self) -> None:
        """Bring all entries together; call it once, after the walk of a sound tree."""
        for _, blocks, counts in sorted(self._parts, key=lambda part: part[0]):
            self.blocks.extend(blocks)
            self.counts.extend(counts)
        self._parts.clear()

    def is_plausible(self, nr_blocks: int) -> bool:
        """Tell whether every entry is for one of *nr_blocks* blocks and has a count that belongs here."""
        return not self.blocks or (self.blocks[-1] < nr_blocks and min(self.counts) >= OVERFLOW_COUNT)

    def get(self, block: int) -> int | None:
        """Return the count of *block*, None when the tree has no entry for it."""
        i = bisect_left(self.blocks, block)
        return self.counts[i] if i < len(self.blocks) and self.blocks[i] == block else None


class Index:
    """The index of a space map: for each bitmap its block, nr_free and none_free_before."""

    def __init__(self) -> None:
        self.bitmaps = array("Q")
        self.nr_free = array("I")
        self.none_free_before = array("I")
        self.path: tuple[int, ...] = ()
        """The way to the index; a bitmap's own block completes it."""

    def append(self, bitmap: int, nr_free: int, none_free_before: int) -> None:
        """Add the entry of the next bitmap."""
        self.bitmaps.append(bitmap)
        self.nr_free.append(nr_free)
        self.none_free_before.append(none_free_before)


class _IndexVisitor:
    """Collects the entries of an index tree, whose leaves come in any order."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, tuple[int, ...]]] = []

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        self.entries += zip(node.keys, node.records(INDEX_ENTRY), strict=True)
        return 0

    def shared(self, block: int, mark: int, path: tuple[int, ...]) -> None:
        pass


INDEX_TREE = TreeKind("index tree", INDEX_ENTRY.size)
OVERFLOW_TREE = TreeKind("overflow tree", REF_COUNT_VALUE.size)


def read_index_tree(walk: BTreeWalk, root: int, nr_blocks: int, report: Report) -> Index | None:
    """Read the index tree of a disk space map; None when there is damage, which *walk* or *report* was told of."""
    visitor = _IndexVisitor()
    summary = walk.walk(root, INDEX_TREE, visitor, (0,))
    if summary is None or walk.nr_errors(root):
        return None
    wanted = nr_bitmaps(nr_blocks)
    entries = sorted(visitor.entries)
    if len(entries) != wanted or (entries and entries[-1][0] != wanted - 1):
        keys = {key for key, _ in entries}
        odd = next((i for i in range(wanted) if i not in keys), None)
        what = f"bitmap {odd} is missing" if odd is not None else f"there is a bitmap {entries[-1][0]}"
        detail = f"{len(entries)} entries instead of {wanted} for {nr_blocks} blocks, {what}"
        report(Damage(Fault(INDEX_KEYS, detail), (0, root)))
        return None
    index = Index()
    index.path = (0, root)
    for _, (bitmap, nr_free, none_free_before) in entries:
        index.append(bitmap, nr_free, none_free_before)
    return index


def read_index_block(
    reader: BlockReader, root: int, nr_blocks: int, references: RefCounts, report: Report
) -> Index | None:
    """Read the index block of a metadata space map; None when there is damage, which *report* was told of."""
    path = (0, root)
    if not 0 < root < min(references.nr_blocks, reader.nr_blocks):
        report(Damage(Fault(OUTSIDE_DEVICE, f"the index is at block {root}"), (0,)))
        return None
    references.add(root)
    try:
        content = reader.read(root)
    except OSError as error:
        report(Damage(Fault(IO_ERROR, str(error)), path))
        return None
    csum, padding, blocknr = BLOCK_HEADER.unpack_from(content)
    if csum != block_checksum(content, INDEX_SALT):
        kind = kind_of(content)
        report(Damage(Fault(INDEX_CHECKSUM, f"it has the checksum of a {kind} block" if kind else ""), path))
        return None
    if blocknr != root:
        report(Damage(Fault(BLOCKNR_MISMATCH, f"the block says it is block {blocknr}"), path))
        return None
    if padding:
        report(Damage(Fault(HEADER_NOT_ZERO, f"it is {padding:#x}", ADVISORY), path))
    used = nr_bitmaps(nr_blocks)
    if any(content[INDEX_HEADER_SIZE + used * INDEX_ENTRY.size :]):
        report(Damage(Fault(STRAY_INDEX_ENTRIES, f"there are {used} bitmaps", ADVISORY), path))
    index = Index()
    index.path = path
    for i in range(min(used, MAX_METADATA_BITMAPS)):
        index.append(*INDEX_ENTRY.unpack_from(content, INDEX_HEADER_SIZE + i * INDEX_ENTRY.size))
    return index


def count_bitmaps(index: Index, limit: int, references: RefCounts, report: Report) -> bool:
    """Count the index's pointers to its bitmaps; false when one of them is outside the device of *limit* blocks."""
    sound = True
    for i, bitmap in enumerate(index.bitmaps):
        if 0 < bitmap < limit:
            references.add(bitmap)
        else:
            sound = False
            begin = i * ENTRIES_PER_BITMAP
            report(Damage(Fault(OUTSIDE_DEVICE, f"bitmap {i} is at block {bitmap} of {limit}"), index.path, begin))
    return sound


def read_overflow(walk: BTreeWalk, root: int, nr_blocks: int, report: Report) -> Overflow | None:
    """Read an overflow tree; None when its nodes are damaged, which *walk* was told of."""
    overflow = Overflow()
    summary = walk.walk(root, OVERFLOW_TREE, overflow, (0,))
    if summary is None or walk.nr_errors(root):
        return None
    overflow.finish()
    if overflow.is_plausible(nr_blocks):
        return overflow
    for block, count in zip(overflow.blocks, overflow.counts, strict=True):
        if block >= nr_blocks:
            report(Damage(Fault(OVERFLOW_KEY, f"block {block} of {nr_blocks}"), (0, root), block, block + 1))
        elif count < OVERFLOW_COUNT:
            report(Damage(Fault(OVERFLOW_VALUE, f"count {count} for block {block}"), (0, root), block, block + 1))
    return overflow


class CountError:
    """Neighbouring blocks *begin* to *end* - 1 whose counts are wrong in the same way.

    :ivar expected: references found
    :ivar actual: count in the space map; None for a bitmap entry 3 whose overflow entry is missing
    :ivar bitmap: the metadata block of the bitmap
    """

    __slots__ = ("actual", "begin", "bitmap", "end", "expected")

    def __init__(self, begin: int, end: int, expected: int, actual: int | None, bitmap: int) -> None:
        self.begin = begin
        self.end = end
        self.expected = expected
        self.actual = actual
        self.bitmap = bitmap

    @property
    def is_leak(self) -> bool:
        """True for a block that nobody refers to and whose count is one."""
        return self.expected == 0 and self.actual == 1

    @property
    def severity(self) -> Severity:
        """Leaks are harmless, all else is not."""
        return NON_FATAL if self.is_leak else FATAL


def compare_counts(
    expected: RefCounts,
    index: Index,
    overflow: Overflow,
    nr_allocated: int,
    reader: BlockReader,
    report: Report,
) -> Iterator[CountError]:
    """Compare every count of a space map with *expected* and yield the differences, ascending within a bitmap.

    What is wrong with a bitmap itself, or with the index's hints, goes to *report*.
    :param nr_allocated: from the space map's root
    """
    order = sorted(range(len(index.bitmaps)), key=index.bitmaps.__getitem__)
    numbers: dict[int, list[int]] = {}
    for i in order:
        numbers.setdefault(index.bitmaps[i], []).append(i)
    found = 0
    complete = True
    for block, content in reader.read_many(sorted(numbers)):
        # A bitmap that stands for two ranges is caught by its reference count, and still compared with both.
        for i in numbers[block]:
            path = (*index.path, block)
            begin = i * ENTRIES_PER_BITMAP
            end = min(begin + ENTRIES_PER_BITMAP, expected.nr_blocks)
            fault = Fault(IO_ERROR, str(content)) if isinstance(content, OSError) else bitmap_fault(content, block)
            if fault is not None:
                report(Damage(fault, path, begin, end))
                complete = False
            if isinstance(content, OSError) or fault is not None:
                continue
            payload = bytes(content[BITMAP_HEADER_SIZE:])
            padding = BLOCK_HEADER.unpack_from(content)[1]
            if padding:
                report(Damage(Fault(HEADER_NOT_ZERO, f"it is {padding:#x}", ADVISORY), path, begin, end))
            counts = expected.counts[begin:end]
            nr_zero = counts.count(0)
            first_zero = counts.find(0)
            if encode_counts(counts) == payload:
                agrees = _overflow_agrees(counts, overflow, begin, end)
                if not agrees:
                    yield from _high_differences(expected, overflow, begin, end, block)
            else:
                agrees = False
                actual = decode_counts(payload)
                beyond = actual[end - begin :]
                if any(beyond):
                    where = end + next(j for j, count in enumerate(beyond) if count)
                    detail = f"the first is that of block {where} of {expected.nr_blocks}"
                    report(Damage(Fault(BITS_BEYOND_END, detail, ADVISORY), path, begin, end))
                del actual[end - begin :]
                nr_zero = actual.count(0)
                first_zero = actual.find(0)
                yield from _differences(expected, actual, overflow, begin, block)
            if not agrees:
                _check_stray_overflow(payload, overflow, begin, end, report, path)
            found += end - begin - nr_zero
            _check_hints(index, i, nr_zero, first_zero, end - begin, report, path, begin, end)
    if complete and found != nr_allocated:
        detail = f"the root says {nr_allocated}, the bitmaps say {found}"
        report(Damage(Fault(NR_ALLOCATED, detail, ADVISORY), (0,)))


def bitmap_fault(content: ReadableBuffer, location: int) -> Fault | None:
    """Say what keeps *content*, read from block *location*, from being a bitmap; None if nothing does."""
    csum, _, blocknr = BLOCK_HEADER.unpack_from(content)
    if csum != block_checksum(content, BITMAP_SALT):
        kind = kind_of(content)
        if kind is not None:
            return Fault(NOT_A_BITMAP, f"it has the checksum of a {kind} block")
        return Fault(CHECKSUM_ERROR, "not a space map bitmap")
    if blocknr != location:
        return Fault(BLOCKNR_MISMATCH, f"the block says it is block {blocknr}")
    return None


def nr_free_is_wrong(nr_free: int, nr_zero: int, nr_entries: int) -> bool:
    """Judge the nr_free of a bitmap that has *nr_zero* zeros among *nr_entries* entries.

    The kernel counts entries beyond the end of the space map as free; some restore tools do not.
    """
    return nr_free not in (nr_zero, nr_zero + ENTRIES_PER_BITMAP - nr_entries)


def none_free_before_is_too_high(none_free_before: int, first_zero: int) -> bool:
    """Judge the none_free_before of a bitmap whose first zero is entry *first_zero*, -1 if it has none."""
    return none_free_before > (first_zero if first_zero >= 0 else ENTRIES_PER_BITMAP)


def _check_hints(
    index: Index,
    number: int,
    nr_zero: int,
    first_zero: int,
    nr_entries: int,
    report: Report,
    path: tuple[int, ...],
    begin: int,
    end: int,
) -> None:
    """Compare nr_free and none_free_before of a bitmap with its *nr_entries* entries."""
    nr_free = index.nr_free[number]
    if nr_free_is_wrong(nr_free, nr_zero, nr_entries):
        nr_zero += ENTRIES_PER_BITMAP - nr_entries
        detail = f"bitmap {number} has {nr_zero} free entries, its index entry says {nr_free}"
        report(Damage(Fault(NR_FREE, detail, ADVISORY), path, begin, end))
    hint = index.none_free_before[number]
    if none_free_before_is_too_high(hint, first_zero):
        detail = f"entry {first_zero} of bitmap {number} is free, its index entry says none before {hint}"
        report(Damage(Fault(NONE_FREE_BEFORE, detail, ADVISORY), path, begin, end))


def _check_stray_overflow(
    payload: bytes, overflow: Overflow, begin: int, end: int, report: Report, path: tuple[int, ...]
) -> None:
    """Report overflow entries of blocks whose entry in this bitmap is not 3."""
    for k in range(bisect_left(overflow.blocks, begin), bisect_left(overflow.blocks, end)):
        block = overflow.blocks[k]
        byte, entry = divmod(block - begin, ENTRIES_PER_BYTE)
        count = CODE_TO_COUNT[payload[byte] >> 2 * entry & 3]
        if count != OVERFLOW_COUNT:
            detail = f"block {block} has {count} in the bitmap and {overflow.counts[k]} in the overflow tree"
            report(Damage(Fault(OVERFLOW_STRAY, detail), path, block, block + 1))


def _overflow_agrees(counts: bytearray, overflow: Overflow, begin: int, end: int) -> bool:
    """Tell at once whether the overflow tree has just the counts from three up among *counts*, of *begin* to *end* - 1.

    False also when some count is so high that it has to be looked at by itself.
    """
    first, last = bisect_left(overflow.blocks, begin), bisect_left(overflow.blocks, end)
    if len(counts) - sum(map(counts.count, range(OVERFLOW_COUNT))) != last - first:
        return False
    found = overflow.counts[first:last].tolist()
    if max(found, default=0) >= _SATURATED:
        return False
    return found == [counts[block - begin] for block in overflow.blocks[first:last]]


def _high_differences(
    expected: RefCounts, overflow: Overflow, begin: int, end: int, bitmap: int
) -> Iterator[CountError]:
    """Compare the counts from three up of a bitmap whose entries agree with the counts found."""
    marks = expected.counts[begin:end].translate(_HIGH)
    at = marks.find(OVERFLOW_COUNT)
    while at >= 0:
        block = begin + at
        actual = overflow.get(block)
        if actual != expected[block]:
            yield CountError(block, block + 1, expected[block], actual, bitmap)
        at = marks.find(OVERFLOW_COUNT, at + 1)


def _differences(
    expected: RefCounts,
    actual: bytearray,
    overflow: Overflow,
    begin: int,
    bitmap: int,
) -> Iterator[CountError]:
    """Yield runs of equal differences between the counts found and the entries of one bitmap."""
    run: CountError | None = None
    counts = memoryview(expected.counts)[begin : begin + len(actual)]
    for block, (code, count) in enumerate(zip(actual, counts, strict=True), begin):
        if code == count < OVERFLOW_COUNT:
            continue
        total = expected[block]
        value: int | None = code
        if code == OVERFLOW_COUNT:
            value = overflow.get(block)
        if value == total:
            continue
        if run is not None and run.end == block and (run.expected, run.actual) == (total, value):
            run.end += 1
            continue
        if run is not None:
            yield run
        run = CountError(block, block + 1, total, value, bitmap)
    if run is not None:
        yield run
