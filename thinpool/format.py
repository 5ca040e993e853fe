"""Declarations of what dm-thin itself puts on disk: the superblock and the values of its trees.

The structures they stand on are in :mod:`persistent_data.format`; code that runs often uses :mod:`thinpool.layout`,
whose numbers a test derives from here.  Source: docs/format.md.
"""

from __future__ import annotations

from construct import Bytes, BytesInteger, FlagsEnum, GreedyBytes, Int32ul, Int64ul, Struct

from persistent_data.format import SpaceMapRoot

SuperblockFlags = FlagsEnum(Int32ul, needs_check=1)
"""needs_check: the kernel gave up on the pool and wants it checked.  Other bits have no meaning and are preserved."""

SPACE_MAP_ROOT_BYTES = 128

SpaceMapRootField = Struct(
    "root" / SpaceMapRoot,
    "unspecified" / Bytes(SPACE_MAP_ROOT_BYTES - SpaceMapRoot.sizeof()),  # whatever the writer had there
)
"""The superblock's place for the root of a space map."""

Superblock = Struct(
    "csum" / Int32ul,  # salt 160774
    "flags" / SuperblockFlags,
    "blocknr" / Int64ul,  # 0; in a metadata snapshot the metadata block that holds the copy
    "uuid" / Bytes(16),  # zero, not used
    "magic" / Int64ul,  # 27022010
    "version" / Int32ul,  # 1 before Linux 3.14, else 2; the layout is the same
    "time" / Int32ul,  # snapshots taken in this pool so far
    "trans_id" / Int64ul,  # the user's transaction id
    "held_root" / Int64ul,  # metadata block of the metadata snapshot's superblock, 0 for none
    "data_space_map_root" / SpaceMapRootField,  # counts references to data blocks
    "metadata_space_map_root" / SpaceMapRootField,  # counts references to metadata blocks, its own included
    "data_mapping_root" / Int64ul,  # metadata block: root of the tree from device id to mapping tree
    "device_details_root" / Int64ul,  # metadata block: root of the tree from device id to details
    "data_block_size" / Int32ul,  # sectors of 512 bytes; a multiple of 128 from 128 to 2097152
    "metadata_block_size" / Int32ul,  # sectors: 8
    "metadata_nr_blocks" / Int64ul,  # metadata blocks when the pool was made; the space map knows the present number
    "compat_flags" / Int32ul,  # features that may be ignored; none is defined
    "compat_ro_flags" / Int32ul,  # features that must be known to write; none is defined
    "incompat_flags" / Int32ul,  # features that must be known to read; none is defined
    "rest" / GreedyBytes,  # zero when the pool was made, then preserved
)
"""Metadata block 0, and the copy of it that a metadata snapshot holds."""

DeviceDetails = Struct(
    "mapped_blocks" / Int64ul,  # entries in the device's mapping tree: data blocks
    "transaction_id" / Int64ul,  # the pool's trans_id when the device was created
    "creation_time" / Int32ul,  # the pool's time when the device was created
    "snapshotted_time" / Int32ul,  # the pool's time when the device was last made a snapshot of, or was made as one
)
"""A value of the details tree; the key is the device id."""

BlockTime = Struct(
    "time" / BytesInteger(3, swapped=True),  # the pool's time when the mapping was made
    "data_block" / BytesInteger(5, swapped=True),  # in units of data_block_size
)
"""A value of a mapping tree, as a little-endian u64: the data block in the upper 40 bits; the key is the thin block."""
