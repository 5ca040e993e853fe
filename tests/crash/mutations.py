"""Defects put into the engine on purpose, one at a time: an explorer that does not find them proves nothing.

Each is what a tired programmer might write, and each leaves an engine that works as long as nothing goes wrong with
the power, or nearly so.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from persistent_data import block_manager
from persistent_data.block_manager import METADATA_INDEX
from persistent_data.btree_spine import ShadowSpine
from persistent_data.layout import INDEX_HEADER_SIZE
from persistent_data.space_map_common import BitmapCounts
from persistent_data.space_map_disk import DiskSpaceMap, IndexTree
from persistent_data.space_map_metadata import IndexBlock, MetadataSpaceMap
from persistent_data.transaction_manager import TransactionManager
from tests.crash.explorer import Effort, Failure, explore, make_pools
from tests.crash.workloads import exhaustive, random_workload, scripted
from thinpool import PoolMetadata
from thinpool.storage import Storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Patch = pytest.MonkeyPatch

_RANDOM_WORKLOADS = 150
_EFFORT = Effort(samples=16, long_way=64, peer=0)


def _superblock_before_the_flush(patch: Patch) -> None:
    """Everything, the superblock included, is written in one go, and then flushed."""
    patch.setattr(TransactionManager, "pre_commit", lambda tm: tm.sm.commit())


def _no_flush_before_the_superblock(patch: Patch) -> None:
    """All is written before the superblock is, but nothing waits for it to be durable."""

    def pre_commit(tm: TransactionManager) -> None:
        tm.sm.commit()
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(tm.bm.device), "flush", lambda _device: None)
            tm.bm.flush()

    patch.setattr(TransactionManager, "pre_commit", pre_commit)


def _no_flush_after_the_superblock(patch: Patch) -> None:
    """A commit returns when the superblock is written, durable or not."""
    commit = TransactionManager.commit

    def hurried(tm: TransactionManager, superblock: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(tm.bm.device), "flush", lambda _device: None)
            commit(tm, superblock)

    patch.setattr(TransactionManager, "commit", hurried)


def _changed_in_place(patch: Patch) -> None:
    """A node that the last commit refers to is changed where it is, if nobody else refers to it."""
    shadow_block = TransactionManager.shadow_block

    def careless(tm: TransactionManager, block: int, validator: Any) -> Any:
        if block and not tm.sm.more_than_one(block):
            return tm.bm.borrow_for_write(block, validator), False
        return shadow_block(tm, block, validator)

    patch.setattr(TransactionManager, "shadow_block", careless)
    patch.setattr(TransactionManager, "move_to_new_block", lambda tm, buffer: False)
    patch.setattr(ShadowSpine, "__init__", _without_shortcut(ShadowSpine.__init__))


def _without_shortcut(init: Callable[..., None]) -> Callable[..., None]:
    def without(spine: Any, tm: TransactionManager) -> None:
        init(spine, tm)
        spine._move_to_new_block = lambda buffer: False

    return without


def _shared_node_not_shadowed(patch: Patch) -> None:
    """A node with two references is taken for one that has one: it is moved, and the other tree loses it."""
    patch.setattr(MetadataSpaceMap, "more_than_one", lambda sm, block: False)
    patch.setattr(MetadataSpaceMap, "replace", lambda sm, block: None)


def _freed_block_reused(patch: Patch) -> None:
    """What this transaction has freed is given out again before the next commit."""
    make_busy = BitmapCounts._make_busy

    def forgetful(counts: BitmapCounts, index: int, blocknr: int) -> None:
        make_busy(counts, index, blocknr)
        nr_entries = len(counts._busy)
        counts._busy = counts._spread(blocknr, nr_entries)
        counts._old_busy = bytearray(nr_entries)

    patch.setattr(BitmapCounts, "_make_busy", forgetful)


def _root_not_updated(patch: Patch, name: str) -> None:
    """The superblock keeps what it had in that field."""
    fill = Storage._fill

    def stale(storage: Storage, data: memoryview, fields: Any) -> None:
        before = getattr(storage.superblock, name)
        fill(storage, data, fields)
        setattr(fields, name, before)
        fields.pack_into(data)

    patch.setattr(Storage, "_fill", stale)


def _count_off_by_one(patch: Patch) -> None:
    """A copy of a shared node does not add a reference to its last child, or last data block."""
    inc_contents = ShadowSpine.inc_contents

    def all_but_one(spine: ShadowSpine, node: Any, value_type: Any) -> None:
        entries = node.nr_entries
        if entries < 2:
            inc_contents(spine, node, value_type)
            return
        node.set_nr_entries(entries - 1)
        try:
            inc_contents(spine, node, value_type)
        finally:
            node.set_nr_entries(entries)

    patch.setattr(ShadowSpine, "inc_contents", all_but_one)


def _index_entry_not_written(patch: Patch) -> None:
    """What the data space map's index says of its bitmaps stays in memory."""

    def forgetful(index: IndexTree, entry: Any) -> None:
        entry.dirty = False

    patch.setattr(IndexTree, "_write_back", forgetful)


