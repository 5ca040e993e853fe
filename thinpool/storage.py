"""The metadata device of a pool: its superblock, space maps and trees, and the two steps of a commit.

A commit first puts everything but the superblock on the device, then the superblock.  The superblock is dirty only
between the two, so whatever happens the device holds either the last commit or this one.  Source: docs/design.md,
"Commit".
"""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING

from persistent_data.block_manager import BlockManager, Validator, complete_for_write
from persistent_data.btree import BTree, block_pointers
from persistent_data.checksum import SUPERBLOCK_SALT
from persistent_data.errors import CorruptMetadata
from persistent_data.layout import BLOCK_SIZE
from persistent_data.space_map_disk import DiskSpaceMap
from persistent_data.space_map_metadata import MetadataSpaceMap
from persistent_data.transaction_manager import NonBlockingTransactionManager, TransactionManager
from thinpool.durable_superblock import make_superblock_durable
from thinpool.layout import (
    METADATA_BLOCK_SECTORS,
    SPACE_MAP_ROOT_SIZE,
    SUPERBLOCK_LOCATION,
    SUPERBLOCK_MAGIC,
    SUPERBLOCK_VERSION,
    Superblock,
    superblock_error,
    valid_data_block_size,
)
from thinpool.values import block_times, device_details, mapping_roots

if TYPE_CHECKING:
    from bufio import Device
    from bufio.engine import Engine

_MAX_DEVICE_SECTORS = 33292800


class SuperblockValidator(Validator):
    """The superblock, and the copy of it that a metadata snapshot is."""

    def __init__(self) -> None:
        super().__init__("superblock", SUPERBLOCK_SALT)

    def check(self, data: memoryview, block: int) -> None:
        """Accept the bytes read from *block*; see :class:`Validator`."""
        problem = superblock_error(data, block)
        if problem is not None:
            wrong_place = Superblock.unpack(data).blocknr != block
            raise CorruptMetadata(block, problem, number=errno.ENOTBLK if wrong_place else errno.EILSEQ)


SUPERBLOCK_BLOCK = SuperblockValidator()


class Trees:
    """The views of the pool's trees; see docs/design.md, "Trees"."""

    def __init__(self, tm: TransactionManager, data_map: DiskSpaceMap) -> None:
        mapping_type = block_times(data_map)
        self.mappings = BTree(tm, [mapping_type])
        """One device's mapping tree."""
        self.info = BTree(tm, [block_pointers(tm), mapping_type])
        """Device id, then thin block: both levels at once."""
        self.top_level = BTree(tm, [mapping_roots(tm, self.mappings)])
        """Device id to the root of its mapping tree; giving up a root deletes the tree."""
        self.details = BTree(tm, [device_details()])


