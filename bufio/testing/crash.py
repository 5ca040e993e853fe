"""A device that loses power: it records what is done to it, and builds what a power cut may leave.

::

    device = CrashDevice(1 << 20)
    ...                                         # a workload, which calls device.mark("commit 1") when it was told so
    for image in device.images(seed=1):
        check(image.device(), image.marks)      # and on failure: device.image(image.choice) is that image again

What a cut may leave (docs/design.md, "Assumptions about media"): a 512-byte sector is written as a whole or not at all.
Between two flushes the sectors that were written may have reached the device in any combination.  What a flush that
returned was called after is durable.  A flush that failed promises nothing about what came before it, ever: a later one
that succeeds does not make up for it, only writing it again does.

Offsets and lengths are in bytes.  A position counts the events of the trace before it.
"""

from __future__ import annotations

import errno
import hashlib
import random
import re
import threading
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from bufio.device import MemoryDevice

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from bufio.device import ReadableBuffer

    Choice = Mapping[int, Collection[int]]
    """Position of an event -> the sectors of it that reached the device, counted from the first it touches."""

_SECTOR_BYTES = 512


class Write(NamedTuple):
    """One buffer was written: a vectored call is as many writes as it has buffers."""

    offset: int
    data: bytes


class Discard(NamedTuple):
    """A range was discarded; it reads as zeroes if that has reached the device."""

    offset: int
    length: int


class Flush(NamedTuple):
    """A flush returned, or raised."""

    succeeded: bool


class Mark(NamedTuple):
    """The test made a note."""

    label: str


class Grow(NamedTuple):
    """The device was made larger.  That is durable at once: it is not the device's doing."""

    size_bytes: int


Event = Write | Discard | Flush | Mark | Grow


class CrashDevice(MemoryDevice):
    """A device in memory that records every write, discard and flush.

    Any number of threads may use it; their calls are recorded in the order in which they take effect.  What is read is
    what was written last, durable or not.

    :param contents: a size in bytes (zeroed), or the bytes to begin with (copied); durable
    """

    def __init__(self, contents: int | ReadableBuffer, name: str = "crash") -> None:
        super().__init__(contents, name)
        self._initial = self.contents()
        self._trace: list[Event] = []
        self._failing_flushes: set[int] = set()
        self._nr_flushes = 0
        self._lock = threading.Lock()

    # Recording

    @property
    def position(self) -> int:
        """How many events have been recorded."""
        return len(self._trace)

    @property
    def trace(self) -> tuple[Event, ...]:
        """Every event so far."""
        with self._lock:
            return tuple(self._trace)

    def mark(self, label: str) -> int:
        """Note in the trace that something has happened, such as that a commit was acknowledged; return the position.

        Images of later positions have *label* among their marks.
        """
        with self._lock:
            self._trace.append(Mark(label))
            return len(self._trace)

    def fail_flushes(self, *numbers: int) -> None:
        """Let flushes fail with EIO: those of these numbers, where 0 is the next one.  Replaces what was said before.

        A failure made above this device, as by a ``FaultyDevice``, is not known here: the flush was not asked for.
        """
        with self._lock:
            self._failing_flushes = {self._nr_flushes + number for number in numbers}

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write, not durably."""
        self.pwritev([data], offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write several buffers, each an event of its own."""
        copies = [bytes(buffer) for buffer in buffers]
        with self._lock:
            super().pwrite(b"".join(copies), offset)
            for data in copies:
                if data:
                    self._trace.append(Write(offset, data))
                offset += len(data)

    def discard(self, offset: int, length: int) -> None:
        """Zero a range, not durably."""
        with self._lock:
            super().discard(offset, length)
            if length:
                self._trace.append(Discard(offset, length))

    def flush(self) -> None:
        """Make durable what was written, or fail as told."""
        with self._lock:
            failing = self._nr_flushes in self._failing_flushes
            self._nr_flushes += 1
            self._trace.append(Flush(not failing))
        if failing:
            raise OSError(errno.EIO, "flush failed as told", self.name)

    def grow(self, size_bytes: int) -> None:
        """Make the device larger, with zeros."""
        with self._lock:
            super().grow(size_bytes)
            self._trace.append(Grow(size_bytes))

    # What is left

    def images(
        self, *, begin: int = 0, end: int | None = None, exhaustive: int = 12, samples: int = 64, seed: int = 0
    ) -> Iterator[CrashImage]:
        """Yield what a power cut may leave at each position from *begin* to *end* (inclusive; None: the last).

        At each position there are events that are not durable.  If they have at most *exhaustive* sectors in all, every
        subset of the sectors is tried.  Otherwise, if there are at most *exhaustive* events, every subset of them is,
        each whole or absent.  Beyond that, and for torn writes, there are *samples* images by chance, which follow from
        *seed*; the newest event is also torn after each of its sectors (no more than *samples* of them), with all
        the others and with none.

        Two images are the same, and the later is left out, when they have the same bytes and no mark lies between them:
        what a mark promises has to hold for the same bytes again.

        The trace is that of the moment of the first image.  Cost of an image: the sectors not yet durable, no matter
        how large the device is, until its bytes are asked for.
        """
        trace = self.trace
        last = len(trace) if end is None else min(end, len(trace))
        state = _State(self._initial, self.name, trace)
        seen: set[tuple[int, int]] = set()
        for position in range(last + 1):
            event = state.advance() if position else None
            # The images of before a write are there again after it, as those in which it is absent.  Where the last
            # step was another, everything has to be tried.
            is_write = isinstance(event, Write | Discard) and position > begin
            if isinstance(event, Mark):
                seen.clear()
            if position < begin or (isinstance(event, Flush) and not event.succeeded and position > begin):
                continue
            chance = random.Random(f"{seed}:{position}")
            for choice in _choices(state.pending, exhaustive, samples, chance, newest_only=is_write):
                image = state.image(choice)
                key = (image.size_bytes, image.digest)
                if key not in seen:
                    seen.add(key)
                    yield image

    def image(self, choice: str) -> CrashImage:
        """Build one image again, from its ``choice``.

        :raises ValueError: that is no choice of this trace
        """
        position, chosen = _parse(choice)
        state = self._state_at(position)
        sectors = {pending.position: pending.sectors.keys() for pending in state.pending}
        for at, wanted in chosen.items():
            if at not in sectors or wanted == [] or not sectors[at] >= set(wanted or ()):
                raise ValueError(f"{choice}: event {at} has no such sectors that are not durable at {position}")
        return state.image({at: sectors[at] if wanted is None else wanted for at, wanted in chosen.items()})

    def replay(self, position: int | None = None) -> CrashImage:
        """Build what a clean stop at *position* (None: now) leaves: everything that was done before it."""
        state = self._state_at(self.position if position is None else position)
        return state.image({pending.position: pending.sectors for pending in state.pending})

    def _state_at(self, position: int) -> _State:
        trace = self.trace
        if not 0 <= position <= len(trace):
            raise ValueError(f"no position {position} in a trace of {len(trace)} events")
        state = _State(self._initial, self.name, trace)
        for _ in range(position):
            state.advance()
        return state


