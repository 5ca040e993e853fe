"""The superblock and the two kinds of thin value, in the form that the engine and the tools read and write.

The declaration, field by field, is in :mod:`thinpool.format`; a test compares the two.  This module imports only
``struct`` and its neighbours below, because every tool starts with it.

Source: docs/format.md, "Superblock", "The four tree types".
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from persistent_data.checksum import SUPERBLOCK_SALT, block_checksum
from persistent_data.layout import BLOCK_SIZE, SPACE_MAP_ROOT

if TYPE_CHECKING:
    from bufio.device import ReadableBuffer

SUPERBLOCK_LOCATION = 0
SUPERBLOCK_MAGIC = 27022010
SUPERBLOCK_VERSION = 2
NEEDS_CHECK_FLAG = 1
METADATA_BLOCK_SECTORS = 8

SUPERBLOCK = Struct("<IIQ16sQIIQQ128s128sQQIIQIII")
"""The live 364 bytes; what follows in the block is preserved."""
SUPERBLOCK_FIELDS = (
    "csum",
    "flags",
    "blocknr",
    "uuid",
    "magic",
    "version",
    "time",
    "trans_id",
    "held_root",
    "data_space_map_root",
    "metadata_space_map_root",
    "data_mapping_root",
    "device_details_root",
    "data_block_size",
    "metadata_block_size",
    "metadata_nr_blocks",
    "compat_flags",
    "compat_ro_flags",
    "incompat_flags",
)
SPACE_MAP_ROOT_SIZE = 128

DEVICE_DETAILS = Struct("<QQII")
"""mapped_blocks, transaction_id, creation_time, snapshotted_time."""

TIME_BITS = 24
"""A mapping is ``data_block << 24 | time``."""
TIME_MASK = (1 << TIME_BITS) - 1
MAX_TIME = TIME_MASK
MAX_DATA_BLOCK = (1 << 40) - 1
MAX_DEVICE_ID = (1 << 24) - 1

MIN_DATA_BLOCK_SIZE = 128
MAX_DATA_BLOCK_SIZE = 2097152
"""Sectors; the size must also be a multiple of the minimum."""


def valid_data_block_size(sectors: int) -> bool:
    """Tell whether a pool may have data blocks of that many sectors."""
    return MIN_DATA_BLOCK_SIZE <= sectors <= MAX_DATA_BLOCK_SIZE and sectors % MIN_DATA_BLOCK_SIZE == 0


class SpaceMapRoot:
    """A space map's root: nr_blocks and nr_allocated in blocks, the other two are metadata blocks."""

    __slots__ = ("bitmap_root", "nr_allocated", "nr_blocks", "ref_count_root")

    def __init__(self, nr_blocks: int, nr_allocated: int, bitmap_root: int, ref_count_root: int) -> None:
        self.nr_blocks = nr_blocks
        self.nr_allocated = nr_allocated
        self.bitmap_root = bitmap_root
        self.ref_count_root = ref_count_root

    @classmethod
    def unpack(cls, blob: ReadableBuffer) -> SpaceMapRoot:
        """Take the root from the first 32 bytes of *blob*."""
        return cls(*SPACE_MAP_ROOT.unpack_from(blob))


class Superblock:
    """The fields of a superblock, as attributes named as in docs/format.md; both space map roots as 128 raw bytes."""

    __slots__ = SUPERBLOCK_FIELDS

    csum: int
    flags: int
    blocknr: int
    uuid: bytes
    magic: int
    version: int
    time: int
    trans_id: int
    held_root: int
    data_space_map_root: bytes
    metadata_space_map_root: bytes
    data_mapping_root: int
    device_details_root: int
    data_block_size: int
    metadata_block_size: int
    metadata_nr_blocks: int
    compat_flags: int
    compat_ro_flags: int
    incompat_flags: int

    @classmethod
    def unpack(cls, block: ReadableBuffer) -> Superblock:
        """Take the fields from a metadata block.  Nothing is verified: see :func:`superblock_error`."""
        self = cls()
        for name, value in zip(SUPERBLOCK_FIELDS, SUPERBLOCK.unpack_from(block), strict=True):
            setattr(self, name, value)
        return self

    def pack_into(self, block: bytearray | memoryview) -> None:
        """Write the fields into a metadata block and leave the rest of it as it is.  The checksum is not computed."""
        SUPERBLOCK.pack_into(block, 0, *(getattr(self, name) for name in SUPERBLOCK_FIELDS))

    @property
    def needs_check(self) -> bool:
        """True when the kernel gave up on this pool and wants it checked."""
        return bool(self.flags & NEEDS_CHECK_FLAG)

    @property
    def data_root(self) -> SpaceMapRoot:
        """Root of the space map that counts references to data blocks."""
        return SpaceMapRoot.unpack(self.data_space_map_root)

    @property
    def metadata_root(self) -> SpaceMapRoot:
        """Root of the space map that counts references to metadata blocks."""
        return SpaceMapRoot.unpack(self.metadata_space_map_root)


def superblock_error(block: ReadableBuffer, location: int = SUPERBLOCK_LOCATION) -> str | None:
    """Say what keeps a block from being a superblock written to *location*; None when nothing does.

    In the kernel's order: block number, magic, checksum.
    """
    sb = Superblock.unpack(block)
    if sb.blocknr != location and sb.magic != SUPERBLOCK_MAGIC:
        return f"not the superblock of a thin pool: magic {sb.magic}, block number {sb.blocknr}"
    if sb.blocknr != location:
        return f"superblock is marked as block {sb.blocknr} instead of {location}"
    if sb.magic != SUPERBLOCK_MAGIC:
        return f"bad magic in superblock: {sb.magic} instead of {SUPERBLOCK_MAGIC}"
    wanted = block_checksum(block, SUPERBLOCK_SALT)
    if sb.csum != wanted:
        return f"bad checksum in superblock: {sb.csum:#010x} instead of {wanted:#010x}"
    return None


assert SUPERBLOCK.size < BLOCK_SIZE
