"""A large pool checked with arrays: whether it is clean, and nothing else.

Clean means that :mod:`thinpool.check` would find nothing, not even advice, in the mapping trees and the space maps.
Where the two could differ, this one errs on the side of "not clean", which costs time and no more: the plain check then
has the word.

Counting data blocks takes most of the time, so there is no more of it than a proof needs.  What is left of the counts
in the space map when one has been taken away for each mapping must be nothing:

- If no count is above one, each mapping merely marks its block.  When there are as many mappings as counted blocks, and
  no counted block is without a mark, then no block was marked twice, or marked without being counted.
- Else the counts are taken down in as few bits as hold the largest one, and wrap around.  When all of them come to
  zero, each block has as many mappings as its count says, or more by a multiple of 256 (or 65536, ...).  When there are
  as many mappings as the counts add up to, it is not more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.batch_walk import BatchWalk
from persistent_data.block_batches import BlockBatches, NotClean, require
from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.btree_walk import BTreeWalk
from persistent_data.layout import max_entries
from persistent_data.node_batches import NodeBatches
from persistent_data.ref_counts import RefCounts
from persistent_data.space_map_batches import Overflow, SpaceMapCounts
from persistent_data.space_map_check import count_bitmaps, read_index_block, read_index_tree
from thinpool.layout import TIME_BITS, TIME_MASK
from thinpool.trees import MAPPING_KIND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from numpy.typing import NDArray

    from persistent_data.batch_walk import Level
    from persistent_data.block_reader import BlockReader
    from persistent_data.damage import Damage
    from persistent_data.node_batches import NodeBatch
    from thinpool.layout import SpaceMapRoot, Superblock
    from thinpool.trees import DeviceEntry

NEVER = 1 << 62
"""Later than any time."""


def is_clean(
    reader: BlockReader,
    references: RefCounts,
    main: Superblock,
    devices: Sequence[DeviceEntry],
    snap: Superblock | None = None,
    snap_devices: Sequence[DeviceEntry] = (),
    progress: Callable[[int], object] | None = None,
) -> bool:
    """Tell whether the mapping trees and both space maps of a pool are clean.

    Memory: one byte for each data block, less where large ranges were never used; if data blocks are shared, another
    and as many as a count takes; 16 bytes for each metadata block, and 150 for each in use.

    :param references: to metadata blocks, as found so far: by the superblocks and the device trees; it is not changed
    :param devices: of the pool, with their roots
    :param snap: the superblock of the metadata snapshot that is held
    :param snap_devices: of that, with their roots
    :param progress: is called with the number of leaves that have been read
    """
    try:
        _check(reader, references, main, devices, snap, snap_devices, progress)
    except NotClean:
        return False
    return True


def _refuse(damage: Damage) -> NoReturn:
    raise NotClean(damage.block)


def _check(
    reader: BlockReader,
    references: RefCounts,
    main: Superblock,
    devices: Sequence[DeviceEntry],
    snap: Superblock | None,
    snap_devices: Sequence[DeviceEntry],
    progress: Callable[[int], object] | None,
) -> None:
    if not references.nr_blocks == main.metadata_root.nr_blocks <= reader.nr_blocks:
        raise NotClean(0)
    metadata = _MetadataCounts(references)
    batches = BlockBatches(reader.device, ahead=True)
    data_counts = _read_data_space_map(reader, batches, main.data_root, metadata)
    _check_mappings(reader, data_counts, metadata, main, devices, snap, snap_devices, progress)
    del data_counts
    _check_metadata_space_map(reader, batches, main.metadata_root, metadata)


class _MetadataCounts:
    """References to metadata blocks."""

    def __init__(self, references: RefCounts) -> None:
        self.counts = np.zeros(references.nr_blocks, np.int64)
        self.nr_blocks = references.nr_blocks
        self.add(references)

    def add(self, references: RefCounts) -> None:
        """Add the references to nodes that nobody else has referred to."""
        found = np.frombuffer(references.counts, np.uint8)
        blocks = np.flatnonzero(found)
        self._require_new(blocks)
        self.counts[blocks] = found[blocks]
        for block, excess in references.excess.items():
            self.counts[block] += excess

    def add_nodes(self, levels: list[Level]) -> None:
        """Add the references to the nodes of trees, to which nobody else has referred."""
        for level in levels:
            self._require_new(level.blocks)
            self.counts[level.blocks] = level.references

    def _require_new(self, blocks: NDArray[np.int64]) -> None:
        # A node has one place: in the trees of one kind.
        require(self.counts[blocks] == 0, blocks)


def _read_data_space_map(
    reader: BlockReader, batches: BlockBatches, root: SpaceMapRoot, metadata: _MetadataCounts
) -> SpaceMapCounts:
    nodes, bitmaps = RefCounts(metadata.nr_blocks), RefCounts(metadata.nr_blocks)
    walk = BTreeWalk(reader, metadata.nr_blocks, _refuse, nodes)
    index = read_index_tree(walk, root.bitmap_root, root.nr_blocks, _refuse)
    assert index is not None, "its damage is refused"
    count_bitmaps(index, metadata.nr_blocks, bitmaps, _refuse)
    overflow = Overflow(reader.device, root.ref_count_root, metadata.nr_blocks, root.nr_blocks)
    metadata.add(nodes)
    metadata.add(bitmaps)
    metadata.add_nodes(overflow.levels)
    return SpaceMapCounts(batches, index, overflow, root.nr_blocks, root.nr_allocated)


def _check_metadata_space_map(
    reader: BlockReader, batches: BlockBatches, root: SpaceMapRoot, metadata: _MetadataCounts
) -> None:
    blocks = RefCounts(metadata.nr_blocks)
    index = read_index_block(reader, root.bitmap_root, metadata.nr_blocks, blocks, _refuse)
    assert index is not None, "its damage is refused"
    count_bitmaps(index, metadata.nr_blocks, blocks, _refuse)
    overflow = Overflow(reader.device, root.ref_count_root, metadata.nr_blocks, metadata.nr_blocks)
    metadata.add(blocks)
    metadata.add_nodes(overflow.levels)
    found = SpaceMapCounts(batches, index, overflow, metadata.nr_blocks, root.nr_allocated)
    differs = found.counts()[: metadata.nr_blocks] != metadata.counts
    if differs.any():
        raise NotClean(int(differs.argmax()))


def _check_mappings(
    reader: BlockReader,
    data_counts: SpaceMapCounts,
    metadata: _MetadataCounts,
    main: Superblock,
    devices: Sequence[DeviceEntry],
    snap: Superblock | None,
    snap_devices: Sequence[DeviceEntry],
    progress: Callable[[int], object] | None,
) -> None:
    leaves = _Leaves(data_counts, main.time, None if snap is None else snap.time)
    levels = walk_mappings(reader, metadata.nr_blocks, devices, snap_devices, leaves.take, progress)
    leaves.finish()
    metadata.add_nodes(levels)


def walk_mappings(
    reader: BlockReader,
    nr_blocks: int,
    devices: Sequence[DeviceEntry],
    snap_devices: Sequence[DeviceEntry],
    take: Callable[[NodeBatch, Level], None],
    progress: Callable[[int], object] | None,
) -> list[Level]:
    """Walk the mapping trees of all devices, and see that each has as many mappings as its details say.

    :param nr_blocks: metadata blocks there are
    :param take: is given the leaves, each once, and what is known of them
    :param progress: is called with the number of leaves that have been read
    :returns: the nodes of each level, and how often they are referred to
    :raises NotClean: a node, or a number of mappings, is not as it should be
    """
    walk = BatchWalk(NodeBatches(reader.device, MAPPING_KIND.value_size, ahead=True), nr_blocks)
    everybody = [*devices, *snap_devices]
    # What the metadata snapshot refers to is not shared with a device in the sense that matters to the kernel.
    labels = [device.snapshotted_time for device in devices] + [NEVER] * len(snap_devices)
    counts = [True] * len(devices) + [False] * len(snap_devices)
    nr_leaves = 0
    for nodes, level in walk.leaves([device.root for device in everybody], labels, counts):
        take(nodes, level)
        nr_leaves += len(level)
        if progress is not None:
            progress(nr_leaves)
    wanted = np.array([device.mapped_blocks for device in everybody], np.uint64)
    if not np.array_equal(walk.nr_entries.view(np.uint64), wanted):
        raise NotClean(0)
    return walk.levels


class _Leaves:
    """Takes the data blocks of each leaf away from what the space map has counted, and judges the times."""

    def __init__(self, data_counts: SpaceMapCounts, pool_time: int, snap_time: int | None) -> None:
        self._nr_blocks = data_counts.nr_blocks
        self._pool_time = pool_time
        self._snap_time = snap_time or 0
        self._nr_mappings = 0
        self._nr_references = data_counts.total()
        self._left: NDArray[Any]
        self._exclusive: _Exclusive | None = None
        if data_counts.highest <= 1:
            self._left = data_counts.entries
        else:
            self._left = data_counts.counts()
            several = data_counts.entries > 1
            self._exclusive = _Exclusive(several) if snap_time is None else _ExclusiveInPool(several, self._left.dtype)
        self._one = self._left.dtype.type(1)
        self._scratch = np.empty((WINDOW_BLOCKS, max_entries(MAPPING_KIND.value_size)), np.uint64)

    def take(self, nodes: NodeBatch, level: Level) -> None:
        """Count the mappings of a batch of leaves."""
        scratch = self._scratch[: len(level)]
        unused = nodes.unused if nodes.unused.any() else None
        np.bitwise_and(nodes.values, np.uint64(TIME_MASK), out=scratch)
        if unused is not None:
            np.copyto(scratch, np.uint64(0), where=unused)
        newest = scratch.max(axis=1).view(np.int64)
        require(newest <= np.where(level.nr_ways > 0, self._pool_time, self._snap_time), level.blocks)
        # The kernel takes a mapping for exclusive whose time is not before the last snapshot of its device.
        late = (newest >= level.label) & (nodes.nr_entries > 0)
        require((level.nr_ways < 2) | ~late, level.blocks)

        data_blocks = np.right_shift(nodes.values, np.uint64(TIME_BITS), out=scratch).view(np.int64)
        if unused is not None:
            np.copyto(data_blocks, 0, where=unused)
        if data_blocks.max() >= self._nr_blocks:
            raise NotClean(int(level.blocks[data_blocks.max(axis=1).argmax()]))
        self._nr_mappings += int(nodes.nr_entries.sum())
        if self._exclusive is None:
            if unused is not None:
                np.copyto(data_blocks, self._nr_blocks, where=unused)  # a zero that is not looked at
            self._left[data_blocks] = _MET
        else:
            if unused is not None:
                np.copyto(data_blocks, self._nr_blocks, where=unused)
            late &= level.nr_ways > 0
            if late.any():
                times = (nodes.values[late] & np.uint64(TIME_MASK)).view(np.int64)
                self._exclusive.add(data_blocks[late][times >= level.label[late, None]])
            self._exclusive.count(data_blocks, level)
            np.subtract.at(self._left, data_blocks, self._one)

    def finish(self) -> None:
        """Compare with the space map."""
        if self._nr_mappings != self._nr_references:
            raise NotClean(0)
        for begin in range(0, self._nr_blocks, _CHUNK):
            left = self._left[begin : min(begin + _CHUNK, self._nr_blocks)]
            if (left == 1).any() if self._exclusive is None else left.any():
                raise NotClean(0)
        if self._exclusive is not None:
            self._exclusive.finish()


class _Exclusive:
    """Refuses data blocks with *several* references of which one is taken for exclusive.

    As long as the space map is right, which is found out in the end.  Behind the data blocks there may be others, with
    no meaning.
    """

    def __init__(self, several: NDArray[np.bool_]) -> None:
        self._several = several

    def add(self, data_blocks: NDArray[np.int64]) -> None:
        """Take references that the kernel takes for exclusive."""
        if self._several[data_blocks].any():
            raise NotClean(0)

    def count(self, data_blocks: NDArray[np.int64], level: Level) -> None:
        """Take all references of the leaves *level*, row by row."""

    def finish(self) -> None:
        """Take the end."""


class _ExclusiveInPool(_Exclusive):
    """The same where only what the pool itself refers to matters, not what the metadata snapshot does."""

    def __init__(self, several: NDArray[np.bool_], dtype: np.dtype[Any]) -> None:
        super().__init__(several)
        self._counts = np.zeros(len(several), dtype)
        self._one = dtype.type(1)
        self._marks = np.zeros(len(several), np.bool_)

    def add(self, data_blocks: NDArray[np.int64]) -> None:
        """Take references that the kernel takes for exclusive."""
        self._marks[data_blocks] = True

    def count(self, data_blocks: NDArray[np.int64], level: Level) -> None:
        """Take all references of the leaves *level*, row by row."""
        np.add.at(self._counts, data_blocks[level.nr_ways > 0], self._one)

    def finish(self) -> None:
        """Compare the two."""
        # No count has wrapped around, for none is above that of the space map, which has turned out right.
        self._marks &= self._several
        if (self._counts[self._marks] > 1).any():
            raise NotClean(0)


_CHUNK = 1 << 20

_MET = 2
"""In place of a count of one: there is a mapping to the block."""
