"""The instructions of scripts for :class:`bufio.Bcache`, on two devices of the same size called ``a`` and ``b``.

Blocks are numbers or expressions, after the device's name (D).  Besides loop variables there are ``blocks`` (of each
device), ``buffers`` (blocks of the cache) and ``size`` (bytes of a block).  Ranges exclude their end.

=============================================  =====================================================================
``get D B [zero] [dirty]``                     hold block B of device D, with these flags
``put D B``                                    give one hold back (or one too many, for ``error hold``)
``stamp D B [bytes X .. Y] [as NAME]``         fill the held block, or a part, with a pattern nobody else has
``verify D B [holds NAME [of C]]``             the held block shows what it has to, or what NAME says
``verify_device D B [holds NAME [of C]]``      the device holds the newest content of B, or what NAME says
``fill D B [as NAME]``                         ``get zero``, ``stamp``, ``put``
``change D B [bytes X .. Y] [as NAME]``        ``get dirty``, ``stamp``, ``put``
``check D B [holds NAME [of C]]``              ``get``, ``verify``, ``put``
``prefetch D B [.. C]``                        of each block
``flush [skipping N]``                         it must return exactly the held dirty blocks, and N if that is said
``invalidate D B [refused]``                   it must return whether the block is gone
``invalidate_device D [refused]``              likewise
``abort_device D``, ``close``                  abort_device, close
``read_bytes D X .. Y``                        must be what the blocks have to hold
``write_bytes D X .. Y``                       with a pattern nobody else has
``zero_bytes D X .. Y``                        zero_bytes
``set_bytes D X .. Y to V``                    set_bytes
``break_reads D B [.. C]``                     let reads of these blocks fail, until ``mend``
``break_writes D B [.. C]``                    let writes of these blocks fail, until ``mend``
``break_flush D``                              let flushes of the device fail, until ``mend``
``recount``                                    count the events of ``expect`` from here on
``expect NAME = N, ...``                       a statistic; also with ``>=`` and ``<=``
=============================================  =====================================================================

NAME is a stamp, ``zeroes``, or ``initial``: what the device had at that block, or block C, at the beginning.  Whatever
a script says, each ``get`` is compared with the model, and at the end nothing may be held, the cache is closed, and
every byte of both devices is compared.  The errors are ``hold``, ``deadlock``, ``io`` and ``value``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

from bufio import GetFlags
from tests.support.cache_machine import CacheMachine
from tests.support.cache_model import DeviceModel, pattern
from tests.support.cache_script import ScriptError, ScriptFailure, instruction

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bufio import Bcache, Device
    from bufio.bcache import Block
    from tests.support.cache_disks import Disk


class _Side:
    """One of the devices, with what the script holds of it."""

    def __init__(self, name: str, disk: Disk, device: Device, size: int) -> None:
        self.disk = disk
        self.device = device
        self.model = DeviceModel(disk.image, size, name)
        self.held: dict[int, list[Block]] = {}
        self.last: dict[int, Block] = {}
        """Each block as it was when it was last held, to release it once too often."""
        self.writing: set[int] = set()
        """Held for writing."""

    def unheld(self) -> list[int]:
        return [block for block in self.model.touched() if block not in self.held]


class BcacheMachine(CacheMachine):
    """Runs one script on one cache, which it closes.

    :param disks: what the names in the script stand for, as the devices that *bcache* is given
    """

    VARIABLES = ("blocks", "buffers", "size")
    EVENTS = (
        "read_hits",
        "read_misses",
        "write_zeroes",
        "write_hits",
        "write_misses",
        "prefetches",
        "reads",
        "writes",
        "evictions",
        "flushes",
    )

    def __init__(self, bcache: Bcache, size: int, disks: Mapping[str, tuple[Disk, Device]]) -> None:
        self._sides = {name: _Side(name, disk, device, size) for name, (disk, device) in disks.items()}
        blocks = min(device.size_bytes // size for _, device in disks.values())
        super().__init__({"blocks": blocks, "buffers": bcache.nr_cache_blocks, "size": size})
        self._bcache = bcache
        self._size = size
        self._nr_patterns = 0
        self._closed = False

    def _side(self, device: str) -> _Side:
        if device not in self._sides:
            raise ScriptError(f"there is no device {device}: {', '.join(self._sides)}")
        return self._sides[device]

    # Holds

    @instruction("get <device:word> <block> [zero] [dirty]")
    def get(self, device: str, block: int, zero: bool, dirty: bool) -> None:
        """Hold a block."""
        side = self._side(device)
        flags = (GetFlags.ZERO if zero else 0) | (GetFlags.DIRTY if dirty else 0)
        held = self._bcache.get(side.device, block, flags)
        if held.index != block or held.device is not side.device:
            raise ScriptFailure(f"this is block {held.index} of {held.device.name}")
        side.held.setdefault(block, []).append(held)
        side.last[block] = held
        if zero:
            side.model.zeroed(block)
        side.model.expect_shown(block, bytes(held.data))
        if zero or dirty:
            side.writing.add(block)
            side.model.marked(block, 0, self._size)

    @instruction("put <device:word> <block>")
    def put(self, device: str, block: int) -> None:
        """Give one hold back."""
        side = self._side(device)
        if block not in side.last:
            raise ScriptError(f"block {block} of {device} was never held")
        side.last[block].put()
        holds = side.held.get(block)
        if not holds:
            raise ScriptFailure("the cache took back a hold that there was not")
        holds.pop()
        if not holds:
            del side.held[block]
            side.writing.discard(block)

    def _data(self, side: _Side, block: int) -> memoryview:
        if block not in side.held:
            raise ScriptError(f"block {block} is not held")
        return side.held[block][0].data

    # Contents

    @instruction("stamp <device:word> <block> [bytes <begin> .. <end>] [as <name:word>]")
    def stamp(self, device: str, block: int, begin: int | None, end: int | None, name: str | None) -> None:
        """Fill a block held for writing, or a part of it."""
        side = self._side(device)
        if block not in side.writing:
            raise ScriptError(f"block {block} is not held for writing")
        first, last = (0, self._size) if begin is None or end is None else (begin, end)
        self._data(side, block)[first:last] = side.model.stamp(block, first, last, name)
        side.model.marked(block, first, last)

    @instruction("verify <device:word> <block> [holds <name:word> [of <origin>]]")
    def verify(self, device: str, block: int, name: str | None, origin: int | None) -> None:
        """Check what a held block shows."""
        side = self._side(device)
        side.model.expect_shown(block, bytes(self._data(side, block)), self._named(side, name, block, origin))

    @instruction("verify_device <device:word> <block> [holds <name:word> [of <origin>]]")
    def verify_device(self, device: str, block: int, name: str | None, origin: int | None) -> None:
        """Check what the device holds."""
        side = self._side(device)
        actual = side.disk.look(block * self._size, self._size)
        side.model.expect_on_device(block, actual, self._named(side, name, block, origin))

    def _named(self, side: _Side, name: str | None, block: int, origin: int | None) -> bytes | None:
        return None if name is None else side.model.named(name, block if origin is None else origin)

    @instruction("fill <device:word> <block> [as <name:word>]")
    def fill(self, device: str, block: int, name: str | None) -> None:
        """Give a block a new content without reading the old one."""
        self.get(device, block, zero=True, dirty=False)
        self.stamp(device, block, None, None, name)
        self.put(device, block)

    @instruction("change <device:word> <block> [bytes <begin> .. <end>] [as <name:word>]")
    def change(self, device: str, block: int, begin: int | None, end: int | None, name: str | None) -> None:
        """Change a block, or a part of it."""
        self.get(device, block, zero=False, dirty=True)
        self.stamp(device, block, begin, end, name)
        self.put(device, block)

    @instruction("check <device:word> <block> [holds <name:word> [of <origin>]]")
    def check(self, device: str, block: int, name: str | None, origin: int | None) -> None:
        """Check what a block shows."""
        self.get(device, block, zero=False, dirty=False)
        self.verify(device, block, name, origin)
        self.put(device, block)

    # Bytes

    def _parts(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Cut a range of bytes at the borders of blocks: block, and the range of its bytes."""
        for block in range(begin // self._size, -(-end // self._size)):
            start = block * self._size
            yield block, max(begin, start) - start, min(end, start + self._size) - start

    @instruction("read_bytes <device:word> <begin> .. <end>")
    def read_bytes(self, device: str, begin: int, end: int) -> None:
        """Check a range of bytes."""
        side = self._side(device)
        actual = self._bcache.read_bytes(side.device, begin, end - begin)
        expected = b"".join(side.model[block].content()[first:last] for block, first, last in self._parts(begin, end))
        if bytes(actual) != expected:
            raise ScriptFailure(f"bytes [{begin}..{end}] are not what they have to be")

    @instruction("write_bytes <device:word> <begin> .. <end>")
    def write_bytes(self, device: str, begin: int, end: int) -> None:
        """Write a pattern."""
        self._nr_patterns += 1
        data = pattern(f"bytes {self._nr_patterns}", end - begin)
        side = self._side(device)
        self._bcache.write_bytes(side.device, begin, data)
        self._note_bytes(side, begin, data)

    @instruction("zero_bytes <device:word> <begin> .. <end>")
    def zero_bytes(self, device: str, begin: int, end: int) -> None:
        """Write zeroes."""
        side = self._side(device)
        self._bcache.zero_bytes(side.device, begin, end - begin)
        self._note_bytes(side, begin, bytes(end - begin))

    @instruction("set_bytes <device:word> <begin> .. <end> to <value>")
    def set_bytes(self, device: str, begin: int, end: int, value: int) -> None:
        """Write the same byte over and over."""
        side = self._side(device)
        self._bcache.set_bytes(side.device, begin, end - begin, value)
        self._note_bytes(side, begin, bytes([value]) * (end - begin))

    def _note_bytes(self, side: _Side, begin: int, data: bytes) -> None:
        at = 0
        for block, first, last in self._parts(begin, begin + len(data)):
            side.model.changed(block, first, data[at : at + last - first])
            at += last - first

    # The whole cache

    @instruction("prefetch <device:word> <block> [.. <end>]")
    def prefetch(self, device: str, block: int, end: int | None) -> None:
        """Read blocks ahead."""
        for number in range(block, block + 1 if end is None else end):
            self._bcache.prefetch(self._side(device).device, number)

    @instruction("flush [skipping <count>]")
    def flush(self, count: int | None) -> None:
        """Write everything but what is held, and check what is said of that."""
        skipped = {(id(block.device), block.index) for block in self._bcache.flush()}
        wanted = {(id(side.device), block) for side in self._sides.values() for block in side.writing}
        may_be = {
            (id(side.device), block) for side in self._sides.values() for block in side.held if side.model[block].dirty
        }
        if not wanted <= skipped <= may_be:
            raise ScriptFailure(f"blocks {sorted(index for _, index in skipped)} are said to be skipped")
        if count is not None and len(skipped) != count:
            raise ScriptFailure(f"{len(skipped)} blocks were skipped, not {count}")
        for side in self._sides.values():
            side.model.written(side.unheld())
            if side.disk.unflushed():
                raise ScriptFailure("what was written was not flushed")

    @instruction("invalidate <device:word> <block> [refused]")
    def invalidate(self, device: str, block: int, refused: bool) -> None:
        """Write a block if it is dirty, and drop it."""
        side = self._side(device)
        gone = self._bcache.invalidate(side.device, block)
        if gone is refused:
            raise ScriptFailure(f"it returned {gone}")
        if gone:
            side.model.written([block])

    @instruction("invalidate_device <device:word> [refused]")
    def invalidate_device(self, device: str, refused: bool) -> None:
        """Write what is dirty of a device, and drop it all."""
        side = self._side(device)
        gone = self._bcache.invalidate_device(side.device)
        if gone is refused:
            raise ScriptFailure(f"it returned {gone}")
        if gone:
            side.model.written(side.unheld())

    @instruction("abort_device <device:word>")
    def abort_device(self, device: str) -> None:
        """Drop all of a device without writing."""
        side = self._side(device)
        self._bcache.abort_device(side.device)
        side.model.dropped(side.unheld())

    @instruction("close")
    def close(self) -> None:
        """Close the cache."""
        self._bcache.close()
        self._closed = True
        for side in self._sides.values():
            side.model.written(side.model.touched())

    # Faults

    @instruction("break_reads <device:word> <block> [.. <end>]")
    def break_reads(self, device: str, block: int, end: int | None) -> None:
        """Let reads of blocks fail."""
        self._break(device, "read", block, end)

    @instruction("break_writes <device:word> <block> [.. <end>]")
    def break_writes(self, device: str, block: int, end: int | None) -> None:
        """Let writes of blocks fail."""
        self._break(device, "write", block, end)

    @instruction("break_flush <device:word>")
    def break_flush(self, device: str) -> None:
        """Let flushes of a device fail."""
        self.break_flushes(self._side(device).disk)

    def _break(self, device: str, kind: Literal["read", "write"], block: int, end: int | None) -> None:
        last = block + 1 if end is None else end
        self.break_transfers(self._side(device).disk, kind, block * self._size, last * self._size)

    def stats(self) -> object:
        """Return a snapshot of the cache's statistics."""
        return self._bcache.stats

    # The end

    def finish(self) -> None:
        """Nothing is held, closing works, and every byte of the devices is what it has to be."""
        for name, side in self._sides.items():
            if side.held:
                raise ScriptError(f"blocks {sorted(side.held)} of {name} are still held")
        self.mend()
        if not self._closed:
            self.close()
        for side in self._sides.values():
            side.model.expect_image(side.disk.look(0, len(side.disk.image)))

    def clean_up(self) -> None:
        """Close the cache whatever has happened."""
        self.mend()
        with contextlib.suppress(Exception):
            for side in self._sides.values():
                for holds in side.held.values():
                    for held in holds:
                        held.put()
        with contextlib.suppress(Exception):
            self._bcache.close()
