"""A fixed number of blocks in memory for many devices, with the semantics of LVM's bcache.

Source: docs/bufio.md, "Bcache".
"""

from __future__ import annotations

import errno
from enum import IntFlag
from threading import get_ident
from typing import TYPE_CHECKING

from bufio.core import NO_EPOCH, USED, WRITE_BACK_BATCH, CachedBlock, CachedDevice, Core, Stats
from bufio.errors import BlocksNotWritten, HoldError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Self

    from bufio.device import Device, ReadableBuffer
    from bufio.engine import Engine

_SECTOR_BYTES = 512
_MOST_PREFETCHES = 256
_LOW_WATER_PERCENT = 33
_HIGH_WATER_PERCENT = 66


class GetFlags(IntFlag):
    """What a block is wanted for; none of these for reading it."""

    ZERO = 1
    """All of it will be written: it is zeroed, without being read, and dirty."""
    DIRTY = 2
    """It will be changed."""


class Block(CachedBlock):
    """One block of a device, from :meth:`Bcache.get` to :meth:`put`.

    ``data`` is a view of its bytes, to be changed only if the block was got with a flag that says so.  Of the last
    block of a device that is not a whole number of blocks long, what lies beyond the end is zero when it is read, and
    is not written; of a device that was opened for direct access, its last incomplete sector is beyond the end.
    """

    __slots__ = ("exclusive",)

    def __init__(self, home: CachedDevice, block_number: int, data: memoryview) -> None:
        super().__init__(home, block_number, data)
        self.exclusive = False
        """Whether it is held for changing."""

    @property
    def device(self) -> Device:
        """The device it is a block of."""
        return self.home.device

    @property
    def index(self) -> int:
        """Its number on the device, in blocks."""
        return self.block_number

    def put(self) -> None:
        """Give one hold back, see :meth:`Bcache.put`."""
        cache: Bcache = self.home.owner
        cache.put(self)


class BcacheStats(Stats):
    """Counters as every cache has them, and those of bcache.

    A get with a flag counts as a write, one without as a read; a miss is one that had to wait for a transfer.
    """

    __slots__ = ("prefetches", "read_hits", "read_misses", "write_hits", "write_misses", "write_zeroes")

    def __init__(self) -> None:
        super().__init__()
        self.read_hits = 0
        self.read_misses = 0
        self.write_zeroes = 0
        self.write_hits = 0
        self.write_misses = 0
        self.prefetches = 0


