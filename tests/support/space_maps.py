"""The three space maps behind one face, so that the same tests can be done to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.space_map_core import CoreSpaceMap
from persistent_data.space_map_disk import DiskSpaceMap
from tests.support.devices import SparseDevice
from tests.support.trees import BLOCK_SIZE, Store

if TYPE_CHECKING:
    from persistent_data.space_map import SpaceMap

KINDS = ["core", "disk", "metadata"]


class Subject:
    """A space map, and how to commit it and open it again.

    :ivar kind: one of ``KINDS``
    :ivar own: blocks that the map itself uses, or may come to use; a test leaves them alone
    """

    def __init__(self, kind: str, nr_blocks: int, cache_bytes: int | None = None) -> None:
        self.kind = kind
        self.store: Store | None = None
        self.map: SpaceMap
        if kind == "core":
            self.map = CoreSpaceMap(nr_blocks)
            return
        size = nr_blocks if kind == "metadata" else 400
        self.store = Store.format(SparseDevice(size * BLOCK_SIZE), cache_bytes=cache_bytes)
        self.map = self.store.sm if kind == "metadata" else DiskSpaceMap.create(self.store.tm, nr_blocks)
        self.commit()

    @property
    def can_be_reopened(self) -> bool:
        """Whether there is anything on a disk."""
        return self.store is not None

    def start(self) -> None:
        """Begin an operation, as the map's owner has to."""
        if self.store is not None:
            self.store.bm.begin_operation()

    def commit(self) -> None:
        """Make the counts durable."""
        self.start()
        if self.kind != "metadata":
            self.map.commit()
        if self.store is not None:
            self.store.commit([])
        self._blob = self.map.root_blob()

    def reopen(self) -> None:
        """Go back to the last commit, with nothing in memory."""
        assert self.store is not None
        self.store.reopen()
        self.map = self.store.sm if self.kind == "metadata" else DiskSpaceMap.open(self.store.tm, self._blob)

    def extend(self, extra: int) -> None:
        """Count more blocks, on a larger device if they are its own."""
        self.start()
        if self.kind == "metadata":
            assert self.store is not None
            assert isinstance(self.store.device, SparseDevice)
            self.store.device.grow((self.map.nr_blocks + extra) * BLOCK_SIZE)
        self.map.extend(extra)
