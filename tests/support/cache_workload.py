"""Work for many threads on one cache, and a ledger that says at any time what each block has to hold.

A thread locks a block in the ledger, shared to look at it and exclusively to change it, before it asks the cache for
it.  The locks are the test's own: what a held block shows must then be what the ledger says, whatever the other threads
make the cache do meanwhile.
"""

from __future__ import annotations

import random
import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

from bufio import Bcache, Client, GetFlags, MemoryDevice, WouldDeadlock, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.testing import FaultyDevice
from tests.support.threads import SharedLock, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from bufio import Block, Buffer
    from bufio.engine import Engine
    from tests.support.threads import Team

    T = TypeVar("T")

SIZE = 4096
_COUNT = struct.Struct("<QQ")
_MOST_TRIES = 1000
_LONG = 1e9  # seconds


class Ledger:
    """What the blocks of one device hold: each a number (of the block it came from) and a count, over and over."""

    def __init__(self, nr_blocks: int) -> None:
        self.blocks = [self.content(block, 0) for block in range(nr_blocks)]
        self.locks = [SharedLock() for _ in range(nr_blocks)]

    @staticmethod
    def content(block: int, count: int) -> bytes:
        """Return a whole block of one count."""
        return _COUNT.pack(block, count) * (SIZE // _COUNT.size)

    def image(self) -> bytes:
        """Return the device as it has to be in the end."""
        return b"".join(self.blocks)

    def check(self, block: int, data: memoryview) -> None:
        """Compare what is in the hands of somebody who has the lock."""
        self.compare(block, bytes(data), self.blocks[block])

    @staticmethod
    def compare(block: int, found: bytes, wanted: bytes) -> None:
        """Fail with what is in a block, where it is not what is *wanted*."""
        assert found == wanted, (
            f"block {block} begins with {_COUNT.unpack_from(found)} and ends with {_COUNT.unpack(found[-16:])}, "
            f"not with {_COUNT.unpack_from(wanted)} and {_COUNT.unpack(wanted[-16:])}"
        )

    def count_up(self, block: int, data: memoryview, *, whole: bool) -> list[tuple[int, int]]:
        """Change a block that is locked exclusively; return the byte ranges, the last one first if not *whole*."""
        origin, count = _COUNT.unpack_from(data)
        end = len(data)
        ranges = [(0, end)] if whole else [(end - _COUNT.size, end), (0, _COUNT.size)]
        fresh = self.content(origin, count + 1)
        wanted = bytearray(self.blocks[block])
        for begin, end in ranges:
            data[begin:end] = wanted[begin:end] = fresh[begin:end]
        self.blocks[block] = bytes(wanted)
        return ranges


class _Workload:
    """What the workloads of both caches have in common."""

    LIES: ClassVar[tuple[type[OSError], ...]] = (WouldDeadlock,)
    """What is not to be raised, even where writes fail."""

    def __init__(self, faulty: bool) -> None:
        self.faulty = faulty
        self.allocated_bytes = parameters.current_allocated_bytes
        self.traffics: list[Traffic] = []
        self.devices: list[FaultyDevice[MemoryDevice]] = []

    def add_device(self, contents: bytes, seed: int) -> Traffic:
        """Return a device for the cache; if *faulty*, one write of five fails until :meth:`heal`."""
        device = FaultyDevice(MemoryDevice(contents, f"device {len(self.devices)}"), seed=seed)
        if self.faulty:
            device.on("write", chance=0.2).fail()
        self.devices.append(device)
        self.traffics.append(Traffic(device, SIZE))
        return self.traffics[-1]

    def heal(self) -> None:
        """Let every call succeed from now on."""
        for device in self.devices:
            device.clear()

    def persist(self, call: Callable[[], T]) -> T:
        """Do what fails only as long as chance wants it."""
        for _ in range(_MOST_TRIES):
            try:
                return call()
            except OSError as error:
                if not self.faulty or isinstance(error, self.LIES):
                    raise
                self.make_room()
        raise AssertionError("it fails again and again")

    def make_room(self) -> None:
        """Do what a caller can do about blocks that could not be written."""

    def attempt(self, call: Callable[[], object]) -> bool:
        """Do what may fail where writes do; tell whether it succeeded."""
        try:
            call()
        except OSError as error:
            if not self.faulty or isinstance(error, self.LIES):
                raise
            return False
        return True

    def check_closed(self) -> None:
        """After the end: all memory was given back, and no device has seen what it must not."""
        # Or less: caches that earlier tests have left are collected at any time.
        assert parameters.current_allocated_bytes <= self.allocated_bytes
        for traffic in self.traffics:
            assert not traffic.violations, traffic.violations[0]


class ClientWorkload(_Workload):
    """Counters in the blocks of a client that has room for a third of them.

    A thread never has more than three buffers, which is what is reserved: ``WouldDeadlock`` would be a lie.
    """

    NR_BLOCKS = 24
    SHARE = 8 * (SIZE + BUFFER_OVERHEAD_BYTES)

    def __init__(self, engine: Engine, seed: int, *, faulty: bool = False) -> None:
        super().__init__(faulty)
        self.seed = seed
        self.ledger = Ledger(self.NR_BLOCKS)
        self.traffic = self.add_device(self.ledger.image(), seed)
        self.engine = engine
        self.client = Client(self.traffic, SIZE, reserved_buffers=3, engine=engine)

    def work(self, team: Team, number: int, nr_steps: int) -> None:
        """Be one of the threads."""
        rng = random.Random(f"{self.seed}/{number}")
        client = self.client
        steps: list[tuple[int, Callable[[], object]]] = [
            (40, lambda: self._increment(rng.randrange(self.NR_BLOCKS), whole=rng.random() < 0.5)),
            (20, lambda: self._look(rng.sample(range(self.NR_BLOCKS), rng.randint(1, 3)))),
            (10, lambda: self._move(*rng.sample(range(self.NR_BLOCKS), 2), shared=rng.random() < 0.5)),
            (4, lambda: self._get(rng.randrange(self.NR_BLOCKS))),
            (6, lambda: client.prefetch(rng.randrange(self.NR_BLOCKS), rng.randint(1, 6))),
            (5, client.write_dirty_buffers_async),
            (3, lambda: self.attempt(client.write_dirty_buffers)),
            (2, lambda: self.attempt(client.drop_buffers)),
            (1, client.issue_flush),
            (2, lambda: client.evict_old(rng.choice([0.0, _LONG]))),
            (2, lambda: self._change_limit(rng.choice([1, 1, 2, 4]))),
            (1, self._use_another_client),
            (1, self._check_stats),
        ]
        weights = [weight for weight, _ in steps]
        for _ in range(nr_steps):
            if not team.goes_on():
                return
            rng.choices(steps, weights)[0][1]()

    @contextmanager
    def _held(self, block: int, *, release: bool = True) -> Iterator[Buffer]:
        buffer = self.persist(lambda: self.client.read(block))
        try:
            with self.traffic.holding(block):
                yield buffer
        finally:
            if release:
                buffer.release()

    def _increment(self, block: int, *, whole: bool) -> None:
        with self.ledger.locks[block].exclusive(), self._held(block) as buffer:
            self.ledger.check(block, buffer.data)
            for begin, end in self.ledger.count_up(block, buffer.data, whole=whole):
                buffer.mark_dirty(begin, end)

    def _look(self, blocks: list[int]) -> None:
        with ExitStack() as stack:
            # In one order, so that the locks of the test do not do what the cache is suspected of.
            for block in sorted(blocks):
                stack.enter_context(self.ledger.locks[block].shared())
            buffers = [stack.enter_context(self._held(block)) for block in blocks]
            for _ in range(2):
                for block, buffer in zip(blocks, buffers, strict=True):
                    self.ledger.check(block, buffer.data)

    def _get(self, block: int) -> None:
        with self.ledger.locks[block].shared():
            buffer = self.client.get(block)
            if buffer is not None:
                self.ledger.check(block, buffer.data)
                buffer.release()

    def _move(self, source: int, target: int, *, shared: bool) -> None:
        """Move a block, which others may hold if it is *shared*."""
        ledger = self.ledger
        with ExitStack() as stack:
            for block in sorted([source, target]):
                lock = ledger.locks[block]
                stack.enter_context(lock.shared() if shared and block == source else lock.exclusive())
            # From the moment of the move on the cache may read the old block again, so that nobody holds it then.
            with self._held(source, release=False) as buffer:
                ledger.check(source, buffer.data)
            if self.attempt(lambda: buffer.release_move(target)):
                ledger.blocks[target] = ledger.blocks[source]
                return
            buffer.release()
            # What had been cached of the target, dirty perhaps, may be gone.
            fresh = self.persist(lambda: self.client.new(target))
            fresh.data[:] = ledger.blocks[target]
            fresh.mark_dirty()
            fresh.release()

    def _change_limit(self, factor: int) -> None:
        parameters.max_cache_size_bytes = factor * self.SHARE

    def _use_another_client(self) -> None:
        device = MemoryDevice(self.ledger.image())
        with Client(device, SIZE, engine=self.engine) as client:
            buffer = client.read(1)
            buffer.data[:] = self.ledger.content(99, 99)
            buffer.mark_dirty()
            buffer.release()
        assert device.contents()[SIZE : 2 * SIZE] == self.ledger.content(99, 99)

    def _check_stats(self) -> None:
        stats = self.client.stats
        assert max(stats.held, stats.dirty) <= stats.cached

    def finish(self) -> None:
        """Write everything, and compare the device with the ledger."""
        self.heal()
        self.engine.drain()
        # The error of a write that failed is still to be told of.
        self.attempt(self.client.write_dirty_buffers)
        self.client.write_dirty_buffers()
        stats = self.client.stats
        assert (stats.held, stats.dirty) == (0, 0)
        image = self.devices[0].inner.contents()
        for block, wanted in enumerate(self.ledger.blocks):
            Ledger.compare(block, image[block * SIZE : (block + 1) * SIZE], wanted)
            self._look([block])
        self.client.close()
        self.check_closed()


class BcacheWorkload(_Workload):
    """Counters in the blocks of three devices, one of them not a whole number of blocks long, in few blocks of memory.

    A thread never has more than two blocks, and there is one more than threads: ``WouldDeadlock`` would be a lie,
    unless the others are in error, which only a flush can change.
    """

    LIES = ()

    NR_BLOCKS = (10, 9, 6)
    CUT_BYTES = 1536
    """What the last block of the last device is short of."""

    def __init__(self, engine: Engine, seed: int, nr_threads: int, *, faulty: bool = False) -> None:
        super().__init__(faulty)
        self.seed = seed
        self.engine = engine
        self.ledgers = [Ledger(nr_blocks) for nr_blocks in self.NR_BLOCKS]
        for number, ledger in enumerate(self.ledgers):
            image = ledger.image()
            self.add_device(image[: len(image) - self.CUT_BYTES] if number == 2 else image, seed + number)
        short = self.ledgers[2]
        short.blocks[-1] = short.blocks[-1][: -self.CUT_BYTES] + bytes(self.CUT_BYTES)
        self.cache = Bcache(SIZE // 512, nr_threads + 1, engine)

    def make_room(self) -> None:
        """Try again what could not be written."""
        self.attempt(self.cache.flush)

    def work(self, team: Team, number: int, nr_steps: int) -> None:
        """Be one of the threads."""
        rng = random.Random(f"{self.seed}/{number}")
        cache = self.cache

        def where() -> tuple[int, int]:
            device = rng.randrange(3)
            return device, rng.randrange(self.NR_BLOCKS[device])

        steps: list[tuple[int, Callable[[], object]]] = [
            (40, lambda: self._increment(*where(), zero=rng.random() < 0.3)),
            (20, lambda: self._look(sorted({where(), where()}))),
            (5, lambda: self._read_bytes(*where())),
            (5, lambda: self._write_bytes(*where())),
            (6, lambda: cache.prefetch(self.traffics[rng.randrange(3)], rng.randrange(10))),
            (5, lambda: self.attempt(cache.flush)),
            (6, lambda: self._invalidate(*where())),
            (3, lambda: self.attempt(lambda: cache.invalidate_device(self.traffics[rng.randrange(3)]))),
            (1, self._check_stats),
        ]
        weights = [weight for weight, _ in steps]
        for _ in range(nr_steps):
            if not team.goes_on():
                return
            rng.choices(steps, weights)[0][1]()

    @contextmanager
    def _held(self, device: int, index: int, flags: int = 0) -> Iterator[Block]:
        traffic = self.traffics[device]
        block = self.persist(lambda: self.cache.get(traffic, index, flags))
        try:
            with traffic.holding(index):
                yield block
        finally:
            block.put()

    def _length(self, device: int, index: int) -> int:
        """Return how many bytes of a block are on the device."""
        is_cut = (device, index) == (2, self.NR_BLOCKS[2] - 1)
        return SIZE - self.CUT_BYTES if is_cut else SIZE

    def _increment(self, device: int, index: int, *, zero: bool) -> None:
        ledger = self.ledgers[device]
        flags = GetFlags.ZERO if zero else GetFlags.DIRTY
        with ledger.locks[index].exclusive(), self._held(device, index, flags) as block:
            if zero:
                assert not any(block.data)
                block.data[:] = ledger.blocks[index]
            ledger.check(index, block.data)
            ledger.count_up(index, block.data[: self._length(device, index)], whole=True)

    def _look(self, places: list[tuple[int, int]]) -> None:
        with ExitStack() as stack:
            # In one order, so that the locks of the test do not do what the cache is suspected of.
            for device, index in sorted(places):
                stack.enter_context(self.ledgers[device].locks[index].shared())
            blocks = [stack.enter_context(self._held(device, index)) for device, index in places]
            for _ in range(2):
                for (device, index), block in zip(places, blocks, strict=True):
                    self.ledgers[device].check(index, block.data)

    def _read_bytes(self, device: int, index: int) -> None:
        """Read what reaches from one block into the next, if there is one."""
        ledger = self.ledgers[device]
        with ExitStack() as stack:
            for lock in ledger.locks[index : index + 2]:
                stack.enter_context(lock.shared())
            begin = SIZE // 2
            wanted = b"".join(ledger.blocks[index : index + 2])[begin : begin + SIZE // 2 + 100]
            offset = index * SIZE + begin
            wanted = wanted[: self.traffics[device].size_bytes - offset]
            found = self.persist(lambda: self.cache.read_bytes(self.traffics[device], offset, len(wanted)))
            assert found == wanted

    def _write_bytes(self, device: int, index: int) -> None:
        """Write the head of a block."""
        ledger = self.ledgers[device]
        with ledger.locks[index].exclusive():
            old = ledger.blocks[index]
            origin, count = _COUNT.unpack_from(old)
            head = Ledger.content(origin, count + 1)[:100]
            self.persist(lambda: self.cache.write_bytes(self.traffics[device], index * SIZE, head))
            ledger.blocks[index] = head + old[100:]

    def _invalidate(self, device: int, index: int) -> None:
        with self.ledgers[device].locks[index].exclusive():
            self.persist(lambda: self._invalidate_unheld(device, index))

    def _invalidate_unheld(self, device: int, index: int) -> None:
        assert self.cache.invalidate(self.traffics[device], index), "nobody holds it"

    def _check_stats(self) -> None:
        stats = self.cache.stats
        assert max(stats.held, stats.dirty) <= stats.cached <= self.cache.nr_cache_blocks

    def finish(self) -> None:
        """Write everything, and compare the devices with the ledgers."""
        self.heal()
        # What is on its way may fail yet, and a flush that waits for it would say so.
        self.engine.drain()
        assert self.cache.flush() == []
        stats = self.cache.stats
        assert (stats.held, stats.dirty) == (0, 0)
        for number, ledger in enumerate(self.ledgers):
            image = self.devices[number].inner.contents()
            for index, wanted in enumerate(ledger.blocks):
                Ledger.compare(index, image[index * SIZE :][:SIZE].ljust(SIZE, b"\0"), wanted)
                self._look([(number, index)])
        self.cache.close()
        self.check_closed()
