"""The buffers themselves: where they are, who holds them, what is dirty, which goes next.

:class:`Core` is the mechanism that every cache interface shares: a table of buffers for each device, an LRU list of
clean ones and one of dirty ones, their memory, what is on its way, the engine and the counters.  When to evict, to
write and to wait, and what an error means, is the policy of the interface on top (:mod:`bufio.client`,
:mod:`bufio.bcache`).

Unless a method says otherwise, its caller holds ``core.lock``.

The LRU lists are dictionaries in order of arrival with a second chance: a hit only sets ``referenced``, and eviction,
which goes round from the oldest on, passes over a referenced buffer once.  That keeps a hit cheap, at the price of an
approximate order.

``referenced`` is a number: zero, or the value of ``client.epoch`` at the last use.  A buffer used in the present epoch
is never evicted or written early, see :attr:`bufio.Client.peek`.

A buffer is in exactly one of these places: on its way from the device, ``CachedDevice.arriving``; otherwise in
``CachedDevice.table``, and there in ``Core.dirty``, or being written (``buffer.writing``), or both, or in
``Core.clean``.
"""

from __future__ import annotations

import errno
import threading
import weakref
from itertools import pairwise
from operator import attrgetter
from threading import get_ident
from typing import TYPE_CHECKING, Any

from bufio.device import MemoryDevice
from bufio.engine import SyncEngine, coalesce, split
from bufio.errors import HoldError, WouldDeadlock
from bufio.memory import Slab, parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bufio.device import Device
    from bufio.engine import Engine, Extent

BUFFER_OVERHEAD_BYTES = 1024
"""What a cached block costs beside its data: the buffer, its views, and what an owner hangs on it."""

WRITE_BACK_BATCH = 256
"""Dirty buffers written in one go under memory pressure, so that neighbours can be coalesced."""

NO_EPOCH = -1
USED = 1
"""``referenced`` of a buffer used outside any epoch."""

_NO_MEMORY = memoryview(b"")
"""``data`` of a buffer that is gone: a list that still has the buffer must not keep a megabyte alive."""

NEW = 0.0
"""``used_at`` of a buffer that was used since the last look at ages."""

_BLOCK_NUMBER = attrgetter("block_number")


class CachedBlock:
    """One block in memory: what every cache interface has to know of it.

    ``data`` is a writable view of the block's bytes, ``block_number`` its address on the device in blocks.
    """

    __slots__ = (
        "aux",
        "block_number",
        "data",
        "dirty",
        "dirty_end",
        "dirty_start",
        "holders",
        "home",
        "referenced",
        "used_at",
        "write_error",
        "writing",
    )

    def __init__(self, home: CachedDevice, block_number: int, data: memoryview) -> None:
        self.home = home
        self.block_number = block_number
        self.data = data
        self.aux: Any = None
        """Whatever the owner of the cache hangs on it."""
        self.holders: list[int] = []
        """Thread idents, one for each hold."""
        self.dirty = False
        self.dirty_start = 0
        self.dirty_end = 0
        self.writing: WriteBack | None = None
        self.write_error: OSError | None = None
        """Why the last attempt to write the content failed."""
        self.referenced = 0
        self.used_at = NEW
        """Monotonic time of the last look at ages before which the buffer was used."""

    @property
    def hold_count(self) -> int:
        """Number of holds that were not given back yet."""
        return len(self.holders)

    def __repr__(self) -> str:
        states = [name for name in ("dirty", "writing") if getattr(self, name)]
        return f"<{type(self).__name__} {self.block_number} holds={self.hold_count} {' '.join(states)}>"


class Stats:
    """Counters of one cache since it was opened; a snapshot that does not change any more."""

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "cached",
        "coalesced_writes",
        "dirty",
        "evictions",
        "flushes",
        "held",
        "hits",
        "misses",
        "reads",
        "waits",
        "writes",
    )

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.coalesced_writes = 0
        self.evictions = 0
        self.flushes = 0
        self.waits = 0
        self.dirty = 0
        self.held = 0
        self.cached = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(" + ", ".join(f"{name}={value}" for name, value in self.as_dict().items()) + ")"

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        names = [name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ())]
        return {name: getattr(self, name) for name in names}