@dataclass(frozen=True, eq=False, slots=True)
class CrashImage:
    """What a power cut left."""

    position: int
    """Where the power went: so many events of the trace had happened."""
    durable_position: int
    """Where the last flush that succeeded had returned; 0 if there was none."""
    marks: tuple[str, ...]
    """The labels marked before the cut."""
    choice: str
    """Which events had reached the device although no flush promised it: ``POSITION:EVENT,EVENT[SECTORS],...``.

    Events have the numbers of the trace; those not named are absent.  :meth:`CrashDevice.image` takes it.
    """
    size_bytes: int
    digest: int
    """128 bits that follow from the bytes: equal for two images of one device exactly if these are."""
    _name: str = field(repr=False)
    durable: bytes = field(repr=False)
    """What is durable for certain.  The images between two flushes share it: it is the same object."""
    changed: Mapping[int, bytes] = field(repr=False)
    """Sector -> its 512 bytes, where something else than what is durable has reached the device."""

    def contents(self) -> bytes:
        """Return all the bytes."""
        return self.device().contents()

    def device(self) -> MemoryDevice:
        """Return a device of its own with these bytes, to open and to change."""
        device = MemoryDevice(self.durable, f"{self._name}@{self.choice}")
        for sector, data in self.changed.items():
            device.pwrite(data, sector * _SECTOR_BYTES)
        return device

    def __str__(self) -> str:
        mark = f", after mark {self.marks[-1]!r}" if self.marks else ""
        return f"power cut at {self.position}{mark}, durable up to {self.durable_position}: {self.choice}"


