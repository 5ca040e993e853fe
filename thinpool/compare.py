"""What two devices of an open pool do not have in common.  Source: docs/design.md, "Comparing devices"."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from persistent_data.btree_spine import READ_AHEAD
from thinpool.differences import differences
from thinpool.errors import ThinError, from_below
from thinpool.mapping_walk import MappingWalk, Subtree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from thinpool.differences import Difference
    from thinpool.thin_device import ThinDevice


class _DeviceNodes:
    """The nodes of a device's mapping tree, through the pool's cache, for as long as the device does not change."""

    most_ahead = READ_AHEAD

    def __init__(self, device: ThinDevice) -> None:
        self._device = device
        pool = device._pool
        with pool._lock:
            root = device._start_query()
            self._version = self._state()
            try:
                height = pool._storage.trees.mappings.height(root)
            except OSError as error:
                raise from_below(error) from error
        self.tree = Subtree(0, root, height, ())

    def _state(self) -> tuple[int, int, int]:
        handle = self._device._live_handle()
        return self._device._pool._mapping_root(handle), handle.nr_changes, handle.snapshotted_time

    def entries(self, subtree: Subtree, high: int) -> tuple[Sequence[int], Sequence[int]]:
        pool = self._device._pool
        with pool._lock:
            pool._start_query()
            if self._state() != self._version:
                raise ThinError(errno.EINVAL, f"device {self._device.dev_id} changed while it was being compared")
            is_leaf = subtree.height == 0
            try:
                return pool._storage.trees.mappings.node_entries(subtree.block, subtree.low, high, is_leaf=is_leaf)
            except OSError as error:
                raise from_below(error) from error

    def read_ahead(self, blocks: set[int]) -> None:
        pool = self._device._pool
        with pool._lock:
            pool._start_query()
            pool._storage.bm.prefetch_all(blocks)


def delta(left: ThinDevice, right: ThinDevice) -> Iterator[Difference]:
    """Iterate over the thin blocks that *left* and *right*, devices of one pool, map differently, ascending.

    Only data blocks are compared, not times.  Neither device may be changed meanwhile.

    :raises ThinError: EINVAL when one of them was changed, or they belong to different pools
    :raises Corrupt: damaged metadata; everything before it has been returned
    """
    if left._pool is not right._pool:
        raise ThinError(errno.EINVAL, "only devices of the same pool can be compared")
    sides = (_DeviceNodes(left), _DeviceNodes(right))
    yield from differences(*(MappingWalk(nodes, nodes.tree) for nodes in sides))
