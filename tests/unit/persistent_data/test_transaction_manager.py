"""Shadowing: when a block is changed in place, moved or copied, and what becomes of the counts."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from persistent_data.block_manager import BITMAP, Validator
from persistent_data.errors import NoFreeBlock, ReadOnlyMetadata, WouldBlock
from tests.support.devices import FaultyMemory
from tests.support.trees import BLOCK_SIZE, Store

if TYPE_CHECKING:
    from persistent_data.transaction_manager import TransactionManager

KIND = Validator("test block", 0xABCD)


@pytest.fixture
def device() -> FaultyMemory:
    return FaultyMemory(64 * BLOCK_SIZE)


@pytest.fixture
def store(device: FaultyMemory) -> Store:
    return Store.format(device)


@pytest.fixture
def tm(store: Store) -> TransactionManager:
    return store.tm


def committed_block(store: Store, fill: int = 7) -> int:
    """A block that the last commit refers to."""
    view = store.tm.new_block(KIND)
    view.data[100] = fill
    store.commit([])
    return view.block


def on_device(store: Store, block: int) -> int:
    return store.image().block(block)[100]


def test_new_block_is_zeroed_and_has_one_reference(store: Store, tm: TransactionManager) -> None:
    view = tm.new_block(KIND)
    assert bytes(view.data) == bytes(BLOCK_SIZE)
    assert tm.ref(view.block) == 1
    assert not tm.block_is_shared(view.block)
    assert tm.new_block(KIND).block != view.block


def test_block_of_this_transaction_is_changed_in_place(tm: TransactionManager) -> None:
    view = tm.new_block(KIND)
    again, was_shared = tm.shadow_block(view.block, KIND)
    assert again is view
    assert not was_shared


def test_block_of_the_last_commit_is_moved_and_stays_on_the_device(
    device: FaultyMemory, store: Store, tm: TransactionManager
) -> None:
    old = committed_block(store)
    buffer = tm.read_block(old, KIND).buffer
    device.log.clear()
    view, was_shared = tm.shadow_block(old, KIND)
    assert not was_shared
    assert view.block != old
    assert view.buffer is buffer  # not a copy: the same memory under another number
    assert not device.ops("write")
    view.data[100] = 8
    assert tm.ref(old) == 0
    assert tm.ref(view.block) == 1
    assert tm.read_block(old, KIND).data[100] == 7  # read from the device
    store.commit([])
    assert (on_device(store, old), on_device(store, view.block)) == (7, 8)


def test_shared_block_is_copied(store: Store, tm: TransactionManager) -> None:
    old = committed_block(store)
    tm.inc(old)
    buffer = tm.read_block(old, KIND).buffer
    view, was_shared = tm.shadow_block(old, KIND)
    assert was_shared
    assert view.buffer is not buffer
    view.data[100] = 8
    assert tm.read_block(old, KIND).data[100] == 7
    assert (tm.ref(old), tm.ref(view.block)) == (1, 1)


def test_block_of_this_transaction_that_got_shared_is_copied(store: Store, tm: TransactionManager) -> None:
    first = tm.new_block(KIND)
    first.data[100] = 7
    tm.inc(first.block)
    second, was_shared = tm.shadow_block(first.block, KIND)
    assert was_shared
    assert second.block != first.block
    assert (tm.ref(first.block), tm.ref(second.block)) == (1, 1)
    # Not shared any more: from here on both are changed in place.
    third, was_shared = tm.shadow_block(first.block, KIND)
    assert third.block == first.block
    assert not was_shared


@pytest.mark.parametrize("way", ["inc", "inc_range", "inc_blocks"])
def test_every_way_to_share_a_block_is_noticed(store: Store, tm: TransactionManager, way: str) -> None:
    view = tm.new_block(KIND)
    block = view.block
    tm.shadow_block(block, KIND)
    if way == "inc":
        tm.inc(block)
    elif way == "inc_range":
        tm.inc_range(block, block + 1)
    else:
        tm.inc_blocks([block])
    _, was_shared = tm.shadow_block(block, KIND)
    assert was_shared


def test_block_of_this_transaction_that_is_not_shared_any_more_is_changed_in_place(tm: TransactionManager) -> None:
    block = tm.new_block(KIND).block
    for _ in range(2):
        tm.inc(block)
        tm.dec(block)
        view, was_shared = tm.shadow_block(block, KIND)
        assert (view.block, was_shared) == (block, False)
    tm.forget_exclusive()
    view, was_shared = tm.shadow_block(block, KIND)
    assert (view.block, was_shared) == (block, False)
    tm.inc(block)
    view, was_shared = tm.shadow_block(block, KIND)
    assert view.block != block
    assert was_shared


def test_block_shadowed_twice_is_the_same_until_the_commit(store: Store, tm: TransactionManager) -> None:
    old = committed_block(store)
    first, _ = tm.shadow_block(old, KIND)
    again, _ = tm.shadow_block(first.block, KIND)
    assert again.block == first.block
    store.commit([])
    after, _ = tm.shadow_block(first.block, KIND)
    assert after.block != old
    assert tm.ref(old) == 0


def test_counts_of_lists_and_ranges(store: Store, tm: TransactionManager) -> None:
    blocks = [40, 41, 42, 50, 41]
    tm.inc_blocks(blocks)
    assert [tm.ref(block) for block in (40, 41, 42, 43, 50)] == [1, 2, 1, 0, 1]
    tm.dec_range(40, 43)
    tm.dec_blocks([50, 41])
    assert [tm.ref(block) for block in (40, 41, 42, 50)] == [0, 0, 0, 0]


def test_freed_block_is_not_written_to_before_the_commit(store: Store, tm: TransactionManager) -> None:
    old = committed_block(store)
    tm.dec(old)
    taken: list[int] = []

    def take_all() -> None:
        while True:
            taken.append(tm.new_block(KIND).block)

    with pytest.raises(NoFreeBlock) as caught:
        take_all()
    assert caught.value.errno == errno.ENOSPC
    assert old not in taken
    assert len(taken) > 40


def test_nothing_is_shadowed_in_read_only_mode(store: Store, tm: TransactionManager) -> None:
    old = committed_block(store)
    mine = tm.new_block(KIND).block
    store.bm.read_only = True
    tm.forget_exclusive()
    for block in (old, mine):
        with pytest.raises(ReadOnlyMetadata):
            tm.shadow_block(block, KIND)
        with pytest.raises(ReadOnlyMetadata):
            tm.shadow_block(block, KIND)
    assert tm.ref(old) == 1


def test_superblock_is_written_by_itself_after_everything_else(device: FaultyMemory, store: Store) -> None:
    committed_block(store)
    store.tm.new_block(KIND)
    device.log.clear()
    store.commit([])
    kinds = [op.kind for op in device.log if op.kind != "read"]
    first_flush = kinds.index("flush")
    before = [op for op in device.log if op.kind != "read"][:first_flush]
    after = [op for op in device.log if op.kind != "read"][first_flush + 1 :]
    assert before
    assert all(not op.overlaps(0, BLOCK_SIZE) for op in before)
    assert [op.kind for op in after] == ["write", "flush"]
    assert (after[0].offset, after[0].length) == (0, BLOCK_SIZE)


def test_nothing_that_the_last_commit_refers_to_is_ever_written(device: FaultyMemory, store: Store) -> None:
    blocks = [committed_block(store, fill) for fill in range(1, 9)]
    for turn in range(30):
        live = set(store.image().counts("metadata")) - {0}
        device.log.clear()
        view, _ = store.tm.shadow_block(blocks[turn % 8], KIND)
        view.data[100] += 1
        blocks[turn % 8] = view.block
        if turn % 3 == 0:
            store.bm.begin_operation()
            store.bm.flush()  # early, as under memory pressure
        store.bm.begin_operation()
        store.tm.pre_commit()
        for op in device.log:
            if op.kind == "write":
                assert not [block for block in live if op.overlaps(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)]
        store.commit([])


# The non-blocking clone


def test_clone_reads_what_is_cached_and_notes_what_is_not(device: FaultyMemory, store: Store) -> None:
    block = committed_block(store)
    store.reopen()
    clone = store.tm.non_blocking_clone()
    device.log.clear()
    for _ in range(2):
        with pytest.raises(WouldBlock) as caught:
            clone.read_block(block, KIND)
        assert caught.value.errno == errno.EWOULDBLOCK
    assert device.log == []
    clone.issue_prefetches()
    assert device.ops("read") == [(block * BLOCK_SIZE, BLOCK_SIZE)]
    assert clone.read_block(block, KIND).data[100] == 7
    clone.issue_prefetches()
    assert len(device.log) == 1


def test_first_of_two_blocks_in_one_slot_is_prefetched() -> None:
    device = FaultyMemory(400 * BLOCK_SIZE)
    store = Store.format(device)
    store.reopen()
    clone = store.tm.non_blocking_clone()
    for block in (200, 200 + 128, 201):
        with pytest.raises(WouldBlock):
            clone.read_block(block, BITMAP)
    device.log.clear()
    clone.issue_prefetches()
    assert device.ops("read") == [(200 * BLOCK_SIZE, BLOCK_SIZE), (201 * BLOCK_SIZE, BLOCK_SIZE)]
