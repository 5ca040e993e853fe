"""The numbers of the on-disk format that code needs where speed or start-up time counts.

Everything here is also declared, field by field, in :mod:`persistent_data.format`; a test derives these constants from
that declaration and compares (tests/unit/persistent_data/test_format.py).  This module imports nothing but ``struct``,
so that a tool which looks at ten blocks does not pay for a parser library.

Source: docs/format.md, "Btree node", "Space maps".  All integers are little-endian.
"""

from __future__ import annotations

from struct import Struct

BLOCK_SIZE = 4096
"""Bytes in a metadata block."""
SECTOR_SHIFT = 9
SECTORS_PER_BLOCK = BLOCK_SIZE >> SECTOR_SHIFT

BLOCK_HEADER = Struct("<IIQ")
"""Of every kind of block: checksum, a word that depends on the kind, the block's own number."""
BLOCKNR_OFFSET = 8
"""Byte offset of the block's own number, in every kind of block."""
BLOCKNR = Struct("<Q")
CHECKSUM = Struct("<I")

NODE_HEADER = Struct("<IIQIIII")
NODE_FIELDS = ("csum", "flags", "blocknr", "nr_entries", "max_entries", "value_size", "padding")
NODE_HEADER_SIZE = 32
INTERNAL_NODE = 1
LEAF_NODE = 2
KEY_SIZE = 8

BITMAP_HEADER_SIZE = 16
ENTRIES_PER_BYTE = 4
ENTRIES_PER_BITMAP = (BLOCK_SIZE - BITMAP_HEADER_SIZE) * ENTRIES_PER_BYTE
"""Reference counts in one bitmap block: 16320."""

INDEX_ENTRY = Struct("<QII")
"""blocknr of the bitmap, nr_free, none_free_before."""
INDEX_HEADER_SIZE = 16
MAX_METADATA_BITMAPS = (BLOCK_SIZE - INDEX_HEADER_SIZE) // INDEX_ENTRY.size
MAX_METADATA_BLOCKS = MAX_METADATA_BITMAPS * ENTRIES_PER_BITMAP
"""Metadata blocks that one pool can use: 4161600, just under 16 GiB."""

SPACE_MAP_ROOT = Struct("<QQQQ")
"""nr_blocks, nr_allocated, bitmap_root, ref_count_root."""

REF_COUNT_VALUE = Struct("<I")
"""A value of the overflow tree: counts of three and more."""
OVERFLOW_COUNT = 3
"""Smallest count kept in the overflow tree."""

CODE_TO_COUNT = (0, 2, 1, 3)
"""Reference count for the two bits of a bitmap entry as they stand in the byte (their order is reversed)."""
COUNT_TO_CODE = (0, 2, 1, 3)


def max_entries(value_size: int) -> int:
    """Entries a node holds for values of *value_size* bytes; always a multiple of three."""
    return (BLOCK_SIZE - NODE_HEADER_SIZE) // (KEY_SIZE + value_size) // 3 * 3
