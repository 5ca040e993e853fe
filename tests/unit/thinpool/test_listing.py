"""The listing: sizes in words, ownership, and the layout of the table."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bufio.device import MemoryDevice
from tests.support.devices import FaultyMemory
from tests.support.fixtures import answer, image, read_xml
from tests.support.image import Image
from tests.support.surgeon import Surgeon
from thinpool.errors import Corrupt
from thinpool.listing import FIELDS, format_table, human_size, list_devices


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        # What thin_ls 0.9.0 made of these sizes, and 1.3.3 of the last two.
        (0, "0b"),
        (7680, "7680b"),
        (8192, "8192b"),
        (8704, "9KiB"),
        (9728, "10KiB"),
        (51200, "50KiB"),
        (99840, "98KiB"),
        (1048064, "1024KiB"),
        (1049088, "1024KiB"),
        (8388096, "8191KiB"),
        (8388608, "8192KiB"),
        (8389120, "8192KiB"),
        (10240512, "10MiB"),
        (1075198464, "1025MiB"),
        (1435303936, "1368MiB"),
        (8589930496, "8191MiB"),
        (9663671808, "9GiB"),
        (7516189184000, "6999GiB"),
        (2097151, "2047KiB"),
        (6619135, "6463KiB"),
    ],
)
def test_sizes_are_worded_as_the_reference_does(size_bytes: int, shown: str) -> None:
    assert human_size(size_bytes) == shown


@given(st.integers(0, 1 << 94))
def test_every_size_is_worded_within_a_unit_of_the_truth(size_bytes: int) -> None:
    text = human_size(size_bytes)
    digits = re.match(r"\d+", text)
    assert digits is not None
    unit = 1024 ** ["b", "KiB", "MiB", "GiB", "Tib", "PiB", "EiB", "ZiB", "YiB", "RiB"].index(text[digits.end() :])
    assert abs(int(digits[0]) * unit - size_bytes) < unit


def test_exclusive_blocks_are_those_with_one_mapping_in_all_devices() -> None:
    """Counted from the recorded dump, mapping by mapping."""
    for name in ("mixed", "shared_by_many", "snapshot_chain", "discards"):
        devices = read_xml(answer(name, "xml")).devices
        uses = Counter(block for device in devices.values() for block, _ in device.mappings.values())
        expected = [
            [str(dev_id), str(sum(uses[block] == 1 for block, _ in device.mappings.values()))]
            for dev_id, device in devices.items()
        ]
        assert list_devices(MemoryDevice(image(name)), ["DEV", "EXCLUSIVE_BLOCKS"]) == expected


def test_what_is_in_the_details_needs_no_mapping_tree() -> None:
    surgeon = Surgeon(image("random"))
    surgeon.flip(surgeon.device_root(3))
    fields = ["DEV", "MAPPED_BLOCKS", "TRANSACTION", "CREATE_TIME", "SNAP_TIME"]
    assert list_devices(surgeon.device(), fields) == [["3", "12000", "0", "0", "0"]]
    assert list_devices(surgeon.device())[0][:2] == ["3", "750MiB"]
    for field in FIELDS:
        if field.startswith(("HIGHEST", "EXCLUSIVE", "SHARED")):
            with pytest.raises(Corrupt, match="thin device 3"):
                list_devices(surgeon.device(), [field])


def test_the_default_fields_take_the_reading_of_superblock_and_device_trees_only() -> None:
    device = FaultyMemory(image("deep"))
    list_devices(device)
    sb = Image.from_bytes(image("deep")).superblock()
    read = [offset // 4096 for offset, _ in device.ops("read")]
    assert read == [0, sb.details_root, sb.mapping_root]


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown field FOO"):
        list_devices(MemoryDevice(image("empty")), ["DEV", "FOO"])


def test_there_are_twenty_fields() -> None:
    assert len(set(FIELDS)) == len(FIELDS) == 20


def test_columns_are_right_aligned_and_each_cell_ends_with_a_blank() -> None:
    assert format_table(["A", "BB"], [["100", "1"]]) == "  A BB \n100  1 \n"
    assert format_table(["A", "BB"], [["100", "1"]], headers=False) == "100 1 \n"


def test_an_empty_pool_without_headers_is_nothing() -> None:
    assert format_table(["A"], [], headers=False) == ""
    assert format_table(["A"], []) == "A \n"