def _index_block_in_place(patch: Patch) -> None:
    """The index block of the metadata space map is overwritten."""

    def in_place(index: IndexBlock) -> int:
        if index.changed:
            view = index._tm.bm.borrow_for_write(index.root, METADATA_INDEX)
            packed = b"".join(entry.pack() for entry in index._entries)
            view.data[INDEX_HEADER_SIZE : INDEX_HEADER_SIZE + len(packed)] = packed
            index.changed = False
        return index.root

    patch.setattr(IndexBlock, "commit", in_place)


def _snapshot_without_a_reference(patch: Patch) -> None:
    """A metadata snapshot does not hold the mapping tree."""
    inc = TransactionManager.inc
    copy_superblock = Storage.copy_superblock

    def copied(storage: Storage) -> Any:
        block, copy = copy_superblock(storage)
        skipped.append(copy.data_mapping_root)
        return block, copy

    def all_but(tm: TransactionManager, block: int) -> None:
        if block in skipped:
            skipped.remove(block)
            return
        inc(tm, block)

    skipped: list[int] = []
    patch.setattr(Storage, "copy_superblock", copied)
    patch.setattr(TransactionManager, "inc", all_but)


def _replaced_block_leaks(patch: Patch) -> None:
    """Removing a mapping does not give its data block back."""
    patch.setattr(DiskSpaceMap, "dec", lambda sm, begin, end: None)


def _details_not_written(patch: Patch) -> None:
    """A commit leaves out what has changed about the devices."""
    patch.setattr(PoolMetadata, "_write_changed_details", lambda pool: [])


def _old_checksum(patch: Patch) -> None:
    """A block that has its number already is written with the checksum that it had."""
    complete = block_manager.complete_for_write

    def hasty(buffer: Any) -> None:
        if int.from_bytes(buffer.data[8:16], "little") != buffer.block_number:
            complete(buffer)

    patch.setattr(block_manager, "complete_for_write", hasty)


def _flags_over_the_transaction(patch: Patch) -> None:
    """Setting needs_check writes the superblock with the roots that the transaction has now."""
    write_flags = PoolMetadata._write_flags

    def eager(pool: Any, flags: int) -> None:
        sb = pool._storage.superblock
        sb.data_mapping_root = pool._root
        sb.time = pool._time
        write_flags(pool, flags)

    patch.setattr(PoolMetadata, "_write_flags", eager)


MUTATIONS: dict[str, Callable[[Patch], None]] = {
    "superblock before the flush": _superblock_before_the_flush,
    "no flush before the superblock": _no_flush_before_the_superblock,
    "no flush after the superblock": _no_flush_after_the_superblock,
    "node changed in place": _changed_in_place,
    "shared node not shadowed": _shared_node_not_shadowed,
    "freed block reused": _freed_block_reused,
    "old metadata space map root": partial(_root_not_updated, name="metadata_space_map_root"),
    "old data space map root": partial(_root_not_updated, name="data_space_map_root"),
    "count off by one": _count_off_by_one,
    "index entry not written": _index_entry_not_written,
    "index block changed in place": _index_block_in_place,
    "snapshot without a reference": _snapshot_without_a_reference,
    "data block not given back": _replaced_block_leaks,
    "details not written": _details_not_written,
    "old checksum": _old_checksum,
    "flags over the transaction": _flags_over_the_transaction,
}


@contextmanager
def put_in(name: str) -> Iterator[None]:
    """Have the engine with that defect for a while."""
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name](patch)
        yield


def find(name: str, seed: int = 1) -> tuple[Failure | None, int, int]:
    """Explore with a defect until it is found.

    :returns: how it showed, None if it did not; and how many workloads and images that took
    """
    nr_images = 0
    number = 0
    singles = [script for script in scripted() if len(script.calls) == 2]
    # By an engine without it.
    make_pools()
    more = (random_workload(seed * 1_000_000 + at) for at in range(_RANDOM_WORKLOADS))
    with put_in(name):
        for number, workload in enumerate(chain(singles, exhaustive(2), more), 1):
            outcome = explore(workload, _EFFORT, seed)
            nr_images += outcome.images
            if outcome.failure is not None:
                return outcome.failure, number, nr_images
    return None, number, nr_images
