"""The instructions of scripts for :class:`bufio.Client`.

Blocks are numbers or expressions.  Besides loop variables there are ``blocks`` (whole blocks of the device),
``buffers`` (how many the cache has room for) and ``size`` (bytes of a block).  Ranges exclude their end.

=============================================  =====================================================================
``read B``, ``new B``, ``get B``               hold block B; a ``get`` must find it in the cache
``get B absent``                               it must not be cached
``put B``                                      give one hold back (or one too many, for ``error hold``)
``move B to C``                                give one hold back; the content becomes that of block C
``stamp B [bytes X .. Y] [as NAME]``           fill the held buffer, or a part, with a pattern nobody else has
``dirty B [bytes X .. Y]``                     mark it dirty; what was stamped must be marked before the last ``put``
``verify B [holds NAME [of C]]``               the held buffer shows what it has to, or what NAME says
``verify_device B [holds NAME [of C]]``        the device holds the newest content of B, or what NAME says
``fill B [as NAME]``                           ``new``, ``stamp``, ``dirty``, ``put``
``check B [holds NAME [of C]]``                ``read``, ``verify``, ``put``
``prefetch B [.. C]``, ``forget B [.. C]``     of one block or a range
``discard B [.. C]``                           likewise
``write``, ``write_async``, ``flush``          write_dirty_buffers, write_dirty_buffers_async, issue_flush
``drop``, ``reset``, ``close``                 drop_buffers, reset, close
``offset N``, ``minimum N``                    set_sector_offset, set_minimum_buffers
``break_reads B [.. C]``, ``break_writes ..``  let transfers of these blocks fail, until ``mend``
``break_flush``                                let flushes fail, until ``mend``
``recount``                                    count the events of ``expect`` from here on
``expect NAME = N, ...``                       a statistic, ``blocks``; also with ``>=`` and ``<=``
=============================================  =====================================================================

NAME is a stamp, ``zeroes``, or ``initial``: what the device had at that block, or block C, at the beginning.  Whatever
a script says, each ``read`` and ``get`` is compared with the model, and at the end nothing may be held, the cache is
closed, and every byte of the device is compared.  The errors are ``hold``, ``deadlock``, ``io`` and ``value``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from tests.support.cache_machine import CacheMachine
from tests.support.cache_model import DeviceModel
from tests.support.cache_script import ScriptError, ScriptFailure, instruction

if TYPE_CHECKING:
    from bufio import Buffer, Client, Stats
    from tests.support.cache_disks import Disk

_SECTOR_BYTES = 512


class ClientMachine(CacheMachine):
    """Runs one script on one client, which it closes.

    :param disk: what *client* caches
    :param nr_buffers: how many buffers the client has room for
    """

    VARIABLES = ("blocks", "buffers", "size")
    EVENTS = (
        "hits",
        "misses",
        "reads",
        "writes",
        "bytes_read",
        "bytes_written",
        "coalesced_writes",
        "evictions",
        "flushes",
        "waits",
    )

    def __init__(self, client: Client, disk: Disk, nr_buffers: int) -> None:
        super().__init__({"blocks": client.device_size, "buffers": nr_buffers, "size": client.block_size})
        self._client = client
        self._disk = disk
        self._size = client.block_size
        self._offset = 0
        self._model = DeviceModel(disk.image, self._size)
        self._held: dict[int, list[Buffer]] = {}
        self._last: dict[int, Buffer] = {}
        """The buffer each block had when it was last held, to release it once too often."""
        self._closed = False

    # Holds

    def _hold(self, block: int, buffer: Buffer) -> None:
        if buffer.block_number != block:
            raise ScriptFailure(f"this is the buffer of block {buffer.block_number}")
        holds = self._held.setdefault(block, [])
        if holds and holds[0] is not buffer:
            raise ScriptFailure("there is another buffer of the same block")
        holds.append(buffer)
        self._last[block] = buffer

    def _show(self, block: int, buffer: Buffer) -> None:
        """Compare what a block shows with the model, unless anything is right."""
        if not self._model[block].undefined:
            self._model.expect_shown(block, bytes(buffer.data))

    def _buffer(self, block: int) -> Buffer:
        holds = self._held.get(block)
        if not holds:
            raise ScriptError(f"block {block} is not held")
        return holds[0]

    def _last_buffer(self, block: int) -> Buffer:
        """Return the buffer of a block that is or was held, for calls that need a hold and for those without one."""
        if block not in self._last:
            raise ScriptError(f"block {block} was never held")
        return self._last[block]

    def _unhold(self, block: int) -> None:
        """Note that one hold was given back."""
        holds = self._held[block]
        holds.pop()
        if not holds:
            del self._held[block]

    @instruction("read <block>")
    def read(self, block: int) -> None:
        """Hold a block, with its content."""
        buffer = self._client.read(block)
        self._hold(block, buffer)
        self._show(block, buffer)

    @instruction("get <block> [absent]")
    def get(self, block: int, absent: bool) -> None:
        """Hold a block that must be cached, or see that it is not."""
        buffer = self._client.get(block)
        if buffer is not None:
            self._hold(block, buffer)
            if absent:
                raise ScriptFailure("it is cached")
            self._show(block, buffer)
        elif not absent:
            raise ScriptFailure("it is not cached")

    @instruction("new <block>")
    def new(self, block: int) -> None:
        """Hold a block; unless it is held already, its content is undefined."""
        known = block in self._held
        self._hold(block, self._client.new(block))
        if not known:
            self._model[block].undefined = True

    @instruction("put <block>")
    def put(self, block: int) -> None:
        """Give one hold back."""
        buffer = self._last_buffer(block)
        if len(self._held.get(block, [])) == 1:
            self._model.released(block)
        buffer.release()
        if block not in self._held:
            raise ScriptFailure("the cache took back a hold that there was not")
        self._unhold(block)

    @instruction("move <block> to <target>")
    def move(self, block: int, target: int) -> None:
        """Give one hold back; the content becomes that of the target."""
        self._last_buffer(block).release_move(target)
        if block not in self._held:
            raise ScriptFailure("a buffer that nobody holds was moved")
        self._model.moved(block, target, others=len(self._held[block]) > 1)
        self._unhold(block)

    # Contents

    @instruction("stamp <block> [bytes <begin> .. <end>] [as <name:word>]")
    def stamp(self, block: int, begin: int | None, end: int | None, name: str | None) -> None:
        """Fill a held buffer, or a part of it."""
        buffer = self._buffer(block)
        first, last = (0, self._size) if begin is None or end is None else (begin, end)
        buffer.data[first:last] = self._model.stamp(block, first, last, name)

    @instruction("dirty <block> [bytes <begin> .. <end>]")
    def dirty(self, block: int, begin: int | None, end: int | None) -> None:
        """Mark a held buffer dirty."""
        buffer = self._last_buffer(block)
        if begin is None or end is None:
            buffer.mark_dirty()
            begin, end = 0, self._size
        else:
            buffer.mark_dirty(begin, end)
        if block not in self._held:
            raise ScriptFailure("a buffer that nobody holds was marked dirty")
        if begin < end:
            self._model.marked(block, begin, end)

    @instruction("verify <block> [holds <name:word> [of <origin>]]")
    def verify(self, block: int, name: str | None, origin: int | None) -> None:
        """Check what a held buffer shows."""
        self._model.expect_shown(block, bytes(self._buffer(block).data), self._named(name, block, origin))

    @instruction("verify_device <block> [holds <name:word> [of <origin>]]")
    def verify_device(self, block: int, name: str | None, origin: int | None) -> None:
        """Check what the device holds."""
        actual = self._disk.look(self._offset + block * self._size, self._size)
        self._model.expect_on_device(block, actual, self._named(name, block, origin))

    def _named(self, name: str | None, block: int, origin: int | None) -> bytes | None:
        return None if name is None else self._model.named(name, block if origin is None else origin)

    @instruction("fill <block> [as <name:word>]")
    def fill(self, block: int, name: str | None) -> None:
        """Give a block a new content."""
        self.new(block)
        self.stamp(block, None, None, name)
        self.dirty(block, None, None)
        self.put(block)

    @instruction("check <block> [holds <name:word> [of <origin>]]")
    def check(self, block: int, name: str | None, origin: int | None) -> None:
        """Check what a block shows."""
        self.read(block)
        self.verify(block, name, origin)
        self.put(block)

    # The whole cache

    @instruction("prefetch <block> [.. <end>]")
    def prefetch(self, block: int, end: int | None) -> None:
        """Read blocks ahead."""
        if end is None:
            self._client.prefetch(block)
        else:
            self._client.prefetch(block, end - block)

    @instruction("forget <block> [.. <end>]")
    def forget(self, block: int, end: int | None) -> None:
        """Drop blocks without writing them."""
        if end is None:
            self._client.forget(block)
        else:
            self._client.forget_buffers(block, end - block)
        blocks = range(block, block + 1 if end is None else end)
        self._model.dropped(number for number in self._unheld() if number in blocks)

    @instruction("discard <block> [.. <end>]")
    def discard(self, block: int, end: int | None) -> None:
        """Discard blocks of the device."""
        blocks = range(block, block + 1 if end is None else end)
        self._client.issue_discard(block, len(blocks))
        for number in blocks:
            self._model.discarded(number, number in self._held)

    @instruction("write")
    def write(self) -> None:
        """Write everything and make it durable."""
        self._client.write_dirty_buffers()
        self._model.written(self._model.touched())
        if self._disk.unflushed():
            raise ScriptFailure("what was written was not flushed")

    @instruction("write_async")
    def write_async(self) -> None:
        """Begin to write everything."""
        self._client.write_dirty_buffers_async()

    @instruction("flush")
    def flush(self) -> None:
        """Have the device make durable what it was given."""
        self._client.issue_flush()

    @instruction("drop")
    def drop(self) -> None:
        """Write everything, then drop what is not held."""
        self._client.drop_buffers()
        self._model.written(self._model.touched())
        self._model.dropped(self._unheld())

    @instruction("reset")
    def reset(self) -> None:
        """Drop what is not held, without writing."""
        self._client.reset()
        self._model.dropped(self._unheld())

    def _unheld(self) -> list[int]:
        return [block for block in self._model.touched() if block not in self._held]

    @instruction("close")
    def close(self) -> None:
        """Close the client."""
        try:
            self._client.close()
        except OSError:
            # What could not be written is lost, and the client is closed all the same.
            self._closed = True
            raise
        self._closed = True
        self._model.written(self._model.touched())

    @instruction("offset <sectors>")
    def offset(self, sectors: int) -> None:
        """Let block 0 begin at another sector."""
        self._client.set_sector_offset(sectors)
        self._offset = sectors * _SECTOR_BYTES
        self._model.offset_changed(self._offset)

    @instruction("minimum <count>")
    def minimum(self, count: int) -> None:
        """Keep room for that many buffers."""
        self._client.set_minimum_buffers(count)

    # Faults

    @instruction("break_reads <block> [.. <end>]")
    def break_reads(self, block: int, end: int | None) -> None:
        """Let reads of blocks fail."""
        self._break("read", block, end)

    @instruction("break_writes <block> [.. <end>]")
    def break_writes(self, block: int, end: int | None) -> None:
        """Let writes of blocks fail."""
        self._break("write", block, end)

    @instruction("break_flush")
    def break_flush(self) -> None:
        """Let flushes fail."""
        self.break_flushes(self._disk)

    def _break(self, kind: Literal["read", "write"], block: int, end: int | None) -> None:
        last = block + 1 if end is None else end
        begin, end = (self._offset + number * self._size for number in (block, last))
        self.break_transfers(self._disk, kind, begin, end)

    # Statistics

    def stats(self) -> Stats:
        """Return a snapshot of the client's statistics."""
        return self._client.stats

    def number(self, stats: object, name: str) -> int:
        """Return one of the numbers that scripts can ask for; the size of the device is one here."""
        return self._client.device_size if name == "blocks" else super().number(stats, name)

    # The end

    def finish(self) -> None:
        """Nothing is held, closing works, and every byte of the device is what it has to be."""
        if self._held:
            raise ScriptError(f"blocks {sorted(self._held)} are still held")
        self.mend()
        if not self._closed:
            self.close()
        self._model.expect_image(self._disk.look(0, self._disk.device.size_bytes))

    def clean_up(self) -> None:
        """Close the client whatever has happened."""
        self.mend()
        with contextlib.suppress(Exception):
            for buffers in self._held.values():
                for buffer in buffers:
                    buffer.release()
            self._client.reset()
        with contextlib.suppress(Exception):
            self._client.close()
