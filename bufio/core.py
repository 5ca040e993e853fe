"""The buffers themselves: where they are, who holds them, what is dirty, which goes next.

:class:`Core` is the mechanism that every cache interface shares: a table of buffers for each device, an LRU list of
    clean
ones and one of dirty ones, their memory, the engine and the counters.  It decides nothing about blocking or errors
beyond "this could be evicted": that is the policy of the interface on top (:mod:`bufio.client`).

Unless a method says otherwise, its caller holds ``core.lock``.

The LRU lists are dictionaries in order of use with a second chance: a hit only sets ``referenced``, and eviction, which
goes from the oldest on, passes over a referenced buffer once.  That keeps a hit cheap, at the price of an approximate
order.

``referenced`` is a number: zero, or the value of ``client.epoch`` at the last use.  A buffer used in the present epoch
is never evicted or written early, see :attr:`bufio.Client.peek`.
"""

from __future__ import annotations

import errno
import threading
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from bufio.engine import SyncEngine
from bufio.errors import HoldError
from bufio.memory import Slab, parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bufio.client import Client
    from bufio.device import Device
    from bufio.engine import Engine

BUFFER_OVERHEAD_BYTES = 1024
"""What a cached block costs beside its data: the buffer, its views, and what an owner hangs on it."""

_BLOCK_NUMBER = attrgetter("block_number")

WRITE_BACK_BATCH = 256
"""Dirty buffers written in one go under memory pressure, so that neighbours can be coalesced."""


class Buffer:
    """One cached block.  Valid from the call that returned it until :meth:`release`.

    ``block_number`` is its address on the device in blocks, ``data`` a writable view of the block's bytes, ``aux``
    whatever the owner of the client hangs on it.
    """

    __slots__ = (
        "aux",
        "block_number",
        "client",
        "data",
        "dirty",
        "dirty_end",
        "dirty_start",
        "holders",
        "reading",
        "referenced",
        "writing",
    )

    def __init__(self, client: Client, block_number: int, data: memoryview) -> None:
        self.client = client
        self.block_number = block_number
        self.data = data
        self.aux: Any = None
        self.holders: list[int] = []
        """Thread idents, one for each hold."""
        self.dirty = False
        self.dirty_start = 0
        self.dirty_end = 0
        self.reading = 0
        """Ident of the thread that reads the content, 0 when it is there."""
        self.writing = False
        self.referenced = 0

    @property
    def hold_count(self) -> int:
        """Number of holds that were not given back yet."""
        return len(self.holders)

    def release(self) -> None:
        """Give one hold back.  ``data`` must not be used afterwards.

        :raises HoldError: nobody holds the buffer
        """
        self.client.release(self)

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

    def __repr__(self) -> str:
        states = [name for name in ("dirty", "reading", "writing") if getattr(self, name)]
        return f"<Buffer {self.block_number} holds={self.hold_count} {' '.join(states)}>"


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
        return "Stats(" + ", ".join(f"{name}={getattr(self, name)}" for name in self.__slots__) + ")"


