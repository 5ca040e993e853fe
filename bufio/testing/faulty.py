"""A device that fails, lies, is slow or waits, as a test tells it to.

::

    device = FaultyDevice(MemoryDevice(1 << 20), seed=7)
    device.on("flush", skip=1, times=1).fail(errno.ENOSPC)    # the second flush, and no other
    device.on("write", blocks=[3]).tear(sectors=[0, 5])       # an error with two sectors written, for ever
    device.on("read", "write").delay(latency_seconds=100e-6)

Offsets and lengths are in bytes, times in seconds.  A vectored call is one call.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar

from bufio.device import Device, transfer_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence
    from typing import Any, Self

    from bufio.device import ReadableBuffer, WritableBuffer

    Proceed = Callable[["_Request"], None]
    Effect = Callable[["_Request", Proceed], None]

D = TypeVar("D", bound=Device)

Kind = Literal["read", "write", "flush", "discard"]
"""What a device is asked to do; whether a transfer is vectored makes no difference."""

_SECTOR_BYTES = 512


class Call(NamedTuple):
    """A call of a device; a vectored one is one."""

    kind: Kind
    offset: int = 0
    """In bytes; 0 for a flush."""
    length: int = 0
    """In bytes, of all the buffers together; 0 for a flush."""

    def overlaps(self, begin: int, end: int) -> bool:
        """Whether any byte of ``begin..end`` (end exclusive) is concerned."""
        return self.offset < end and begin < self.offset + self.length

    def __str__(self) -> str:
        return self.kind if self.kind == "flush" else f"{self.kind} of {self.length} bytes at byte {self.offset}"


class _Request(NamedTuple):
    """A call with its buffers, on its way to the device below; rules may change it."""

    call: Call
    """What was asked for, for messages: the other fields are what will be done."""
    offset: int
    length: int
    buffers: Sequence[memoryview]
    """Of bytes; empty for a flush or a discard."""

    def part(self, begin: int, end: int) -> _Request:
        """Return the same for bytes ``begin..end`` of it alone."""
        return self._replace(offset=self.offset + begin, length=end - begin, buffers=_cut(self.buffers, begin, end))


def _cut(buffers: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """Return views of bytes ``begin..end`` of *buffers*, as if they were one."""
    parts = []
    for view in buffers:
        if begin < view.nbytes and end > 0:
            parts.append(view[max(begin, 0) : end])
        begin -= view.nbytes
        end -= view.nbytes
    return parts


class GateTimeout(Exception):
    """A gate was not opened, or not reached, in time: the test is wrong, or what it tests hangs.

    Not an ``OSError``, lest it be taken for an I/O error and dealt with.
    """


class Rule:
    """What happens to some calls of a device.  Made by the methods of :class:`Selection`."""

    def __init__(self, selection: Selection, effect: Effect) -> None:
        self._selection = selection
        self._effect = effect
        self._seen = 0
        self.hits = 0
        """Calls that it was applied to so far."""

    def remove(self) -> None:
        """Let the device do as it would without this rule.  A call that is under way is not affected."""
        self._selection.device._remove(self)

    def _applies_to(self, call: Call) -> bool:
        """Count a call; the device's lock is held."""
        wanted = self._selection
        if not wanted.matches(call):
            return False
        self._seen += 1
        if self._seen <= wanted.skip or (wanted.times is not None and self.hits >= wanted.times):
            return False
        if wanted.chance < 1 and wanted.device._random.random() >= wanted.chance:
            return False
        self.hits += 1
        return True


