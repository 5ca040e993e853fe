"""How transfers reach a device.

The cache gives an engine *extents*: views whose contents lie one after the other on the device, so that each is one
vectored call.  :class:`SyncEngine` is done with them when its call returns; :class:`AsyncEngine` has threads that carry
them out while the caller goes on.  What comes out is the same.  Source: docs/bufio.md, "Engines".
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol, Self

    from bufio.device import Device, ReadableBuffer, WritableBuffer

    Extent = tuple[int, list[memoryview]]
    """A byte offset, and the views of what lies on the device from there on."""

    Done = Callable[[int, list[OSError | None]], None]
    """Called with the number of a view, counted over all extents, and for it and each of those behind it None or its
    error.  In any thread, not necessarily in order; what comes for a view a second time does not count."""

    One = Callable[[WritableBuffer, int], None] | Callable[[ReadableBuffer, int], None]
    Many = Callable[[Sequence[WritableBuffer], int], None] | Callable[[Sequence[ReadableBuffer], int], None]

    _Job = tuple[One, Many, Extent, int, Done]
    """One extent on its way: the device's calls for one view and for several, where, and whom to tell what."""

    class Engine(Protocol):
        """Carries out transfers."""

        def start_read(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
            """Fill the views from the device.

            :param waiting: the caller has nothing else to do until all is done
            """

        def start_write(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
            """Write the views to the device.  Nothing is durable before the device's flush."""

        def assist(self, device: Device) -> bool:
            """Carry out a read of *device* that nobody has begun, in place of waiting for another one.

            :returns: whether it was done; if not, nothing was: there are none, or too few to do without the caller
            """

        def drain(self) -> None:
            """Wait until nothing is in flight."""

        def close(self) -> None:
            """Wait likewise, and give back what the engine has.  It may be used again."""

        @property
        def calls(self) -> int:
            """Calls of a device so far, a vectored one being one."""


MAX_COALESCED_BYTES = 1 << 20
"""One extent is at most this long."""

DEFAULT_IN_FLIGHT = 10
"""More threads than this cost more in hand-overs than they gain in overlap, see docs/performance.md."""

_IDLE_SECONDS = 5.0
_LOOK_SECONDS = 0.01


def split(start: int, views: list[memoryview], block_size: int) -> list[Extent]:
    """Return *views* of *block_size* bytes, which are all neighbours, as extents of at most MAX_COALESCED_BYTES.

    :param start: byte offset of the first
    """
    step = max(1, MAX_COALESCED_BYTES // block_size)
    return [(start + at * block_size, views[at : at + step]) for at in range(0, len(views), step)]


def coalesce(starts: list[int], views: list[memoryview]) -> list[Extent]:
    """Join neighbours to extents of at most MAX_COALESCED_BYTES.

    :param starts: byte offset of each view, ascending
    """
    extents: list[Extent] = []
    run: list[memoryview] = []
    end = limit = -1
    for start, view in zip(starts, views, strict=True):
        if start == end and start + view.nbytes <= limit:
            run.append(view)
        else:
            run = [view]
            extents.append((start, run))
            limit = start + MAX_COALESCED_BYTES
        end = start + view.nbytes
    return extents


def _carry_out(one: One, many: Many, extent: Extent) -> list[OSError | None]:
    """Transfer one extent; if that fails, view by view, so that one bad place does not take its neighbours with it."""
    offset, views = extent
    try:
        if len(views) == 1:
            one(views[0], offset)
        else:
            many(views, offset)
    except OSError as error:
        if len(views) == 1:
            return [error]
        results: list[OSError | None] = []
        for view in views:
            results += _carry_out(one, many, (offset, [view]))
            offset += view.nbytes
        return results
    return [None] * len(views)


class SyncEngine:
    """Carries out each transfer before it returns."""

    def __init__(self) -> None:
        self.calls = 0

    def start_read(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
        """Fill the views from the device."""
        self._transfer(device.readinto, device.preadv, extents, done)

    def start_write(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
        """Write the views to the device."""
        self._transfer(device.pwrite, device.pwritev, extents, done)

    def _transfer(self, one: One, many: Many, extents: list[Extent], done: Done) -> None:
        results: list[OSError | None] = []
        for extent in extents:
            self.calls += 1
            results += _carry_out(one, many, extent)
        done(0, results)

    def assist(self, device: Device) -> bool:
        """Do nothing: whatever was begun is done."""
        return False

    def drain(self) -> None:
        """Do nothing: nothing is ever in flight."""

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""


def _run(job: _Job) -> None:
    """Carry out a transfer in flight, and report it."""
    one, many, extent, first, done = job
    offset, views = extent
    results: list[OSError | None]
    try:
        if len(views) == 1:
            # As _carry_out, without the call.
            try:
                one(views[0], offset)
                results = [None]
            except OSError as error:
                results = [error]
        else:
            results = _carry_out(one, many, extent)
    except Exception as error:
        # Nobody is there to catch it, and somebody may be waiting.
        failure = OSError(errno.EIO, f"transfer at byte {extent[0]} failed: {error!r}")
        failure.__cause__ = error
        results = [failure] * len(extent[1])
    done(first, results)


class AsyncEngine:
    """Keeps several transfers in flight while its callers go on, by threads over the device's vectored calls.

    :param max_in_flight: transfers at a time, which is also the most threads there are
    :raises ValueError: fewer than one

    Threads are started when there is work for them and end when there is none for some seconds; they do not keep the
    interpreter alive.  One engine may serve any number of caches.  It does not survive a ``fork``.
    """

    def __init__(self, max_in_flight: int = DEFAULT_IN_FLIGHT) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be positive, not {max_in_flight}")
        self.max_in_flight = max_in_flight
        self.calls = 0
        self._jobs: deque[_Job] = deque()
        self._lock = threading.RLock()
        self._drained = threading.Condition(self._lock)
        self._idle: list[threading.Lock] = []
        """What each thread that has nothing to do waits for."""
        self._threads: set[threading.Thread] = set()
        self._closing = False
        self._nr_assisting = 0

    def start_read(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
        """Begin to fill the views from the device."""
        self._start(device.readinto, device.preadv, extents, done, waiting)

    def start_write(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
        """Begin to write the views to the device."""
        self._start(device.pwrite, device.pwritev, extents, done, waiting)

    def _start(self, one: One, many: Many, extents: list[Extent], done: Done, waiting: bool) -> None:
        if len(extents) == 1 and not waiting:
            # As below, for the many blocks that are read ahead one at a time.
            job = (one, many, extents[0], 0, done)
            with self._lock:
                if len(self._jobs) >= len(self._idle) and len(self._threads) < self.max_in_flight:
                    self._start_thread()
                self.calls += 1
                self._jobs.append(job)
                if self._idle:
                    self._idle.pop().release()
            return
        jobs: list[_Job] = []
        first = 0
        for extent in extents:
            jobs.append((one, many, extent, first, done))
            first += len(extent[1])
        # Whoever waits does a share of the work: that saves hand-overs, for a single transfer the only one.
        own = jobs.pop() if waiting else None
        with self._lock:
            missing = len(self._jobs) + len(jobs) - len(self._idle)
            for _ in range(min(missing, self.max_in_flight - len(self._threads))):
                self._start_thread()
            self.calls += len(extents)
            # All or nothing: an interrupt must not leave a part of them behind that nobody knows of.
            self._jobs.extend(jobs)
            for _ in range(min(len(jobs), len(self._idle))):
                self._idle.pop().release()
        while own is not None:
            _run(own)
            own = self._take_back(done)

    def _take_back(self, done: Done) -> _Job | None:
        """Return a transfer of the call that reports to *done*, if there is one that nobody has begun."""
        with self._lock:
            return self._jobs.pop() if self._jobs and self._jobs[-1][-1] is done else None

    def assist(self, device: Device) -> bool:
        """Carry out the oldest read of one view of *device* that nobody has begun, if every thread has others to do.

        Whoever waits for one block of many costs two hand-overs, each of which may wake a core; whoever reads another
        one meanwhile finds a number of them there afterwards.
        """
        job: _Job | None = None
        try:
            with self._lock:
                jobs = self._jobs
                if len(jobs) <= len(self._threads) or jobs[0][0] != device.readinto or len(jobs[0][2][1]) != 1:
                    return False
                # Without a call on the way, at which an interrupt could leave it with nobody or with two.
                job = jobs[0]
                del jobs[0]
                self._nr_assisting += 1
            _run(job)
        except BaseException:
            if job is not None:
                job[-1](job[-2], [OSError(errno.EIO, "read was interrupted", device.name)])
            raise
        finally:
            if job is not None:
                self._nr_assisting -= 1
        return True

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name="bufio", daemon=True)
        try:
            self._threads.add(thread)
            thread.start()
        except BaseException as error:
            # An interrupt may come when it runs already: it adds itself again then.
            self._threads.discard(thread)
            # Where the system has no thread to spare, those that there are do the work.
            if not isinstance(error, RuntimeError) or not self._threads:
                raise

    def _serve(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        with self._lock:
            self._threads.add(threading.current_thread())
        try:
            while True:
                job = None
                with self._lock:
                    if self._jobs:
                        job = self._jobs.popleft()
                if job is None:
                    job = self._next_job(wake)
                    if job is None:
                        return
                _run(job)
        finally:
            with self._lock:
                self._end_thread()

    def _end_thread(self) -> None:
        self._threads.discard(threading.current_thread())
        self._drained.notify_all()

    def _next_job(self, wake: threading.Lock) -> _Job | None:
        """Wait for something to do; None when this thread is not needed any more.

        A lock for each thread, and not a condition for all: it wakes the one that was busy last, and costs less.
        """
        while True:
            with self._lock:
                if self._jobs:
                    return self._jobs.popleft()
                if self._closing:
                    self._end_thread()
                    return None
                self._idle.append(wake)
                if len(self._idle) == len(self._threads):
                    self._drained.notify_all()
            if not wake.acquire(timeout=_IDLE_SECONDS):
                with self._lock:
                    if wake in self._idle:
                        self._idle.remove(wake)
                        # In the same step: whoever has work now must not count on this thread.
                        self._end_thread()
                        return None
                # Somebody has woken it all the same, or was interrupted before that: there is nothing to wait for.
                wake.acquire(blocking=False)

    def _wake_all(self) -> None:
        while self._idle:
            self._idle.pop().release()

    def drain(self) -> None:
        """Wait until nothing is in flight."""
        with self._lock:
            while self._jobs or len(self._idle) < len(self._threads) or self._nr_assisting:
                if self._jobs:
                    if not self._threads:
                        self._start_thread()
                    self._wake_all()
                # Who assists tells nobody when it is done: an interrupt could keep it from that.
                self._drained.wait(_LOOK_SECONDS if self._nr_assisting else None)

    def close(self) -> None:
        """Wait until nothing is in flight and the threads have ended.  The engine may be used again."""
        self.drain()
        with self._lock:
            self._closing = True
            try:
                self._wake_all()
                while self._threads:
                    self._drained.wait()
            finally:
                self._closing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