class CachedDevice:
    """What a core has of one device.

    :param owner: the cache its buffers belong to
    :param offset: byte of the device at which block 0 begins
    :param prepare: called, without the lock, just before a dirty buffer is written
    """

    __slots__ = (
        "arriving",
        "device",
        "end_bytes",
        "failed_flushes",
        "flush_error",
        "flushing",
        "nr_blocks",
        "offset",
        "owner",
        "prepare",
        "table",
        "unflushed",
        "write_error",
    )

    def __init__(
        self, device: Device, owner: Any, offset: int = 0, prepare: Callable[[Any], None] | None = None
    ) -> None:
        self.device = device
        self.owner = owner
        self.offset = offset
        self.prepare = prepare
        self.nr_blocks = 0
        """Blocks on the device when it was last looked at."""
        self.end_bytes: int | None = None
        """Where the last block of the device is cut short, None where it is not."""
        # Any: each interface knows what its blocks are, and the core does not care.
        self.table: dict[int, Any] = {}
        self.arriving: dict[int, Any] = {}
        self.unflushed: set[int] = set()
        """Blocks written since the device was last flushed."""
        self.flushing = False
        """Somebody flushes the device right now, and what that covers is not in ``unflushed``."""
        self.failed_flushes = 0
        self.flush_error: OSError | None = None
        """Of the last flush that failed."""
        self.write_error: OSError | None = None
        """The first that nobody was told of yet."""


class WriteBack:
    """Some dirty buffers of one device on their way there."""

    __slots__ = ("_batch", "_core", "_gate", "_home", "failed", "numbers", "remaining")

    def __init__(self, core: Core, home: CachedDevice, batch: list[CachedBlock]) -> None:
        self._core = core
        self._home = home
        self._batch = batch
        self.numbers = [buffer.block_number for buffer in batch]
        self.remaining = len(batch)
        self._gate: threading.Lock | None = None
        """What whoever began this waits for."""
        self.failed: list[CachedBlock] = []
        """Those that could not be written, and are dirty again."""

    def done(self, first: int, results: list[OSError | None]) -> None:
        """Take note of what became of the buffers from number *first* on.  Called **without** the lock."""
        batch, numbers = self._batch, self.numbers
        if len(results) != len(batch):
            batch, numbers = batch[first : first + len(results)], numbers[first : first + len(results)]
        core = self._core
        with core.lock:
            # Not before: a flush that comes while they are on their way does not cover them.
            self._home.unflushed.update(numbers)
            if any(results):
                for buffer, error in zip(batch, results, strict=True):
                    if error is None:
                        self._written(buffer)
                        continue
                    self._not_written(buffer, error)
                    if self._home.write_error is None:
                        self._home.write_error = error
            elif core.dirty:
                for buffer in batch:
                    self._written(buffer)
            else:
                # As _written, for the case that matters: nothing was changed while everything was written.
                core.clean.update(dict.fromkeys(batch))
                for buffer in batch:
                    buffer.writing = None
                    buffer.write_error = None
            # No call in between, at which a signal could keep the second from happening.
            nr_done = len(batch)
            self.remaining -= nr_done
            core.nr_writing -= nr_done
            if self._gate is not None and not self.remaining:
                self._gate.release()
            core.notify()

    def wait(self) -> None:
        """Wait until all was reported.  Gives the lock up meanwhile."""
        if not self.remaining:
            return
        self._gate = gate = threading.Lock()
        gate.acquire()
        core = self._core
        core.counters.waits += 1
        me = (1, get_ident())
        try:
            core.lock.release()
            gate.acquire()
        finally:
            core.take_again(me)

    def abandon(self) -> None:
        """Take note that what was not reported so far never will be: whoever wanted it knows from an exception."""
        for buffer in self._batch:
            if buffer.writing is self:
                self._not_written(buffer, OSError(errno.EIO, "write was interrupted", self._home.device.name))
        self._core.nr_writing -= self.remaining
        self.remaining = 0
        self._core.notify()

    def _written(self, buffer: CachedBlock) -> None:
        if not buffer.dirty:
            self._core.clean[buffer] = None
        buffer.writing = None
        buffer.write_error = None

    def _not_written(self, buffer: CachedBlock, error: OSError) -> None:
        buffer.write_error = error
        buffer.dirty = True
        self._core.clean.pop(buffer, None)
        self._core.dirty[buffer] = None
        buffer.writing = None
        self.failed.append(buffer)


