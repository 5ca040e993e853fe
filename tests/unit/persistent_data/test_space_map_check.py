"""Bitmaps: what is encoded is decoded, and is what the kernel writes.  The comparison is tested with whole pools."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from persistent_data.layout import BITMAP_HEADER_SIZE, ENTRIES_PER_BITMAP
from persistent_data.space_map_check import decode_counts, encode_counts, nr_bitmaps
from tests.support.fixtures import image
from tests.support.image import Image


@given(st.lists(st.integers(0, 255), max_size=100), st.integers(0, ENTRIES_PER_BITMAP - 100))
def test_what_is_encoded_is_decoded(some: list[int], position: int) -> None:
    counts = bytearray(ENTRIES_PER_BITMAP)
    counts[position : position + len(some)] = bytes(some)
    decoded = decode_counts(encode_counts(counts))
    assert decoded == bytes(min(count, 3) for count in counts)


def test_bits_are_where_the_documented_example_has_them() -> None:
    # Counts 2, 1, 2, 1 make the byte 0x99; many, 1, many, many, 2, 1 make 0xfb 0x09.
    assert encode_counts(bytes([2, 1, 2, 1]))[:2] == b"\x99\x00"
    assert encode_counts(bytes([4, 1, 4, 3, 2, 1]))[:2] == b"\xfb\x09"


def test_a_short_list_of_counts_is_padded_with_free_entries() -> None:
    assert encode_counts(b"") == bytes(ENTRIES_PER_BITMAP // 4)


def test_the_kernels_bitmaps_decode_to_what_an_independent_reader_sees() -> None:
    content = Image.from_bytes(image("snapshot_chain"))
    counts = content.counts("data")
    for i, (block, _, _) in enumerate(content.bitmaps("data")):
        decoded = decode_counts(content.block(block)[BITMAP_HEADER_SIZE:])
        begin = i * ENTRIES_PER_BITMAP
        assert {begin + j: count for j, count in enumerate(decoded) if count} == {
            block: min(count, 3) for block, count in counts.items() if begin <= block < begin + ENTRIES_PER_BITMAP
        }


def test_nr_bitmaps_rounds_up() -> None:
    assert [nr_bitmaps(n) for n in (0, 1, ENTRIES_PER_BITMAP, ENTRIES_PER_BITMAP + 1)] == [0, 1, 1, 2]