class Gate(Rule):
    """Holds calls up until the test lets them go on.

    As a context manager it is opened at the end, also when the test fails.  Every wait ends after *deadline_seconds*
    with :class:`GateTimeout`, in the test or in the thread that called the device, and the gate then lets nobody pass.
    """

    def __init__(self, selection: Selection, deadline_seconds: float) -> None:
        super().__init__(selection, self._hold)
        self._deadline_seconds = deadline_seconds
        self._changed = threading.Condition()
        self._waiting: list[_Request] = []
        self._state: Literal["closed", "open", "broken"] = "closed"

    @property
    def waiting(self) -> tuple[Call, ...]:
        """The calls held up at this moment, those that came first in front."""
        with self._changed:
            return tuple(request.call for request in self._waiting)

    def wait_for(self, count: int = 1) -> tuple[Call, ...]:
        """Wait until at least *count* calls are held up at the same time, and return all that are.

        :raises GateTimeout: fewer came
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) >= count, self._deadline_seconds):
                raise GateTimeout(
                    f"{len(self._waiting)} of {count} calls came to the gate in {self._deadline_seconds:g} s"
                )
            return tuple(request.call for request in self._waiting)

    def release(self, position: int = 0) -> Call:
        """Let one call go on, that at *position* of :attr:`waiting`, and return it.  The others keep their order.

        :raises IndexError: there is none
        """
        with self._changed:
            request = self._waiting.pop(position)
            self._changed.notify_all()
            return request.call

    def open(self) -> None:
        """Let all go on that wait or will come."""
        with self._changed:
            if self._state == "closed":
                self._state = "open"
            self._waiting.clear()
            self._changed.notify_all()

    def remove(self) -> None:
        """Open the gate and forget the rule."""
        super().remove()
        self.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()

    def _hold(self, request: _Request, proceed: Proceed) -> None:
        with self._changed:
            if self._state == "closed":
                self._waiting.append(request)
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: not self._holds(request), self._deadline_seconds):
                    self._state = "broken"
                    self._waiting.clear()
                    self._changed.notify_all()
            if self._state == "broken":
                raise GateTimeout(f"{request.call}: the gate was not opened in {self._deadline_seconds:g} s")
        proceed(request)

    def _holds(self, request: _Request) -> bool:
        return any(waiting is request for waiting in self._waiting)


class Selection:
    """Calls of a :class:`FaultyDevice`, made by its method ``on``; each method here adds a rule for them.

    Where several rules apply to a call, the first added has its way first: a delay added before a failure delays the
    failure, a failure added before a gate keeps the call from the gate.
    """

    def __init__(
        self,
        device: FaultyDevice[Any],
        kinds: Collection[Kind],
        ranges: Sequence[tuple[int, int]] | None,
        skip: int,
        times: int | None,
        chance: float,
    ) -> None:
        self.device = device
        self.kinds = frozenset(kinds)
        self.ranges = ranges
        self.skip = skip
        self.times = times
        self.chance = chance

    def matches(self, call: Call) -> bool:
        """Whether *call* is of one of the kinds and in one of the ranges; ``skip``, ``times`` and ``chance`` aside."""
        if call.kind not in self.kinds:
            return False
        return self.ranges is None or any(call.overlaps(begin, end) for begin, end in self.ranges)

    # Errors

    def fail(self, error: int = errno.EIO, *, afterwards: bool = False) -> Rule:
        """Raise ``OSError`` with that errno, before anything is done or, *afterwards*, when all of it has been."""

        def effect(request: _Request, proceed: Proceed) -> None:
            if afterwards:
                proceed(request)
            raise self._error(request.call, error)

        return self._add(effect)

    def tear(
        self, *, first_bytes: int | None = None, sectors: Iterable[int] | None = None, error: int | None = errno.EIO
    ) -> Rule:
        """Transfer or discard a part and then raise ``OSError`` with that errno.

        :param first_bytes: do so many bytes of the call
        :param sectors: do these 512-byte sectors of it, counted from its offset.  With neither, about half of the
            sectors, chosen by the device's seed and never all of them
        :param error: None to report a torn transfer as done
        """
        self._refuse("flush", "be torn")
        if first_bytes is not None and sectors is not None:
            raise ValueError("a part is given by first_bytes or by sectors, not by both")
        wanted = None if sectors is None else sorted(set(sectors))

        def effect(request: _Request, proceed: Proceed) -> None:
            if first_bytes is not None:
                parts = [(0, first_bytes)] if first_bytes else []
            else:
                chosen = self.device._some_sectors(request.length) if wanted is None else wanted
                parts = [(at * _SECTOR_BYTES, (at + 1) * _SECTOR_BYTES) for at in chosen]
            for begin, end in parts:
                if begin < request.length:
                    proceed(request.part(begin, min(end, request.length)))
            if error is not None:
                raise self._error(request.call, error)

        return self._add(effect)

    # Lies

    def lose(self) -> Rule:
        """Report a write, discard or flush as done, and do nothing."""
        self._refuse("read", "be lost: its buffers would hold what they held before")
        return self._add(lambda _request, _proceed: None)

    def flip_bit(self, bit: int | None = None) -> Rule:
        """Turn over one bit of what is read or written; the writer's own buffer stays as it is.

        :param bit: counted from the first of the call, 8 to a byte and the lowest first; a call without it is left
            alone.  None for one chosen by the device's seed
        """
        self._refuse("flush", "have a bit flipped")
        self._refuse("discard", "have a bit flipped")

        def effect(request: _Request, proceed: Proceed) -> None:
            flipped = self.device._draw(8 * request.length) if bit is None else bit
            if not flipped < 8 * request.length:
                proceed(request)
            elif request.call.kind == "read":
                proceed(request)
                _cut(request.buffers, flipped // 8, flipped // 8 + 1)[0][0] ^= 1 << flipped % 8
            else:
                data = bytearray(b"".join(request.buffers))
                data[flipped // 8] ^= 1 << flipped % 8
                proceed(request._replace(buffers=[memoryview(data)]))

        return self._add(effect)

    def misdirect(self, distance: int) -> Rule:
        """Read, write or discard *distance* bytes further on (back when negative) than was asked."""
        self._refuse("flush", "be misdirected")
        return self._add(lambda request, proceed: proceed(request._replace(offset=request.offset + distance)))

    # Time

    def delay(self, latency_seconds: float, seconds_per_byte: float = 0.0) -> Rule:
        """Let a call last at least so much longer.  The latencies of several threads overlap.

        What the system adds to a sleep (some 60 microseconds on Linux) comes on top.
        """

        def effect(request: _Request, proceed: Proceed) -> None:
            time.sleep(latency_seconds + seconds_per_byte * request.length)
            proceed(request)

        return self._add(effect)

    def gate(self, deadline_seconds: float = 20.0) -> Gate:
        """Hold calls up until the test lets them go on: see :class:`Gate`."""
        gate = Gate(self, deadline_seconds)
        self.device._install(gate)
        return gate

    # The rest

    def shorten(self, max_bytes: int | None = None) -> Rule:
        """Make transfers short: the device below is given a piece at a time, and what is missing is tried again.

        :param max_bytes: of each piece.  0 for a device that moves nothing any more, which is EIO.  None for pieces of
            a random length, 1 byte to all that is left, by the device's seed
        """
        self._refuse("flush", "be short")
        self._refuse("discard", "be short")

        def effect(request: _Request, proceed: Proceed) -> None:
            def move(buffers: Sequence[memoryview], offset: int) -> int:
                left = sum(view.nbytes for view in buffers)
                if not left:
                    return 0
                length = 1 + self.device._draw(left) if max_bytes is None else min(max_bytes, left)
                if length:
                    proceed(_Request(request.call, offset, length, _cut(buffers, 0, length)))
                return length

            transfer_whole(move, request.buffers, request.length, request.offset, request.call.kind, self.device.name)

        return self._add(effect)

    def call(self, function: Callable[[Call], object]) -> Rule:
        """Call *function* in the calling thread before anything is done; what it raises is raised."""

        def effect(request: _Request, proceed: Proceed) -> None:
            function(request.call)
            proceed(request)

        return self._add(effect)

    def _add(self, effect: Effect) -> Rule:
        rule = Rule(self, effect)
        self.device._install(rule)
        return rule

    def _refuse(self, kind: Kind, what: str) -> None:
        if kind in self.kinds:
            raise ValueError(f"a {kind} cannot {what}")

    def _error(self, call: Call, error: int) -> OSError:
        return OSError(error, f"{call} failed as told: {os.strerror(error)}", self.device.name)


class FaultyDevice(Generic[D]):
    """Passes calls on to another device, apart from those that a rule is for.

    Any number of threads may call it and change its rules.  What is left to chance follows from *seed* and the order
    of the calls.

    :param inner: the device below; closing this one closes it
    """

    def __init__(self, inner: D, *, seed: int = 0) -> None:
        self.inner = inner
        self.log: list[Call] = []
        """Every call in the order of arrival, before a rule has changed or refused it.  Clear it as you like."""
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._random = random.Random(seed)

    def on(
        self,
        *kinds: Kind,
        begin: int = 0,
        end: int | None = None,
        blocks: Iterable[int] | None = None,
        block_size: int = 4096,
        skip: int = 0,
        times: int | None = None,
        chance: float = 1.0,
    ) -> Selection:
        """Select calls; a method of what is returned says what happens to them.

        :param kinds: ``read``, ``write``, ``flush``, ``discard``; vectored or not makes no difference
        :param begin: with *end* (exclusive), the range of bytes that a call must touch; a flush touches none
        :param blocks: instead of a range, numbers of blocks of *block_size* bytes, of which it must touch one
        :param skip: let so many such calls through first.  Each rule counts for itself, from when it is added
        :param times: how often it happens; None for ever
        :param chance: of those left, which part it happens to, by the device's seed
        """
        if not kinds or not {"read", "write", "flush", "discard"}.issuperset(kinds):
            raise ValueError(f"not kinds of calls: {kinds}")
        ranges: list[tuple[int, int]] | None = None
        if blocks is not None:
            ranges = [(block * block_size, (block + 1) * block_size) for block in blocks]
        if begin or end is not None:
            if blocks is not None:
                raise ValueError("calls are selected by a range of bytes or by blocks, not by both")
            ranges = [(begin, 1 << 64 if end is None else end)]
        return Selection(self, kinds, ranges, skip, times, chance)

    def clear(self) -> None:
        """Remove every rule and open every gate; the log stays."""
        with self._lock:
            rules = list(self._rules)
        for rule in rules:
            rule.remove()

    # The device

    @property
    def name(self) -> str:
        """That of the device below."""
        return self.inner.name

    @property
    def size_bytes(self) -> int:
        """That of the device below."""
        return self.inner.size_bytes

    @property
    def read_only(self) -> bool:
        """Whether the device below is."""
        return self.inner.read_only

    @property
    def direct(self) -> bool:
        """Whether the device below wants aligned buffers, as a file opened with O_DIRECT does."""
        return bool(getattr(self.inner, "direct", False))

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill *buffer* from byte *offset*, as the rules have it."""
        self._do("read", offset, [buffer], partial(self.inner.readinto, buffer, offset))

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Fill *buffers* one after the other, as the rules have it."""
        self._do("read", offset, buffers, partial(self.inner.preadv, buffers, offset))

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write *data* at byte *offset*, as the rules have it."""
        self._do("write", offset, [data], partial(self.inner.pwrite, data, offset))

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write *buffers* one after the other, as the rules have it."""
        self._do("write", offset, buffers, partial(self.inner.pwritev, buffers, offset))

    def flush(self) -> None:
        """Flush, as the rules have it."""
        self._do("flush", 0, (), self.inner.flush)

    def discard(self, offset: int, length: int) -> None:
        """Discard, as the rules have it."""
        self._do("discard", offset, (), partial(self.inner.discard, offset, length), length)

    def close(self) -> None:
        """Close the device below."""
        self.inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _do(
        self,
        kind: Kind,
        offset: int,
        buffers: Sequence[ReadableBuffer],
        plainly: Callable[[], None],
        length: int = 0,
    ) -> None:
        """Do a call; *plainly* is what it is without any rule."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        call = Call(kind, offset, length + sum(view.nbytes for view in views))
        with self._lock:
            # One lock for both: the log has the calls in the order in which the rules counted them.
            self.log.append(call)
            rules = [rule for rule in self._rules if rule._applies_to(call)]
        if rules:
            self._pass_on(rules, _Request(call, offset, call.length, views))
        else:
            plainly()

    def _pass_on(self, rules: Sequence[Rule], request: _Request) -> None:
        """Apply the first of *rules*, which may or may not go on with the others and then the device."""
        if rules:
            rules[0]._effect(request, partial(self._pass_on, rules[1:]))
        elif request.call.kind == "read":
            self.inner.preadv(request.buffers, request.offset)
        elif request.call.kind == "write":
            self.inner.pwritev(request.buffers, request.offset)
        elif request.call.kind == "flush":
            self.inner.flush()
        else:
            self.inner.discard(request.offset, request.length)

    # For the rules

    def _install(self, rule: Rule) -> None:
        with self._lock:
            self._rules.append(rule)

    def _remove(self, rule: Rule) -> None:
        with self._lock:
            if rule in self._rules:
                self._rules.remove(rule)

    def _draw(self, below: int) -> int:
        """A number from 0 to *below*, exclusive; 0 if there is none."""
        with self._lock:
            return self._random.randrange(below) if below else 0

    def _some_sectors(self, length: int) -> list[int]:
        """About half of the sectors that *length* bytes have, never all."""
        count = -(-length // _SECTOR_BYTES)
        with self._lock:
            left_out = self._random.randrange(count) if count else 0
            return [at for at in range(count) if at != left_out and self._random.random() < 0.5]