class Core:
    """Buffers of one block size, of any number of devices."""

    def __init__(self, block_size: int, engine: Engine | None) -> None:
        self.block_size = block_size
        self.engine: Engine = SyncEngine() if engine is None else engine
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """Notified when a hold is given back, a transfer ends, or memory becomes available."""
        self.clean: dict[Buffer, None] = {}
        self.dirty: dict[Buffer, None] = {}
        self.counters = Stats()
        self.nr_buffers = 0
        self.nr_writing = 0
        self._slab = Slab(block_size)
        self._tables: dict[int, dict[int, Buffer]] = {}

    @property
    def buffer_bytes(self) -> int:
        """What one buffer counts for in the account of memory."""
        return self.block_size + BUFFER_OVERHEAD_BYTES

    def table_of(self, device: Device) -> dict[int, Buffer]:
        """Return the (live) table of the cached blocks of *device*."""
        return self._tables.setdefault(id(device), {})

    def create(self, client: Client, table: dict[int, Buffer], block: int, reading: int) -> Buffer:
        """Make a buffer for *block*, clean and with undefined contents.  Memory is taken without asking.

        :param reading: ident of the thread that is going to read the content, 0 if it will not be read
        """
        buffer = Buffer(client, block, self._slab.take())
        buffer.reading = reading
        self.nr_buffers += 1
        parameters.account(self.buffer_bytes)
        self.clean[buffer] = None
        table[block] = buffer
        return buffer

    def destroy(self, table: dict[int, Buffer], buffer: Buffer) -> None:
        """Remove a buffer, whatever its state, and take its memory back.  Only its last user may do this."""
        del table[buffer.block_number]
        (self.dirty if buffer.dirty else self.clean).pop(buffer, None)
        buffer.dirty = False
        buffer.aux = None
        self._slab.give_back(buffer.data)
        self.nr_buffers -= 1
        parameters.account(-self.buffer_bytes)

    def set_dirty(self, buffer: Buffer, start: int, end: int) -> None:
        """Add ``[start, end)`` to what must be written."""
        if buffer.dirty:
            if start < buffer.dirty_start:
                buffer.dirty_start = start
            if end > buffer.dirty_end:
                buffer.dirty_end = end
            return
        buffer.dirty = True
        buffer.dirty_start = start
        buffer.dirty_end = end
        del self.clean[buffer]
        self.dirty[buffer] = None

    def oldest_clean(self, epoch: int) -> Buffer | None:
        """Return the clean buffer to evict next, None when every one is in use."""
        clean = self.clean
        for _ in range(2 * len(clean)):
            buffer = next(iter(clean))
            if not (buffer.holders or buffer.reading or buffer.writing or buffer.referenced):
                return buffer
            if buffer.referenced != epoch:
                buffer.referenced = 0
            del clean[buffer]
            clean[buffer] = None
        return None

    def oldest_dirty(self, count: int, epoch: int) -> list[Buffer]:
        """Return up to *count* unheld dirty buffers, least recently dirtied first."""
        chosen = []
        for buffer in self.dirty:
            if not (buffer.holders or buffer.writing or buffer.referenced == epoch):
                chosen.append(buffer)
                if len(chosen) == count:
                    break
        return chosen

    def read_into(self, device: Device, buffers: list[Buffer], offset: int) -> list[OSError | None]:
        """Fill *buffers* (ascending, marked as being read).  Called **without** the lock.

        :param offset: byte of the device at which block 0 begins
        """
        size = self.block_size
        results = self.engine.read(device, [(offset + b.block_number * size, b.data) for b in buffers])
        with self.lock:
            self.counters.reads += len(buffers)
            self.counters.bytes_read += len(buffers) * size
        return results

    def write_back(
        self,
        device: Device,
        buffers: Iterable[Buffer],
        offset: int,
        prepare: Callable[[Buffer], None] | None,
    ) -> list[tuple[Buffer, OSError]]:
        """Write dirty *buffers* in ascending order and return those that failed, which stay dirty.

        Called **with** the lock, which is given up during the transfer.  A buffer that is dirtied again meanwhile stays
        dirty.  *prepare* is called for each, without the lock, just before.
        """
        batch = sorted([b for b in buffers if b.dirty and not b.writing], key=_BLOCK_NUMBER)
        if not batch:
            return []
        ranges = [(buffer.dirty_start, buffer.dirty_end) for buffer in batch]
        if len(batch) == len(self.dirty):
            self.clean.update(self.dirty)
            self.dirty.clear()
        else:
            for buffer in batch:
                del self.dirty[buffer]
                self.clean[buffer] = None
        for buffer in batch:
            buffer.writing = True
            buffer.dirty = False
        self.nr_writing += len(batch)
        results: list[OSError | None] = []
        calls = self.engine.calls
        try:
            self.lock.release()
            if prepare is not None:
                for buffer in batch:
                    prepare(buffer)
                ranges = [(0, self.block_size)] * len(batch)
            if getattr(device, "direct", False):
                # Parts of blocks are not aligned as direct access wants it.
                ranges = [(0, self.block_size)] * len(batch)
            results = self.engine.write(device, self._requests(batch, ranges, offset))
        finally:
            self.lock.acquire()
            self.nr_writing -= len(batch)
            # A write that did not even return (an exception in prepare, a signal) counts as failed.
            unknown = [OSError(errno.EIO, "write was interrupted")] * (len(batch) - len(results))
            failed: list[tuple[Buffer, OSError]] = []
            for buffer in batch:
                buffer.writing = False
            if unknown or any(results):
                for buffer, (start, end), error in zip(batch, ranges, [*results, *unknown], strict=True):
                    if error is not None:
                        self.set_dirty(buffer, start, end)
                        failed.append((buffer, error))
            self.changed.notify_all()
        self.counters.writes += len(batch)
        self.counters.bytes_written += sum(end - start for start, end in ranges)
        self.counters.coalesced_writes += len(batch) - (self.engine.calls - calls)
        return failed

    def _requests(
        self, batch: list[Buffer], ranges: list[tuple[int, int]], offset: int
    ) -> list[tuple[int, memoryview]]:
        """Return byte offset and content of what has to be written of each buffer."""
        size = self.block_size
        whole = (0, size)
        if ranges.count(whole) == len(ranges):
            return [(offset + buffer.block_number * size, buffer.data) for buffer in batch]
        return [
            (offset + buffer.block_number * size + start, buffer.data[start:end])
            for buffer, (start, end) in zip(batch, ranges, strict=True)
        ]
