"""The estimate of the metadata's size."""

from __future__ import annotations

import pytest

from thinpool.metadata_size import estimate

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def test_it_counts_the_superblock_half_full_leaves_and_devices() -> None:
    assert estimate(64 * KIB, 126 * 64 * KIB, 0).nr_blocks == 2
    assert estimate(64 * KIB, 127 * 64 * KIB, 0).nr_blocks == 3
    assert estimate(64 * KIB, 127 * 64 * KIB, 10).nr_blocks == 13


def test_a_partial_data_block_needs_no_mapping() -> None:
    assert estimate(64 * KIB, 127 * 64 * KIB - 1, 0).nr_blocks == 2


def test_units_agree() -> None:
    size = estimate(64 * KIB, TIB, 1000)
    assert (size.nr_blocks, size.nr_bytes, size.limited) == (134154, 134154 * 4096, False)


def test_no_more_than_a_pool_can_use() -> None:
    size = estimate(64 * KIB, TIB, 1 << 64)
    assert (size.nr_blocks, size.nr_bytes, size.limited) == (4161600, 4161600 * 4096, True)
    assert size.nr_blocks_wanted == 133154 + (1 << 64)


def test_what_just_fits_is_not_limited() -> None:
    at_most = 4161600 - 2
    assert not estimate(64 * KIB, 64 * KIB, at_most).limited
    assert estimate(64 * KIB, 64 * KIB, at_most + 1).limited


@pytest.mark.parametrize("size", [64 * KIB, 128 * KIB, 192 * KIB, MIB, GIB])
def test_valid_data_block_sizes(size: int) -> None:
    assert estimate(size, size, 0).nr_blocks == 2


@pytest.mark.parametrize(
    ("block_size", "pool_size", "reason"),
    [
        (0, TIB, "block size must be a multiple of 64 KiB"),
        (1, TIB, "block size must be a multiple of 64 KiB"),
        (32 * KIB, TIB, "block size must be a multiple of 64 KiB"),
        (GIB + 512, TIB, "block size must be a multiple of 64 KiB"),
        (GIB + 64 * KIB, TIB, "maximum block size is 1 GiB"),
        (64 * KIB, 64 * KIB - 1, "pool size must be larger than block size"),
    ],
)
def test_impossible_pools_are_refused(block_size: int, pool_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        estimate(block_size, pool_size, 1)
