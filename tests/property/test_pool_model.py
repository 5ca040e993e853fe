"""The whole interface of a pool against plain dictionaries, in any order of calls that hypothesis thinks of.

After every commit our check is clean, and the space maps are what an independent reader counts.  A pool's nodes are
large, so some rules insert hundreds of blocks at once; test_btree_model.py has the small nodes.
"""

from __future__ import annotations

import copy
import errno
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bufio import MemoryDevice
from tests.support.pools import assert_sound, outcome_of
from thinpool import (
    DeviceBusy,
    DeviceDetails,
    DeviceExists,
    NoSuchDevice,
    NotMapped,
    OutOfSpace,
    PoolMetadata,
    ReadOnly,
    Run,
    ThinDevice,
    ThinError,
    TransactionMismatch,
    WouldBlock,
    delta,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4096
LAST_BLOCK = (1 << 64) - 1
PLENTY = 1024  # metadata blocks that no run of this machine can use up
NEEDS_CHECK = 1

DEV_IDS = [0, 1, 2, 3, (1 << 24) - 1]
dev_ids = st.sampled_from(DEV_IDS)
some_device = st.sampled_from([*range(12), -1])
"""Which of the devices that exist; -1 for an id that may exist or not.  See ``PoolMachine.an_open``."""
thin_blocks = st.one_of(
    st.integers(0, 30),
    st.integers(0, 2000),
    st.sampled_from([1 << 40, (1 << 63) - 1, 1 << 63, LAST_BLOCK - 1, LAST_BLOCK]),
)
seeds = st.integers(0, 1 << 16)
patterns = st.sampled_from(["ascending", "descending", "random", "interleaved"])

Mappings = dict[int, tuple[int, int]]


@dataclass
class Device:
    """A device as plain values; ``mappings`` is thin block -> (data block, time)."""

    mappings: Mappings = field(default_factory=dict)
    transaction_id: int = 0
    creation_time: int = 0
    snapshotted_time: int = 0

    def details(self) -> DeviceDetails:
        return DeviceDetails(len(self.mappings), self.transaction_id, self.creation_time, self.snapshotted_time)

    def runs(self, begin: int = 0, end: int = LAST_BLOCK + 1) -> list[Run]:
        found: list[Run] = []
        for thin in sorted(self.mappings):
            if begin <= thin < end:
                run = Run(thin, self.mappings[thin][0], 1, self.mappings[thin][1])
                joined = found[-1].joined_with(run) if found else None
                found[len(found) - (joined is not None) :] = [joined or run]
        return found


@dataclass
class Pool:
    """A pool as plain values."""

    nr_data_blocks: int
    nr_metadata_blocks: int
    devices: dict[int, Device] = field(default_factory=dict)
    time: int = 0
    transaction_id: int = 0
    flags: int = 0
    owned: Counter[int] = field(default_factory=Counter)
    """References to data blocks that are ours: allocated, or added, but not mapped."""
    snap: Pool | None = None

    def used(self) -> set[int]:
        """Data blocks that are not free."""
        found = {block for block, count in self.owned.items() if count}
        for pool in (self, self.snap):
            for device in pool.devices.values() if pool is not None else ():
                found.update(data for data, _ in device.mappings.values())
        return found


def in_pattern(pattern: str, begin: int, count: int, seed: int) -> list[int]:
    """*count* different thin blocks from *begin* on, in an order that makes trees grow in a certain way."""
    blocks = list(range(begin, begin + count))
    if pattern == "descending":
        blocks.reverse()
    elif pattern == "random":
        blocks = random.Random(seed).sample(range(begin, begin + 8 * count), count)
    elif pattern == "interleaved":
        blocks = [begin + 2 * (i % (count // 2 + 1)) + i // (count // 2 + 1) for i in range(count)]
    return blocks


def count_event(what: str) -> None:
    """Have hypothesis say in its statistics how often a run got as far as this."""
    if currently_in_test_context():
        event(what)


class PoolMachine(RuleBasedStateMachine):
    """Does the same to a pool and to its model, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.device = MemoryDevice(0)
        self.cache_bytes: int | None = None
        self.pool: PoolMetadata
        self.now = Pool(0, 0)
        self.committed = Pool(0, 0)
        self.open: dict[int, list[ThinDevice]] = {}
        self.orphans: list[ThinDevice] = []
        """Open handles of devices that a failure or an abort took away."""
        self.changed: set[int] = set()
        self.created: set[int] = set()
        """Devices made since the last commit, even where one of the same id was there before."""
        self.failed = False
        self.read_only = False
        self.nr_changes = 0
        self.commit_every = 1
        self.stay_failed = False

    @initialize(
        nr_data_blocks=st.sampled_from([4000, 4000, 20000, 700, 25, 0]),
        nr_metadata_blocks=st.sampled_from([PLENTY, PLENTY, 40, 24, 18, 14]),
        cache_bytes=st.sampled_from([None, 1]),
        commit_every=st.sampled_from([1, 3, 10, 1000]),
        stay_failed=st.booleans(),
        devices=st.lists(st.tuples(patterns, st.sampled_from([600, 900, 200, 5]), st.booleans()), max_size=2),
    )
    def format(
        self,
        nr_data_blocks: int,
        nr_metadata_blocks: int,
        cache_bytes: int | None,
        commit_every: int,
        stay_failed: bool,
        devices: list[tuple[str, int, bool]],
    ) -> None:
        """Begin with a few devices, so that runs of few steps get somewhere."""
        self.device = MemoryDevice(nr_metadata_blocks * BLOCK)
        self.cache_bytes = cache_bytes
        self.commit_every = commit_every
        self.stay_failed = stay_failed
        self.pool = PoolMetadata.format(self.device, 128, nr_data_blocks, cache_bytes=cache_bytes)
        self.now = Pool(nr_data_blocks, nr_metadata_blocks)
        self.committed = copy.deepcopy(self.now)
        self.check_committed()
        for dev, (pattern, count, with_snapshot) in enumerate(devices):
            self.create_thin(DEV_IDS[dev])
            self.insert_blocks(dev, 0, count, pattern, 0)
            if with_snapshot:
                self.create_snap(DEV_IDS[dev + 2], DEV_IDS[dev])
        self.commit()

    # What a call may do besides succeeding

    def change(self, call: Callable[[], object]) -> bool:
        """Do what must succeed unless the pool is frozen or out of metadata space; tell whether it did."""
        error = outcome_of(call)
        if error is None:
            assert not self.failed, "a failed transaction was changed"
            assert not self.read_only, "a read-only pool was changed"
            self.nr_changes += 1
            return True
        self.excuse(error)
        return False

    def excuse(self, error: OSError) -> None:
        """Accept the errors of a pool that cannot be changed, and of one that runs out of metadata."""
        if currently_in_test_context():
            note(f"{type(error).__name__}: {error}")
        if self.failed and isinstance(error, NoSuchDevice):
            assert self.orphans
        elif self.failed:
            assert type(error) is ThinError
            assert error.errno == errno.EINVAL
            assert "abort" in str(error)
        elif self.read_only:
            assert isinstance(error, ReadOnly)
            assert error.errno == errno.EPERM
        else:
            assert isinstance(error, OutOfSpace), f"{type(error).__name__}: {error}"
            assert error.errno == errno.ENOSPC
            assert self.now.nr_metadata_blocks < PLENTY
            count_event("out of metadata space")
            self.failed = True
            self.orphan_created()
            self.nothing_can_be_changed()
            self.queries(0, [0, 7], 0)

    def refused(self, kind: type[ThinError], call: Callable[[], object]) -> None:
        """Do what must be refused."""
        error = outcome_of(call)
        assert error is not None, f"no {kind.__name__}"
        if self.failed or self.read_only:
            self.excuse(error)
        else:
            assert isinstance(error, kind), f"{type(error).__name__} in place of {kind.__name__}: {error}"

    def orphan_created(self) -> None:
        for dev in self.created:
            self.orphans += self.open.pop(dev, [])
        for thin in self.orphans:
            error = outcome_of(lambda thin=thin: thin.find_block(0))  # type: ignore[misc]  # bound at once
            assert isinstance(error, NoSuchDevice)

    @property
    def shown(self) -> Pool:
        """What queries answer from."""
        return self.committed if self.failed else self.now

    def allocatable(self) -> set[int]:
        return set(range(self.now.nr_data_blocks)) - self.now.used() - self.committed.used()

    def pick(self, which: int) -> int:
        """The id of one of the devices that exist, or any id."""
        devices = sorted(self.shown.devices)
        return devices[which % len(devices)] if devices and which >= 0 else DEV_IDS[self.nr_changes % len(DEV_IDS)]

    def an_open(self, dev: int) -> ThinDevice | None:
        """A handle of *dev*, opened if it is not, None if there is no such device."""
        handles = self.open.setdefault(dev, [])
        if not handles:
            if dev not in self.shown.devices:
                error = outcome_of(lambda: self.pool.open_thin_device(dev))
                assert isinstance(error, NoSuchDevice)
                assert error.errno == errno.ENODATA
                return None
            handles.append(self.pool.open_thin_device(dev))
        return handles[-1]

    # Devices

    @rule(dev=dev_ids)
    def create_thin(self, dev: int) -> None:
        if dev in self.now.devices:
            self.refused(DeviceExists, lambda: self.pool.create_thin(dev))
        elif self.change(lambda: self.pool.create_thin(dev)):
            now = self.now
            now.devices[dev] = Device({}, now.transaction_id, now.time, now.time)
            self.changed.add(dev)
            self.created.add(dev)

    @rule(dev=dev_ids, origin=dev_ids)
    def create_snap(self, dev: int, origin: int) -> None:
        if dev in self.now.devices:
            self.refused(DeviceExists, lambda: self.pool.create_snap(dev, origin))
        elif origin not in self.now.devices:
            self.refused(NoSuchDevice, lambda: self.pool.create_snap(dev, origin))
        elif self.change(lambda: self.pool.create_snap(dev, origin)):
            now = self.now
            now.time += 1
            now.devices[dev] = Device(dict(now.devices[origin].mappings), now.transaction_id, now.time, now.time)
            now.devices[origin].snapshotted_time = now.time
            self.changed |= {dev, origin}
            self.created.add(dev)

    @rule(dev=dev_ids)
    def delete_thin_device(self, dev: int) -> None:
        if dev not in self.now.devices:
            self.refused(NoSuchDevice, lambda: self.pool.delete_thin_device(dev))
        elif self.open.get(dev):
            self.refused(DeviceBusy, lambda: self.pool.delete_thin_device(dev))
        elif self.change(lambda: self.pool.delete_thin_device(dev)):
            del self.now.devices[dev]
            self.changed.discard(dev)

    @rule(which=some_device, more=st.booleans())
    def open_or_close_thin_device(self, which: int, more: bool) -> None:
        dev = self.pick(which)
        if more and dev in self.shown.devices:
            self.open.setdefault(dev, []).append(self.pool.open_thin_device(dev))
        while self.open.get(dev) and not more:
            thin = self.open[dev].pop()
            thin.close()
            thin.close()
            error = outcome_of(lambda thin=thin: thin.find_block(0))  # type: ignore[misc]  # bound at once
            assert isinstance(error, ThinError)
            assert error.errno == errno.EINVAL

    # Mappings, one by one

    @rule(which=some_device, block=thin_blocks)
    def insert_block(self, which: int, block: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        data = self.alloc() if thin is not None else None
        if thin is None or data is None:
            return
        if self.change(lambda: thin.insert_block(block, data)):
            self.mapped(dev, block, data)

    def alloc(self, free: set[int] | None = None) -> int | None:
        """Allocate a data block, one of *free*, as a writer to the device does."""
        got: list[int] = []
        if free is None:
            free = self.allocatable()
        if free or self.failed or self.read_only:
            if self.change(lambda: got.append(self.pool.alloc_data_block())):
                free.remove(got[0])
                self.now.owned[got[0]] += 1
                return got[0]
            return None
        count_event("out of data space")
        self.refused(OutOfSpace, self.pool.alloc_data_block)
        return None

    def mapped(self, dev: int, block: int, data: int) -> None:
        device = self.now.devices[dev]
        old = device.mappings.get(block)
        device.mappings[block] = data, self.now.time
        if old is None or old[0] != data:
            self.now.owned[data] -= 1
        self.changed.add(dev)

    @rule(which=some_device, block=thin_blocks, other=some_device, pick=seeds)
    def map_a_block_of_another_device(self, which: int, block: int, other: int, pick: int) -> None:
        """Share by hand: a reference for the mapping is added first."""
        dev, other = self.pick(which), self.pick(other)
        thin = self.an_open(dev)
        candidates = sorted(self.now.devices[other].mappings.items()) if other in self.now.devices else []
        if thin is None or not candidates:
            return
        data = candidates[pick % len(candidates)][1][0]
        if self.change(lambda: self.pool.inc_data_range(data, data + 1)):
            self.now.owned[data] += 1
            if self.change(lambda: thin.insert_block(block, data)):
                self.mapped(dev, block, data)

    @rule(which=some_device, block=thin_blocks, data=st.integers(0, 30000))
    def insert_of_a_free_data_block_is_refused(self, which: int, block: int, data: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is not None and (data >= self.now.nr_data_blocks or data not in self.now.used()):
            self.refused(ThinError, lambda: thin.insert_block(block, data))

    @rule(which=some_device, block=thin_blocks, pick=st.one_of(st.none(), seeds))
    def remove_block(self, which: int, block: int, pick: int | None) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is None:
            return
        mappings = self.now.devices[dev].mappings if dev in self.now.devices else {}
        if pick is not None and mappings:
            block = sorted(mappings)[pick % len(mappings)]
        if block not in mappings:
            self.refused(NotMapped, lambda: thin.remove_block(block))
        elif self.change(lambda: thin.remove_block(block)):
            del mappings[block]
            self.changed.add(dev)

    # Mappings, many at once

    @rule(which=some_device, begin=thin_blocks, length=st.one_of(st.integers(0, 40), st.just(LAST_BLOCK)))
    def remove_range(self, which: int, begin: int, length: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is None:
            return
        end = min(begin + length, LAST_BLOCK + 1)
        if self.change(lambda: thin.remove_range(begin, end)):
            device = self.now.devices[dev]
            device.mappings = {b: m for b, m in device.mappings.items() if not begin <= b < end}
            self.changed.add(dev)
        if begin:
            self.refused(ThinError, lambda: thin.remove_range(begin, begin - 1))

    @rule(which=some_device, begin=st.integers(0, 3000), count=st.integers(1, 700), pattern=patterns, seed=seeds)
    def insert_blocks(self, which: int, begin: int, count: int, pattern: str, seed: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is None:
            return
        thin_blocks = in_pattern(pattern, begin, count, seed)
        data_blocks: list[int] = []
        free = self.allocatable()
        while len(data_blocks) < count:
            data = self.alloc(free)
            if data is None:
                break
            data_blocks.append(data)
        del thin_blocks[len(data_blocks) :]
        if self.failed:
            return
        if self.change(lambda: thin.insert_blocks(thin_blocks, data_blocks)):
            for block, data in zip(thin_blocks, data_blocks, strict=True):
                self.mapped(dev, block, data)
            if thin_blocks:
                self.refused(ThinError, lambda: thin.insert_blocks(thin_blocks, data_blocks[1:]))

    @rule(which=some_device, count=st.integers(1, 700), pattern=patterns, seed=seeds)
    def remove_blocks(self, which: int, count: int, pattern: str, seed: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is None or dev not in self.now.devices:
            return
        mappings = self.now.devices[dev].mappings
        present = sorted(mappings)
        order = in_pattern(pattern, seed % (len(present) + 1), count, seed)
        for block in [present[at] for at in order if at < len(present)]:
            if not self.change(lambda block=block: thin.remove_block(block)):  # type: ignore[misc]  # bound at once
                break
            del mappings[block]
            self.changed.add(dev)

    @rule(which=some_device, begin=thin_blocks, length=st.one_of(st.integers(0, 40), st.integers(200, 600)))
    def provision(self, which: int, begin: int, length: int) -> None:
        dev = self.pick(which)
        thin = self.an_open(dev)
        if thin is None:
            return
        if begin + length > LAST_BLOCK + 1:
            self.refused(ThinError, lambda: thin.provision(begin, length))
            return
        device = self.now.devices.get(dev, Device())
        missing = [block for block in range(begin, begin + length) if block not in device.mappings]
        free = self.allocatable()
        made: list[Run] = []
        error = outcome_of(lambda: made.extend(thin.provision(begin, length)))
        if error is not None:
            if not self.failed and not self.read_only and len(missing) > len(free) and self.is_alive():
                assert isinstance(error, OutOfSpace)
            else:
                self.excuse(error)
            return
        assert len(missing) <= len(free)
        given = [(run.thin_begin + i, run.data_begin + i) for run in made for i in range(run.length)]
        assert [block for block, _ in given] == missing
        assert {run.time for run in made} <= {self.now.time}
        for block, data in given:
            assert data in free
            free.discard(data)
            device.mappings[block] = data, self.now.time
        if given:
            self.changed.add(dev)

    def is_alive(self) -> bool:
        """Whether the transaction can go on, found out by a change that changes nothing."""
        transaction_id = self.now.transaction_id
        return outcome_of(lambda: self.pool.set_transaction_id(transaction_id, transaction_id)) is None

    # Data blocks

    @rule(give_back=st.booleans(), pick=seeds)
    def alloc_data_block(self, give_back: bool, pick: int) -> None:
        self.alloc()
        owned = sorted(block for block, count in self.now.owned.items() if count)
        if give_back and owned:
            data = owned[pick % len(owned)]
            if self.change(lambda: self.pool.dec_data_range(data, data + 1)):
                self.now.owned[data] -= 1

    @rule(begin=st.integers(0, 25000), length=st.integers(0, 300), back=st.booleans())
    def inc_and_dec_data_range(self, begin: int, length: int, back: bool) -> None:
        end = begin + length
        if end > self.now.nr_data_blocks:
            self.refused(ThinError, lambda: self.pool.inc_data_range(begin, end))
            self.refused(ThinError, lambda: self.pool.dec_data_range(begin, end))
            return
        if length and not all(block in self.now.used() for block in range(begin, end)):
            self.refused(ThinError, lambda: self.pool.dec_data_range(begin, end))
        if self.change(lambda: self.pool.inc_data_range(begin, end)):
            self.now.owned.update(range(begin, end))
            if back and self.change(lambda: self.pool.dec_data_range(begin, end)):
                self.now.owned.subtract(range(begin, end))

    # Sizes, ids, flags, modes

    @rule(extra=st.sampled_from([-1, 0, 1, 10, 1000, 17000]))
    def resize_data_dev(self, extra: int) -> None:
        size = self.now.nr_data_blocks + extra
        if extra < 0:
            self.refused(ThinError, lambda: self.pool.resize_data_dev(size))
        elif size < 60000 and self.change(lambda: self.pool.resize_data_dev(size)):
            self.now.nr_data_blocks = size

    @rule(extra=st.sampled_from([-1, 0, 1, 8, 24]))
    def resize_metadata_dev(self, extra: int) -> None:
        size = self.now.nr_metadata_blocks + extra
        if extra > 0:
            self.refused(ThinError, lambda: self.pool.resize_metadata_dev(self.device.size_bytes // BLOCK + 1))
            if self.device.size_bytes < size * BLOCK:
                self.device.grow(size * BLOCK)
        if extra < 0:
            self.refused(ThinError, lambda: self.pool.resize_metadata_dev(size))
        elif self.change(lambda: self.pool.resize_metadata_dev(size)):
            self.now.nr_metadata_blocks = size
            assert self.pool.metadata_dev_size == size

    @rule(current=st.integers(0, 2), new=st.integers(0, 2))
    def set_transaction_id(self, current: int, new: int) -> None:
        if current != self.now.transaction_id:
            self.refused(TransactionMismatch, lambda: self.pool.set_transaction_id(current, new))
        elif self.change(lambda: self.pool.set_transaction_id(current, new)):
            self.now.transaction_id = new

    @rule(value=st.booleans())
    def needs_check(self, value: bool) -> None:
        """The flag goes to the device at once, without the rest of the transaction; a failure does not prevent it."""
        call = self.pool.set_needs_check if value else self.pool.clear_needs_check
        if self.read_only:
            assert isinstance(outcome_of(call), ReadOnly)
            return
        call()
        flags = NEEDS_CHECK if value else 0
        self.now.flags = self.committed.flags = flags
        if self.committed.snap is None or self.now.snap is None:
            self.check_committed()

    @rule(abort=st.booleans())
    def read_only_for_a_while(self, abort: bool) -> None:
        """Every change is refused, queries go on, and what was changed before is still there afterwards."""
        self.pool.set_read_only()
        self.read_only = True
        assert self.pool.is_read_only
        self.nothing_can_be_changed()
        self.counts_agree()
        self.queries(0, [0, 7], 0)
        if abort:
            self.abort()
            self.nothing_can_be_changed()
        self.pool.set_read_write()
        self.read_only = False
        assert not self.pool.is_read_only

    def nothing_can_be_changed(self) -> None:
        for call in (
            lambda: self.pool.create_thin(77),
            lambda: self.pool.delete_thin_device(0),
            lambda: self.pool.set_transaction_id(0, 1),
            lambda: self.pool.resize_data_dev(1 << 20),
            lambda: self.pool.alloc_data_block(),
            lambda: self.pool.commit(),
        ):
            assert not self.change(call)
        for handles in self.open.values():
            for thin in handles:
                for change in (
                    lambda thin=thin: thin.insert_block(0, 0),
                    lambda thin=thin: thin.remove_range(0, 1),
                    lambda thin=thin: thin.provision(0, 1),
                ):
                    assert not self.change(change)

    # The metadata snapshot

    @rule()
    def reserve_metadata_snap(self) -> None:
        if self.now.snap is not None:
            self.refused(DeviceBusy, self.pool.reserve_metadata_snap)
            return
        before = self.device.contents()[:BLOCK]
        if self.change(self.pool.reserve_metadata_snap):
            self.has_committed()
            self.now.snap = copy.deepcopy(self.committed)
        elif self.device.contents()[:BLOCK] != before:
            # It is the copy that failed; the commit before it has been made.
            self.has_committed()

    @rule()
    def release_metadata_snap(self) -> None:
        if self.now.snap is None:
            self.refused(ThinError, self.pool.release_metadata_snap)
        elif self.change(self.pool.release_metadata_snap):
            self.now.snap = None

    @rule()
    def open_metadata_snap(self) -> None:
        if self.committed.snap is None:
            error = outcome_of(lambda: PoolMetadata.open_metadata_snap(self.device))
            assert isinstance(error, ThinError)
            assert error.errno == errno.ENODATA
            return
        with PoolMetadata.open_metadata_snap(self.device) as snap:
            self.compare_all(snap, self.committed.snap)
            assert isinstance(outcome_of(lambda: snap.create_thin(77)), ReadOnly)

    # The transaction

    @rule()
    def commit(self) -> None:
        if self.change(self.pool.commit):
            self.has_committed()

    def has_committed(self) -> None:
        self.committed = copy.deepcopy(self.now)
        self.changed.clear()
        self.created.clear()
        self.nr_changes = 0
        self.check_committed()

    @rule()
    def abort(self) -> None:
        self.pool.abort()
        for dev, handles in self.open.items():
            for thin in handles:
                # A call that failed midway may have changed some of what it was to change.
                assert thin.aborted_changes == (dev in self.changed) or (thin.aborted_changes and self.failed)
        self.orphan_created()
        assert all(thin.aborted_changes for thin in self.orphans)
        self.failed = False
        self.changed.clear()
        self.created.clear()
        self.now = copy.deepcopy(self.committed)
        self.compare_all(self.pool, self.committed)

    @precondition(lambda self: self.orphans)
    @rule()
    def close_orphans(self) -> None:
        while self.orphans:
            self.orphans.pop().close()

    @rule()
    def reopen(self) -> None:
        busy = sorted(dev for dev, handles in self.open.items() if handles)
        if busy:
            error = outcome_of(self.pool.close)
            assert isinstance(error, DeviceBusy)
            assert str(busy) in str(error)
        self.close_devices()
        lost = self.failed or self.read_only
        error = outcome_of(self.pool.close)
        if error is not None:
            # The commit failed, but the pool is closed all the same.
            assert isinstance(error, OutOfSpace)
            assert self.now.nr_metadata_blocks < PLENTY
            lost = True
        if not lost:
            self.committed = copy.deepcopy(self.now)
        self.open_again()

    @rule()
    def power_cut(self) -> None:
        """What was not committed is gone.  (tests/crash has the cuts within a commit.)"""
        self.close_devices()
        self.open_again()

    def close_devices(self) -> None:
        self.close_orphans()
        for handles in self.open.values():
            for thin in handles:
                thin.close()
        self.open.clear()

    def open_again(self) -> None:
        self.check_committed()
        self.failed = self.read_only = False
        self.changed.clear()
        self.created.clear()
        self.now = copy.deepcopy(self.committed)
        self.pool = PoolMetadata.open(self.device, 128, cache_bytes=self.cache_bytes)
        self.compare_all(self.pool, self.committed)

    # Comparing

    def check_committed(self) -> None:
        """What is on the device, for a reader that shares no code with the engine."""
        expected = self.committed
        image = assert_sound(self.device, expected.owned)
        sb = image.superblock()
        assert sb.time == expected.time
        assert sb.transaction_id == expected.transaction_id
        assert sb.flags == expected.flags
        assert sb.data_map.nr_blocks == expected.nr_data_blocks
        assert sb.metadata_map.nr_blocks == expected.nr_metadata_blocks
        assert bool(sb.held_root) == (expected.snap is not None)
        nr_levels = max(
            (len(image.shape(int.from_bytes(v, "little")).levels) for _, v in image.items(sb.mapping_root)), default=0
        )
        count_event(f"mapping tree of {nr_levels} levels")
        if any(count > 2 for count in image.counts("data").values()):
            count_event("data count above 2")
        assert image.devices() == {d: tuple(device.details()) for d, device in expected.devices.items()}
        assert image.mappings() == {dev: device.mappings for dev, device in expected.devices.items()}
        if expected.snap is not None:
            copy_of_it = image.superblock(sb.held_root)
            assert image.mappings(copy_of_it) == {d: device.mappings for d, device in expected.snap.devices.items()}

    def compare_all(self, pool: PoolMetadata, expected: Pool) -> None:
        """Everything the engine tells about devices and mappings."""
        assert pool.time == expected.time
        assert pool.transaction_id == expected.transaction_id
        assert pool.devices() == {dev: device.details() for dev, device in expected.devices.items()}
        for dev, device in expected.devices.items():
            with pool.open_thin_device(dev) as thin:
                assert list(thin.mappings()) == device.runs()
                assert thin.mapped_count == len(device.mappings)
                assert thin.highest_mapped_block == max(device.mappings, default=None)

    @invariant()
    def commits_now_and_then(self) -> None:
        if self.failed and not self.stay_failed:
            self.abort()
        elif self.nr_changes >= self.commit_every:
            self.commit()

    @invariant()
    def counts_agree(self) -> None:
        pool, shown = self.pool, self.shown
        assert pool.time == shown.time
        assert pool.transaction_id == shown.transaction_id
        assert pool.needs_check == bool(shown.flags)
        assert (pool.metadata_snap is None) == (shown.snap is None)
        assert pool.data_dev_size == self.committed.nr_data_blocks
        assert pool.metadata_dev_size == shown.nr_metadata_blocks
        # Before the commit that lets the pool grow, more than it has may be in use.
        assert pool.free_block_count == max(0, self.committed.nr_data_blocks - len(shown.used()))
        assert pool.devices() == {dev: device.details() for dev, device in shown.devices.items()}
        assert pool.changed_this_transaction == (bool(self.changed) and not self.failed)
        for dev, handles in self.open.items():
            for thin in handles:
                assert thin.dev_id == dev
                if dev in shown.devices:
                    assert thin.mapped_count == len(shown.devices[dev].mappings)
                    assert thin.changed_this_transaction == (dev in self.changed and not self.failed)

    @rule(which=some_device, blocks=st.lists(thin_blocks, max_size=5), pick=seeds)
    def queries(self, which: int, blocks: list[int], pick: int) -> None:
        self.find_block(which, blocks, pick)
        begin = blocks[0] if blocks else pick % 2000
        self.mappings(which, begin, pick % 3000, not blocks)
        self.compare_devices(which, which + 1)
        self.data_block_state(pick % 5000)

    def find_block(self, which: int, blocks: list[int], pick: int) -> None:
        dev = self.pick(which)
        device = self.shown.devices.get(dev)
        thin = self.an_open(dev)
        if thin is None or device is None:
            return
        if device.mappings:
            blocks = [*blocks, sorted(device.mappings)[pick % len(device.mappings)]]
        for block in blocks:
            found = device.mappings.get(block)
            if found is None:
                error = outcome_of(lambda block=block: thin.find_block(block))  # type: ignore[misc]  # bound at once
                assert isinstance(error, NotMapped)
                assert thin.lookup_blocks([block]) == [None]
            else:
                answer = found[0], device.snapshotted_time > found[1]
                assert thin.find_block(block) == answer
                assert thin.lookup_blocks([block]) == [answer]
                assert self.find_without_io(thin, block) == answer
        assert thin.highest_mapped_block == max(device.mappings, default=None)

    def find_without_io(self, thin: ThinDevice, block: int) -> tuple[int, bool]:
        """As one does who must not wait: try, have missing blocks read, try again."""
        for _ in range(10):
            try:
                return thin.find_block(block, can_issue_io=False)
            except WouldBlock:
                self.pool.issue_prefetches()
        raise AssertionError("still not cached after ten prefetches")

    def mappings(self, which: int, begin: int, length: int, whole: bool) -> None:
        dev = self.pick(which)
        device = self.shown.devices.get(dev)
        thin = self.an_open(dev)
        if thin is None or device is None:
            return
        if whole:
            assert list(thin.mappings()) == device.runs()
        end = min(begin + length, LAST_BLOCK + 1)
        runs = device.runs(begin, end)
        assert list(thin.mappings(begin, end)) == runs
        if not runs:
            assert isinstance(outcome_of(lambda: thin.find_mapped_range(begin, end)), NotMapped)
            return
        thin_begin, data_begin = runs[0].thin_begin, runs[0].data_begin
        shared = device.snapshotted_time > runs[0].time
        thin_end = thin_begin
        for run in runs:
            offset = thin_end - thin_begin
            if (run.thin_begin, run.data_begin) != (thin_end, data_begin + offset):
                break
            if (device.snapshotted_time > run.time) != shared:
                break
            thin_end += run.length
        assert thin.find_mapped_range(begin, end) == (thin_begin, thin_end, data_begin, shared)

    def compare_devices(self, which: int, other: int) -> None:
        dev, other = self.pick(which), self.pick(other)
        if dev not in self.shown.devices or other not in self.shown.devices:
            return
        left, right = self.an_open(dev), self.an_open(other)
        assert left is not None
        assert right is not None
        a, b = ({block: data for block, (data, _) in self.shown.devices[d].mappings.items()} for d in (dev, other))
        found: dict[int, tuple[int | None, int | None]] = {}
        last = -1
        for difference in delta(left, right):
            assert difference.thin_begin > last
            for i in range(difference.length):
                sides = [
                    None if begin is None else begin + i
                    for begin in (difference.left_data_begin, difference.right_data_begin)
                ]
                found[difference.thin_begin + i] = sides[0], sides[1]
            last = difference.thin_begin + difference.length - 1
        expected = {
            block: (a.get(block), b.get(block)) for block in a.keys() | b.keys() if a.get(block) != b.get(block)
        }
        assert found == expected

    def data_block_state(self, block: int) -> None:
        if block >= self.shown.nr_data_blocks and not self.failed:
            assert outcome_of(lambda: self.pool.block_is_used(block)) is not None
        elif block < self.shown.nr_data_blocks:
            assert self.pool.block_is_used(block) == (block in self.shown.used())

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.power_cut()
            self.pool.close()
            assert_sound(self.device, self.committed.owned)


PoolMachine.TestCase.settings = settings(
    suppress_health_check=list(HealthCheck), print_blob=True, phases=set(Phase) - {Phase.explain}
)
TestPoolMachine = PoolMachine.TestCase


def take_a_walk(rng: random.Random, nr_steps: int) -> None:
    """Drive the machine by hand: hypothesis prefers short runs of few kinds of step, this does a bit of everything."""
    machine = PoolMachine()

    def thin() -> int:
        return rng.choice([rng.randrange(31), rng.randrange(2000), 1 << 40, 1 << 63, LAST_BLOCK - 1, LAST_BLOCK])

    def which() -> int:
        return rng.randrange(-1, 12)

    def pattern() -> str:
        return rng.choice(["ascending", "descending", "random", "interleaved"])

    steps: list[tuple[int, Callable[[], object]]] = [
        (3, lambda: machine.create_thin(rng.choice(DEV_IDS))),
        (4, lambda: machine.create_snap(rng.choice(DEV_IDS), machine.pick(which()))),
        (3, lambda: machine.delete_thin_device(machine.pick(which()))),
        (4, lambda: machine.open_or_close_thin_device(which(), rng.random() < 0.3)),
        (12, lambda: machine.insert_block(which(), thin())),
        (3, lambda: machine.map_a_block_of_another_device(which(), thin(), which(), rng.randrange(9999))),
        (1, lambda: machine.insert_of_a_free_data_block_is_refused(which(), thin(), rng.randrange(30000))),
        (6, lambda: machine.remove_block(which(), thin(), rng.choice([None, rng.randrange(9999)]))),
        (4, lambda: machine.remove_range(which(), thin(), rng.choice([0, 30, 30, 300, LAST_BLOCK]))),
        (6, lambda: machine.insert_blocks(which(), rng.randrange(3000), rng.randint(1, 700), pattern(), thin() & 9999)),
        (4, lambda: machine.remove_blocks(which(), rng.randint(1, 700), pattern(), rng.randrange(9999))),
        (5, lambda: machine.provision(which(), thin(), rng.choice([3, 40, 400]))),
        (2, lambda: machine.alloc_data_block(rng.random() < 0.7, rng.randrange(9999))),
        (2, lambda: machine.inc_and_dec_data_range(rng.randrange(25000), rng.randrange(300), rng.random() < 0.7)),
        (2, lambda: machine.resize_data_dev(rng.choice([-1, 0, 1, 10, 1000, 17000]))),
        (2, lambda: machine.resize_metadata_dev(rng.choice([-1, 0, 1, 8, 24]))),
        (2, lambda: machine.set_transaction_id(rng.randrange(3), rng.randrange(3))),
        (1, lambda: machine.needs_check(rng.random() < 0.5)),
        (1, lambda: machine.read_only_for_a_while(rng.random() < 0.2)),
        (2, machine.reserve_metadata_snap),
        (2, machine.release_metadata_snap),
        (2, machine.open_metadata_snap),
        (8, machine.commit),
        (2, machine.abort),
        (2, machine.reopen),
        (1, machine.power_cut),
        (1, machine.close_orphans),
        (8, lambda: machine.queries(which(), [thin() for _ in range(3)], rng.randrange(9999))),
    ]
    machine.format(
        rng.choice([700, 4000, 20000]),
        rng.choice([18, 30, 50, PLENTY, PLENTY]),
        rng.choice([None, 1]),
        rng.choice([1, 3, 10, 1000]),
        rng.random() < 0.3,
        [(pattern(), rng.choice([5, 600, 900]), rng.random() < 0.5)],
    )
    weights = [weight for weight, _ in steps]
    for _ in range(nr_steps):
        rng.choices(steps, weights)[0][1]()
        machine.commits_now_and_then()
        machine.counts_agree()
    machine.teardown()


@pytest.mark.parametrize("seed", range(settings().max_examples // 5))
def test_a_random_walk_agrees_with_the_model(seed: int) -> None:
    take_a_walk(random.Random(seed), 100)
