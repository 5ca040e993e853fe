"""The dump's leaves by the hundred, for large pools: the same runs as :class:`thinpool.dump.Emitter` finds one by one.

Importing it loads numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.block_batches import NotClean
from persistent_data.block_reader import WINDOW_BLOCKS
from persistent_data.layout import max_entries
from persistent_data.node_batches import NodeBatches
from thinpool.dump import NEXT_BLOCK, Emitter
from thinpool.layout import MAX_DATA_BLOCK, TIME_BITS, TIME_MASK

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from numpy.typing import NDArray

    from persistent_data.block_batches import Words
    from persistent_data.node_batches import NodeBatch
    from thinpool.dump import Run
    from thinpool.ir import Visitor
    from thinpool.leaf_lists import Leaves
    from thinpool.pool_reader import PoolReader
    from thinpool.trees import DeviceEntry

_MAX_ENTRIES = max_entries(8)
WORTH_A_BATCH = 4
"""Leaves from which on a batch is faster than one after the other."""


class BatchEmitter(Emitter):
    """Reads leaves a window at a time; a window with anything unusual in it is left to the plain code.

    Memory: a window of leaves, and some ten times as much for what is computed from it.
    """

    def __init__(
        self, pool: PoolReader, leaves: Leaves, visitor: Visitor, progress: Callable[[int, int], None] | None
    ) -> None:
        super().__init__(pool, leaves, visitor, progress)
        self._batches = NodeBatches(pool.reader.device)
        self._blocks = np.frombuffer(leaves.blocks, np.uint32).astype(np.int64)
        self._lowest = np.frombuffer(leaves.lowest, np.uint64)
        self._highest = np.frombuffer(leaves.highest, np.uint64)
        self._is_root = np.frombuffer(leaves.is_root, np.bool_)
        self._geometry = np.frombuffer(leaves.geometry, np.uint16)
        # No value is as high: neither is its data block outside, nor does the value that would follow it overflow.
        self._end = np.uint64(min(pool.nr_data_blocks, MAX_DATA_BLOCK) << TIME_BITS)
        self._pass_runs = getattr(visitor, "mappings", self._one_by_one)

    def _one_by_one(self, begins: Words, data_begins: Words, lengths: Words, times: Words) -> None:
        """Pass runs to a visitor that does not take arrays."""
        for run in zip(begins.tolist(), data_begins.tolist(), lengths.tolist(), times.tolist(), strict=True):
            self._visitor.mapping(*run)

    def _pass_on(self, leaves: array[int], entry: DeviceEntry | None, run: Run) -> int:
        if len(leaves) < WORTH_A_BATCH:
            return super()._pass_on(leaves, entry, run)
        numbers = np.frombuffer(leaves, np.uint32)
        blocks = self._blocks[numbers]
        # Leaves with few entries are no concern of a dump; those without any are looked at below.
        small = np.ones(len(numbers), np.bool_)
        found = at = 0
        while at < len(numbers):
            try:
                for nodes in self._batches.read(blocks[at:], small[at:]):
                    part = numbers[at : at + len(nodes.blocks)]
                    found += self._pass_batch(nodes, part, run)
                    at += len(part)
                    self._done(len(part))
            except NotClean:
                window = leaves[at : at + WINDOW_BLOCKS]
                found += super()._pass_on(window, entry, run)
                at += len(window)
        return found

    def _pass_batch(self, nodes: NodeBatch, leaves: NDArray[np.uint32], run: Run) -> int:
        """Verify nodes in the context of all their parents and pass on their mappings, but for the last *run*.

        :raises NotClean: something is unusual, and nothing has been passed on
        """
        keys, nr_entries = nodes.keys, nodes.nr_entries
        last = np.maximum(nr_entries - 1, 0)
        fits = (keys[:, 0] >= self._lowest[leaves]) & (keys[np.arange(len(leaves)), last] <= self._highest[leaves])
        clean = nodes.is_leaf & np.where(nr_entries > 0, fits, self._is_root[leaves])
        if not clean.all():
            raise NotClean(int(nodes.blocks[clean.argmin()]))
        keys, values = nodes.entries()
        if len(keys) and values.max() >= self._end:
            raise NotClean(int(nodes.blocks[0]))
        self._geometry[leaves] = _MAX_ENTRIES
        if len(keys):
            self._pass_entries(keys, values, run)
        return len(keys)

    def _pass_entries(self, keys: Words, values: Words, run: Run) -> None:
        """Pass on the runs of mappings in order, but for the last one, which *run* is set to."""
        ends = keys[1:] - keys[:-1] != np.uint64(1)
        ends |= values[1:] - values[:-1] != np.uint64(NEXT_BLOCK)
        starts = np.flatnonzero(ends) + 1
        goes_on = (
            run.length > 0
            and int(keys[0]) == run.begin + run.length
            and int(values[0]) == run.value + run.length * NEXT_BLOCK
        )
        if not goes_on:
            run.end(self._visitor)
            run.length = 0
            starts = np.concatenate((np.zeros(1, np.int64), starts))
        if not len(starts):
            run.length += len(keys)
            return
        begins, first, lengths = keys[starts[:-1]], values[starts[:-1]], np.diff(starts)
        if goes_on:
            begins = np.concatenate((np.array([run.begin], np.uint64), begins))
            first = np.concatenate((np.array([run.value], np.uint64), first))
            lengths = np.concatenate((np.array([run.length + int(starts[0])]), lengths))
        if len(begins):
            times = first & np.uint64(TIME_MASK)
            self._pass_runs(begins, first >> np.uint64(TIME_BITS), lengths.view(np.uint64), times)
        run.begin, run.value = int(keys[starts[-1]]), int(values[starts[-1]])
        run.length = len(keys) - int(starts[-1])
