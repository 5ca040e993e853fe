"""What two thin devices have in common and what not, read from the metadata without an engine.

Mappings are streamed.  In memory are the top-level trees, the children of one node on each level of both mapping trees,
and nodes read ahead, a megabyte of them at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from persistent_data.read_ahead import ReadAhead
from thinpool.differences import DIFFERENT, LEFT_ONLY, RIGHT_ONLY, SAME, Difference, differences
from thinpool.errors import NoSuchDevice
from thinpool.mapping_nodes import MappingNodes
from thinpool.pool_reader import PoolReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bufio.device import Device
    from thinpool.delta_batch import Columns
    from thinpool.mapping_walk import Subtree
    from thinpool.trees import DeviceEntry

    Progress = Callable[[int, int], None]


BULK_FROM_MAPPINGS = 1 << 16
"""Mappings on both sides together from which on it takes less time to load numpy first."""
BULK_FROM_HEIGHT = 2
"""The same for the levels above the leaves, where mappings have not been counted."""


class Thin(NamedTuple):
    """The mapping tree of the thin device *dev_id*."""

    dev_id: int


class Root(NamedTuple):
    """The mapping tree whose root is at metadata block *block*."""

    block: int


class PoolDelta:
    """The comparison of two mapping trees of the pool on *device*, or of its metadata snapshot.

    :ivar left: as given; so is *right*
    :ivar superblock: what the pool says of itself
    :param snap_block: the metadata block at which the snapshot must be, None for wherever it is
    :raises NoSuchDevice: there is no device with one of the ids
    :raises Corrupt: the superblock, a tree of devices, or the way to a first leaf is damaged
    :raises ThinError: ENODATA, the metadata snapshot was asked for and there is none; EINVAL, it is at another block,
        or a root is outside the metadata
    :raises OSError: the device cannot be read
    """

    def __init__(
        self,
        device: Device,
        left: Thin | Root,
        right: Thin | Root,
        metadata_snap: bool = False,
        snap_block: int | None = None,
    ) -> None:
        self._pool = PoolReader(device, metadata_snap, snap_block)
        self.superblock = self._pool.describe()
        self.left = left
        self.right = right
        self._devices: dict[int, DeviceEntry] = {}
        # Roots need no device trees: they may be asked for because those are damaged.
        if isinstance(left, Thin) or isinstance(right, Thin):
            self._devices = {entry.dev_id: entry for entry in self._pool.devices()}
        ahead = ReadAhead(self._pool.reader)
        self._nodes = (self._open(left, "snap1", ahead), self._open(right, "snap2", ahead))
        self._nr_mappings = self._nr_mappings_of_both()

    def _open(self, tree: Thin | Root, name: str, ahead: ReadAhead) -> MappingNodes:
        if isinstance(tree, Root):
            return MappingNodes(self._pool, ahead, tree.block)
        entry = self._devices.get(tree.dev_id)
        if entry is None:
            raise NoSuchDevice(f"Unable to find mapping tree for {name} ({tree.dev_id})")
        return MappingNodes(self._pool, ahead, entry.root, entry.path, entry.dev_id)

    def differences(self, *, same: bool = True, progress: Progress | None = None) -> Iterator[Difference]:
        """Iterate over what is mapped on either side, ascending by thin block, in longest runs.

        :param same: yield also what both sides map to the same data blocks; if not, what they share is not read, so
            damage in there goes unnoticed
        :param progress: called now and then with the mappings compared and those of both devices, if all are compared
            and there are details that say how many there are
        :raises Corrupt: damaged metadata, or a device has not as many mappings as its details say; everything before
            it has been returned
        :raises OSError: the device cannot be read
        """
        for found in self.in_bulk(same=same, progress=progress):
            if isinstance(found, Difference):
                yield found
            else:
                yield from found.differences()

    def in_bulk(
        self, *, same: bool = True, joined: bool = False, progress: Progress | None = None
    ) -> Iterator[Difference | Columns]:
        """Iterate over the same: of large devices in columns of many, until there is anything unusual about them.

        :param joined: those in columns may be as long as they are without regard to data blocks
        """
        begin = 0
        total = self._nr_mappings if same else None
        if self._is_large():
            from persistent_data.block_batches import NotClean
            from thinpool.delta_batch import DeltaBatches

            batches = DeltaBatches(self._pool, self._roots(), same=same, joined=joined)
            try:
                for columns in batches.columns():
                    yield columns
                    if progress is not None and total is not None:
                        progress(sum(batches.nr_mappings), total)
            except NotClean:
                begin = batches.begin
            else:
                if same:
                    self._check_counts(*batches.nr_mappings)
                return
        for found in self._one_by_one(same, progress):
            if found.thin_begin >= begin:
                yield found

    def _one_by_one(self, same: bool, progress: Progress | None) -> Iterator[Difference]:
        nr_blocks = dict.fromkeys((SAME, DIFFERENT, LEFT_ONLY, RIGHT_ONLY), 0)
        done = 0
        total = self._nr_mappings if same else None
        left, right = self._nodes
        reader = self._entries_of_both if same else None
        for found in differences(left.walk(), right.walk(), entries_of_both=reader):
            nr_blocks[found.kind] += found.length
            done += found.length if found.kind in (LEFT_ONLY, RIGHT_ONLY) else 2 * found.length
            if progress is not None and total is not None:
                progress(done, total)
            yield found
        if same:
            in_both = nr_blocks[SAME] + nr_blocks[DIFFERENT]
            self._check_counts(in_both + nr_blocks[LEFT_ONLY], in_both + nr_blocks[RIGHT_ONLY])

    def _entries_of_both(
        self, subtree: Subtree, high: int, twin: Subtree, twin_high: int
    ) -> tuple[Sequence[int], Sequence[int]]:
        left, right = self._nodes
        return left.entries_of_both(subtree, high, right, twin, twin_high)

    def _roots(self) -> tuple[int, int]:
        left, right = self._nodes
        return left.root, right.root

    def _is_large(self) -> bool:
        """Tell whether it takes less time to load numpy first."""
        if self._nr_mappings is not None:
            return self._nr_mappings >= BULK_FROM_MAPPINGS
        return max(nodes.height for nodes in self._nodes) >= BULK_FROM_HEIGHT

    def _nr_mappings_of_both(self) -> int | None:
        """Return how many mappings both trees have together, None if that is not known."""
        if isinstance(self.left, Root) or isinstance(self.right, Root):
            return None
        return sum(self._devices[tree.dev_id].mapped_blocks for tree in (self.left, self.right))

    def _check_counts(self, *found: int) -> None:
        for tree, nr_mappings in zip((self.left, self.right), found, strict=True):
            if isinstance(tree, Thin):
                self._pool.check_nr_mappings(self._devices[tree.dev_id], nr_mappings)