class Bcache:
    """A cache of *nr_cache_blocks* blocks of *block_sectors* sectors (512 bytes), shared by any number of devices.

    :param engine: how transfers are done; one that is synchronous by default
    :raises ValueError: no sectors, or no blocks

    Any number of threads may use it.  Readers share a block; whoever wants to change one that somebody else holds, or
    wants one that somebody changes, gets a :class:`HoldError`.  The size of a device is looked at when it is first
    used, and again after :meth:`invalidate_device` or :meth:`abort_device`.
    """

    def __init__(self, block_sectors: int, nr_cache_blocks: int, engine: Engine | None = None) -> None:
        if block_sectors < 1:
            raise ValueError(f"block_sectors must be positive, not {block_sectors}")
        if nr_cache_blocks < 1:
            raise ValueError(f"nr_cache_blocks must be positive, not {nr_cache_blocks}")
        self.block_sectors = block_sectors
        self.block_size = block_sectors * _SECTOR_BYTES
        self.nr_cache_blocks = nr_cache_blocks
        self.max_prefetches = min(_MOST_PREFETCHES, nr_cache_blocks)
        """Reads ahead that may be in flight at a time; those beyond are not begun."""
        self._core = Core(self.block_size, engine, Block, fixed=nr_cache_blocks)
        self._lock = self._core.lock
        self._counters = BcacheStats()
        self._given_up: list[CachedDevice] = []
        """Aborted devices, to which blocks were written before that the next flush has to make durable."""
        self._closed = False

    @property
    def stats(self) -> BcacheStats:
        """What happened so far, and what is cached now."""
        with self._lock:
            snapshot = BcacheStats()
            self._core.count(snapshot)
            for name in BcacheStats.__slots__:
                setattr(snapshot, name, getattr(self._counters, name))
            snapshot.hits = snapshot.read_hits + snapshot.write_hits
            snapshot.misses = snapshot.read_misses + snapshot.write_misses
            return snapshot

    # Getting blocks and giving them back

    def get(self, device: Device, index: int, flags: int = 0) -> Block:
        """Return block *index* of *device*, held; it is read if it is not cached.

        :param flags: :class:`GetFlags`, for a block that will be changed
        :raises HoldError: it is held for changing; or it is held, and *flags* ask for changing it
        :raises OSError: it cannot be read, or lies beyond the end (EIO)
        :raises WouldDeadlock: every block is held, and by nobody but those who wait for one
        """
        with self._lock:
            counters = self._counters
            block: Block | None = None
            missed = False
            while block is None:
                # Each time: what is waited for may be that the device is given up.
                home = self._home_of(device)
                block = home.table.get(index)
                if block is not None:
                    self._refuse_conflict(block, flags)
                    if flags and block.writing is not None:
                        # What is on its way to the device must not change under the transfer.
                        self._core.wait()
                        missed, block = True, None
                elif index in home.arriving:
                    missed = True
                    self._core.await_arrival(home.arriving[index])
                else:
                    missed = True
                    block = self._get_absent(home, index, flags)
            me = get_ident()
            if flags:
                counters.write_misses += missed
                counters.write_hits += not missed
                # Before it is zeroed: whatever interrupts this, what differs from the device is dirty.
                self._core.set_dirty(block, 0, self.block_size)
                if flags & GetFlags.ZERO:
                    block.data[:] = bytes(self.block_size)
                    counters.write_zeroes += 1
            else:
                counters.read_misses += missed
                counters.read_hits += not missed
            if not missed:
                block.referenced = USED
            block.exclusive = bool(flags)
            block.holders.append(me)
            return block

    def _refuse_conflict(self, block: Block, flags: int) -> None:
        if block.holders and (block.exclusive or flags):
            purpose = "changing" if block.exclusive else "reading"
            raise HoldError(f"block {block.index} of {block.device.name} is held for {purpose}")

    def _get_absent(self, home: CachedDevice, index: int, flags: int) -> Block | None:
        """Return a block that is not cached, unheld; None when the lock was given up before it was known to be so."""
        self._check_index(home, index)
        block: Block | None = self._allocate(home, index)
        if block is None:
            return None
        if flags & GetFlags.ZERO:
            # It must not be found with the content of another block, even if this is as far as we get.
            block.data[:] = bytes(self.block_size)
            self._core.insert(block)
        else:
            self._zero_tail(block)
            self._core.fill(block)
        return block

    def put(self, block: Block) -> None:
        """Give one hold of *block* back.  ``data`` must not be used afterwards.

        When fewer than a third of all blocks are not dirty, some are written until it is two thirds.  What cannot be
        written is left to :meth:`flush`.

        :raises HoldError: nobody holds it
        """
        with self._lock:
            self._core.drop_hold(block)
            if not block.holders:
                block.exclusive = False
            nr_available = self.nr_cache_blocks - len(self._core.dirty)
            if nr_available * 100 < _LOW_WATER_PERCENT * self.nr_cache_blocks:
                wanted = _HIGH_WATER_PERCENT * self.nr_cache_blocks // 100 - nr_available
                self._start_writing(self._core.oldest_dirty(wanted, NO_EPOCH, again=False))

    def prefetch(self, device: Device, index: int) -> None:
        """Start to read a block, if it is not cached and fewer than ``max_prefetches`` are on their way.

        Nothing is evicted that is held or dirty.  Errors surface at the later :meth:`get`, which tries again.
        """
        self._prefetch_range(device, index, index + 1)

    def _prefetch_range(self, device: Device, begin: int, end: int) -> None:
        """Prefetch blocks ``[begin, end)``, as far as there is room, with neighbours in one call."""
        with self._lock:
            home = self._home_of(device)
            core = self._core
            fresh: list[CachedBlock] = []
            try:
                for index in range(max(0, begin), min(end, home.nr_blocks)):
                    if index in home.table or index in home.arriving:
                        continue
                    victim = None if core.spare else core.oldest_clean(NO_EPOCH)
                    if core.nr_reading >= self.max_prefetches or not (core.spare or victim):
                        break
                    block: Block = core.create(home, index) if victim is None else core.reuse(victim, home, index)
                    self._zero_tail(block)
                    fresh.append(block)
                    core.expect(block)
                if fresh:
                    self._counters.prefetches += len(fresh)
                    core.start_read(home, fresh)
            except BaseException:
                core.cancel_reads(fresh)
                raise

    # Writing

    def flush(self) -> list[Block]:
        """Write every dirty block that is not held, wait for all transfers, and make the writes durable.

        Blocks that could not be written before are tried again.

        :returns: the dirty blocks that were skipped because they are held, by device and index
        :raises BlocksNotWritten: EIO, naming the blocks; what could be written has been
        :raises OSError: a device could not be flushed (the others are); what was written to it since the last flush is
            dirty again
        """
        with self._lock:
            self._require_open()
            core = self._core
            before = [(home, home.failed_flushes) for home in core.devices.values()]
            self._write(list(core.dirty))
            core.wait_for_transfers()
            errored, skipped = self._left_dirty(core.dirty)
            homes = [(home, failed) for home, failed in before if self._needs_flush(home, failed)]
            given_up, self._given_up = self._given_up, []
        flush_error: OSError | None = None
        for home, failed in homes + [(home, home.failed_flushes) for home in given_up]:
            try:
                core.flush(home, failed)
            except OSError as error:
                flush_error = flush_error or error
        if flush_error is not None:
            # Before the blocks in error: it says more, and they will be named by the next flush.
            raise flush_error
        if errored:
            raise BlocksNotWritten(errored, skipped) from errored[0].write_error
        return skipped

    def _needs_flush(self, home: CachedDevice, failed_before: int) -> bool:
        """Tell whether something written is not durable, or another thread's flush has yet to say, or said that."""
        return bool(home.unflushed) or home.flushing or home.failed_flushes != failed_before

    def _write(self, blocks: list[CachedBlock]) -> None:
        """Write those of *blocks* that are dirty and not held, once, and wait until none of them is being written."""
        core = self._core
        left = blocks
        while left:
            ready = [block for block in left if block.dirty and not block.holders and block.writing is None]
            in_flight = [block for block in left if block.writing is not None]
            self._start_writing(ready, waiting=True)
            while any(block.writing is not None for block in left):
                core.wait()
            # Dirtied again before a transfer that was on its way already had ended.
            left = [block for block in in_flight if block.dirty and block.write_error is None]

    def _start_writing(self, blocks: list[CachedBlock], *, waiting: bool = False) -> None:
        by_device: dict[CachedDevice, list[CachedBlock]] = {}
        for block in blocks:
            by_device.setdefault(block.home, []).append(block)
        # Only the last one may do its share in this thread: the others shall be on their way by then.
        last = len(by_device) - 1
        for number, (home, batch) in enumerate(by_device.items()):
            # The lock is given up for each device: others may have got blocks of the next one, or its memory.
            still = [block for block in batch if block.home is home and not block.holders]
            self._core.start_write_back(home, still, waiting=waiting and number == last)

    def _left_dirty(self, blocks: Iterable[CachedBlock]) -> tuple[list[Block], list[Block]]:
        """Return the dirty blocks that are in error, and those that are held."""
        order = {id(home): number for number, home in enumerate(self._core.devices.values())}
        dirty = [block for block in blocks if block.dirty and isinstance(block, Block)]
        dirty.sort(key=lambda block: (order[id(block.home)], block.index))
        errored = [block for block in dirty if block.write_error is not None and not block.holders]
        return errored, [block for block in dirty if block.holders]

    # Dropping

    def invalidate(self, device: Device, index: int) -> bool:
        """Write a block if it is dirty, and forget it.  False, and nothing done, if it is held.

        It is durable after the next :meth:`flush`.

        :raises BlocksNotWritten: it could not be written, and is still there
        """
        with self._lock:
            self._require_open()
            home = self._core.devices.get(device)
            return home is None or not self._invalidate(home, [index])

    def invalidate_device(self, device: Device) -> bool:
        """Write what is dirty of a device, make it durable, and forget all of its blocks.

        :returns: False if some are held; these are left
        :raises BlocksNotWritten: some could not be written, and are still there
        :raises OSError: the device could not be flushed; what was written since the last flush is dirty again
        """
        with self._lock:
            self._require_open()
            home = self._core.devices.get(device)
            if home is None:
                return True
        while True:
            with self._lock:
                failed = home.failed_flushes
                self._settle(home)
                self._write([block for block in home.table.values() if block.dirty])
                errored, _ = self._left_dirty(home.table.values())
            if self._needs_flush(home, failed):
                self._core.flush(home, failed)
            if errored:
                raise BlocksNotWritten(errored, []) from errored[0].write_error
            with self._lock:
                blocks: list[Block] = list(home.table.values())
                if home.arriving or home.unflushed or any(not b.holders and (b.dirty or b.writing) for b in blocks):
                    continue  # others have used it meanwhile
                for block in blocks:
                    if not block.holders:
                        self._core.destroy(block)
                if not home.table:
                    self._forget_device(home)
                return not home.table

    def _invalidate(self, home: CachedDevice, indexes: list[int]) -> list[Block]:
        """Write and forget blocks, and return those that are held."""
        for index in indexes:
            arriving = home.arriving.get(index)
            if arriving is not None:
                self._core.await_arrival(arriving)
        blocks: list[Block] = [home.table[index] for index in indexes if index in home.table]
        self._write([block for block in blocks if block.dirty or block.writing is not None])
        # The lock was given up: others may have forgotten them, got them, or changed them.
        blocks = [home.table[index] for index in indexes if index in home.table]
        for block in blocks:
            if not (block.dirty or block.holders or block.writing is not None):
                self._core.destroy(block)
        errored, _ = self._left_dirty(blocks)
        if errored:
            raise BlocksNotWritten(errored, []) from errored[0].write_error
        return [block for block in blocks if block.holders or block.dirty or block.writing is not None]

    def abort_device(self, device: Device) -> None:
        """Forget all blocks of a device without writing them.  What is on its way already is waited for.

        :raises HoldError: some are held (the message names them); nothing is forgotten then
        """
        with self._lock:
            self._require_open()
            home = self._core.devices.get(device)
            if home is None:
                return
            self._settle(home)
            held = sorted(index for index, block in home.table.items() if block.holders)
            if held:
                raise HoldError(f"{device.name} is aborted while blocks {held} are held")
            for block in list(home.table.values()):
                self._core.destroy(block)
            self._forget_device(home)

    def _forget_device(self, home: CachedDevice) -> None:
        """Forget a device of which nothing is cached, unless another thread has done so, and maybe more, already."""
        if self._core.devices.get(home.device) is home:
            del self._core.devices[home.device]
            if home.unflushed:
                self._given_up.append(home)
        self._core.notify()

    def _settle(self, home: CachedDevice) -> None:
        """Wait until nothing of a device is on its way."""
        while home.arriving or any(block.writing is not None for block in home.table.values()):
            self._core.wait()

    # Bytes

    def prefetch_bytes(self, device: Device, offset: int, length: int) -> None:
        """Prefetch the blocks of a range of bytes, neighbours in one call; as far as there is room.

        :raises OSError: the range lies beyond the end (EIO)
        :raises ValueError: a negative offset or length
        """
        self._check_range(device, offset, length)
        if length:
            self._prefetch_range(device, offset // self.block_size, -(-(offset + length) // self.block_size))

    def read_bytes(self, device: Device, offset: int, length: int) -> bytes:
        """Return *length* bytes from byte *offset* on.

        :raises OSError: some of it cannot be read, or lies beyond the end (EIO)
        :raises HoldError: some of it is held for changing
        :raises ValueError: a negative offset or length
        """
        self.prefetch_bytes(device, offset, length)
        parts = []
        for index, begin, end in self._parts(offset, length):
            block = self.get(device, index)
            try:
                parts.append(bytes(block.data[begin:end]))
            finally:
                block.put()
        return b"".join(parts)

    def write_bytes(self, device: Device, offset: int, data: ReadableBuffer) -> None:
        """Write *data* from byte *offset* on.  Blocks that are covered entirely are not read.

        An error leaves the blocks before the one it names changed.

        :raises OSError: a block that is changed in part cannot be read, or the range lies beyond the end (EIO)
        :raises HoldError: some of it is held
        :raises ValueError: a negative offset
        """
        view = memoryview(data).cast("B")
        self._check_range(device, offset, view.nbytes)
        for part, at in self._changing(device, offset, view.nbytes):
            part[:] = view[at : at + len(part)]

    def zero_bytes(self, device: Device, offset: int, length: int) -> None:
        """Write *length* zero bytes; errors are those of :meth:`write_bytes`."""
        self.set_bytes(device, offset, length, 0)

    def set_bytes(self, device: Device, offset: int, length: int, value: int) -> None:
        """Write *length* bytes, each of them *value*; errors are those of :meth:`write_bytes`.

        :raises ValueError: *value* is not 0..255, or the offset or length is negative
        """
        self._check_range(device, offset, length)
        pattern = bytes([value]) * min(length, self.block_size)
        for part, _ in self._changing(device, offset, length):
            part[:] = pattern[: len(part)]

    def _changing(self, device: Device, offset: int, length: int) -> Iterator[tuple[memoryview, int]]:
        """Yield a view of each part of a range that lies within one block, held for changing, and its place in it."""
        with self._lock:
            end_bytes = self._home_of(device).end_bytes
        done = 0
        for index, begin, end in self._parts(offset, length):
            whole = begin == 0 and (end == self.block_size or index * self.block_size + end == end_bytes)
            block = self.get(device, index, GetFlags.ZERO if whole else GetFlags.DIRTY)
            try:
                yield block.data[begin:end], done
            finally:
                block.put()
            done += end - begin

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield block, first byte and last byte (exclusive) within it, for each block of a range of bytes."""
        end = offset + length
        while offset < end:
            index, begin = divmod(offset, self.block_size)
            step = min(self.block_size - begin, end - offset)
            yield index, begin, begin + step
            offset += step

    def _check_range(self, device: Device, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise ValueError(f"{length} bytes at byte {offset} are no range")
        with self._lock:
            home = self._home_of(device)
            size = home.nr_blocks * self.block_size if home.end_bytes is None else home.end_bytes
        if offset + length > size:
            raise OSError(errno.EIO, f"{length} bytes at byte {offset} lie beyond the end ({size} bytes)", device.name)

    # The end

    def close(self) -> None:
        """Flush, and free everything; the devices stay open.

        :raises HoldError: blocks are still held (the message names them); the cache stays usable
        :raises OSError: as :meth:`flush`; the cache stays usable, so that one may try again, or abort the device
        """
        while not self._closed:
            with self._lock:
                core = self._core
                blocks: list[Block] = [block for home in core.devices.values() for block in home.table.values()]
                held = [block for block in blocks if block.holders]
                if held:
                    names = ", ".join(f"{block.index} of {block.device.name}" for block in held)
                    raise HoldError(f"closed while blocks are held: {names}")
                busy = core.dirty or core.nr_reading or core.nr_writing
                unflushed = any(home.unflushed or home.flushing for home in core.devices.values())
                if not (busy or unflushed or self._given_up):
                    for block in blocks:
                        core.destroy(block)
                    core.devices.clear()
                    core.give_up()
                    self._closed = True
                    return
            self.flush()

    def _require_open(self) -> None:
        if self._closed:
            raise HoldError("the cache was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # All of these are called with the lock.

    def _home_of(self, device: Device) -> CachedDevice:
        self._require_open()
        home = self._core.devices.get(device)
        if home is None:
            home = CachedDevice(device, self)
            size = device.size_bytes
            if getattr(device, "direct", False):
                # Part of a sector cannot be transferred.
                size -= size % _SECTOR_BYTES
            # The last block may be cut short.
            home.nr_blocks = -(-size // self.block_size)
            home.end_bytes = size if size % self.block_size else None
            self._core.devices[device] = home
        return home

    def _check_index(self, home: CachedDevice, index: int) -> None:
        if not 0 <= index < home.nr_blocks:
            raise OSError(errno.EIO, f"block {index} is beyond the end ({home.nr_blocks} blocks)", home.device.name)

    def _zero_tail(self, block: Block) -> None:
        """Zero what lies beyond the end of the device, which will not be read."""
        end = block.home.end_bytes
        if end is not None and end < (block.index + 1) * self.block_size:
            begin = end - block.index * self.block_size
            block.data[begin:] = bytes(self.block_size - begin)

    def _allocate(self, home: CachedDevice, index: int) -> Any:
        """Return a :class:`Block` that is in no list; None when the lock was given up meanwhile: look again then.

        :raises OSError: every block is dirty and cannot be written
        """
        core = self._core
        if core.spare:
            return core.create(home, index)
        victim = core.oldest_clean(NO_EPOCH)
        if victim is not None:
            return core.reuse(victim, home, index)
        batch = [] if core.nr_writing else core.oldest_dirty(WRITE_BACK_BATCH, NO_EPOCH, again=False)
        if batch:
            self._start_writing(batch, waiting=True)
            return None
        if core.nr_reading or core.nr_writing:
            core.wait()
            return None
        errored, _ = self._left_dirty(core.dirty)
        if errored:
            # The last resort, since nothing else can be had: they may be writable again.
            self._start_writing(list(errored), waiting=True)
            if any(block.write_error is None for block in errored):
                return None
        held = [block for other in core.devices.values() for block in other.table.values() if block.holders]
        if errored and not held:
            # Nobody will give anything back: all there is is dirty and cannot be written.
            raise BlocksNotWritten(errored, []) from errored[0].write_error
        core.wait(held)
        return None
