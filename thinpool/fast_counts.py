"""References in clean mapping trees, counted with arrays: for a large pool whose space maps are what is wrong with it.

Clean means that :mod:`thinpool.check` would find nothing in the mapping trees, not even advice.  The plain check counts
node by node what is not clean, and says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.block_batches import NotClean, require
from persistent_data.ref_counts import RefCounts
from thinpool.fast_check import walk_mappings
from thinpool.layout import TIME_BITS, TIME_MASK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from persistent_data.batch_walk import Level
    from persistent_data.block_reader import BlockReader
    from persistent_data.node_batches import NodeBatch
    from thinpool.layout import Superblock
    from thinpool.trees import DeviceEntry

_MOST = 255
"""The largest count that has room in a byte."""


def count_mappings(
    reader: BlockReader,
    references: RefCounts,
    main: Superblock,
    devices: Sequence[DeviceEntry],
    snap: Superblock | None = None,
    snap_devices: Sequence[DeviceEntry] = (),
    progress: Callable[[int], object] | None = None,
) -> tuple[RefCounts, bytes] | None:
    """Count the references to data blocks, and add to *references* those to the nodes of the mapping trees.

    Memory: two bytes for each data block, three if a metadata snapshot is held, less where large ranges were never
    used; and 150 for each metadata block in use.

    :param references: to metadata blocks, as found so far: by the superblocks and the device trees
    :param devices: of the pool, with their roots
    :param snap: the superblock of the metadata snapshot that is held
    :param snap_devices: of that, with their roots
    :param progress: is called with the number of leaves that have been read
    :return: references to data blocks, and a byte for each metadata block, not zero for the nodes; None, and
        *references* as they were, when something is not clean, or a data block has more than 255 references
    """
    try:
        return _count(reader, references, main, devices, snap, snap_devices, progress)
    except NotClean:
        return None


def _count(
    reader: BlockReader,
    references: RefCounts,
    main: Superblock,
    devices: Sequence[DeviceEntry],
    snap: Superblock | None,
    snap_devices: Sequence[DeviceEntry],
    progress: Callable[[int], object] | None,
) -> tuple[RefCounts, bytes]:
    leaves = _Leaves(main, snap)
    levels = walk_mappings(reader, references.nr_blocks, devices, snap_devices, leaves.take, progress)
    data = leaves.finish()
    return data, _add_nodes(references, levels)


def _add_nodes(references: RefCounts, levels: list[Level]) -> bytes:
    """Add the references to nodes, to which nobody else has referred, and return which blocks they are."""
    found = np.frombuffer(references.counts, np.uint8)
    nodes = np.zeros(len(found), np.uint8)
    for level in levels:
        # A node has one place: in the trees of one kind.
        require(found[level.blocks] == 0, level.blocks)
    for level in levels:
        found[level.blocks] = np.minimum(level.references, _MOST)
        nodes[level.blocks] = 1
        for i in np.flatnonzero(level.references > _MOST):
            references.excess[int(level.blocks[i])] = int(level.references[i]) - _MOST
    return nodes.tobytes()


class _Leaves:
    """Counts the data blocks of each leaf, and judges the times."""

    def __init__(self, main: Superblock, snap: Superblock | None) -> None:
        self._nr_blocks = main.data_root.nr_blocks
        self._pool_time = main.time
        self._snap_time = 0 if snap is None else snap.time
        self._nr_mappings = 0
        self._data = RefCounts(self._nr_blocks)
        self._counts = np.frombuffer(self._data.counts, np.uint8)
        self._in_pool: NDArray[np.uint8] | None = None if snap is None else np.zeros(self._nr_blocks, np.uint8)
        """The same without what only the metadata snapshot refers to."""
        self._exclusive = np.zeros(self._nr_blocks, np.bool_)
        """Data blocks of mappings that the kernel takes for the only ones."""

    def take(self, nodes: NodeBatch, level: Level) -> None:
        """Count the mappings of a batch of leaves."""
        used = ~nodes.unused
        times = (nodes.values & np.uint64(TIME_MASK)).view(np.int64)
        newest = times.max(axis=1, where=used, initial=0)
        is_in_pool = level.nr_ways > 0
        require(newest <= np.where(is_in_pool, self._pool_time, self._snap_time), level.blocks)
        # The kernel takes a mapping for exclusive whose time is not before the last snapshot of its device.
        late = (newest >= level.label) & (nodes.nr_entries > 0)
        require((level.nr_ways < 2) | ~late, level.blocks)

        blocks = (nodes.values >> np.uint64(TIME_BITS)).view(np.int64)
        data_blocks = blocks[used]
        if data_blocks.size and data_blocks.max() >= self._nr_blocks:
            raise NotClean(0)
        self._nr_mappings += data_blocks.size
        np.add.at(self._counts, data_blocks, np.uint8(1))
        if self._in_pool is not None:
            np.add.at(self._in_pool, blocks[used & is_in_pool[:, None]], np.uint8(1))
        late &= is_in_pool
        if late.any():
            self._exclusive[blocks[used & late[:, None] & (times >= level.label[:, None])]] = True

    def finish(self) -> RefCounts:
        """Return the references to data blocks."""
        # A count that has wrapped around leaves the sum short.
        if int(self._counts.sum(dtype=np.int64)) != self._nr_mappings:
            raise NotClean(0)
        in_pool = self._counts if self._in_pool is None else self._in_pool
        if (in_pool[self._exclusive] > 1).any():
            raise NotClean(0)
        return self._data