class Core:
    """Buffers of one block size, of any number of devices.

    :param engine: how transfers are done; a synchronous one by default
    :param block_type: what to make of a device, a block number and memory
    :param fixed: so many buffers there are, from the beginning to :meth:`give_up`; by default they come and go
    """

    def __init__(
        self, block_size: int, engine: Engine | None, block_type: type[CachedBlock], fixed: int | None = None
    ) -> None:
        self.block_size = block_size
        self.engine: Engine = SyncEngine() if engine is None else engine
        self.lock = threading.RLock()
        self.take_again: Callable[[tuple[int, int]], None] = self.lock._acquire_restore  # type: ignore[attr-defined]
        """Acquires the lock after it was given up in the middle of a step; takes (1, the thread's ident).

        It is what ``threading.Condition`` uses.  A signal whose handler raises ends a wait in ``acquire`` without the
        lock, and whoever then goes on as if it had it gives back that of another thread.
        """
        self.clean: dict[CachedBlock, None] = {}
        self.dirty: dict[CachedBlock, None] = {}
        self.counters = Stats()
        self.nr_buffers = 0
        self.nr_reading = 0
        self.nr_writing = 0
        self.devices: dict[Device, CachedDevice] = {}
        self._partly_dirty = False
        """A part of a block was dirtied at some time: a look at each tells what there is to write."""
        self._changed = threading.Condition(self.lock)
        self._nr_waiting = 0
        self._wanted: dict[int, list[CachedBlock]] = {}
        """Ident of each thread that waits for a hold to be given back: the buffers of which it wants one."""
        self._gates: dict[CachedBlock, list[threading.Lock]] = {}
        self._hand: list[CachedBlock] = []
        """What was clean when the present round of eviction began and has not been looked at, the next one last."""
        self._slab = Slab(block_size)
        self._taken = [0]
        """Bytes of memory in the account; a list because it outlives a core that nobody closed."""
        weakref.finalize(self, parameters.drop, self._taken).atexit = False
        self._block_type = block_type
        self.spare: list[CachedBlock] = []
        """Buffers of no block, where their number is fixed."""
        self._fixed = fixed is not None
        if fixed is not None:
            nowhere = CachedDevice(MemoryDevice(0), None)
            spare = [self._make(nowhere, 0) for _ in range(fixed)]
            self.spare = spare[::-1]

    @property
    def buffer_bytes(self) -> int:
        """What one buffer counts for in the account of memory."""
        return self.block_size + BUFFER_OVERHEAD_BYTES

    def count(self, snapshot: Stats) -> None:
        """Put into *snapshot* what happened so far, and what is cached now."""
        for name in Stats.__slots__:
            setattr(snapshot, name, getattr(self.counters, name))
        snapshot.bytes_read = self.counters.reads * self.block_size
        buffers = [buffer for home in self.devices.values() for buffer in home.table.values()]
        snapshot.dirty = sum(1 for buffer in buffers if buffer.dirty or buffer.writing is not None)
        snapshot.cached = len(buffers)
        snapshot.held = sum(1 for buffer in buffers if buffer.holders)

    # Buffers come and go

    def create(self, home: CachedDevice, block: int) -> Any:
        """Return a buffer with undefined contents that is in no list yet.  Memory is taken without asking."""
        if not self._fixed:
            return self._make(home, block)
        return self._rename(self.spare.pop(), home, block)

    def _make(self, home: CachedDevice, block: int) -> CachedBlock:
        buffer = self._block_type(home, block, self._slab.take())
        self.nr_buffers += 1
        self._taken[0] += self.buffer_bytes
        parameters.account(self.buffer_bytes)
        return buffer

    def reuse(self, buffer: CachedBlock, home: CachedDevice, block: int) -> Any:
        """Evict a clean buffer that nobody uses, and return it for another block, in no list."""
        del buffer.home.table[buffer.block_number]
        del self.clean[buffer]
        self.counters.evictions += 1
        return self._rename(buffer, home, block)

    def _rename(self, buffer: CachedBlock, home: CachedDevice, block: int) -> CachedBlock:
        buffer.home = home
        buffer.block_number = block
        buffer.aux = None
        buffer.referenced = 0
        buffer.used_at = NEW
        return buffer

    def insert(self, buffer: CachedBlock) -> None:
        """Put a buffer that is in no list where it can be found, clean."""
        buffer.home.table[buffer.block_number] = buffer
        self.clean[buffer] = None

    def destroy(self, buffer: CachedBlock) -> None:
        """Remove a buffer that nobody uses, clean or dirty."""
        del buffer.home.table[buffer.block_number]
        (self.dirty if buffer.dirty else self.clean).pop(buffer, None)
        buffer.dirty = False
        buffer.write_error = None
        buffer.aux = None
        self.free(buffer)

    def free(self, buffer: CachedBlock) -> None:
        """Take back a buffer that is in no list."""
        if self._fixed:
            self.spare.append(buffer)
        else:
            self._unmake(buffer)

    def _unmake(self, buffer: CachedBlock) -> None:
        self._slab.give_back(buffer.data)
        buffer.data = _NO_MEMORY
        self.nr_buffers -= 1
        self._taken[0] -= self.buffer_bytes
        parameters.account(-self.buffer_bytes)

    def give_up(self) -> None:
        """Give the memory of the spare buffers back, for good."""
        self._fixed = False
        while self.spare:
            self._unmake(self.spare.pop())

    def oldest_clean(self, epoch: int) -> CachedBlock | None:
        """Return the clean buffer to evict next, None when every one is in use."""
        clean = self.clean
        # Two rounds: in the first one the marks of use may be all that stands in the way.
        for _ in range(3):
            hand = self._hand
            while hand:
                buffer = hand.pop()
                if buffer not in clean:
                    continue
                if not buffer.referenced and not buffer.holders:
                    return buffer
                if buffer.referenced != epoch:
                    buffer.referenced = 0
                    buffer.used_at = NEW
            self._hand = list(reversed(clean))
        return None

    def evict_one(self, epoch: int) -> bool:
        """Evict a clean buffer, if there is one that nobody uses."""
        buffer = self.oldest_clean(epoch)
        if buffer is None:
            return False
        self.destroy(buffer)
        self.counters.evictions += 1
        return True

    def evict_unused_since(self, limit: float, now: float, keep: int, epoch: int) -> None:
        """Evict the clean buffers that were not used after time *limit*, as long as there are more than *keep*.

        A use is known only from the first look after it on: what was used since the last look is given the time *now*.
        """
        self._hand.clear()
        for buffer in list(self.clean):
            if buffer.holders or buffer.referenced or buffer.used_at == NEW:
                buffer.used_at = now
                if buffer.referenced not in (0, epoch):
                    # The order of the list has to tell from now on what the mark told until now.
                    buffer.referenced = 0
                    del self.clean[buffer]
                    self.clean[buffer] = None
            elif buffer.used_at <= limit and self.nr_buffers > keep:
                self.destroy(buffer)
                self.counters.evictions += 1

    # Dirtying

    def set_dirty(self, buffer: CachedBlock, start: int, end: int) -> None:
        """Add ``[start, end)`` to what must be written."""
        if end - start != self.block_size:
            self._partly_dirty = True
        if buffer.dirty or buffer.writing is not None:
            # Also of one being written: should that fail, what was to be written then must be written yet.
            if start < buffer.dirty_start:
                buffer.dirty_start = start
            if end > buffer.dirty_end:
                buffer.dirty_end = end
            if not buffer.dirty:
                buffer.dirty = True
                self.dirty[buffer] = None
            return
        buffer.dirty = True
        buffer.dirty_start = start
        buffer.dirty_end = end
        del self.clean[buffer]
        self.dirty[buffer] = None

    def oldest_dirty(self, count: int, epoch: int, *, again: bool = True) -> list[CachedBlock]:
        """Return up to *count* unheld dirty buffers, least recently dirtied first.

        :param again: also those that could not be written before
        """
        chosen = []
        for buffer in self.dirty:
            if not (
                buffer.holders
                or buffer.writing is not None
                or buffer.referenced == epoch
                or not (again or buffer.write_error is None)
            ):
                chosen.append(buffer)
                if len(chosen) == count:
                    break
        return chosen

    # Transfers

    def fill(self, buffer: CachedBlock) -> None:
        """Read the content of a buffer that is in no list, in this thread.  Gives the lock up meanwhile.

        :raises OSError: it could not be read; the buffer is gone, and everybody who waits for it gets the same error
        """
        home = buffer.home
        block = buffer.block_number
        view = buffer.data if home.end_bytes is None else self._view(buffer)
        error: OSError | None = None
        me = (1, get_ident())
        home.arriving[block] = buffer
        self.nr_reading += 1
        arrived = False
        try:
            self.lock.release()
            home.device.readinto(view, home.offset + block * self.block_size)
            arrived = True
        except OSError as failure:
            error = failure
        finally:
            try:
                self.take_again(me)
            finally:
                # As arrived(), but without a call on the way, at which a signal could keep it from happening.
                if arrived:
                    home.table[block] = buffer
                    self.clean[buffer] = None
                del home.arriving[block]
                self.nr_reading -= 1
                self.counters.reads += 1
            if not arrived:
                # Whoever waits has the object, not the table: leave the error where they look.
                buffer.aux = error or OSError(errno.EIO, f"read of block {block} was interrupted", home.device.name)
            if self._gates or self._nr_waiting:
                self._announce(buffer)
            if not arrived:
                self.free(buffer)
        if error is not None:
            raise error

    def start_read(self, home: CachedDevice, buffers: list[CachedBlock], *, waiting: bool = False) -> None:
        """Begin to read *buffers*, which are expected.

        Gives the lock up meanwhile.  Those that cannot be read leave the cache, and whoever waits for them tries again.
        """
        if len(buffers) > 1:
            buffers.sort(key=_BLOCK_NUMBER)

        def done(first: int, results: list[OSError | None]) -> None:
            with self.lock:
                self.counters.reads += len(results)
                for buffer, error in zip(buffers[first:], results, strict=False):
                    if home.arriving.get(buffer.block_number) is buffer:
                        self.arrived(buffer, error)
                    else:
                        # Told again, after an interrupt that may have come between the arrival and this.
                        self._announce(buffer)

        me = (1, get_ident())
        try:
            try:
                self.lock.release()
                if len(buffers) == 1:
                    start = home.offset + buffers[0].block_number * self.block_size
                    extents = [(start, [self._view(buffers[0])])]
                else:
                    extents = self._extents(home, buffers, [buffer.block_number for buffer in buffers])
                self.engine.start_read(home.device, extents, done, waiting=waiting)
            finally:
                self.take_again(me)
        except BaseException:
            self._drain()
            self.cancel_reads(buffers)
            raise

    def expect(self, buffer: CachedBlock) -> None:
        """Note that a buffer in no list is arriving, of which use will be made: :meth:`arrived` must follow."""
        # Or what was used once already, and has the mark, would outlive what is still to be used.
        buffer.referenced = USED
        buffer.home.arriving[buffer.block_number] = buffer
        self.nr_reading += 1

    def arrived(self, buffer: CachedBlock, error: OSError | None) -> None:
        """Note that an arriving buffer has its content, or will not have it and is gone."""
        home = buffer.home
        block = buffer.block_number
        if error is None:
            home.table[block] = buffer
            self.clean[buffer] = None
        del home.arriving[block]
        self.nr_reading -= 1
        self._announce(buffer)
        if error is not None:
            self.free(buffer)

    def _announce(self, buffer: CachedBlock) -> None:
        """Wake whoever waits for the arrival of *buffer*, or for anything else to change."""
        if self._gates:
            for gate in self._gates.pop(buffer, ()):
                gate.release()
        self.notify()

    def cancel_reads(self, buffers: list[CachedBlock]) -> None:
        """Note that those of *buffers* that are arriving still will not."""
        for buffer in buffers:
            if buffer.home.arriving.get(buffer.block_number) is buffer:
                self.arrived(buffer, OSError(errno.EIO, "read was interrupted", buffer.home.device.name))

    def await_arrival(self, buffer: CachedBlock) -> OSError | None:
        """Wait until a buffer that is arriving is there, and return None, or what went wrong.

        Gives the lock up meanwhile, so that the buffer may be gone again already.
        """
        home = buffer.home
        block = buffer.block_number
        assisting = True
        while assisting:
            assisting = self._assist(home)
            if home.arriving.get(block) is not buffer:
                return self._arrival_error(buffer, home, block)
        gate = threading.Lock()
        gate.acquire()
        self._gates.setdefault(buffer, []).append(gate)
        self.counters.waits += 1
        me = (1, get_ident())
        try:
            self.lock.release()
            gate.acquire()
        finally:
            self.take_again(me)
        return self._arrival_error(buffer, home, block)

    def _assist(self, home: CachedDevice) -> bool:
        """Let the engine use this thread for another read, if it can.  Gives the lock up meanwhile."""
        me = (1, get_ident())
        try:
            self.lock.release()
            return self.engine.assist(home.device)
        finally:
            self.take_again(me)

    @staticmethod
    def _arrival_error(buffer: CachedBlock, home: CachedDevice, block: int) -> OSError | None:
        failed = buffer.home is home and buffer.block_number == block and isinstance(buffer.aux, OSError)
        return buffer.aux if failed else None

    def start_write_back(
        self, home: CachedDevice, buffers: Iterable[CachedBlock], *, waiting: bool = False
    ) -> WriteBack:
        """Begin to write those of *buffers*, all of one device, that are dirty and not being written already.

        Gives the lock up meanwhile.  A buffer that is dirtied again before it was written stays dirty, and so does one
        that could not be written.

        :param waiting: the caller is going to wait for the end
        """
        batch = [buffer for buffer in buffers if buffer.dirty and buffer.writing is None]
        batch.sort(key=_BLOCK_NUMBER)
        transfer = WriteBack(self, home, batch)
        if not batch:
            return transfer
        self.nr_writing += len(batch)
        try:
            self._set_writing(batch, transfer)
            extents, nr_bytes = self._dirty_extents(home, batch, transfer.numbers)
            me = (1, get_ident())
            try:
                self.lock.release()
                prepare = home.prepare
                if prepare is not None:
                    for buffer in batch:
                        prepare(buffer)
                self.engine.start_write(home.device, extents, transfer.done, waiting=waiting)
            finally:
                self.take_again(me)
        except BaseException:
            self._drain()
            transfer.abandon()
            raise
        self.counters.writes += len(batch)
        self.counters.bytes_written += nr_bytes
        self.counters.coalesced_writes += len(batch) - len(extents)
        return transfer

    def _set_writing(self, batch: list[CachedBlock], transfer: WriteBack) -> None:
        # In this order, so that WriteBack.abandon finds its way back from whatever was done when a signal came.
        for buffer in batch:
            buffer.writing = transfer
        for buffer in batch:
            buffer.dirty = False
        if len(batch) == len(self.dirty):
            self.dirty.clear()
        else:
            for buffer in batch:
                del self.dirty[buffer]

    def _drain(self) -> None:
        """Wait until the engine has nothing to do.  Gives the lock up meanwhile."""
        me = (1, get_ident())
        try:
            self.lock.release()
            self.engine.drain()
        finally:
            self.take_again(me)

    def write_back(self, home: CachedDevice, buffers: Iterable[CachedBlock]) -> list[CachedBlock]:
        """As :meth:`start_write_back`, and wait for the end.  Returns those that could not be written."""
        transfer = self.start_write_back(home, buffers, waiting=True)
        transfer.wait()
        return transfer.failed

    def flush(self, home: CachedDevice, failed_before: int | None = None) -> None:
        """Have a device make durable what was written to it.  Called **without** the lock.

        One at a time: a device tells of a failure once, and whoever came meanwhile has to be told as well.

        :param failed_before: ``home.failed_flushes`` when the caller began; by default when it came here
        :raises OSError: the device's error, in this flush or in another one since then.  Nobody knows then what of the
            writes since the last flush is durable, so whatever of it is still cached is dirty again.
        """
        unflushed: set[int] = set()
        covered = unflushed
        mine = False
        try:
            with self.lock:
                if failed_before is None:
                    failed_before = home.failed_flushes
                while home.flushing:
                    self.wait()
                if home.failed_flushes != failed_before and home.flush_error is not None:
                    raise home.flush_error
                covered, home.unflushed = home.unflushed, unflushed
                home.flushing = mine = True
            home.device.flush()
            with self.lock:
                self.counters.flushes += 1
        except BaseException as error:
            if mine:
                with self.lock:
                    if isinstance(error, OSError):
                        home.failed_flushes += 1
                        home.flush_error = error
                    home.unflushed |= covered
                    for number in covered:
                        buffer = home.table.get(number)
                        if buffer is not None:
                            self.set_dirty(buffer, 0, self.block_size)
            raise
        finally:
            if mine:
                with self.lock:
                    home.flushing = False
                    self.notify()

    def _view(self, buffer: CachedBlock) -> memoryview:
        """Return what of a buffer there is on the device."""
        end = buffer.home.end_bytes
        if end is None:
            return buffer.data
        return buffer.data[: end - (buffer.home.offset + buffer.block_number * self.block_size)]

    def _extents(self, home: CachedDevice, buffers: list[CachedBlock], numbers: list[int]) -> list[Extent]:
        """Return where on the device whole *buffers* are, whose block numbers ascend."""
        views = [buffer.data for buffer in buffers]
        if home.end_bytes is not None:
            views[-1] = self._view(buffers[-1])
        size = self.block_size
        if numbers[-1] - numbers[0] == len(numbers) - 1:
            return split(home.offset + numbers[0] * size, views, size)
        # As coalesce would, but for blocks of one size only the numbers matter.
        firsts = [at for at, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
        extents: list[Extent] = []
        for first, end in pairwise([0, *firsts, len(numbers)]):
            extents += split(home.offset + numbers[first] * size, views[first:end], size)
        return extents

    def _dirty_extents(
        self, home: CachedDevice, batch: list[CachedBlock], numbers: list[int]
    ) -> tuple[list[Extent], int]:
        """Return what has to be written of a batch that is being written, and how many bytes that is."""
        size = self.block_size
        # Else whole blocks: what completes a block may change any byte of it, and direct access wants them aligned.
        if self._partly_dirty and home.prepare is None and not getattr(home.device, "direct", False):
            starts = [home.offset + buffer.block_number * size + buffer.dirty_start for buffer in batch]
            views = [self._view(buffer)[buffer.dirty_start : buffer.dirty_end] for buffer in batch]
            return coalesce(starts, views), sum(view.nbytes for view in views)
        nr_bytes = len(batch) * size
        if home.end_bytes is not None:
            nr_bytes -= size - self._view(batch[-1]).nbytes
        return self._extents(home, batch, numbers), nr_bytes

    # Waiting

    def notify(self) -> None:
        """Wake whoever waits: a hold was given back, a transfer has ended, or there is memory."""
        if self._nr_waiting:
            self._changed.notify_all()

    def wait(self, wanted: Iterable[CachedBlock] = ()) -> None:
        """Wait until something changes.

        :param wanted: what the caller waits for is that one of these is not held any more; empty when it waits for a
            transfer
        :raises WouldDeadlock: that cannot happen: each of them has a holder that waits here as well, for the same
            reason in vain, the calling thread being one of those
        """
        me = get_ident()
        held = [buffer for buffer in wanted if buffer.holders]
        if held:
            self._wanted[me] = held
        try:
            if held and not (self.nr_reading or self.nr_writing) and not self._can_go_on(me):
                blocks = tuple(sorted(buffer.block_number for buffer in held))
                name = held[0].home.device.name
                raise WouldDeadlock(f"{name}: no buffer can be had, blocks {list(blocks)} are held by waiters", blocks)
            self.counters.waits += 1
            self._nr_waiting += 1
            try:
                self._changed.wait()
            finally:
                self._nr_waiting -= 1
        finally:
            self._wanted.pop(me, None)

    def wait_for_transfers(self, *, reads: bool = True) -> None:
        """Wait for the end of what is on its way now, and not for what others begin meanwhile: that may never end.

        :param reads: for reads too, not only for writes
        """
        if not self.nr_writing and not (reads and self.nr_reading):
            return
        arriving: list[tuple[dict[int, Any], int, CachedBlock]] = []
        writing: list[tuple[CachedBlock, WriteBack]] = []
        for home in self.devices.values():
            if reads:
                arriving += [(home.arriving, number, buffer) for number, buffer in home.arriving.items()]
            if self.nr_writing:
                writing += [(b, b.writing) for b in home.table.values() if b.writing is not None]
        while any(where.get(number) is buffer for where, number, buffer in arriving) or any(
            buffer.writing is transfer for buffer, transfer in writing
        ):
            self.wait()

    def _can_go_on(self, thread: int) -> bool:
        """Tell whether a thread that waits for a hold will get it, if everybody who does not wait goes on."""
        stuck = set(self._wanted)
        while thread in stuck:
            freed = {
                waiter for waiter in stuck if any(stuck.isdisjoint(buffer.holders) for buffer in self._wanted[waiter])
            }
            if not freed:
                return False
            stuck -= freed
        return True

    def drop_hold(self, buffer: CachedBlock) -> None:
        """Give one hold back.

        :raises HoldError: nobody holds the buffer
        """
        holders = buffer.holders
        if not holders:
            raise HoldError(f"block {buffer.block_number} is released more often than it was held")
        try:
            holders.remove(get_ident())
        except ValueError:
            # Handed over by the thread that got it.
            holders.pop()
        # Also when others hold it still: who waits for it may now wait for nobody but itself.
        self.notify()
