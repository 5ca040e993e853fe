"""One thin device of a pool: its mappings from thin blocks to data blocks.

Source: docs/design.md, "Mappings"; docs/api.md.
"""

from __future__ import annotations

import errno
from itertools import chain
from operator import index
from typing import TYPE_CHECKING, NamedTuple

from persistent_data.btree import Finger
from persistent_data.btree_node import FIRST_SLOT
from persistent_data.errors import KeyNotFound
from thinpool.errors import Corrupt, NoSuchDevice, NotMapped, OutOfSpace, ThinError, from_below
from thinpool.layout import TIME_BITS, TIME_MASK
from thinpool.runs import MAX_BATCH_LEAVES, Run, run_fields, runs_of_fields
from thinpool.values import BLOCK_TIME_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Self

    from thinpool.metadata import DeviceDetails, PoolMetadata

KEY_LIMIT = 1 << 64
_new_tuple = tuple.__new__
"""Makes a named tuple in half the time that its own constructor takes."""


class LookupResult(NamedTuple):
    """Where a thin block is."""

    block: int
    """Data block."""
    shared: bool
    """Whether another device may map it too: then it must be copied before it is written to.  Errs on the safe side."""


class MappedRange(NamedTuple):
    """Consecutive thin blocks that are mapped to consecutive data blocks, all of them shared or none."""

    thin_begin: int
    thin_end: int
    pool_begin: int
    maybe_shared: bool


class Handle:
    """What is in memory of one device, for all who have it open: its details, and whether they are on the device."""

    __slots__ = (
        "_committed",
        "aborted_with_changes",
        "changed",
        "creation_time",
        "dev",
        "exists",
        "finger",
        "had_changes",
        "mapped_blocks",
        "nr_changes",
        "open_count",
        "path_generation",
        "root",
        "root_generation",
        "snapshotted_time",
        "transaction_id",
    )

    def __init__(self, dev: int) -> None:
        self.dev = dev
        self.open_count = 0
        self.changed = False
        self.had_changes = False
        """Changes were lost when the transaction failed, before it was aborted."""
        self.aborted_with_changes = False
        self.exists = False
        self.nr_changes = 0
        """Counts calls that changed mappings, for those who must notice."""
        self.mapped_blocks = 0
        self.transaction_id = 0
        self.creation_time = 0
        self.snapshotted_time = 0
        self._committed: tuple[int, int, int, int] | None = None
        self.root = 0
        self.root_generation = -1
        """The pool's generation in which ``root`` is right."""
        self.path_generation = -1
        """The pool's generation in which everything above ``root`` is shadowed, and has room."""
        self.finger = Finger()

    @property
    def is_committed(self) -> bool:
        """True when the details tree has the device."""
        return self._committed is not None

    def details(self) -> tuple[int, int, int, int]:
        """Return mapped_blocks, transaction_id, creation_time and snapshotted_time."""
        return self.mapped_blocks, self.transaction_id, self.creation_time, self.snapshotted_time

    def create(self, details: DeviceDetails) -> None:
        """Begin as a device that the details tree does not have yet."""
        self._take(details)
        self.changed = True

    def set_details(self, details: DeviceDetails | None) -> None:
        """Begin, or begin again, with what the details tree has."""
        self._committed = details
        self.restore_committed()
        self.had_changes = False

    def restore_committed(self) -> None:
        """Give up what was changed since the last commit."""
        self.had_changes = self.had_changes or self.changed
        self.changed = False
        self.root_generation = self.path_generation = -1
        self.finger.leaf = None
        self.exists = self._committed is not None
        if self._committed is not None:
            self._take(self._committed)

    def note_commit(self) -> None:
        """The details are in the tree now."""
        self.changed = False
        self._committed = self.details()

    def remember_root(self, root: int, generation: int) -> None:
        """Keep the root of the mapping tree for as long as the generation lasts."""
        self.root = root
        self.root_generation = generation

    def _take(self, details: Sequence[int]) -> None:
        self.exists = True
        self.mapped_blocks, self.transaction_id, self.creation_time, self.snapshotted_time = details


