"""One contract for all space maps, and what is peculiar to each."""

from __future__ import annotations

import errno
from collections import Counter

import pytest

from persistent_data.errors import CorruptMetadata, InvalidArgument, MetadataError, NoFreeBlock, NoFreeMetadataBlock
from persistent_data.layout import ENTRIES_PER_BITMAP, MAX_METADATA_BLOCKS
from persistent_data.space_map import runs
from persistent_data.space_map_disk import slot_of
from persistent_data.space_map_metadata import MetadataSpaceMap
from tests.support.space_maps import KINDS, Subject
from tests.support.trees import Store, recount

BORDER = ENTRIES_PER_BITMAP
TWO_BITMAPS = 2 * BORDER


@pytest.fixture(params=KINDS)
def large(request: pytest.FixtureRequest) -> Subject:
    """Two bitmaps' worth of blocks; the metadata map keeps to the beginning of them."""
    return Subject(request.param, TWO_BITMAPS)


@pytest.fixture(params=KINDS)
def small(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param, 24)


def counts(subject: Subject, begin: int, end: int) -> list[int]:
    subject.start()
    return [subject.map.get_count(block) for block in range(begin, end)]


def test_new_map_has_only_its_own_blocks(large: Subject) -> None:
    assert large.map.nr_blocks == TWO_BITMAPS
    used = [block for block, count in enumerate(counts(large, 0, TWO_BITMAPS)) if count]
    assert len(used) <= (0 if large.kind != "metadata" else 10)
    assert large.map.nr_free == TWO_BITMAPS - len(used)


def test_count_goes_up_and_down_through_every_value(large: Subject) -> None:
    block = 20000
    for count in (*range(1, 7), *range(5, -1, -1)):
        large.start()
        if count > large.map.get_count(block):
            large.map.inc(block, block + 1)
        else:
            large.map.dec(block, block + 1)
        assert counts(large, block - 1, block + 2) == [0, count, 0]
        assert large.map.more_than_one(block) == (count > 1)
    large.commit()
    assert counts(large, block - 1, block + 2) == [0, 0, 0]


@pytest.mark.parametrize("step", [1, 3, 7, 40])
def test_range_across_a_bitmap_border_is_every_block_of_it(large: Subject, step: int) -> None:
    begin, end = BORDER - 50, BORDER + 61
    expected = [0] * (end - begin)
    for at in range(0, end - begin, step):
        for times in range(at % 4):
            large.start()
            first = begin + at - min(at, times)
            large.map.inc(first, end - times)
            for block in range(first, end - times):
                expected[block - begin] += 1
    assert counts(large, begin, end) == expected
    large.commit()
    while any(expected):
        first = next(at for at, count in enumerate(expected) if count)
        last = next((at for at in range(first, len(expected)) if not expected[at]), len(expected))
        large.start()
        large.map.dec(begin + first, begin + last)
        for at in range(first, last):
            expected[at] -= 1
        assert counts(large, begin, end) == expected


def test_long_range_of_free_blocks_is_counted_as_block_by_block(large: Subject) -> None:
    free = large.map.nr_free
    large.start()
    large.map.inc(BORDER - 5001, BORDER + 7002)
    assert set(counts(large, BORDER - 5001, BORDER + 7002)) == {1}
    assert counts(large, BORDER - 5002, BORDER - 5001) + counts(large, BORDER + 7002, BORDER + 7003) == [0, 0]
    large.commit()
    assert large.map.nr_free <= free - 12003
    large.start()
    large.map.dec(BORDER - 5001, BORDER + 7002)
    large.commit()
    assert set(counts(large, BORDER - 5001, BORDER + 7002)) == {0}
    assert large.map.nr_free >= free - 5


def test_empty_range_changes_nothing(large: Subject) -> None:
    before = large.map.root_blob()
    for block in (0, 100, BORDER, TWO_BITMAPS):
        large.start()
        large.map.inc(block, block)
        large.map.dec(block, block)
    large.commit()
    assert large.map.root_blob() == before


@pytest.mark.parametrize(("begin", "end"), [(20002, 20003), (19999, 20000), (20001, 20003)])
def test_reference_that_does_not_exist_cannot_be_given_up(large: Subject, begin: int, end: int) -> None:
    """As with every error of a change, what is in memory is not to be trusted afterwards."""
    large.start()
    large.map.inc(20000, 20002)
    large.commit()
    large.start()
    with pytest.raises(InvalidArgument) as caught:
        large.map.dec(begin, end)
    assert caught.value.errno == errno.EINVAL
    if large.can_be_reopened:
        large.reopen()
        assert counts(large, 19999, 20003) == [0, 1, 1, 0]


