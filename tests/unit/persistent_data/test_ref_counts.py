"""Counting references in bytes."""

from __future__ import annotations

import pytest

from persistent_data.ref_counts import RefCounts


def test_counts_beyond_a_byte_are_exact() -> None:
    counts = RefCounts(10)
    for _ in range(300):
        counts.add(3)
    assert counts.add_all([4] * 700) == []
    assert [counts[block] for block in (2, 3, 4)] == [0, 300, 700]


@pytest.mark.parametrize("how_often", [254, 255, 256, 257])
def test_both_ways_of_counting_agree(how_often: int) -> None:
    one_by_one, at_once = RefCounts(3), RefCounts(3)
    for _ in range(how_often):
        one_by_one.add(1)
    at_once.add_all([1] * how_often)
    assert one_by_one[1] == at_once[1] == how_often


def test_blocks_that_are_not_ours_are_returned_and_do_not_stop_the_count() -> None:
    counts = RefCounts(10)
    assert counts.add_all([1, 10, 2, 1 << 40, 3]) == [10, 1 << 40]
    assert [counts[block] for block in (1, 2, 3)] == [1, 1, 1]


def test_any_shared_sees_counts_above_one() -> None:
    counts = RefCounts(10)
    counts.add_all([1, 2, 3])
    assert not counts.any_shared()
    counts.add(2)
    assert counts.any_shared()
