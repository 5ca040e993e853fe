"""The counted columns of a listing by arrays, for large pools: what :mod:`thinpool.listing` finds node by node.

Importing it loads numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.batch_walk import BatchWalk
from persistent_data.block_batches import NotClean
from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.layout import max_entries
from persistent_data.node_batches import NodeBatches
from persistent_data.node_check import check_node
from thinpool.layout import TIME_BITS
from thinpool.trees import MAPPING_KIND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from persistent_data.batch_walk import Level
    from thinpool.listing import Row
    from thinpool.pool_reader import PoolReader

_CAPPED_FROM = 1000
"""A count above this is cut to 2, which says as much."""
assert _CAPPED_FROM + WINDOW_BLOCKS * max_entries(MAPPING_KIND.value_size) < 1 << 16, "a batch overflows no count"


def count(
    pool: PoolReader,
    rows: Sequence[Row],
    ownership: bool,
    highest: bool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill in *rows*: the exclusive blocks if *ownership* is asked for, the highest ones if those are.

    Memory: 2 bytes for each data block if it is, and 50 for each leaf.

    :raises NotClean: something is wrong, or merely unusual, and the rows are not to be used
    """
    walk = BatchWalk(NodeBatches(pool.reader.device), pool.nr_blocks)
    counts = _Counts(pool.nr_data_blocks, ownership)
    expected = [row.device.mapped_blocks for row in rows]
    nr_expected, nr_seen = sum(expected), 0
    for nodes, level in walk.leaves([row.device.root for row in rows], range(len(rows))):
        _, values = nodes.entries()
        counts.add(values, level)
        nr_seen += len(values)
        if progress is not None:
            progress(nr_seen, nr_expected)
    if not np.array_equal(walk.nr_entries.view(np.uint64), np.array(expected, np.uint64)):
        raise NotClean(0)
    for row in rows:
        row.exclusive = row.device.mapped_blocks
        if highest:
            row.highest = _highest(pool, row.device.root)
    if ownership and rows:
        leaves = walk.levels[-1]
        own = np.flatnonzero(leaves.nr_ways == 1)
        if counts.any_shared or len(own) < len(leaves):
            exclusive = _exclusive(walk, leaves.at(own), counts, len(rows))
            for row, number in zip(rows, exclusive.tolist(), strict=True):
                row.exclusive = number


class _Counts:
    """How often each data block is mapped, as far as that is 0, 1 or more.

    :ivar any_shared: some block is mapped more than once
    """

    def __init__(self, nr_data_blocks: int, wanted: bool) -> None:
        self._nr_data_blocks = nr_data_blocks
        self._counts = np.zeros(nr_data_blocks if wanted else 0, np.uint16)
        self._wanted = wanted
        self.any_shared = False

    def add(self, values: NDArray[np.uint64], level: Level) -> None:
        """Count the data blocks of the mappings in the leaves of *level*."""
        data_blocks = self._data_blocks(values)
        if not len(data_blocks):
            return
        if data_blocks.max() >= self._nr_data_blocks:
            raise NotClean(int(level.blocks[0]))
        if self._wanted:
            np.add.at(self._counts, data_blocks, np.uint16(1))
            highest = self._counts[data_blocks].max()
            self.any_shared |= bool(highest > 1)
            if highest > _CAPPED_FROM:
                self._counts[data_blocks] = np.minimum(self._counts[data_blocks], 2)

    def are_one(self, values: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell for each mapping whether it is the only one of its data block."""
        ones: NDArray[np.bool_] = self._counts[self._data_blocks(values)] == 1
        return ones

    @staticmethod
    def _data_blocks(values: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (values >> np.uint64(TIME_BITS)).view(np.int64)


def _exclusive(walk: BatchWalk, leaves: Level, counts: _Counts, nr_devices: int) -> NDArray[np.int64]:
    """Return for each device its mappings in *leaves*, which nothing shares, whose data blocks nothing else maps."""
    exclusive = np.zeros(nr_devices, np.int64)
    for nodes, level in walk.read_leaves(leaves):
        _, values = nodes.entries()
        so_far = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts.are_one(values))))
        ends = np.cumsum(nodes.nr_entries)
        np.add.at(exclusive, level.label, so_far[ends] - so_far[ends - nodes.nr_entries])
    return exclusive


def _highest(pool: PoolReader, root: int) -> int:
    """Return the last key of a tree that has been found clean, -1 if it has none."""
    block = root
    while True:
        node, _ = check_node(bytes(pool.reader.read(block)), block, MAPPING_KIND.value_size, True)
        if node is None:
            raise NotClean(block)
        if node.is_leaf:
            return node.keys[-1] if node.keys else -1
        block = node.numbers()[-1]