class ThinDevice:
    """An open thin device.  Made by :meth:`PoolMetadata.open_thin_device`.

    Thin blocks and data blocks are both counted in units of the pool's ``data_block_size`` sectors.  Changes are part
    of the pool's transaction; nothing is durable before :meth:`PoolMetadata.commit`.
    """

    __slots__ = ("_closed", "_handle", "_pool")

    def __init__(self, pool: PoolMetadata, handle: Handle) -> None:
        self._pool = pool
        self._handle = handle
        self._closed = False

    @property
    def dev_id(self) -> int:
        """The device's id."""
        return self._handle.dev

    @property
    def changed_this_transaction(self) -> bool:
        """True when the device was created, snapshotted or has changed mappings since the last commit."""
        return self._handle.changed

    @property
    def aborted_changes(self) -> bool:
        """True when the last abort took changes of this device away."""
        return self._handle.aborted_with_changes

    @property
    def mapped_count(self) -> int:
        """Thin blocks that are mapped, uncommitted changes included."""
        return self._live_handle().mapped_blocks

    @property
    def highest_mapped_block(self) -> int | None:
        """The last thin block that is mapped, None when none is."""
        pool = self._pool
        with pool._lock:
            root = self._start_query()
            try:
                keys = pool._storage.trees.mappings.find_highest_key(root)
            except OSError as error:
                raise from_below(error) from error
            return keys[0] if keys else None

    def close(self) -> None:
        """Close the device.  Changes stay part of the transaction.

        Closing twice does nothing.
        """
        with self._pool._lock:
            if not self._closed:
                self._closed = True
                handle = self._handle
                handle.open_count = max(0, handle.open_count - 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _live_handle(self) -> Handle:
        if self._closed or not self._handle.exists:
            raise self._gone()
        return self._handle

    def _gone(self) -> ThinError:
        if self._closed:
            return ThinError(errno.EINVAL, f"device {self.dev_id} was closed")
        return NoSuchDevice(f"no device {self.dev_id}: the transaction that created it was aborted")

    def _start_query(self) -> int:
        """Begin a call that reads, and return the root of the mapping tree."""
        handle = self._live_handle()
        self._pool._start_query()
        return self._pool._mapping_root(handle)

    # Queries

    def find_block(self, block: int, can_issue_io: bool = True) -> LookupResult:
        """Return where thin block *block* is.

        :param can_issue_io: with False, fail rather than read anything from the metadata device
        :raises NotMapped: it is mapped nowhere
        :raises WouldBlock: with *can_issue_io* False, when I/O would be needed; see ``PoolMetadata.issue_prefetches``
        :raises Corrupt: the metadata on the way is damaged, or the mapping leads out of the data device
        """
        if type(block) is not int:
            block = index(block)
        pool = self._pool
        handle = self._handle
        with pool._lock:
            if pool._frozen is not None or self._closed or not handle.exists:
                self._start_query()
            pool._client.epoch += 1
            if can_issue_io:
                root = handle.root if handle.root_generation == pool._generation else pool._mapping_root(handle)
                try:
                    found = pool._find_mapping(root, block, BLOCK_TIME_SIZE)
                except OSError as error:
                    raise from_below(error) from error
                if found is None:
                    raise NotMapped(f"thin block {block} of device {handle.dev} is not mapped")
                leaf, slot = found
                value = leaf.words[slot + leaf.max_entries]
            else:
                value = self._find_cached(block)
            data_block = value >> TIME_BITS
            if data_block >= pool._nr_data_blocks:
                raise self._outside(block, data_block)
            return _new_tuple(LookupResult, (data_block, handle.snapshotted_time > value & TIME_MASK))

    def _find_cached(self, block: int) -> int:
        pool = self._pool
        trees = pool._storage.trees
        try:
            value = trees.info.lookup_non_blocking(pool._storage.non_blocking, pool._root, [self.dev_id, block])
        except KeyNotFound:
            raise NotMapped(f"thin block {block} of device {self.dev_id} is not mapped") from None
        except OSError as error:
            raise from_below(error) from error
        assert isinstance(value, int)
        return value

    def _outside(self, block: int, data_block: int) -> Corrupt:
        found = self._pool._storage.trees.mappings.find(self._pool._mapping_root(self._handle), block)
        return Corrupt(
            None if found is None else found[0].block,
            f"thin block {block} of device {self.dev_id} is mapped to data block {data_block}, beyond the data device",
            number=errno.EINVAL,
        )

    def find_mapped_range(self, begin: int, end: int) -> MappedRange:
        """Return the first stretch of mapped blocks in ``[begin, end)`` whose data blocks are consecutive too.

        :raises NotMapped: nothing in the range is mapped
        """
        begin, end = index(begin), index(end)
        pool = self._pool
        with pool._lock:
            root = self._start_query()
            if begin >= end:
                raise NotMapped(f"range [{begin}..{end}] of device {self.dev_id} is empty")
            snapshotted_time = self._handle.snapshotted_time
            thin_begin = pool_begin = -1
            shared = False
            length = 0
            try:
                for key, value in pool._storage.trees.mappings.items(root, begin):
                    assert isinstance(value, int)
                    data_block = value >> TIME_BITS
                    maybe_shared = snapshotted_time > value & TIME_MASK
                    if key >= end:
                        break
                    if not length:
                        thin_begin, pool_begin, shared = key, data_block, maybe_shared
                    elif key != thin_begin + length or data_block != pool_begin + length or maybe_shared != shared:
                        break
                    length += 1
            except OSError as error:
                raise from_below(error) from error
            if not length:
                raise NotMapped(f"nothing in [{begin}..{end}] of device {self.dev_id} is mapped")
            if pool_begin + length > pool._nr_data_blocks:
                raise self._outside(thin_begin, pool_begin)
            return MappedRange(thin_begin, thin_begin + length, pool_begin, shared)

    def lookup_blocks(self, thin_blocks: Iterable[int]) -> list[LookupResult | None]:
        """Return where each of many thin blocks is, None for those that are not mapped.

        :param thin_blocks: ints in any order, an array as well
        """
        results: list[LookupResult | None] = []
        with self._pool._lock:
            self._start_query()
            for block in thin_blocks:
                try:
                    results.append(self.find_block(index(block)))
                except NotMapped:
                    results.append(None)
        return results

    def mappings(self, begin: int = 0, end: int | None = None) -> Iterator[Run]:
        """Iterate over the runs of mapped blocks in ``[begin, end)``, ascending.

        A run goes on as long as thin blocks and data blocks are consecutive and the time is the same.  At no time is
        more than a few leaves of the tree in memory.  Changing the device meanwhile is allowed: what lies ahead is then
        seen as it is when the iteration gets there.

        :raises Corrupt: the metadata is damaged; everything before it has been returned
        """
        return chain.from_iterable(self._batches_of_runs(index(begin), KEY_LIMIT if end is None else index(end)))

    def _batches_of_runs(self, begin: int, limit: int) -> Iterator[Iterable[Run]]:
        pending: Run | None = None
        while begin < limit:
            keys, values, begin, damage = self._gather(begin, limit)
            fields = run_fields(keys, values)
            thin, data, lengths, times = fields
            if thin:
                if pending is not None:
                    if pending.joined_with(Run(thin[0], data[0], lengths[0], times[0])) is None:
                        yield (pending,)
                    else:
                        thin[0], data[0] = pending.thin_begin, pending.data_begin
                        lengths[0] += pending.length
                # The last one may go on in the next leaf.
                pending = Run(*(field.pop() for field in fields))
                yield runs_of_fields(fields)
            if damage is not None:
                if pending is not None:
                    yield (pending,)
                raise damage
        if pending is not None:
            yield (pending,)

    def _gather(self, begin: int, limit: int) -> tuple[bytes, bytes, int, ThinError | None]:
        """Copy the entries in ``[begin, limit)`` out of the next few leaves.

        :returns: the keys and the values as little-endian words, the key to go on from, and what made it stop early
        """
        pool = self._pool
        keys: list[memoryview] = []
        values: list[memoryview] = []
        nr_data_blocks = pool._nr_data_blocks
        with pool._lock:
            root = self._start_query()
            tree = pool._storage.trees.mappings
            try:
                while len(keys) < MAX_BATCH_LEAVES and begin < limit:
                    found = tree.leaf_from(root, begin, limit)
                    if found is None:
                        begin = KEY_LIMIT
                        break
                    leaf, first, bound = found
                    last = leaf.nr_entries if bound <= limit else leaf.upper_bound(limit)
                    first_value = FIRST_SLOT + leaf.max_entries
                    part = leaf.words[first_value + first : first_value + last]
                    if part and max(part) >> TIME_BITS >= nr_data_blocks:
                        bad = next(at for at, value in enumerate(part) if value >> TIME_BITS >= nr_data_blocks)
                        keys.append(leaf.words[FIRST_SLOT + first : FIRST_SLOT + first + bad])
                        values.append(part[:bad])
                        raise self._outside(leaf.key(first + bad), part[bad] >> TIME_BITS)
                    keys.append(leaf.words[FIRST_SLOT + first : FIRST_SLOT + last])
                    values.append(part)
                    begin = bound
            except OSError as error:
                return b"".join(keys), b"".join(values), begin, from_below(error)
            # Within the lock: the views are the cache's.
            return b"".join(keys), b"".join(values), begin, None

    # Changes

    def insert_block(self, block: int, data_block: int) -> None:
        """Map *block* to *data_block*, stamped with the pool's time.

        The caller's reference to *data_block* becomes the mapping's.  An older mapping to another data block gives up
        its reference.  Cost: shadows one path of the tree, O(log n) blocks.

        :raises ThinError: EINVAL for numbers out of range, or a data block that nobody has allocated; nothing has
            changed
        :raises OutOfSpace: no free metadata block: abort
        """
        if type(block) is not int or type(data_block) is not int:
            # Numbers of other kinds overflow where a mapping is put together.
            block, data_block = index(block), index(data_block)
        pool = self._pool
        handle = self._handle
        with pool._lock:
            if pool._frozen is not None or self._closed or not handle.exists:
                self._refuse_change()
            pool._in_service = True
            storage = pool._storage
            pool._client.epoch += 1
            try:
                if not 0 <= block < KEY_LIMIT or storage.data_map.is_free(data_block):
                    raise ThinError(
                        errno.EINVAL, f"thin block {block} cannot be mapped to data block {data_block}, which is free"
                    )
            except OSError as error:
                raise from_below(error) from error
            try:
                value = data_block << TIME_BITS | pool._time
                if handle.path_generation == pool._generation:
                    tree = storage.trees.mappings
                    inserted = tree.insert_at_finger(handle.finger, block, value)
                    if inserted is None:
                        handle.root, inserted = tree.insert_in_subtree(handle.root, block, value, handle.finger)
                else:
                    pool._root, inserted = storage.trees.info.insert_notify(pool._root, [handle.dev, block], value)
                    self._note_path()
                if inserted:
                    handle.mapped_blocks += 1
                handle.changed = True
                handle.nr_changes += 1
            except BaseException as error:
                pool._fail(error)

    def _note_path(self) -> None:
        """The way from the pool's root to the device's has just been shadowed: remember where it leads."""
        pool = self._pool
        handle = self._handle
        root = pool._storage.trees.top_level.lookup(pool._root, [handle.dev])
        assert isinstance(root, int)
        handle.remember_root(root, pool._generation)
        handle.path_generation = pool._generation
        handle.finger.leaf = None

    def _refuse_change(self) -> None:
        self._live_handle()
        self._pool._start_change()

    def insert_range(self, thin_begin: int, data_begin: int, length: int) -> None:
        """Map *length* consecutive thin blocks to consecutive data blocks; as :meth:`insert_block` one by one."""
        self.insert_blocks(range(thin_begin, thin_begin + length), range(data_begin, data_begin + length))

    def insert_blocks(self, thin_blocks: Iterable[int], data_blocks: Iterable[int]) -> None:
        """Map each of *thin_blocks* to the data block at the same place; as :meth:`insert_block` one by one.

        :param thin_blocks: ints, an array as well; as many as *data_blocks*
        :raises ThinError: EINVAL when the lengths differ, or for any pair that ``insert_block`` would refuse: nothing
            has changed
        """
        thin = [index(block) for block in thin_blocks]
        data = [index(block) for block in data_blocks]
        pool = self._pool
        with pool._lock:
            self._refuse_change()
            if len(thin) != len(data):
                raise ThinError(errno.EINVAL, f"{len(thin)} thin blocks for {len(data)} data blocks")
            self._require_insertable(thin, data)
            for block, data_block in zip(thin, data, strict=True):
                self.insert_block(block, data_block)

    def _require_insertable(self, thin: list[int], data: list[int]) -> None:
        """Refuse what ``insert_block`` would, at its turn: mapping a block again may free a data block named later."""
        pool = self._pool
        mapped: dict[int, int | None] = {}
        dropped: dict[int, int] = {}
        for block, data_block in zip(thin, data, strict=True):
            if not 0 <= block < KEY_LIMIT or pool._count(data_block) <= dropped.get(data_block, 0):
                raise ThinError(
                    errno.EINVAL, f"thin block {block} cannot be mapped to data block {data_block}, which is free"
                )
            old = mapped[block] if block in mapped else self._data_block_of(block)
            if old is not None and old != data_block:
                dropped[old] = dropped.get(old, 0) + 1
            mapped[block] = data_block

    def _data_block_of(self, block: int) -> int | None:
        try:
            return self.find_block(block).block
        except NotMapped:
            return None

    def provision(self, begin: int, length: int) -> list[Run]:
        """Allocate and map a data block for each thin block of ``[begin, begin + length)`` that is not mapped yet.

        :returns: the new mappings, as runs
        :raises OutOfSpace: not enough data blocks are free, nothing is mapped; or no metadata block: abort
        """
        pool = self._pool
        with pool._lock:
            self._refuse_change()
            begin, length = index(begin), index(length)
            if not 0 <= begin <= begin + length <= KEY_LIMIT:
                raise ThinError(errno.EINVAL, f"[{begin}..{begin + length}] is not a range of thin blocks")
            wanted = length - sum(run.length for run in self.mappings(begin, begin + length))
            data_map = pool._storage.data_map
            free = data_map.nr_free + pool._nr_data_blocks - data_map.nr_blocks
            if wanted > free:
                raise OutOfSpace(f"{wanted} data blocks are needed, {free} are free")
            missing = self._unmapped(begin, begin + length)
            allocated: list[int] = []
            try:
                allocated.extend(pool.alloc_data_block() for _ in missing)
                for block, data_block in zip(missing, allocated, strict=True):
                    self.insert_block(block, data_block)
            except OutOfSpace:
                if pool._failure is None:
                    for data_block in allocated:
                        pool.dec_data_range(data_block, data_block + 1)
                raise
            except BaseException as error:
                # Blocks that nobody knows of any more must not be committed.
                pool._fail(error)
            made: list[Run] = []
            for block, data_block in zip(missing, allocated, strict=True):
                run = Run(block, data_block, 1, pool._time)
                joined = made[-1].joined_with(run) if made else None
                if joined is None:
                    made.append(run)
                else:
                    made[-1] = joined
            return made

    def _unmapped(self, begin: int, end: int) -> list[int]:
        missing: list[int] = []
        for run in self.mappings(begin, end):
            missing.extend(range(begin, run.thin_begin))
            begin = run.thin_begin + run.length
        missing.extend(range(begin, end))
        return missing

    def remove_block(self, block: int) -> None:
        """Take the mapping of *block* away; its data block loses a reference.

        :raises NotMapped: it has none, nothing has changed
        """
        if type(block) is not int:
            block = index(block)
        pool = self._pool
        handle = self._handle
        with pool._lock:
            if pool._frozen is not None or self._closed or not handle.exists:
                self._refuse_change()
            pool._in_service = True
            storage = pool._storage
            pool._client.epoch += 1
            root = handle.root if handle.root_generation == pool._generation else pool._mapping_root(handle)
            tree = storage.trees.mappings
            try:
                place = tree.find_place(root, block)
            except OSError as error:
                raise from_below(error) from error
            if place is None:
                raise NotMapped(f"thin block {block} of device {handle.dev} is not mapped")
            try:
                if handle.path_generation == pool._generation:
                    handle.root = tree.remove_at(root, block, place)
                    handle.finger.leaf = None
                else:
                    pool._root = storage.trees.info.remove(pool._root, [handle.dev, block])
                    self._note_path()
                handle.mapped_blocks -= 1
                handle.changed = True
                handle.nr_changes += 1
            except BaseException as error:
                pool._fail(error)

    def remove_range(self, begin: int, end: int) -> None:
        """Take all mappings in ``[begin, end)`` away; there need not be any.

        :raises ThinError: EINVAL when *end* is below *begin*, nothing has changed
        """
        pool = self._pool
        with pool._lock:
            self._refuse_change()
            begin, end = index(begin), index(end)
            if not 0 <= begin <= end <= KEY_LIMIT:
                raise ThinError(errno.EINVAL, f"[{begin}..{end}] is not a range of thin blocks")
            handle = self._handle
            root = pool._mapping_root(handle)
            storage = pool._storage
            trees = storage.trees
            try:
                # The tree is taken out of the pool while it changes, with a reference that keeps it.
                storage.tm.inc(root)
                pool._root = trees.top_level.remove(pool._root, [handle.dev])
                removed = 0
                while begin < end:
                    storage.bm.begin_operation()
                    found = trees.mappings.leaf_from(root, begin, end)
                    if found is None:
                        break
                    leaf, at, _ = found
                    begin = leaf.key(at)
                    if begin >= end:
                        break
                    root, count, begin = trees.mappings.remove_leaves(root, [begin], end)
                    removed += count
                storage.bm.begin_operation()
                handle.mapped_blocks -= removed
                handle.changed = True
                handle.nr_changes += 1
                pool._root = trees.top_level.insert(pool._root, [handle.dev], root)
                pool._generation += 1
                handle.finger.leaf = None
            except BaseException as error:
                pool._fail(error)