@pytest.mark.parametrize("begin", [TWO_BITMAPS, TWO_BITMAPS + 1, 1 << 40])
def test_blocks_beyond_the_map_are_refused(large: Subject, begin: int) -> None:
    for call in (
        lambda: large.map.get_count(begin),
        lambda: large.map.more_than_one(begin),
        lambda: large.map.set_count(begin, 1),
        lambda: large.map.inc(begin - 1, begin + 1),
        lambda: large.map.dec(begin - 1, begin + 1),
    ):
        large.start()
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert large.map.nr_blocks == TWO_BITMAPS


@pytest.mark.parametrize("old", range(5))
@pytest.mark.parametrize("new", [0, 1, 2, 3, 4, 0xFFFFFFFF])
def test_count_can_be_set_whatever_it_was(large: Subject, old: int, new: int) -> None:
    block = 20000
    large.start()
    large.map.set_count(block, old)
    assert counts(large, block - 1, block + 2) == [0, old, 0]
    large.start()
    large.map.set_count(block, new)
    assert counts(large, block - 1, block + 2) == [0, new, 0]
    large.commit()
    assert counts(large, block - 1, block + 2) == [0, new, 0]


def test_allocated_blocks_are_different_and_were_free(large: Subject) -> None:
    large.start()
    large.map.inc(300, 350)
    taken: list[int] = []
    for _ in range(500):
        large.start()
        block = large.map.new_block()
        assert block not in taken
        assert large.map.get_count(block) == 1
        taken.append(block)
    assert not set(taken) & set(range(300, 350))
    assert taken == sorted(taken)


def take_all(subject: Subject) -> list[int]:
    """Allocate until there is nothing left."""
    taken = []
    while True:
        subject.start()
        try:
            taken.append(subject.map.new_block())
        except NoFreeBlock:
            return taken


def test_exhausted_map_says_so_and_goes_on_after_a_commit(small: Subject) -> None:
    taken = take_all(small)
    assert len(taken) >= 10
    with pytest.raises(NoFreeBlock) as caught:
        small.map.new_block()
    assert caught.value.errno == errno.ENOSPC
    if small.kind == "metadata":
        return  # what it was doing is half done
    small.map.dec(taken[3], taken[3] + 1)
    small.commit()
    assert small.map.new_block() == taken[3]


def test_freed_block_is_not_reused_before_the_commit(small: Subject) -> None:
    small.start()
    first = small.map.new_block()
    small.commit()
    small.start()
    small.map.dec(first, first + 1)
    assert small.map.get_count(first) == 0
    assert first not in take_all(small)


def test_block_freed_before_a_commit_is_reused_after_it(small: Subject) -> None:
    small.start()
    first = small.map.new_block()
    small.commit()
    small.map.dec(first, first + 1)
    small.commit()
    assert first in take_all(small)


def test_block_allocated_and_freed_in_one_transaction_is_reused_in_it(small: Subject) -> None:
    small.start()
    first = small.map.new_block()
    small.map.dec(first, first + 1)
    taken = take_all(small)
    # The cursor had gone past it, so it comes last, after the wrap.
    assert taken[-1] == first
    assert taken[:-1] == sorted(taken[:-1])


def test_cursor_goes_on_behind_what_was_allocated_and_wraps() -> None:
    for kind in ("core", "disk"):
        subject = Subject(kind, 10)
        first = [subject.map.new_block() for _ in range(4)]
        assert first == [0, 1, 2, 3]
        subject.map.dec(1, 2)
        subject.commit()
        assert [subject.map.new_block() for _ in range(3)] == [4, 5, 6]
        assert [subject.map.new_block() for _ in range(4)] == [7, 8, 9, 1]
        with pytest.raises(NoFreeBlock):
            subject.map.new_block()


def test_cursor_begins_at_the_beginning_when_the_map_is_opened() -> None:
    subject = Subject("disk", 10)
    assert [subject.map.new_block() for _ in range(4)] == [0, 1, 2, 3]
    subject.map.dec(1, 2)
    subject.commit()
    subject.reopen()
    assert subject.map.new_block() == 1
    assert subject.map.new_block() == 4


