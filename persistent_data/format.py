"""Declarations of every block that persistent data is made of: each field with its unit and meaning.

This is the format and nothing else.  Code that reads blocks by the thousand uses :mod:`persistent_data.layout`, whose
numbers a test derives from here.  All integers are unsigned and little-endian; nothing is aligned or padded beyond what
is declared.  Source: docs/format.md.
"""

from __future__ import annotations

from construct import Array, Bytes, Enum, GreedyBytes, Int32ul, Int64ul, Struct, this

BLOCK_BYTES = 4096

BlockHeader = Struct(
    "csum" / Int32ul,  # CRC-32C of bytes 4 to 4095 without final inversion, xored with the salt of the block's kind
    "kind_word" / Int32ul,  # flags in a superblock or node, zero elsewhere
    "blocknr" / Int64ul,  # the metadata block this was written to
)
"""What every kind of block begins with."""

NodeFlags = Enum(Int32ul, internal=1, leaf=2)
"""Exactly one of the two."""

NodeHeader = Struct(
    "csum" / Int32ul,
    "flags" / NodeFlags,  # internal: values are children; leaf: values are the tree's
    "blocknr" / Int64ul,  # the metadata block this was written to
    "nr_entries" / Int32ul,  # keys and values in use
    "max_entries" / Int32ul,  # keys and values there is room for; says where the values begin
    "value_size" / Int32ul,  # bytes in a value
    "padding" / Int32ul,  # zero
)

Node = Struct(
    "header" / NodeHeader,
    "keys" / Array(this.header.nr_entries, Int64ul),  # strictly ascending
    "unused_keys" / Bytes((this.header.max_entries - this.header.nr_entries) * Int64ul.sizeof()),  # no meaning
    "values" / Array(this.header.nr_entries, Bytes(this.header.value_size)),  # value i belongs to key i
    "rest" / GreedyBytes,  # unused values, and what does not divide into entries; no meaning
)
"""A btree node, of a whole block."""

BITMAP_WORDS = (BLOCK_BYTES - BlockHeader.sizeof()) // Int64ul.sizeof()
ENTRIES_PER_WORD = 32

Bitmap = Struct(
    "csum" / Int32ul,
    "not_used" / Int32ul,  # zero
    "blocknr" / Int64ul,  # the metadata block this was written to
    # Entry e is in word e / 32.  Of its two bits, 2 * (e % 32) is the high and the next one the low bit of the count;
    # the value 3 means that the count is in the overflow tree.
    "words" / Array(BITMAP_WORDS, Int64ul),
)
"""Reference counts of consecutive blocks, two bits each."""

IndexEntry = Struct(
    "blocknr" / Int64ul,  # metadata block of the bitmap
    "nr_free" / Int32ul,  # entries that are zero, those beyond the end of the space map among them
    "none_free_before" / Int32ul,  # no entry below this number is zero
)
"""What a space map keeps of a bitmap: a value of the index tree, or an element of the index block."""

INDEX_ENTRIES = (BLOCK_BYTES - BlockHeader.sizeof()) // IndexEntry.sizeof()

MetadataIndex = Struct(
    "csum" / Int32ul,
    "padding" / Int32ul,  # zero
    "blocknr" / Int64ul,  # the metadata block this was written to
    "entries" / Array(INDEX_ENTRIES, IndexEntry),  # entry i is of the bitmap for blocks from i * 16320 on
)
"""The index of the metadata space map."""

SpaceMapRoot = Struct(
    "nr_blocks" / Int64ul,  # blocks whose references are counted
    "nr_allocated" / Int64ul,  # those with a count above zero
    "bitmap_root" / Int64ul,  # metadata block: the index block, or the root of the index tree
    "ref_count_root" / Int64ul,  # metadata block: the root of the overflow tree
)
"""Where a space map begins; the superblock has one for each space map."""

OverflowValue = Struct(
    "ref_count" / Int32ul,  # references to the block that is the key; three or more
)
"""A value of an overflow tree."""