class _Pending:
    """An event that need not have reached the device."""

    def __init__(self, position: int, offset: int, data: ReadableBuffer, is_doubtful: bool = False) -> None:
        self.position = position
        """Its number in the trace."""
        self.is_doubtful = is_doubtful
        """A flush failed after it: none can make it durable any more."""
        first = offset // _SECTOR_BYTES
        self.first_sector = first
        self.sectors: dict[int, tuple[int, bytes]] = {}
        """Number within the event -> where in the sector it begins, and its bytes there."""
        at = 0
        while at < len(data):
            start = (offset + at) % _SECTOR_BYTES
            piece = bytes(data[at : at + _SECTOR_BYTES - start])
            self.sectors[(offset + at) // _SECTOR_BYTES - first] = (start, piece)
            at += len(piece)
        self.nr_sectors = len(self.sectors)


class _State:
    """What is durable and what is not, at a position of a trace that moves on."""

    def __init__(self, initial: bytes, name: str, trace: Sequence[Event]) -> None:
        self.pending: list[_Pending] = []
        self._name = name
        self._trace = trace
        self._position = 0
        self._durable_position = 0
        self._marks: tuple[str, ...] = ()
        self._durable = bytearray(initial)
        self._snapshot: bytes | None = initial
        self._digest = 0  # of what is durable, the initial bytes being 0
        self._differences: dict[tuple[int, bytes], int] = {}

    def advance(self) -> Event:
        """Let the next event happen, and return it."""
        event = self._trace[self._position]
        if isinstance(event, Write):
            self.pending.append(_Pending(self._position, event.offset, event.data))
        elif isinstance(event, Discard):
            self.pending.append(_Pending(self._position, event.offset, bytes(event.length)))
        elif isinstance(event, Mark):
            self._marks = (*self._marks, event.label)
        elif isinstance(event, Grow):
            self._durable.extend(bytes(event.size_bytes - len(self._durable)))
            self._durable_has_changed()
        elif event.succeeded:
            self._settle()
            self._durable_position = self._position + 1
        else:
            for pending in self.pending:
                pending.is_doubtful = True
        self._position += 1
        return event

    def _durable_has_changed(self) -> None:
        """Forget what was derived from it."""
        self._snapshot = None
        self._differences.clear()

    def _settle(self) -> None:
        """Make durable what a flush that succeeded promises."""
        doubtful = [pending for pending in self.pending if pending.is_doubtful]
        settled = [pending for pending in self.pending if not pending.is_doubtful]
        for sector, data in self._composed((pending, pending.sectors) for pending in settled).items():
            self._digest ^= self._difference(sector, data)
            self._durable[sector * _SECTOR_BYTES : sector * _SECTOR_BYTES + len(data)] = data
        self._durable_has_changed()
        for older in doubtful:
            for newer in settled:
                self._overwrite(older, newer)
        self.pending = [pending for pending in doubtful if pending.sectors]

    @staticmethod
    def _overwrite(older: _Pending, newer: _Pending) -> None:
        """Let what is doubtful say nothing about bytes that are durable by now."""
        distance = newer.first_sector - older.first_sector
        for at in [at for at in older.sectors if at - distance in newer.sectors]:
            start, data = older.sectors[at]
            new_start, new_data = newer.sectors[at - distance]
            begin, end = max(start, new_start), min(start + len(data), new_start + len(new_data))
            if begin == start and end == start + len(data):
                del older.sectors[at]
            elif begin < end:
                kept = bytearray(data)
                kept[begin - start : end - start] = new_data[begin - new_start : end - new_start]
                older.sectors[at] = (start, bytes(kept))

    def image(self, choice: Choice) -> CrashImage:
        """Build the image in which those sectors of pending events, and no others, have reached the device."""
        changed = self._composed((pending, choice.get(pending.position, ())) for pending in self.pending)
        digest = self._digest
        for sector, data in changed.items():
            digest ^= self._difference(sector, data)
        if self._snapshot is None:
            self._snapshot = bytes(self._durable)
        return CrashImage(
            self._position,
            self._durable_position,
            self._marks,
            _describe(self._position, self.pending, choice),
            len(self._durable),
            digest,
            self._name,
            self._snapshot,
            changed,
        )

    def _composed(self, chosen: Iterable[tuple[_Pending, Collection[int]]]) -> dict[int, bytes]:
        """Return the sectors that are changed when those of each event are written in this order."""
        changed: dict[int, bytes] = {}
        for pending, sectors in chosen:
            for at in sectors:
                sector = pending.first_sector + at
                start, data = pending.sectors[at]
                if len(data) < _SECTOR_BYTES:
                    old = changed.get(sector) or self._sector(sector)
                    data = old[:start] + data + old[start + len(data) :]
                changed[sector] = data
        return changed

    def _sector(self, sector: int) -> bytes:
        """The durable bytes of a sector."""
        return bytes(self._durable[sector * _SECTOR_BYTES : (sector + 1) * _SECTOR_BYTES])

    def _difference(self, sector: int, data: bytes) -> int:
        """What the digest changes by when a sector that is durable becomes *data*."""
        found = self._differences.get((sector, data))
        if found is None:
            found = self._differences[sector, data] = _hash(sector, self._sector(sector)) ^ _hash(sector, data)
        return found


def _hash(sector: int, data: bytes) -> int:
    """Hash of a sector with its place: the exclusive or of these over a device tells each of its sectors."""
    place = sector.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=16, salt=place).digest(), "little")


