"""The fast forms of thinpool/layout.py are what format.py declares, and both are what the kernel wrote."""

from __future__ import annotations

import pytest

from tests.support.declarations import field_names, offset_of, struct_code, without
from tests.support.fixtures import BLOCK_SIZE, GOOD, facts_of, image
from tests.support.image import Image
from thinpool import format as declared
from thinpool import layout

LIVE = without(declared.Superblock, "rest")


def test_fast_superblock_reads_the_declared_fields() -> None:
    assert layout.SUPERBLOCK.format == struct_code(LIVE)
    assert layout.SUPERBLOCK.size == LIVE.sizeof() == 364
    assert field_names(LIVE) == layout.SUPERBLOCK_FIELDS
    assert declared.SPACE_MAP_ROOT_BYTES == layout.SPACE_MAP_ROOT_SIZE


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("magic", 32),
        ("held_root", 56),
        ("data_space_map_root", 64),
        ("metadata_space_map_root", 192),
        ("data_mapping_root", 320),
        ("device_details_root", 328),
        ("data_block_size", 336),
        ("incompat_flags", 360),
    ],
)
def test_superblock_field_is_where_it_is_documented(name: str, offset: int) -> None:
    assert offset_of(declared.Superblock, name) == offset


def test_needs_check_is_the_lowest_bit() -> None:
    assert declared.SuperblockFlags.parse(b"\1\0\0\0").needs_check
    assert not declared.SuperblockFlags.parse(b"\xfe\xff\xff\xff").needs_check
    assert layout.NEEDS_CHECK_FLAG == 1


def test_fast_details_read_the_declared_fields() -> None:
    assert layout.DEVICE_DETAILS.format == struct_code(declared.DeviceDetails)
    assert layout.DEVICE_DETAILS.size == declared.DeviceDetails.sizeof() == 24
    assert field_names(declared.DeviceDetails) == (
        "mapped_blocks",
        "transaction_id",
        "creation_time",
        "snapshotted_time",
    )


@pytest.mark.parametrize(("data_block", "time"), [(0, 0), (3, 1), (layout.MAX_DATA_BLOCK, layout.MAX_TIME)])
def test_a_mapping_is_a_block_above_a_time(data_block: int, time: int) -> None:
    packed = declared.BlockTime.build({"data_block": data_block, "time": time})
    assert int.from_bytes(packed, "little") == data_block << layout.TIME_BITS | time
    parsed = declared.BlockTime.parse(packed)
    assert (parsed.data_block, parsed.time) == (data_block, time)


@pytest.mark.parametrize("name", GOOD)
def test_kernel_written_superblock_survives_parse_and_build(name: str) -> None:
    content = image(name)[:BLOCK_SIZE]
    parsed = declared.Superblock.parse(content)
    assert declared.Superblock.build(parsed) == content
    assert parsed.magic == layout.SUPERBLOCK_MAGIC
    assert bool(parsed.flags.needs_check) == facts_of(name).needs_check
    assert parsed.data_space_map_root.root.nr_blocks == facts_of(name).nr_data_blocks


@pytest.mark.parametrize("name", GOOD)
def test_fast_superblock_survives_unpack_and_pack(name: str) -> None:
    content = image(name)[:BLOCK_SIZE]
    packed = bytearray(content)
    layout.Superblock.unpack(content).pack_into(packed)
    assert packed == content
    sb = layout.Superblock.unpack(content)
    parsed = declared.Superblock.parse(content)
    for field in ("csum", "blocknr", "version", "time", "trans_id", "held_root", "data_block_size", "incompat_flags"):
        assert getattr(sb, field) == parsed[field]
    assert sb.metadata_root.nr_allocated == parsed.metadata_space_map_root.root.nr_allocated


def test_details_are_what_an_independent_reader_sees() -> None:
    content = Image.from_bytes(image("snapshot_chain"))
    root = content.superblock().details_root
    for (_, value), details in zip(content.items(root), content.devices().values(), strict=True):
        parsed = declared.DeviceDetails.parse(value)
        assert (parsed.mapped_blocks, parsed.snapshotted_time) == (details.mapped_blocks, details.snapshotted_time)