class Storage:
    """The pool's metadata as of the last commit, with a transaction open on it.

    ``superblock`` is the last commit's; the fields of the next one are passed to :meth:`commit`.
    """

    def __init__(
        self, bm: BlockManager, superblock: Superblock, tm: TransactionManager, data_map: DiskSpaceMap
    ) -> None:
        self.bm = bm
        self.superblock = superblock
        self.tm = tm
        self.metadata_map = tm.sm
        self.data_map = data_map
        self.trees = Trees(tm, data_map)
        self.non_blocking: NonBlockingTransactionManager = tm.non_blocking_clone()
        self.superblock_in_doubt = False
        """A superblock was written, or was to be, and the device did not confirm that it is durable."""

    @classmethod
    def format(cls, device: Device, data_block_size: int, cache_bytes: int | None, engine: Engine | None) -> Storage:
        """Write the metadata of an empty pool without data blocks; what was on the device is lost.

        :raises NoFreeBlock: the device is too small
        """
        bm = BlockManager(device, cache_bytes=cache_bytes, engine=engine)
        try:
            metadata_map = MetadataSpaceMap()
            tm = TransactionManager(bm, metadata_map)
            metadata_map.create(tm, bm.nr_blocks, SUPERBLOCK_LOCATION + 1)
            data_map = DiskSpaceMap.create(tm, 0)
            sb = Superblock()
            sb.csum = sb.flags = sb.blocknr = sb.time = sb.trans_id = sb.held_root = 0
            sb.compat_flags = sb.compat_ro_flags = sb.incompat_flags = 0
            sb.uuid = bytes(16)
            sb.magic = SUPERBLOCK_MAGIC
            sb.version = SUPERBLOCK_VERSION
            sb.data_block_size = data_block_size
            sb.metadata_block_size = METADATA_BLOCK_SECTORS
            sb.metadata_nr_blocks = min(bm.nr_blocks, _MAX_DEVICE_SECTORS // METADATA_BLOCK_SECTORS)
            self = cls(bm, sb, tm, data_map)
            sb.data_mapping_root = self.trees.info.empty()
            sb.device_details_root = self.trees.details.empty()
            self._write_maps()
            view = bm.borrow_zeroed(SUPERBLOCK_LOCATION, SUPERBLOCK_BLOCK)
            self._fill(view.data, sb)
            tm.commit(view)
            bm.begin_operation()
        except BaseException:
            bm.close(write=False)
            raise
        return cls.reopen(bm)

    @classmethod
    def open(cls, device: Device, cache_bytes: int | None, engine: Engine | None, *, read_only: bool) -> Storage:
        """Open what is on the device.

        :raises CorruptMetadata: it is not, or not sound, metadata
        """
        bm = BlockManager(device, cache_bytes=cache_bytes, engine=engine, read_only=read_only)
        bm.before_first_write(partial(make_superblock_durable, device))
        try:
            return cls.reopen(bm)
        except BaseException:
            bm.close(write=False)
            raise

    @classmethod
    def reopen(cls, bm: BlockManager) -> Storage:
        """Open what is on the device of *bm*, whose cache has nothing to write."""
        bm.begin_operation()
        return cls._open(bm, cls.read_superblock(bm))

    def reopen_committed(self) -> Storage:
        """Open the last commit once more, beside a transaction that has failed."""
        return self._open(self.bm, self.superblock)

    @classmethod
    def _open(cls, bm: BlockManager, superblock: Superblock) -> Storage:
        roots = superblock.metadata_root, superblock.data_root
        if roots[0].nr_blocks > bm.nr_blocks:
            raise CorruptMetadata(
                SUPERBLOCK_LOCATION,
                f"metadata has {roots[0].nr_blocks} blocks, but the device only {bm.nr_blocks}",
                number=errno.EINVAL,
            )
        metadata_map = MetadataSpaceMap()
        tm = TransactionManager(bm, metadata_map)
        metadata_map.open(tm, superblock.metadata_space_map_root)
        data_map = DiskSpaceMap.open(tm, superblock.data_space_map_root)
        return cls(bm, superblock, tm, data_map)

    @staticmethod
    def read_superblock(bm: BlockManager, location: int = SUPERBLOCK_LOCATION) -> Superblock:
        """Read and check a superblock.

        :raises CorruptMetadata: it is none, or one that must not be opened
        """
        superblock = Superblock.unpack(bm.borrow(location, SUPERBLOCK_BLOCK).data)
        if superblock.incompat_flags:
            raise CorruptMetadata(
                location, f"unknown incompatible features {superblock.incompat_flags:#x}", number=errno.EINVAL
            )
        if superblock.compat_ro_flags and not bm.read_only:
            raise CorruptMetadata(
                location, f"features {superblock.compat_ro_flags:#x} allow reading only", number=errno.EINVAL
            )
        if not valid_data_block_size(superblock.data_block_size):
            raise CorruptMetadata(
                location,
                f"data_block_size of {superblock.data_block_size} sectors is not possible",
                number=errno.EINVAL,
            )
        return superblock

    def commit(self, fields: Superblock) -> None:
        """Make the transaction durable: the maps, all blocks, then the superblock with *fields*; begin the next one.

        *fields* has the roots and counters of the transaction; the space map roots are filled in here.

        :raises OSError: a write failed, and what is on the device is the last commit or this one
        """
        self._write_maps()
        view = self.bm.borrow_for_write(SUPERBLOCK_LOCATION, SUPERBLOCK_BLOCK)
        self._fill(view.data, fields)
        try:
            self.tm.commit(view)
        except BaseException:
            # It must not get to the device later, when memory runs short: the transaction has failed.
            self.bm.forget(SUPERBLOCK_LOCATION)
            self.superblock_in_doubt = True
            raise
        self.superblock = fields

    def settle_superblock(self) -> None:
        """Write the superblock that was found on the device once more, so that it is the durable one.

        What was read back after a failed flush need not survive a power cut, and then the blocks that only the other
        superblock refers to must not have been overwritten.

        :raises OSError: the device still refuses
        """
        self.bm.borrow_for_write(SUPERBLOCK_LOCATION, SUPERBLOCK_BLOCK)
        self.bm.flush()
        self.superblock_in_doubt = False

    def _write_maps(self) -> None:
        self.data_map.commit()
        self.tm.pre_commit()

    def _fill(self, data: memoryview, fields: Superblock) -> None:
        fields.data_space_map_root = self.data_map.root_blob().ljust(SPACE_MAP_ROOT_SIZE, b"\0")
        fields.metadata_space_map_root = self.metadata_map.root_blob().ljust(SPACE_MAP_ROOT_SIZE, b"\0")
        fields.pack_into(data)

    def copy_superblock(self) -> tuple[int, Superblock]:
        """Copy the committed superblock to a new block, as a metadata snapshot; return the block and its fields."""
        tm = self.tm
        tm.inc(SUPERBLOCK_LOCATION)
        view, _ = tm.shadow_block(SUPERBLOCK_LOCATION, SUPERBLOCK_BLOCK)
        copy = Superblock.unpack(view.data)
        copy.data_space_map_root = copy.metadata_space_map_root = bytes(SPACE_MAP_ROOT_SIZE)
        copy.held_root = 0
        copy.pack_into(view.data)
        return view.block, copy

    def write_flags(self, flags: int) -> None:
        """Put new flags into the committed superblock, at once.  Nothing else of the transaction goes to the device.

        :raises ReadOnlyMetadata: in read-only mode
        """
        self.bm.require_writable(SUPERBLOCK_LOCATION)
        view = self.bm.borrow(SUPERBLOCK_LOCATION, SUPERBLOCK_BLOCK)
        self.superblock.flags = flags
        self.superblock.pack_into(view.data)
        complete_for_write(view.buffer)
        self.bm.device.pwrite(view.data, SUPERBLOCK_LOCATION * BLOCK_SIZE)
        self.bm.device.flush()
