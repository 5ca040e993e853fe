"""Space maps as arrays: the counts that an independent reader finds, and none where a hint is wrong."""

from __future__ import annotations

from struct import calcsize
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bufio import MemoryDevice
from persistent_data import format as declared
from persistent_data.block_batches import BlockBatches, NotClean
from persistent_data.layout import CODE_TO_COUNT, ENTRIES_PER_BITMAP
from persistent_data.space_map_batches import BITMAP_DTYPE, Overflow, SpaceMapCounts
from persistent_data.space_map_check import Index, decode_counts
from tests.support.declarations import field_names, offset_of
from tests.support.fixtures import image
from tests.support.image import Image
from tests.support.surgeon import Surgeon

if TYPE_CHECKING:
    from tests.support.image import SpaceMapRoot

FIXTURES = ["mixed", "snapshot_chain", "many_devices", "shared_by_many", "huge_virtual", "block_192k"]
MAPS = ["data", "metadata"]


def root_of(pool: Image, which: str) -> SpaceMapRoot:
    sb = pool.superblock()
    return sb.data_map if which == "data" else sb.metadata_map


def read(content: bytes, which: str, bitmaps: list[tuple[int, int, int]] | None = None) -> SpaceMapCounts:
    """Read a space map, with the index that is on the device or another."""
    pool = Image.from_bytes(content)
    root = root_of(pool, which)
    index = Index()
    for entry in pool.bitmaps(which) if bitmaps is None else bitmaps:
        index.append(*entry)
    device = MemoryDevice(content)
    overflow = Overflow(device, root.ref_count_root, pool.nr_blocks, root.nr_blocks)
    return SpaceMapCounts(BlockBatches(device), index, overflow, root.nr_blocks, root.nr_allocated)


def test_the_header_is_the_declared_one() -> None:
    assert BITMAP_DTYPE.names == field_names(declared.Bitmap)[:-1]
    assert BITMAP_DTYPE.itemsize == offset_of(declared.Bitmap, "words") == calcsize("<IIQ")


@pytest.mark.parametrize("which", MAPS)
@pytest.mark.parametrize("name", FIXTURES)
def test_counts_are_those_of_other_readers(name: str, which: str) -> None:
    pool = Image.from_bytes(image(name))
    nr_blocks = root_of(pool, which).nr_blocks
    expected = pool.counts(which)
    found = read(image(name), which)
    counts = found.counts()
    assert {int(block): int(counts[block]) for block in np.flatnonzero(counts)} == expected
    assert found.total() == sum(expected.values())
    assert len(found.entries) > nr_blocks
    assert found.highest == min(max(expected.values()), 3)
    plainly = b"".join(decode_counts(pool.block(block)[16:]) for block, _, _ in pool.bitmaps(which))
    assert found.entries[:-1].tobytes() == plainly
    assert set(plainly) <= set(CODE_TO_COUNT)


@pytest.mark.parametrize("which", MAPS)
def test_hints_are_compared(which: str) -> None:
    content = image("mixed")
    bitmaps = Image.from_bytes(content).bitmaps(which)
    block, nr_free, hint = bitmaps[-1]
    nr_blocks = root_of(Image.from_bytes(content), which).nr_blocks
    rest = -nr_blocks % ENTRIES_PER_BITMAP
    assert rest, "or what is said of entries beyond the end is not tested"
    first_free = decode_counts(Image.from_bytes(content).block(block)[16:]).find(0)
    for changed in [(block, nr_free - rest, hint), (block, nr_free, 0), (block, nr_free, first_free)]:
        assert read(content, which, [*bitmaps[:-1], changed]).nr_blocks == nr_blocks
    for changed in [
        (block, nr_free + 1, hint),
        (block, nr_free - 1, hint),
        (block, nr_free, first_free + 1),
        (block, nr_free, ENTRIES_PER_BITMAP + 1),
        (block + 1, nr_free, hint),
    ]:
        with pytest.raises(NotClean):
            read(content, which, [*bitmaps[:-1], changed])


def test_a_bitmap_for_two_ranges() -> None:
    bitmaps = Image.from_bytes(image("block_192k")).bitmaps("metadata")
    with pytest.raises(NotClean):
        read(image("block_192k"), "metadata", [*bitmaps, bitmaps[-1]])


@pytest.mark.parametrize("count", [0, 2])
def test_overflow_entries_below_three(count: int) -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    root = root_of(surgeon.image, "data").ref_count_root
    surgeon.value(surgeon.leaves(root)[0], 0, count)
    with pytest.raises(NotClean) as raised:
        read(surgeon.content(), "data")
    assert raised.value.block == root


@pytest.mark.parametrize("beyond", [0, 1, 1 << 63])
def test_overflow_entries_beyond_the_end(beyond: int) -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    root = root_of(surgeon.image, "data")
    last = surgeon.image.node(surgeon.leaves(root.ref_count_root)[-1])
    surgeon.key(last.number, len(last.keys) - 1, root.nr_blocks + beyond)
    with pytest.raises(NotClean) as raised:
        read(surgeon.content(), "data")
    assert raised.value.block == root.ref_count_root