@pytest.mark.parametrize("extra", [0, 1, 100, BORDER, 3 * BORDER])
def test_extension_adds_free_blocks(large: Subject, extra: int) -> None:
    if large.kind == "metadata" and extra < 10:
        return  # it has to find the blocks for its own growth in what is new
    large.start()
    large.map.inc(20000, 20003)
    large.extend(extra)
    large.commit()
    assert large.map.nr_blocks == TWO_BITMAPS + extra
    assert counts(large, 19999, 20004) == [0, 1, 1, 1, 0]
    if extra:
        last = TWO_BITMAPS + extra - 1
        large.start()
        large.map.inc(last, last + 1)
        assert counts(large, last, last + 1) == [1]


def test_extension_gives_a_full_map_room_at_once() -> None:
    for kind in ("core", "disk"):
        subject = Subject(kind, 10)
        assert take_all(subject) == list(range(10))
        subject.extend(3)
        assert take_all(subject) == [10, 11, 12]


@pytest.mark.parametrize("kind", ["disk", "metadata"])
def test_map_cannot_shrink(kind: str) -> None:
    subject = Subject(kind, 100)
    with pytest.raises(InvalidArgument):
        subject.map.extend(-1)
    assert subject.map.nr_blocks == 100


@pytest.mark.parametrize("kind", ["disk", "metadata"])
def test_reopened_map_has_the_counts_of_the_last_commit(kind: str) -> None:
    subject = Subject(kind, TWO_BITMAPS)
    for count in range(1, 6):
        subject.start()
        subject.map.inc(BORDER - count, BORDER + count)
    subject.commit()
    expected, free = counts(subject, BORDER - 6, BORDER + 6), subject.map.nr_free
    assert expected == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    subject.reopen()
    assert counts(subject, BORDER - 6, BORDER + 6) == expected
    assert subject.map.nr_free == free
    assert subject.map.nr_blocks == TWO_BITMAPS


# The data map


def test_data_map_shows_an_extension_after_the_commit() -> None:
    subject = Subject("disk", 100)
    subject.extend(50)
    assert subject.map.nr_blocks == 100
    subject.map.inc(149, 150)
    subject.commit()
    assert subject.map.nr_blocks == 150
    assert subject.map.get_count(149) == 1


def test_data_map_counts_freed_blocks_as_free_at_once() -> None:
    subject = Subject("disk", 100)
    taken = [subject.map.new_block() for _ in range(10)]
    assert subject.map.nr_free == 90
    subject.commit()
    subject.map.dec(taken[0], taken[-1] + 1)
    assert subject.map.nr_free == 100
    subject.map.inc(50, 60)
    assert subject.map.nr_free == 90


def test_entries_are_in_the_slots_of_the_kernels_hash() -> None:
    indexes = [*range(1000), 2**32 - 1, 2**32, 2**40 + 7]
    assert [slot_of(index) for index in indexes] == [index * 4294967291 % 2**32 % 64 for index in indexes]


def test_data_map_with_more_bitmaps_than_cached_entries() -> None:
    nr_bitmaps = 70  # the cache of index entries has 64 slots
    subject = Subject("disk", nr_bitmaps * BORDER)
    for index in range(nr_bitmaps):
        for at in (index, (index * 37) % nr_bitmaps):
            subject.start()
            subject.map.inc(at * BORDER + 5, at * BORDER + 6)
    expected = Counter([*range(nr_bitmaps), *((index * 37) % nr_bitmaps for index in range(nr_bitmaps))])
    for _ in range(2):
        subject.start()
        assert {index: subject.map.get_count(index * BORDER + 5) for index in range(nr_bitmaps)} == expected
        assert subject.map.nr_free == nr_bitmaps * (BORDER - 1)
        subject.commit()
        subject.reopen()


# The metadata map


def metadata_subject(nr_blocks: int) -> tuple[Subject, Store, MetadataSpaceMap]:
    subject = Subject("metadata", nr_blocks)
    assert subject.store is not None
    return subject, subject.store, subject.store.sm


def give_back(sm: MetadataSpaceMap, blocks: list[int]) -> None:
    for block in blocks:
        sm.dec(block, block + 1)


