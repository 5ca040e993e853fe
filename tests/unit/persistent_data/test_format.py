"""The fast forms of layout.py are what format.py declares, and both are what the kernel wrote."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from persistent_data import format as declared
from persistent_data import layout
from tests.support.declarations import field_names, offset_of, struct_code
from tests.support.fixtures import BLOCK_SIZE, image
from tests.support.image import Image

STRUCTS = [
    pytest.param(declared.BlockHeader, layout.BLOCK_HEADER, 16, id="block header"),
    pytest.param(declared.NodeHeader, layout.NODE_HEADER, 32, id="node header"),
    pytest.param(declared.IndexEntry, layout.INDEX_ENTRY, 16, id="index entry"),
    pytest.param(declared.SpaceMapRoot, layout.SPACE_MAP_ROOT, 32, id="space map root"),
    pytest.param(declared.OverflowValue, layout.REF_COUNT_VALUE, 4, id="overflow value"),
]


@pytest.mark.parametrize(("declaration", "fast", "documented_size"), STRUCTS)
def test_fast_form_reads_the_declared_fields(declaration: Any, fast: struct.Struct, documented_size: int) -> None:
    assert fast.format == struct_code(declaration)
    assert fast.size == declaration.sizeof() == documented_size
    content = bytes(range(1, fast.size + 1))
    parsed = declaration.parse(content)
    assert [int(parsed[name]) for name in field_names(declaration)] == list(fast.unpack(content))


def test_field_order_of_a_node_header_is_the_documented_one() -> None:
    expected = ("csum", "flags", "blocknr", "nr_entries", "max_entries", "value_size", "padding")
    assert field_names(declared.NodeHeader) == expected
    assert (int(declared.NodeFlags.internal), int(declared.NodeFlags.leaf)) == (layout.INTERNAL_NODE, layout.LEAF_NODE)


def test_every_kind_of_block_begins_alike() -> None:
    for declaration in (declared.BlockHeader, declared.NodeHeader, declared.Bitmap, declared.MetadataIndex):
        assert offset_of(declaration, "csum") == 0
        assert offset_of(declaration, "blocknr") == layout.BLOCKNR_OFFSET


def test_a_bitmap_fills_its_block_with_16320_entries() -> None:
    assert declared.Bitmap.sizeof() == layout.BLOCK_SIZE == declared.BLOCK_BYTES
    assert offset_of(declared.Bitmap, "words") == layout.BITMAP_HEADER_SIZE
    assert declared.BITMAP_WORDS * declared.ENTRIES_PER_WORD == layout.ENTRIES_PER_BITMAP == 16320


def test_the_index_block_is_full_with_255_bitmaps() -> None:
    assert declared.MetadataIndex.sizeof() == layout.BLOCK_SIZE
    assert offset_of(declared.MetadataIndex, "entries") == layout.INDEX_HEADER_SIZE
    assert declared.INDEX_ENTRIES == layout.MAX_METADATA_BITMAPS == 255
    assert layout.MAX_METADATA_BLOCKS == 4161600


@pytest.mark.parametrize(("value_size", "documented"), [(8, 252), (24, 126), (16, 168), (4, 336)])
def test_a_node_holds_the_documented_number_of_entries(value_size: int, documented: int) -> None:
    assert layout.max_entries(value_size) == documented
    used = declared.NodeHeader.sizeof() + documented * (layout.KEY_SIZE + value_size)
    assert used <= layout.BLOCK_SIZE < used + 3 * (layout.KEY_SIZE + value_size)


def test_a_count_and_its_code_are_each_others_inverse() -> None:
    for count in range(4):
        assert layout.CODE_TO_COUNT[layout.COUNT_TO_CODE[count]] == count
        high, low = count >> 1, count & 1
        assert layout.COUNT_TO_CODE[count] == high | low << 1


# On blocks that the kernel wrote


def blocks_of(name: str, kind: str) -> list[tuple[int, bytes]]:
    content = Image.from_bytes(image(name))
    return [(number, content.block(number)) for number in content.live_blocks() if content.kind(number) == kind]


DECLARATIONS = {"node": declared.Node, "bitmap": declared.Bitmap, "index": declared.MetadataIndex}


@pytest.mark.parametrize("name", ["snapshot_chain", "shared_by_many", "resized_data"])
@pytest.mark.parametrize("kind", DECLARATIONS)
def test_kernel_written_blocks_survive_parse_and_build(name: str, kind: str) -> None:
    found = blocks_of(name, kind)
    assert found
    for number, content in found:
        parsed = DECLARATIONS[kind].parse(content)
        assert DECLARATIONS[kind].build(parsed) == content
        assert parsed.get("blocknr", parsed.get("header", parsed).get("blocknr")) == number


def test_a_declared_node_has_the_keys_and_values_of_an_independent_reader() -> None:
    content = Image.from_bytes(image("snapshot_chain"))
    for number, block in blocks_of("snapshot_chain", "node"):
        parsed = declared.Node.parse(block)
        node = content.node(number)
        assert parsed.header.flags == ("leaf" if node.leaf else "internal")
        assert (tuple(parsed["keys"]), tuple(parsed["values"])) == (node.keys, node.values)
        assert len(block) == BLOCK_SIZE
