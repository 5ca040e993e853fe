"""The buffer cache of one device, with the semantics of Linux dm-bufio.

Source: docs/bufio.md, "Client".
"""

from __future__ import annotations

import errno
from threading import get_ident
from typing import TYPE_CHECKING

from bufio.core import NO_EPOCH, USED, WRITE_BACK_BATCH, CachedBlock, CachedDevice, Core, Stats
from bufio.errors import HoldError
from bufio.memory import parameters

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, Self

    from bufio.device import Device
    from bufio.engine import Engine

    class Lock(Protocol):
        """A lock of either kind."""

        def acquire(self, blocking: bool = True) -> Any:
            """Take it; false when that would mean waiting and *blocking* is false."""

        def release(self) -> None:
            """Give it back."""


_SECTOR_BYTES = 512
_LEAST_BUFFERS = 8
FIRST_EPOCH = 2
_DIRTY_TO_CLEAN = 3
"""Write-back starts when there are this many times more dirty buffers than clean ones."""


class Buffer(CachedBlock):
    """One cached block.  Valid from the call that returned it until :meth:`release`.

    ``block_number`` is its address on the device in blocks, ``data`` a writable view of the block's bytes, ``aux``
    whatever the owner of the client hangs on it, ``client`` the cache.
    """

    __slots__ = ("client",)

    def __init__(self, home: CachedDevice, block_number: int, data: memoryview) -> None:
        super().__init__(home, block_number, data)
        self.client: Client = home.owner

    def release(self) -> None:
        """Give one hold back.  ``data`` must not be used afterwards.

        :raises HoldError: nobody holds the buffer
        """
        client = self.client
        with client._lock:
            client._core.drop_hold(self)

    def mark_dirty(self, start: int = 0, end: int | None = None) -> None:
        """Say that bytes ``[start, end)`` were changed; by default all of them.  The buffer must be held.

        It may be written at any time from now on, and certainly is by ``write_dirty_buffers``.

        :raises HoldError: nobody holds the buffer
        :raises ValueError: not a range within the block
        """
        if not self.holders:
            raise HoldError(f"block {self.block_number} is marked dirty without being held")
        self.client.mark_dirty(self, start, end)

    def release_move(self, new_block: int) -> None:
        """Release, and make the content that of *new_block*: see :meth:`bufio.Client.release_move`."""
        self.client.release_move(self, new_block)


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
        if reserved_buffers < 0:
            raise ValueError(f"reserved_buffers must not be negative, but is {reserved_buffers}")
        self.device = device
        self.block_size = block_size
        self._core = Core(block_size, engine, Buffer)
        self._lock = self._core.lock
        self._home = self._core.devices[device] = CachedDevice(device, self, prepare=write_callback)
        self._table: dict[int, Buffer] = self._home.table
        self._counters = self._core.counters
        self._reserved_buffers = reserved_buffers
        self._aux_size = aux_size
        self._alloc_callback = alloc_callback
        self._minimum_buffers = 0
        self._cache_bytes = cache_bytes
        self._closed = False
        self.peek: Callable[[int], Buffer | None] = self._table.get
        """Return the cached buffer of a block without a hold and without counting, or None.

        For an owner that serialises all its own calls and brackets them in epochs: it must set ``buffer.referenced =
        client.epoch`` at once, and the buffer then stays where it is, unwritten, until the epoch is over.
        """
        self.epoch = NO_EPOCH
        """The owner's present epoch, a number above 1 that the owner counts up; -1 when there is no such owner."""
        self.owner_lock: Lock | None = None
        """What that owner holds during its calls.  With it, buffers are evicted between them because of their age."""
        self.limit_changed()
        parameters.join(self, shares=cache_bytes is None)

    # Sizes

    @property
    def device_size(self) -> int:
        """Whole blocks on the device, behind the sector offset, at this moment."""
        self._home.nr_blocks = max(0, self.device.size_bytes - self._home.offset) // self.block_size
        return self._home.nr_blocks

    @property
    def max_buffers(self) -> int:
        """The most buffers there will be, at the present limit of memory."""
        return self._limit

    def set_sector_offset(self, sectors: int) -> None:
        """Let block 0 begin at that sector (512 bytes) of the device.  Only while nothing is cached.

        :raises HoldError: something is cached
        :raises ValueError: a negative sector
        """
        if sectors < 0:
            raise ValueError(f"the sector offset must not be negative, but is {sectors}")
        with self._lock:
            if self._table or self._home.arriving:
                raise HoldError("the sector offset cannot change while blocks are cached")
            self._home.offset = sectors * _SECTOR_BYTES
            self._home.nr_blocks = 0

    def set_minimum_buffers(self, n: int) -> None:
        """Keep room for at least *n* buffers, whatever the limit of memory says.

        :raises ValueError: a negative number
        """
        if n < 0:
            raise ValueError(f"the minimum of buffers must not be negative, but is {n}")
        self._minimum_buffers = n
        self.limit_changed()

    def limit_changed(self) -> None:
        """Recompute how many buffers there may be, and evict clean ones that are too many."""
        with self._lock:
            # Within the lock: of several changes at a time, the last one to come here sees them all.
            share = parameters.share_bytes() if self._cache_bytes is None else self._cache_bytes
            self._limit = max(share // self._core.buffer_bytes, self._minimum_buffers, _LEAST_BUFFERS)
            self._threshold = self._limit - self._limit // 8
        self._between_epochs(self._trim)

    def evict_old(self, now: float) -> None:
        """Evict clean buffers that were not used for ``parameters.max_age_seconds``; called from time to time.

        :param now: monotonic time in seconds
        """
        keep = parameters.retain_bytes // self._core.buffer_bytes
        limit = now - parameters.max_age_seconds
        self._between_epochs(lambda: self._core.evict_unused_since(limit, now, keep, self.epoch))

    def _between_epochs(self, work: Callable[[], None]) -> None:
        """Do something that evicts buffers, unless somebody may have borrowed some right now, in another thread.

        It is left undone then: the next allocation, or the next look at ages, will see to it.
        """
        owner_lock = self.owner_lock
        if self.epoch == NO_EPOCH:
            owner_lock = None
        elif owner_lock is None or not owner_lock.acquire(blocking=False):
            return
        try:
            with self._lock:
                work()
        finally:
            if owner_lock is not None:
                owner_lock.release()

    @property
    def stats(self) -> Stats:
        """What happened so far, and what is cached now."""
        with self._lock:
            snapshot = Stats()
            self._core.count(snapshot)
            return snapshot

    # Getting buffers

    @property
    def write_callback(self) -> Callable[[Buffer], None] | None:
        """What is called, without any lock, just before a buffer is written.  It may be set at any time."""
        return self._home.prepare

    @write_callback.setter
    def write_callback(self, callback: Callable[[Buffer], None] | None) -> None:
        self._home.prepare = callback

    def read(self, block: int) -> Buffer:
        """Return the buffer of *block*, held; it is read from the device if it is not cached.

        :raises OSError: the device's error; every thread that waits for the same block gets it, and the next call
            tries again.  EIO for a block beyond the device's end.
        :raises WouldDeadlock: there is no memory for it, and only the calling thread could give any back
        """
        with self._lock:
            buffer = self._table.get(block)
            if buffer is None:
                buffer = self._read_uncached(block)
            else:
                buffer.referenced = buffer.referenced or USED
                self._counters.hits += 1
            buffer.holders.append(get_ident())
            return buffer

    def get(self, block: int) -> Buffer | None:
        """Return the buffer of *block*, held, if it is cached; None if it is not, or is still being read."""
        with self._lock:
            buffer = self._table.get(block)
            if buffer is None:
                return None
            buffer.holders.append(get_ident())
            buffer.referenced = buffer.referenced or USED
            self._counters.hits += 1
            return buffer

    def new(self, block: int) -> Buffer:
        """Return the buffer of *block*, held, without reading: the caller fills it and marks it dirty.

        If the block is cached its buffer is returned as it is; otherwise the contents are undefined.  That a block lies
        beyond the device's end is an error when it is written, not here.

        :raises OSError: EIO for a negative block
        :raises WouldDeadlock: as :meth:`read`
        """
        with self._lock:
            buffer = self._new_unheld(block)
            buffer.holders.append(get_ident())
            return buffer

    def borrow(self, block: int) -> Buffer:
        """As :meth:`read`, without a hold: for the owner of the present epoch, see :attr:`peek`."""
        with self._lock:
            buffer = self._table.get(block)
            if buffer is None:
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
        while True:
            buffer = self._table.get(block)
            if buffer is not None:
                return buffer
            self._require_place(block)
            arriving = self._home.arriving.get(block)
            if arriving is not None:
                self._core.await_arrival(arriving)
                continue
            buffer = self._allocate(block)
            if buffer is not None:
                self._core.insert(buffer)
                return buffer

    def _require_place(self, block: int) -> None:
        """Refuse to cache anything when closed, and a block in front of the first: what lies there is not ours."""
        self._require_open()
        if block < 0:
            raise OSError(errno.EIO, f"there is no block {block}", self.name)

    def _read_uncached(self, block: int) -> Buffer:
        """Return the buffer of a block that is absent or on its way, unheld.  Called with the lock."""
        while True:
            # Each time: it may have been closed while the lock was given up.
            if self._closed:
                self._require_open()
            arriving = self._home.arriving.get(block)
            if arriving is not None:
                error = self._core.await_arrival(arriving)
                if error is not None:
                    raise error
            else:
                # The size of the device is asked for only if it could matter.
                if not (0 <= block < self._home.nr_blocks or 0 <= block < self.device_size):
                    raise OSError(
                        errno.EIO, f"block {block} is beyond the end ({self._home.nr_blocks} blocks)", self.name
                    )
                fresh = self._allocate(block)
                if fresh is not None:
                    self._counters.misses += 1
                    self._core.fill(fresh)
                    return fresh
            buffer = self._table.get(block)
            if buffer is not None:
                self._counters.hits += 1
                return buffer

    def prefetch(self, block: int, n_blocks: int = 1) -> None:
        """Start to read blocks ahead, and return.  With a synchronous engine they are there when it returns.

        Stops quietly where no buffer can be had.  Errors surface at the later ``read``, which tries again.
        """
        with self._lock:
            self._require_open()
            fresh: list[CachedBlock] = []
            end = block + n_blocks
            if end > self._home.nr_blocks:
                end = min(end, self.device_size)
            try:
                self._create_absent(range(max(0, block), end), fresh)
                if fresh:
                    self._counters.misses += len(fresh)
                    self._core.start_read(self._home, fresh)
            except BaseException:
                self._core.cancel_reads(fresh)
                raise

    def _create_absent(self, blocks: range, fresh: list[CachedBlock]) -> None:
        """Add to *fresh* a buffer, marked as arriving, for each block that is not cached, as far as there is room."""
        for number in blocks:
            if number in self._table or number in self._home.arriving:
                continue
            victim = self._room_for_prefetch() if self._core.nr_buffers >= self._limit else None
            if victim is None and self._core.nr_buffers >= self._limit:
                return
            # Making room may have given the lock up.
            if not (number in self._table or number in self._home.arriving):
                buffer = self._create(number, victim)
                fresh.append(buffer)
                self._core.expect(buffer)

    # Giving buffers back

    def release(self, buffer: Buffer) -> None:
        """Give one hold of *buffer* back; see :meth:`Buffer.release`."""
        buffer.release()

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

        :raises HoldError: nobody holds *buffer*, or *new_block* is its own
        :raises OSError: the old content could not be written, or (with other holders) the new one, or *new_block* is
            negative; still held then
        """
        with self._lock:
            if not buffer.holders:
                raise HoldError(f"block {buffer.block_number} is moved without being held")
            self._require_place(new_block)
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
                    self._core.notify()
                    return
                # The others keep the buffer, so the new block gets one of its own, for which readers have to wait.
                target = self._allocate(new_block)
            self._write_copy(buffer, target)
            self._core.drop_hold(buffer)

    def _write_copy(self, source: Buffer, target: Buffer) -> None:
        """Write the content of *source* to the block of *target*, a new buffer.  Gives the lock up meanwhile."""
        home = self._home
        self._core.expect(target)
        error: OSError | None = OSError(errno.EIO, f"write of block {target.block_number} was interrupted", self.name)
        try:
            target.data[:] = source.data
            me = (1, get_ident())
            try:
                self._lock.release()
                if home.prepare is not None:
                    # It sees the content as that of the new block.
                    own, target.aux = target.aux, source.aux
                    try:
                        home.prepare(target)
                    finally:
                        target.aux = own
                self.device.pwrite(target.data, home.offset + target.block_number * self.block_size)
                error = None
            finally:
                self._core.take_again(me)
        except OSError as failure:
            error = failure
            raise
        finally:
            self._core.arrived(target, error)
        home.unflushed.add(target.block_number)
        self._counters.writes += 1
        self._counters.bytes_written += self.block_size

    def move(self, buffer: Buffer, new_block: int) -> None:
        """Re-key a buffer that the caller got from :attr:`peek` and that nobody holds; otherwise as ``release_move``.

        :raises HoldError: somebody holds it
        """
        with self._lock:
            if buffer.holders:
                raise HoldError(f"block {buffer.block_number} is held and cannot be moved away")
            if buffer.dirty or buffer.writing is not None:
                self._settle(buffer)
            table = self._table
            if new_block in table or self._home.arriving:
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
        while buffer.dirty or buffer.writing is not None:
            if buffer.writing is not None:
                self._core.wait()
            elif self._core.write_back(self._home, [buffer]):
                error = buffer.write_error
                # None when another thread has written it since.
                if error is not None:
                    raise error

    def _clear_target(self, buffer: Buffer, new_block: int) -> None:
        while True:
            arriving = self._home.arriving.get(new_block)
            target = self._table.get(new_block)
            if arriving is not None:
                self._core.await_arrival(arriving)
            elif target is None:
                return
            elif target is buffer:
                raise HoldError(f"block {new_block} cannot be moved onto itself")
            elif target.holders:
                self._core.wait([target])
            elif target.writing is not None:
                self._core.wait()
            else:
                self._core.destroy(target)
                return

    def _rekey(self, buffer: Buffer, new_block: int) -> None:
        table = self._table
        del table[buffer.block_number]
        buffer.block_number = new_block
        table[new_block] = buffer
        self._core.set_dirty(buffer, 0, self.block_size)
        buffer.referenced = buffer.referenced or USED

    # Writing

    def write_dirty_buffers_async(self) -> None:
        """Start writing every dirty buffer, and return.  Errors are reported by the next :meth:`write_dirty_buffers`.

        With a synchronous engine they are written when it returns.
        """
        with self._lock:
            self._core.start_write_back(self._home, self._core.dirty)

    def write_dirty_buffers(self) -> None:
        """Put every buffer that is dirty now on the device, and make it durable.

        :raises OSError: the flush's error, or else the first write error since the last call, these writes included.
            What could be written is flushed all the same; what failed stays dirty.
        """
        core = self._core
        home = self._home
        with self._lock:
            failed_flushes = home.failed_flushes
            pending = list(core.dirty)
            while pending:
                in_flight = [buffer for buffer in pending if buffer.writing is not None] if core.nr_writing else []
                core.write_back(home, pending)
                while any(buffer.writing is not None for buffer in in_flight):
                    core.wait()
                # Dirtied again while they were being written: what went to the device may be the old content.
                pending = [b for b in in_flight if b.dirty and self._table.get(b.block_number) is b]
            core.wait_for_transfers(reads=False)
            error, home.write_error = home.write_error, None
        try:
            # Also after an error: what could be written shall be durable.
            core.flush(home, failed_flushes)
        except OSError as failure:
            # It comes before the other one: of everything written since the last flush nobody knows what is durable.
            raise failure from error
        if error is not None:
            raise error

    def issue_flush(self) -> None:
        """Have the device make durable what was written to it.

        :raises OSError: the device's error.  Nobody knows then what of the writes since the last flush is durable, so
            whatever of it is still cached is dirty again.
        """
        self._core.flush(self._home)

    # Dropping

    def issue_discard(self, block: int, count: int) -> None:
        """Discard blocks of the device; clean cached copies that nobody holds are forgotten.

        :raises OSError: EOPNOTSUPP where the device cannot; EIO beyond its end, or for a negative block
        """
        with self._lock:
            self._require_place(block)
            # What is read ahead is the content from before.
            for number in [number for number in self._home.arriving if block <= number < block + count]:
                while (arriving := self._home.arriving.get(number)) is not None:
                    self._core.await_arrival(arriving)
            for number in self._cached_in(block, count):
                buffer = self._table.get(number)
                while buffer is not None and buffer.writing is not None:
                    self._core.wait()
                    buffer = self._table.get(number)
                if buffer is not None and not (buffer.dirty or buffer.holders):
                    self._core.destroy(buffer)
        self.device.discard(self._home.offset + block * self.block_size, count * self.block_size)

    def forget(self, block: int) -> None:
        """Drop the buffer of *block*, clean or dirty, without writing it, unless it is held."""
        self.forget_buffers(block, 1)

    def forget_buffers(self, block: int, n: int) -> None:
        """Drop the unheld buffers of *n* blocks from *block* on, clean or dirty, without writing them."""
        with self._lock:
            for number in self._cached_in(block, n):
                self._drop(self._table[number])

    def _drop(self, buffer: Buffer) -> None:
        """Forget a buffer, clean or dirty, unless somebody needs it."""
        if not (buffer.holders or buffer.writing is not None):
            self._core.destroy(buffer)

    def _cached_in(self, block: int, n: int) -> list[int]:
        if n > len(self._table):
            return [number for number in self._table if block <= number < block + n]
        return [number for number in range(block, block + n) if number in self._table]

    def drop_buffers(self) -> None:
        """Write what is dirty, then forget every buffer that is not held, or was changed meanwhile."""
        self.write_dirty_buffers()
        with self._lock:
            self._core.wait_for_transfers()
            for buffer in list(self._table.values()):
                if not buffer.dirty:
                    self._drop(buffer)

    def reset(self) -> None:
        """Drop every unheld buffer without writing it, and any write error that was not reported yet.

        What is on its way already is waited for.
        """
        with self._lock:
            self._core.wait_for_transfers()
            self._drop_all()

    def _drop_all(self) -> None:
        for buffer in list(self._table.values()):
            self._drop(buffer)
        self._home.write_error = None

    @property
    def name(self) -> str:
        """What messages call the device."""
        return self.device.name

    def close(self) -> None:
        """Write what is dirty and free everything; the device stays open.

        :raises HoldError: a buffer is still held (the message names the blocks); the client stays usable
        :raises OSError: something could not be written; the client is closed all the same
        """
        core = self._core
        home = self._home
        try:
            while not self._closed:
                with self._lock:
                    while core.nr_reading or core.nr_writing:
                        core.wait()
                    held = sorted(number for number, buffer in self._table.items() if buffer.holders)
                    if held:
                        raise HoldError(f"closed while blocks {held} are held")
                    if not (core.dirty or home.unflushed or home.flushing or home.write_error):
                        # In one step, so that nobody can change anything in between.
                        self._closed = True
                        self._drop_all()
                        break
                self.write_dirty_buffers()
        except OSError:
            self._closed = True
            raise
        finally:
            if self._closed:
                self.discard_all()

    def discard_all(self) -> None:
        """Free everything without writing.  For an owner that gives its changes up."""
        self._closed = True
        core = self._core
        with self._lock:
            while core.nr_reading or core.nr_writing:
                core.wait()
            self._drop_all()
        parameters.leave(self)

    def _require_open(self) -> None:
        if self._closed:
            raise HoldError(f"the cache of {self.name} was closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Memory.  All of these are called with the lock, which some of them give up for a while.

    def _create(self, block: int, victim: CachedBlock | None = None) -> Buffer:
        """Return a buffer for *block* that is in no list, made of *victim* or of new memory."""
        core = self._core
        if victim is not None:
            buffer: Buffer = core.reuse(victim, self._home, block)
        else:
            if not parameters.ageing and core.nr_buffers * core.buffer_bytes >= parameters.retain_bytes:
                parameters.start_ageing()
            buffer = core.create(self._home, block)
        if self._aux_size:
            buffer.aux = bytearray(self._aux_size)
        if self._alloc_callback is not None:
            try:
                self._alloc_callback(buffer)
            except BaseException:
                core.free(buffer)
                raise
        return buffer

    def _allocate(self, block: int) -> Buffer | None:
        """Return a buffer for *block* that is in no list.

        None when the lock was given up meanwhile and somebody else may have cached the block: the caller looks again.
        """
        core = self._core
        if core.nr_buffers < self._threshold:
            return self._create(block)
        while core.nr_buffers > self._limit and core.evict_one(self.epoch):
            pass
        if len(core.dirty) > _DIRTY_TO_CLEAN * len(core.clean):
            batch = core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
            if batch:
                core.start_write_back(self._home, batch)
                if self._is_known(block):
                    return None
        victim = core.oldest_clean(self.epoch)
        if victim is not None:
            return self._create(block, victim)
        if core.nr_buffers < self._limit:
            return self._create(block)
        return self._allocate_beyond(block)

    def _allocate_beyond(self, block: int) -> Buffer | None:
        """As :meth:`_allocate`, when the limit is reached and no clean buffer can be evicted."""
        core = self._core
        batch = core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
        failed = core.write_back(self._home, batch)
        if len(failed) < len(batch) or self._is_known(block):
            return None
        if core.nr_writing:
            core.wait()
            return None
        if core.nr_buffers < self._limit + self._reserved_buffers or self.epoch != NO_EPOCH:
            # What an owner borrows in one epoch may exceed the limit: there is nobody to wait for.
            return self._create(block)
        buffers = self._table.values()
        if failed and not (core.nr_reading or any(b.holders for b in buffers)):
            # Nobody will give anything back: all there is is dirty and cannot be written.
            error = failed[0].write_error
            if error is None:
                return None  # another thread has written it since
            raise error
        me = get_ident()
        if sum(buffer.holders.count(me) for buffer in buffers) < self._reserved_buffers:
            # Whoever holds no more than that must not depend on others giving something back.
            return self._create(block)
        core.wait(buffers)
        return None

    def _is_known(self, block: int) -> bool:
        return block in self._table or block in self._home.arriving

    def _room_for_prefetch(self) -> CachedBlock | None:
        """Return a buffer to evict for one that is read ahead.  May give the lock up.

        Dirty buffers are written as soon as they are half of all: where few clean ones are left, each block read ahead
        would push out one that was read ahead before it, and whoever waits for both would never get them.
        """
        core = self._core
        if len(core.dirty) >= len(core.clean):
            core.start_write_back(self._home, core.oldest_dirty(WRITE_BACK_BATCH, self.epoch))
        return core.oldest_clean(self.epoch)

    def _trim(self) -> None:
        core = self._core
        while core.nr_buffers > self._limit:
            if not core.evict_one(self.epoch):
                batch = core.oldest_dirty(WRITE_BACK_BATCH, self.epoch)
                if batch and len(core.write_back(self._home, batch)) < len(batch):
                    continue
                if not core.nr_writing:
                    break
                core.wait()
        core.notify()
