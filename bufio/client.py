"""The buffer cache of one device, with the semantics of Linux dm-bufio.

Source: docs/bufio.md, "Client".
"""

from __future__ import annotations

import errno
from threading import get_ident
from typing import TYPE_CHECKING

from bufio.core import WRITE_BACK_BATCH, Buffer, Core, Stats
from bufio.errors import HoldError, WouldDeadlock
from bufio.memory import parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from bufio.device import Device
    from bufio.engine import Engine

_SECTOR_BYTES = 512
_LEAST_BUFFERS = 8
_NO_EPOCH = -1
_USED = 1
"""``referenced`` of a buffer used outside any epoch."""
FIRST_EPOCH = 2
_DIRTY_TO_CLEAN = 3
"""Write-back starts when there are this many times more dirty buffers than clean ones."""


class Client:
    """A cache of the blocks of *device*.

    :param block_size: bytes, a multiple of 512
    :param reserved_buffers: that many buffers can always be had: a thread that holds no more makes progress
    :param aux_size: ``buffer.aux`` begins as that many zeroed bytes
    :param alloc_callback: called once for each new buffer, before anybody sees it, to set up ``buffer.aux``
    :param write_callback: called just before a dirty buffer is written, to complete its bytes (a checksum, say)
    :param engine: how transfers are done; one that is synchronous by default
    :param cache_bytes: memory the client may use, its bookkeeping included; by default an equal share of
        ``bufio.parameters.max_cache_size_bytes``
    :raises ValueError: an impossible block size

    Any number of threads may use one client.  The callbacks must not call it.
    """

    def __init__(
        self,
        device: Device,
        block_size: int = 4096,
        *,
        reserved_buffers: int = 1,
        aux_size: int = 0,
        alloc_callback: Callable[[Buffer], None] | None = None,
        write_callback: Callable[[Buffer], None] | None = None,
        engine: Engine | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        if block_size < _SECTOR_BYTES or block_size % _SECTOR_BYTES:
            raise ValueError(f"block_size must be a multiple of 512, not {block_size}")
        self.device = device
        self.block_size = block_size
        self._core = Core(block_size, engine)
        self._lock = self._core.lock
        self._table = self._core.table_of(device)
        self._reserved_buffers = reserved_buffers
        self._aux_size = aux_size
        self._alloc_callback = alloc_callback
        self._write_callback = write_callback
        self._offset = 0
        self._minimum_buffers = 0
        self._cache_bytes = cache_bytes
        self._write_error: OSError | None = None
        self._waiting: dict[int, int] = {}
        self._closed = False
        self.peek: Callable[[int], Buffer | None] = self._table.get
        """Return the cached buffer of a block without a hold and without counting, or None.

        For an owner that serialises all its own calls and brackets them in epochs: it must set ``buffer.referenced =
        client.epoch`` at once, and the buffer then stays where it is, unwritten, until the epoch is over.
        """
        self.epoch = _NO_EPOCH
        """The owner's present epoch, a number above 1 that the owner counts up; -1 when there is no such owner."""
        self.limit_changed()
        if cache_bytes is None:
            parameters.join(self)

    # Sizes

    @property
    def device_size(self) -> int:
        """Whole blocks on the device, behind the sector offset, at this moment."""
        return max(0, self.device.size_bytes - self._offset) // self.block_size

    def set_sector_offset(self, sectors: int) -> None:
        """Let block 0 begin at that sector (512 bytes) of the device.  Only while nothing is cached."""
        with self._lock:
            if self._table:
                raise HoldError("the sector offset cannot change while blocks are cached")
            self._offset = sectors * _SECTOR_BYTES

    def set_minimum_buffers(self, n: int) -> None:
        """Keep room for at least *n* buffers, whatever the limit of memory says."""
        self._minimum_buffers = n
        self.limit_changed()

    def limit_changed(self) -> None:
        """Recompute how many buffers there may be, and evict clean ones that are too many."""
        share = parameters.share_bytes() if self._cache_bytes is None else self._cache_bytes
        with self._lock:
            self._limit = max(share // self._core.buffer_bytes, self._minimum_buffers, _LEAST_BUFFERS)
            self._threshold = self._limit - self._limit // 8
            if self.epoch == _NO_EPOCH:
                # Whoever borrows buffers may be doing so right now, in another thread: the next allocation trims.
                self._trim()

    @property
    def stats(self) -> Stats:
        """What happened so far, and what is cached now."""
        with self._lock:
            snapshot = Stats()
            for name in Stats.__slots__:
                setattr(snapshot, name, getattr(self._core.counters, name))
            snapshot.dirty = len(self._core.dirty)
            snapshot.cached = len(self._table)
            snapshot.held = sum(1 for buffer in self._table.values() if buffer.holders)
            return snapshot

    # Getting buffers

    def read(self, block: int) -> Buffer:
        """Return the buffer of *block*, held; it is read from the device if it is not cached.

        :raises OSError: the device's error; every thread that waits for the same block gets it, and the next call
            tries again.  EIO for a block beyond the device's end.
        :raises WouldDeadlock: there is no memory for it, and only the calling thread could give any back
        """
        with self._lock:
            buffer = self._table.get(block)
            if buffer is not None and not buffer.reading:
                buffer.holders.append(get_ident())
                buffer.referenced = buffer.referenced or _USED
                self._core.counters.hits += 1
                return buffer
            buffer = self._read_uncached(block)
            buffer.holders.append(get_ident())
            buffer.referenced = buffer.referenced or _USED
            return buffer

    def get(self, block: int) -> Buffer | None:
        """Return the buffer of *block*, held, if it is cached; None if it is not, or is still being read."""
        with self._lock:
            buffer = self._table.get(block)
            if buffer is None or buffer.reading:
                return None
            buffer.holders.append(get_ident())
            buffer.referenced = buffer.referenced or _USED
            self._core.counters.hits += 1
            return buffer

    def new(self, block: int) -> Buffer:
        """Return the buffer of *block*, held, without reading: the caller fills it and marks it dirty.

        If the block is cached its buffer is returned as it is; otherwise the contents are undefined.
        """
        with self._lock:
            buffer = self._new_unheld(block)
            buffer.holders.append(get_ident())
            return buffer

    def borrow(self, block: int) -> Buffer:
        """As :meth:`read`, without a hold: for the owner of the present epoch, see :attr:`peek`."""
        with self._lock:
            buffer = self._table.get(block)
            if buffer is None or buffer.reading:
                buffer = self._read_uncached(block)
            buffer.referenced = self.epoch
            return buffer

    def borrow_new(self, block: int) -> Buffer:
        """As :meth:`new`, without a hold: for the owner of the present epoch, see :attr:`peek`."""
        with self._lock:
            buffer = self._new_unheld(block)
            buffer.referenced = self.epoch
            return buffer

    def _new_unheld(self, block: int) -> Buffer:
        self._require_open()
        while True:
            buffer = self._table.get(block)
            if buffer is None:
                buffer = self._allocate(block)
                if buffer is not None:
                    return buffer
            elif buffer.reading:
                self._wait(())
            else:
                return buffer

    def prefetch(self, block: int, n_blocks: int = 1) -> None:
        """Read blocks ahead.  Stops quietly where no buffer can be had; errors surface at the later ``read``."""
        with self._lock:
            self._require_open()
            fresh: list[Buffer] = []
            try:
                self._create_absent(range(block, min(block + n_blocks, self.device_size)), fresh)
            except BaseException:
                for buffer in fresh:
                    self._core.destroy(self._table, buffer)
                raise
            if not fresh:
                return
            self._core.counters.misses += len(fresh)
            results: list[OSError | None] = []
            try:
                self._lock.release()
                results = self._core.read_into(self.device, fresh, self._offset)
            finally:
                self._lock.acquire()
                for at, buffer in enumerate(fresh):
                    buffer.reading = 0
                    if at >= len(results) or results[at] is not None:
                        self._core.destroy(self._table, buffer)
                self._core.changed.notify_all()

    def _create_absent(self, blocks: range, fresh: list[Buffer]) -> None:
        """Add to *fresh* a buffer, marked as being read, for each block that is not cached, as far as there is room."""
        for number in blocks:
            if number not in self._table and self._core.nr_buffers >= self._limit and not self._make_room():
                return
            if number not in self._table:
                buffer = self._create(number, get_ident())
                fresh.append(buffer)

    def _read_uncached(self, block: int) -> Buffer:
        """Return the buffer of a block that is absent or on its way, unheld.  Called with the lock."""
        self._require_open()
        while True:
            buffer = self._table.get(block)
            if buffer is None:
                if not 0 <= block < self.device_size:
                    raise OSError(errno.EIO, f"block {block} is beyond the end ({self.device_size} blocks)", self.name)
                try:
                    buffer = self._allocate(block, get_ident())
                    if buffer is None:
                        continue
                    self._fill(buffer)
                except BaseException:
                    self._drop_unread(block)
                    raise
            elif buffer.reading:
                error = self._await_read(buffer)
                if error is not None:
                    raise error
                continue
            else:
                self._core.counters.hits += 1
            return buffer

    def _fill(self, buffer: Buffer) -> None:
        """Read a new buffer; on failure it leaves the cache and whoever waits for it gets the same error."""
        self._core.counters.misses += 1
        error: OSError | None = OSError(errno.EIO, f"read of block {buffer.block_number} was interrupted", self.name)
        try:
            self._lock.release()
            error = self._core.read_into(self.device, [buffer], self._offset)[0]
        finally:
            self._lock.acquire()
            buffer.reading = 0
            if error is not None:
                self._core.destroy(self._table, buffer)
                # Whoever waits has the object, not the table: leave the error where they look.
                buffer.aux = error
            self._core.changed.notify_all()
        if error is not None:
            raise error

    def _drop_unread(self, block: int) -> None:
        """Remove a buffer that this thread was going to fill and did not."""
        buffer = self._table.get(block)
        if buffer is not None and buffer.reading == get_ident():
            self._core.destroy(self._table, buffer)
            buffer.reading = 0
            self._core.changed.notify_all()

    def _await_read(self, buffer: Buffer) -> OSError | None:
        while buffer.reading:
            self._wait(())
        if self._table.get(buffer.block_number) is not buffer and isinstance(buffer.aux, OSError):
            return buffer.aux
        return None

    # Giving buffers back

    def release(self, buffer: Buffer) -> None:
        """Give one hold of *buffer* back; see :meth:`Buffer.release`."""
        with self._lock:
            self._drop_hold(buffer)

    def _drop_hold(self, buffer: Buffer) -> None:
        if not buffer.holders:
            raise HoldError(f"block {buffer.block_number} is released more often than it was held")
        try:
            buffer.holders.remove(get_ident())
        except ValueError:
            # Handed over by the thread that got it.
            buffer.holders.pop()
        if not buffer.holders and self._waiting:
            self._core.changed.notify_all()

    def mark_dirty(self, buffer: Buffer, start: int = 0, end: int | None = None) -> None:
        """Note a change of bytes ``[start, end)``; see :meth:`Buffer.mark_dirty`.  Also of a borrowed buffer."""
        end = self.block_size if end is None else end
        if not 0 <= start <= end <= self.block_size:
            raise ValueError(f"[{start}..{end}] is no range within a block of {self.block_size} bytes")
        if start < end:
            with self._lock:
                self._core.set_dirty(buffer, start, end)

    def release_move(self, buffer: Buffer, new_block: int) -> None:
        """Release *buffer*, whose content becomes that of *new_block*.

        What was dirty is written to the old block first.  With no other holder the buffer itself is re-keyed and dirty:
        nothing is written yet, and a later read of the old block reads the device.  With other holders, they keep the
        old block, and its content is written to *new_block*.  A cached buffer of *new_block* is dropped, or waited for
        if it is held.

        :raises OSError: the old content could not be written, or (with other holders) the new one; still held then
        """
        with self._lock:
            if not buffer.holders:
                raise HoldError(f"block {buffer.block_number} is moved without being held")
            target: Buffer | None = None
            while target is None:
                self._settle(buffer)
                self._clear_target(buffer, new_block)
                if buffer.dirty or buffer.writing:
                    # Waiting for the target gave others the time to change the content.
                    continue
                if len(buffer.holders) == 1:
                    buffer.holders.clear()
                    self._rekey(buffer, new_block)
                    return
                # The others keep the buffer, so the new block gets one of its own, for which readers have to wait.
                target = self._allocate(new_block)
            self._write_copy(buffer, target)
            self._drop_hold(buffer)

    def _write_copy(self, source: Buffer, target: Buffer) -> None:
        """Write the content of *source* to the block of *target*, a new buffer.  Gives the lock up meanwhile."""
        target.reading = get_ident()
        target.data[:] = source.data
        written = False
        try:
            self._lock.release()
            if self._write_callback is not None:
                # It sees the content as that of the new block.
                own, target.aux = target.aux, source.aux
                self._write_callback(target)
                target.aux = own
            self.device.pwrite(target.data, self._offset + target.block_number * self.block_size)
            written = True
        finally:
            self._lock.acquire()
            target.reading = 0
            if not written:
                self._core.destroy(self._table, target)
            self._core.changed.notify_all()
        self._core.counters.writes += 1
        self._core.counters.bytes_written += self.block_size

    def move(self, buffer: Buffer, new_block: int) -> None:
        """Re-key a buffer that the caller got from :attr:`peek` and that nobody holds; otherwise as ``release_move``.

        :raises HoldError: somebody holds it
        """
        with self._lock:
            if buffer.holders:
                raise HoldError(f"block {buffer.block_number} is held and cannot be moved away")
            if buffer.dirty or buffer.writing:
                self._settle(buffer)
            table = self._table
            if new_block in table:
                self._clear_target(buffer, new_block)
            # As _rekey; written out because this is done for every block that a transaction changes.
            del table[buffer.block_number]
            buffer.block_number = new_block
            table[new_block] = buffer
            core = self._core
            del core.clean[buffer]
            core.dirty[buffer] = None
            buffer.dirty = True
            buffer.dirty_start = 0
            buffer.dirty_end = self.block_size
            buffer.referenced = self.epoch

    def _settle(self, buffer: Buffer) -> None:
        """Write what is dirty of *buffer* to where it is now."""
        while buffer.dirty or buffer.writing:
            if buffer.writing:
                self._wait(())
                continue
            failed = self._write_back([buffer])
            if failed:
                raise failed[0][1]

    def _clear_target(self, buffer: Buffer, new_block: int) -> None:
        while True:
            target = self._table.get(new_block)
            if target is None:
                return
            if target is buffer:
                raise HoldError(f"block {new_block} cannot be moved onto itself")
            if not (target.holders or target.reading or target.writing):
                self._core.destroy(self._table, target)
                return
            self._wait([target])

    def _rekey(self, buffer: Buffer, new_block: int) -> None:
        table = self._table
        del table[buffer.block_number]
        buffer.block_number = new_block
        table[new_block] = buffer
        self._core.set_dirty(buffer, 0, self.block_size)
        buffer.referenced = buffer.referenced or _USED

    # Writing

    def write_dirty_buffers_async(self) -> None:
        """Start writing every dirty buffer.  Errors are reported by the next :meth:`write_dirty_buffers`."""
        with self._lock:
            self._write_back(list(self._core.dirty))

    def write_dirty_buffers(self) -> None:
        """Put every buffer that is dirty now on the device, and make it durable.

        :raises OSError: the first write error since the last call, these writes included, or the flush's.  What failed
            stays dirty.
        """
        with self._lock:
            batch = list(self._core.dirty)
            pending = batch
            while pending:
                in_flight = [buffer for buffer in pending if buffer.writing]
                self._write_back(pending)
                while any(buffer.writing for buffer in in_flight):
                    self._wait(())
                # Dirtied again while they were being written: what went to the device may be the old content.
                pending = [b for b in in_flight if b.dirty and self._table.get(b.block_number) is b]
            while self._core.nr_writing:
                self._wait(())
            error, self._write_error = self._write_error, None
        if error is not None:
            raise error
        try:
            self.issue_flush()
        except OSError:
            # Nobody knows what of it is durable: write all of it again next time.
            with self._lock:
                for buffer in batch:
                    if self._table.get(buffer.block_number) is buffer:
                        self._core.set_dirty(buffer, 0, self.block_size)
            raise

    def issue_flush(self) -> None:
        """Have the device make durable what was written to it."""
        self.device.flush()
        self._core.counters.flushes += 1

    def _write_back(self, buffers: Iterable[Buffer]) -> list[tuple[Buffer, OSError]]:
        failed = self._core.write_back(self.device, buffers, self._offset, self._write_callback)
        if failed and self._write_error is None:
            self._write_error = failed[0][1]
        return failed

    # Dropping

    def issue_discard(self, block: int, count: int) -> None:
        """Discard blocks of the device; clean cached copies that nobody holds are forgotten.

        :raises OSError: EOPNOTSUPP where the device cannot
        """
        with self._lock:
            for number in self._cached_in(block, count):
                buffer = self._table[number]
                if not (buffer.dirty or buffer.holders or buffer.reading or buffer.writing):
                    self._core.destroy(self._table, buffer)
        self.device.discard(self._offset + block * self.block_size, count * self.block_size)

    def forget(self, block: int) -> None:
        """Drop the buffer of *block*, clean or dirty, without writing it, unless it is held."""
        self.forget_buffers(block, 1)

    def forget_buffers(self, block: int, n: int) -> None:
        """Drop the unheld buffers of *n* blocks from *block* on, clean or dirty, without writing them."""
        with self._lock:
            for number in self._cached_in(block, n):
                buffer = self._table[number]
                if not (buffer.holders or buffer.reading or buffer.writing):
                    self._core.destroy(self._table, buffer)

    def _cached_in(self, block: int, n: int) -> list[int]:
        if n > len(self._table):
            return [number for number in self._table if block <= number < block + n]
        return [number for number in range(block, block + n) if number in self._table]

    def drop_buffers(self) -> None:
        """Write what is dirty, then forget every buffer that is not held."""
        self.write_dirty_buffers()
        self.reset()

    def reset(self) -> None:
        """Drop every unheld buffer without writing it, and any write error that was not reported yet."""
        with self._lock:
            for buffer in list(self._table.values()):
                if not (buffer.holders or buffer.reading or buffer.writing):
                    self._core.destroy(self._table, buffer)
            self._write_error = None

    @property
    def name(self) -> str:
        """What messages call the device."""
        return self.device.name

    def close(self) -> None:
        """Write what is dirty and free everything; the device stays open.

        :raises HoldError: a buffer is still held (the message names the blocks); the client stays usable
        :raises OSError: something could not be written; the client is closed all the same
        """
        if self._closed:
            return
        with self._lock:
            held = sorted(number for number, buffer in self._table.items() if buffer.holders)
            if held:
                raise HoldError(f"closed while blocks {held} are held")
            dirty = bool(self._core.dirty) or self._write_error is not None
        try:
            if dirty:
                self.write_dirty_buffers()
        finally:
            self.discard_all()

    def discard_all(self) -> None:
        """Free everything without writing.  For an owner that gives its changes up."""
        self.reset()
        parameters.leave(self)
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise HoldError(f"the cache of {self.name} was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Memory.  All of these are called with the lock, which some of them give up for a while.

    def _create(self, block: int, reading: int = 0) -> Buffer:
        buffer = self._core.create(self, self._table, block, reading)
        if self._aux_size:
            buffer.aux = bytearray(self._aux_size)
        if self._alloc_callback is not None:
            try:
                self._alloc_callback(buffer)
            except BaseException:
                self._core.destroy(self._table, buffer)
                raise
        return buffer

    def _allocate(self, block: int, reading: int = 0) -> Buffer | None:
        """Make a buffer for *block*; None when the lock was given up meanwhile, so that the caller looks again.

        :param reading: see :meth:`bufio.core.Core.create`
        """
        core = self._core
        if core.nr_buffers < self._threshold:
            return self._create(block, reading)
        while core.nr_buffers > self._limit and self._evict_one():
            pass
        if len(core.dirty) > _DIRTY_TO_CLEAN * len(core.clean):
            batch = core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
            if batch:
                self._write_back(batch)
                return None if block in self._table else self._allocate_at_limit(block, reading)
        return self._allocate_at_limit(block, reading)

    def _allocate_at_limit(self, block: int, reading: int) -> Buffer | None:
        core = self._core
        if self._evict_one() or core.nr_buffers < self._limit:
            return self._create(block, reading)
        batch = core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
        failed = self._write_back(batch)
        if len(failed) < len(batch) or block in self._table:
            return None
        if core.nr_buffers < self._limit + self._reserved_buffers or self.epoch != _NO_EPOCH:
            # What an owner borrows in one epoch may exceed the limit: there is nobody to wait for.
            return self._create(block, reading)
        if failed and not any(b.holders or b.reading or b.writing for b in self._table.values()):
            # Nobody will give anything back: all there is is dirty and cannot be written.
            raise failed[0][1]
        self._wait(self._table.values())
        return None

    def _evict_one(self) -> bool:
        buffer = self._core.oldest_clean(self.epoch)
        if buffer is None:
            return False
        self._core.destroy(self._table, buffer)
        self._core.counters.evictions += 1
        return True

    def _make_room(self) -> bool:
        """Evict a buffer for one that is read ahead.  Gives the lock up while it writes.

        Dirty buffers are written as soon as they are half of all: where few clean ones are left, each block read ahead
        would push out one that was read ahead before it, and whoever waits for both would never get them.
        """
        core = self._core
        if len(core.dirty) >= len(core.clean):
            self._write_back(core.oldest_dirty(WRITE_BACK_BATCH, self.epoch))
        return self._evict_one()

    def _trim(self) -> None:
        while self._core.nr_buffers > self._limit:
            if not self._evict_one():
                batch = self._core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
                if not batch or len(self._write_back(batch)) == len(batch):
                    break
        self._core.changed.notify_all()

    def _wait(self, wanted: Iterable[Buffer]) -> None:
        """Wait until something changes.

        :param wanted: what the caller waits for is a release of one of these; empty when it waits for a transfer
        :raises WouldDeadlock: each of them is held by the calling thread, or by one that waits here as well
        """
        me = get_ident()
        held = [buffer for buffer in wanted if buffer.holders]
        stuck = self._waiting.keys() | {me}
        in_flight = any(buffer.reading or buffer.writing for buffer in self._table.values())
        if held and not in_flight and all(ident in stuck for buffer in held for ident in buffer.holders):
            blocks = tuple(sorted(buffer.block_number for buffer in held))
            raise WouldDeadlock(f"{self.name}: no buffer can be had, blocks {list(blocks)} are held by waiters", blocks)
        self._core.counters.waits += 1
        if held:
            self._waiting[me] = len(held)
        try:
            self._core.changed.wait()
        finally:
            self._waiting.pop(me, None)
