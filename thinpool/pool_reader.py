"""Read a pool without an engine, for programs that must not go on from damage: everything is verified, or it raises."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from persistent_data.block_reader import BlockReader
from persistent_data.btree_walk import BTreeWalk
from persistent_data.damage import FATAL
from persistent_data.layout import ENTRIES_PER_BITMAP, MAX_METADATA_BLOCKS
from persistent_data.ref_counts import RefCounts
from thinpool import ir
from thinpool.errors import Corrupt, ThinError
from thinpool.layout import SUPERBLOCK_LOCATION, Superblock
from thinpool.superblock_check import superblock_fault
from thinpool.trees import (
    DETAILS_KIND,
    DETAILS_TREE,
    MAPPED_BLOCKS,
    SNAP_PREFIX,
    TOP_LEVEL,
    TOP_LEVEL_KIND,
    DetailsVisitor,
    TopLevelVisitor,
    describe_damage,
)

if TYPE_CHECKING:
    from typing import NoReturn

    from bufio.device import Device
    from persistent_data.damage import Damage
    from thinpool.trees import DeviceEntry


class PoolReader:
    """The superblock and the devices of the pool on *device*, or of its metadata snapshot.

    :ivar reader: reads single blocks
    :ivar main: the pool's superblock
    :ivar superblock: the metadata snapshot's superblock if that was asked for, else the pool's
    :ivar nr_blocks: metadata blocks that the pool uses
    :ivar nr_data_blocks: data blocks of the pool, for the metadata snapshot too
    :param snap_block: the metadata block at which that snapshot must be, None for wherever it is
    :param mapping_root: metadata block of the root of the mapping tree, None for what the superblock says
    :param details_root: metadata block of the root of the details tree, None for what the superblock says
    :raises Corrupt: there is no sound superblock
    :raises ThinError: ENODATA, the metadata snapshot was asked for and there is none; EINVAL, it is at another block
    :raises OSError: the device cannot be read
    """

    def __init__(
        self,
        device: Device,
        metadata_snap: bool = False,
        snap_block: int | None = None,
        *,
        mapping_root: int | None = None,
        details_root: int | None = None,
    ) -> None:
        self.reader = BlockReader(device)
        self.prefix = ""
        self._tree = ""
        self._dev_id: int | None = None
        self._mapping_root = mapping_root
        self._details_root = details_root
        self.main = self._read_superblock(SUPERBLOCK_LOCATION)
        self.superblock = self.main
        self.location = SUPERBLOCK_LOCATION
        if metadata_snap:
            self.prefix = SNAP_PREFIX
            self.location = self.main.held_root
            if self.location == 0:
                raise ThinError(errno.ENODATA, "no current metadata snap is held by this pool")
            if snap_block not in (None, self.location):
                message = f"metadata snapshot does not match that in superblock, which is at block {self.location}"
                raise ThinError(errno.EINVAL, message)
            self.superblock = self._read_superblock(self.location)
        root = self.main.metadata_root
        self.nr_blocks = min(root.nr_blocks, self.reader.nr_blocks, MAX_METADATA_BLOCKS)
        self.nr_data_blocks = self.main.data_root.nr_blocks
        if self.main.incompat_flags:
            rule = f"incompatible feature flags {self.main.incompat_flags:#x}"
            raise Corrupt(SUPERBLOCK_LOCATION, rule, number=errno.EINVAL)
        if self.nr_data_blocks > MAX_METADATA_BLOCKS * ENTRIES_PER_BITMAP:
            raise self._too_many_data_blocks()

    def require_countable(self) -> None:
        """Refuse more data blocks than this device has room for bitmaps of: they would take memory for nothing.

        :raises Corrupt: the superblock claims as many
        """
        if self.nr_data_blocks > self.nr_blocks * ENTRIES_PER_BITMAP:
            raise self._too_many_data_blocks()

    def _too_many_data_blocks(self) -> Corrupt:
        rule = f"data space map of {self.nr_data_blocks} blocks, more than bitmaps can be stored for"
        return Corrupt(SUPERBLOCK_LOCATION, rule)

    def _read_superblock(self, location: int) -> Superblock:
        if not 0 <= location < self.reader.nr_blocks:
            raise Corrupt(location, f"{self.prefix}superblock outside the device of {self.reader.nr_blocks} blocks")
        content = self.reader.read(location)
        fault = superblock_fault(content, location)
        if fault is not None:
            raise Corrupt(location, fault.rule, message=f"{self.prefix}{fault} (block {location})")
        return Superblock.unpack(content)

    def describe(self) -> ir.Superblock:
        """Return what the pool, or the metadata snapshot, says of itself.

        The metadata snapshot does not have the number of data blocks: it is 0 there.
        """
        sb = self.superblock
        return ir.Superblock(
            time=sb.time,
            transaction=sb.trans_id,
            needs_check=sb.needs_check,
            version=sb.version,
            data_block_size=sb.data_block_size,
            nr_data_blocks=sb.data_root.nr_blocks,
        )

    def new_walk(self) -> BTreeWalk:
        """Return a walk that raises at the first fatal fault, :class:`Corrupt`, and keeps quiet about lesser ones."""
        return BTreeWalk(self.reader, self.nr_blocks, self._refuse, RefCounts(self.nr_blocks))

    def enter(self, tree: str, dev_id: int | None = None) -> None:
        """Say which tree the next walk is of, for the sake of messages."""
        self._tree = tree
        self._dev_id = dev_id

    def _refuse(self, damage: Damage) -> None:
        if damage.fault.severity == FATAL:
            self.refuse(damage, self._tree, self._dev_id)

    def refuse(self, damage: Damage, tree: str, dev_id: int | None = None) -> NoReturn:
        """Raise :class:`Corrupt` for damage in *tree*."""
        message = describe_damage(damage, self.prefix + tree, dev_id)
        raise Corrupt(damage.block, damage.fault.rule, message=message)

    def check_nr_mappings(self, entry: DeviceEntry, found: int) -> None:
        """Compare the number of mappings found in a device's tree with that of its details.

        :raises Corrupt: they differ
        """
        if found != entry.mapped_blocks:
            message = (
                f"{self.prefix}Thin device {entry.dev_id} has unexpected number of mappings, "
                f"expected {entry.mapped_blocks}, actual {found} (root block {entry.root})"
            )
            raise Corrupt(entry.root, MAPPED_BLOCKS, message=message)

    def _tree_root(self, named: int | None, stored: int) -> tuple[int, tuple[int, ...]]:
        """Return the root of a tree and the metadata blocks that lead there; nothing leads to one that was *named*."""
        if named is not None:
            return named, ()
        return stored, (0,) if self.location == SUPERBLOCK_LOCATION else (0, self.location)

    def devices(self) -> list[DeviceEntry]:
        """Return every device, ascending by id.

        :raises Corrupt: one of the two device trees is damaged, or they name different devices
        """
        walk = self.new_walk()
        details = DetailsVisitor()
        self.enter(DETAILS_TREE)
        root, path = self._tree_root(self._details_root, self.superblock.device_details_root)
        walk.walk(root, DETAILS_KIND, details, path)
        roots = TopLevelVisitor()
        self.enter(TOP_LEVEL)
        root, path = self._tree_root(self._mapping_root, self.superblock.data_mapping_root)
        walk.walk(root, TOP_LEVEL_KIND, roots, path)
        odd = sorted(details.devices.keys() ^ roots.roots.keys())
        if odd:
            only = "details tree" if odd[0] in details.devices else "mapping tree"
            message = (
                f"{self.prefix}Inconsistency between the details tree and the mapping tree: "
                f"thin device {odd[0]} is in the {only} only"
            )
            raise Corrupt(None, "inconsistent device ids", message=message)
        result = []
        for dev_id in sorted(details.devices):
            device = details.devices[dev_id]
            device.root, device.path = roots.roots[dev_id]
            result.append(device)
        return result