def test_metadata_map_counts_its_own_blocks() -> None:
    subject, store, sm = metadata_subject(300)
    for block in range(100, 290):
        subject.start()
        sm.inc(block, block + 1)
    for _ in range(3):
        subject.start()
        sm.inc(100, 250)  # enough counts above two for an overflow tree of its own
    subject.commit()
    image = store.image()
    ours = Counter(range(100, 290)) + Counter(dict.fromkeys(range(100, 250), 3))
    assert image.counts("metadata") == dict(Counter(recount(image, [], 1)) + ours)


def test_metadata_map_does_not_count_freed_blocks_as_free_before_the_commit() -> None:
    subject, _, sm = metadata_subject(300)
    taken = [sm.new_block() for _ in range(10)]
    subject.commit()
    free = sm.nr_free
    give_back(sm, taken)
    assert sm.nr_free <= free
    subject.commit()
    assert sm.nr_free >= free + 9


def test_threshold_fires_once_each_time_it_is_passed() -> None:
    subject, _, sm = metadata_subject(100)
    fired: list[int] = []
    sm.register_threshold(60, lambda: fired.append(sm.nr_free))
    taken = []
    while sm.nr_free > 61:
        subject.start()
        taken.append(sm.new_block())
    assert fired == []
    taken += [sm.new_block() for _ in range(5)]
    assert fired == [60]
    subject.commit()
    give_back(sm, taken)
    subject.commit()
    assert sm.nr_free > 61
    sm.new_block()
    assert fired == [60]
    while sm.nr_free > 59:
        sm.new_block()
    assert fired == [60, 60]


def test_threshold_that_is_passed_already_fires_at_the_next_allocation() -> None:
    _, _, sm = metadata_subject(100)
    fired: list[int] = []
    sm.register_threshold(1000, lambda: fired.append(1))
    assert not fired
    sm.new_block()
    sm.new_block()
    assert fired == [1]
    sm.register_threshold(1000, lambda: fired.append(2))
    sm.new_block()
    assert fired == [1, 2]


def test_metadata_map_is_extended_from_the_new_area() -> None:
    subject, store, sm = metadata_subject(100)
    before = set(store.image().counts("metadata"))
    subject.extend(2 * BORDER)
    assert sm.nr_blocks == 100 + 2 * BORDER
    subject.commit()
    image = store.image()
    new = set(image.counts("metadata")) - before
    assert new
    assert min(new) >= 100
    assert image.counts("metadata") == recount(image, [], 1)
    subject.start()
    assert sm.new_block() > 100


def test_metadata_map_has_a_largest_size() -> None:
    _, _, sm = metadata_subject(100)
    with pytest.raises(InvalidArgument):
        sm.extend(MAX_METADATA_BLOCKS)
    assert sm.nr_blocks == 100


@pytest.mark.parametrize("nr_blocks", [1, 2, 3])
def test_device_too_small_for_its_own_map_is_out_of_space(nr_blocks: int) -> None:
    with pytest.raises(NoFreeMetadataBlock) as caught:
        Store.of_size(nr_blocks)
    assert caught.value.errno == errno.ENOSPC


def test_too_many_changes_at_once_are_enomem() -> None:
    """As the kernel's queue of deferred changes: filled here from within a change, which no tree ever does."""
    subject, _, sm = metadata_subject(100)
    subject.start()

    def much_more(begin: int, end: int) -> None:
        for _ in range(1100):
            sm.inc(begin, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm._counts, "inc", much_more)
        with pytest.raises(MetadataError) as caught:
            sm.inc(50, 52)
    assert caught.value.errno == errno.ENOMEM


def test_metadata_map_of_impossible_size_is_refused() -> None:
    subject, store, sm = metadata_subject(100)
    blob = bytearray(sm.root_blob())
    blob[0:8] = (MAX_METADATA_BLOCKS + 1).to_bytes(8, "little")
    subject.commit()
    with pytest.raises(CorruptMetadata):
        MetadataSpaceMap().open(store.tm, bytes(blob))


# Runs


def test_runs_join_neighbours_in_the_order_of_the_list() -> None:
    assert runs([]) == []
    assert runs([5]) == [(5, 6)]
    assert runs([1, 2, 3, 5, 4, 6, 7]) == [(1, 4), (5, 6), (4, 5), (6, 8)]
    assert runs([1, 1, 2]) == [(1, 2), (1, 3)]