# Choices


def _choices(
    pending: Sequence[_Pending], exhaustive: int, samples: int, chance: random.Random, *, newest_only: bool
) -> Iterator[Choice]:
    """Yield what may have reached the device; with *newest_only*, without the choices in which the newest is absent."""
    whole = {p.position: p.sectors.keys() for p in pending}
    newest = pending[-1].position if pending else -1
    if sum(map(len, whole.values())) <= exhaustive:
        pieces = [(position, at) for position, sectors in whole.items() for at in sectors]
        for bits in product((False, True), repeat=len(pieces)):
            choice: dict[int, list[int]] = {}
            for (position, at), is_there in zip(pieces, bits, strict=True):
                if is_there:
                    choice.setdefault(position, []).append(at)
            if not newest_only or newest in choice:
                yield choice
        return
    others = [position for position in whole if position != newest]
    if len(whole) <= exhaustive:
        for newest_bit in (True,) if newest_only else (False, True):
            for bits in product((False, True), repeat=len(others)):
                there = [position for position, is_there in zip(others, bits, strict=True) if is_there]
                yield {position: whole[position] for position in ([*there, newest] if newest_bit else there)}
    else:
        # The corners, which chance would hardly hit.
        yield whole
        yield {newest: whole[newest]}
        yield {position: whole[position] for position in others}
        if not newest_only:
            yield {}
    sectors = sorted(whole[newest])
    cuts = range(1, len(sectors))
    for cut in cuts if len(cuts) <= samples else chance.sample(cuts, samples):
        yield {newest: sectors[:cut]}
        yield {**{position: whole[position] for position in others}, newest: sectors[:cut]}
    for _ in range(samples):
        yield _by_chance(whole, chance)


def _by_chance(whole: Choice, chance: random.Random) -> Choice:
    """Each event whole, absent or torn: its first sectors, its last ones, or any."""
    tearing = chance.random()  # some images with many torn writes, some with hardly any
    choice: dict[int, Collection[int]] = {}
    for position, all_sectors in whole.items():
        sectors = sorted(all_sectors)
        if chance.random() < tearing and len(sectors) > 1:
            cut = chance.randrange(1, len(sectors))
            how = chance.randrange(3)
            torn = sectors[:cut] if how == 0 else sectors[cut:] if how == 1 else sorted(chance.sample(sectors, cut))
            choice[position] = torn
        elif chance.random() < 0.5:
            choice[position] = sectors
    return choice


def _describe(position: int, pending: Sequence[_Pending], choice: Choice) -> str:
    """Write a choice down, in the form that ``_parse`` reads."""
    words = []
    for event in pending:
        chosen = choice.get(event.position, ())
        if len(chosen) == len(event.sectors):
            words.append(str(event.position))
        elif chosen:
            words.append(f"{event.position}[{_runs(sorted(chosen))}]")
    return f"{position}:{','.join(words)}"


def _runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ``0-3+7``."""
    words: list[str] = []
    first = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            words.append(str(numbers[first]) if at - first == 1 else f"{numbers[first]}-{numbers[at - 1]}")
            first = at
    return "+".join(words)


_CHOSEN = r"(\d+)(?:\[(\d+(?:-\d+)?(?:\+\d+(?:-\d+)?)*)\])?"
_CHOICE = re.compile(rf"(\d+):((?:{_CHOSEN}(?:,{_CHOSEN})*)?)", re.ASCII)


def _parse(choice: str) -> tuple[int, dict[int, list[int] | None]]:
    """Read what ``_describe`` wrote; None stands for every sector of an event."""
    found = _CHOICE.fullmatch(choice)
    if found is None:
        raise ValueError(f"not the choice of a crash image: {choice!r}")
    chosen: dict[int, list[int] | None] = {}
    for event in re.finditer(_CHOSEN, found[2]):
        chosen[int(event[1])] = None if event[2] is None else [at for run in event[2].split("+") for at in _run(run)]
    return int(found[1]), chosen


def _run(word: str) -> range:
    """The numbers that ``3`` or ``0-3`` stands for."""
    first, _, last = word.partition("-")
    return range(int(first), int(last or first) + 1)
