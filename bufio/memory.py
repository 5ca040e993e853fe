"""Aligned memory for buffers, and the process-wide account of it.

Buffers are cut from anonymous maps of a megabyte, so that they are page-aligned (O_DIRECT asks for that), neighbours
cost no bookkeeping of their own, and an emptied map goes back to the system.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol

    class Cache(Protocol):
        """What the process-wide parameters have an effect on."""

        def limit_changed(self) -> None:
            """Take notice of a new share of the memory."""

        def evict_old(self, now: float) -> None:
            """Evict what was not used for ``parameters.max_age_seconds`` before the monotonic time *now*."""


_MAP_BYTES = 1 << 20
_MEMORY_FRACTION = 50
_LEAST_LIMIT_BYTES = 32 << 20
_MAX_AGE_SECONDS = 300.0
_RETAIN_BYTES = 256 << 10
_LOOKS_PER_AGE = 8
_LONGEST_PAUSE_SECONDS = 30.0


class _Map:
    """One anonymous map, from which views of equal size are cut as they are needed."""

    __slots__ = ("_end", "_view_bytes", "_whole", "free", "nr_taken")

    def __init__(self, view_bytes: int) -> None:
        size = max(_MAP_BYTES, view_bytes)
        self._whole = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._view_bytes = view_bytes
        self._end = 0
        self.free: list[memoryview] = []
        self.nr_taken = 0

    @property
    def has_room(self) -> bool:
        return bool(self.free) or self._end + self._view_bytes <= self._whole.nbytes

    def take(self) -> memoryview:
        self.nr_taken += 1
        if self.free:
            return self.free.pop()
        # Ascending: what is taken, and later written, one after the other lies so in memory.
        begin = self._end
        self._end += self._view_bytes
        return self._whole[begin : self._end]


class Slab:
    """Hands out views of *view_bytes* writable, page-aligned bytes with undefined contents.  Not thread-safe."""

    def __init__(self, view_bytes: int) -> None:
        self._view_bytes = view_bytes
        self._with_room: list[_Map] = []
        self._owner: dict[int, _Map] = {}

    def take(self) -> memoryview:
        """Return a view that nobody else has."""
        if not self._with_room:
            self._with_room.append(_Map(self._view_bytes))
        owner = self._with_room[-1]
        view = owner.take()
        if not owner.has_room:
            self._with_room.pop()
        self._owner[id(view)] = owner
        return view

    def give_back(self, view: memoryview) -> None:
        """Take a view back.  All but one of the maps that are not in use at all are returned to the system."""
        owner = self._owner.pop(id(view))
        if not owner.has_room:
            self._with_room.append(owner)
        owner.free.append(view)
        owner.nr_taken -= 1
        if not owner.nr_taken and len(self._with_room) > 1:
            self._with_room.remove(owner)


class Parameters:
    """The process-wide parameters, as dm-bufio shows them under /sys/module; ``bufio.parameters`` is the only instance.

    A change takes effect at once on every cache that exists.  Source: docs/bufio.md, "Memory".
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._sharers: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._ageing = _Ageing(self)
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._max_cache_size_bytes = max(physical // _MEMORY_FRACTION, _LEAST_LIMIT_BYTES)
        self._max_age_seconds = _MAX_AGE_SECONDS
        self._retain_bytes = _RETAIN_BYTES
        self._current = 0
        self._peak = 0
        self._dropped: deque[int] = deque()
        """What caches had that are gone without having been closed, and was not subtracted yet."""
        os.register_at_fork(after_in_child=self._after_fork)

    @property
    def max_cache_size_bytes(self) -> int:
        """Memory of all caches that were given no size of their own; by default a fiftieth of the machine's."""
        return self._max_cache_size_bytes

    @max_cache_size_bytes.setter
    def max_cache_size_bytes(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"max_cache_size_bytes must be positive, not {size}")
        self._max_cache_size_bytes = size
        self._tell_sharers()

    @property
    def max_age_seconds(self) -> float:
        """Clean buffers not used for that long are evicted, a quarter of it later at most; by default 300."""
        return self._max_age_seconds

    @max_age_seconds.setter
    def max_age_seconds(self, age: float) -> None:
        if not age > 0:
            raise ValueError(f"max_age_seconds must be positive, not {age}")
        self._max_age_seconds = age
        self._ageing.wake()

    @property
    def retain_bytes(self) -> int:
        """What each cache keeps of its memory whatever the age of the buffers; by default 256 KiB."""
        return self._retain_bytes

    @retain_bytes.setter
    def retain_bytes(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"retain_bytes must not be negative, but is {size}")
        self._retain_bytes = size
        if self._caches:
            self._ageing.start()
            self._ageing.wake()

    @property
    def current_allocated_bytes(self) -> int:
        """Memory that buffers take at present, their bookkeeping included."""
        self.account(0)
        return self._current

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that buffers have taken at any time."""
        return self._peak

    def account(self, change_bytes: int) -> None:
        """Note that buffers take *change_bytes* more (or less) than before."""
        with self._lock:
            while self._dropped:
                self._current -= self._dropped.popleft()
            self._current += change_bytes
            if self._current > self._peak:
                self._peak = self._current

    def drop(self, taken: list[int]) -> None:
        """Note that a cache is gone that had taken that many bytes: its memory is not there any more.

        Called by the garbage collector, at any time and in any thread, so that this takes no lock.
        """
        self._dropped.append(taken[0])

    def _after_fork(self) -> None:
        """In the new process there is nobody who has these locks, nor a thread that looks at ages."""
        self._lock = threading.Lock()
        self._ageing = _Ageing(self)

    def join(self, cache: Cache, *, shares: bool = True) -> None:
        """Have the parameters apply to *cache*, until it leaves.

        :param shares: it is one of those among whom the limit is divided
        """
        with self._lock:
            self._caches.add(cache)
            if shares:
                self._sharers.add(cache)
        if shares:
            self._tell_sharers()

    def leave(self, cache: Cache) -> None:
        """Remove somebody; the others get more."""
        with self._lock:
            shared = cache in self._sharers
            self._sharers.discard(cache)
            self._caches.discard(cache)
        if not self._caches:
            self._ageing.wake()
        if shared:
            self._tell_sharers()

    def share_bytes(self) -> int:
        """Return what one of the sharers may take."""
        return self._max_cache_size_bytes // max(1, len(self._sharers))

    def caches(self) -> list[Cache]:
        """Return those to whom the parameters apply."""
        with self._lock:
            return list(self._caches)

    def start_ageing(self) -> None:
        """Have :meth:`Cache.evict_old` of every cache called from time to time, from now on."""
        self._ageing.start()

    @property
    def ageing(self) -> bool:
        """Whether that is so."""
        return self._ageing.running

    def _tell_sharers(self) -> None:
        with self._lock:
            sharers = list(self._sharers)
        for sharer in sharers:
            sharer.limit_changed()


class _Ageing:
    """A thread that looks at the age of buffers, as long as there are caches."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._changed = threading.Condition()
        self.running = False

    def start(self) -> None:
        with self._changed:
            if self.running:
                return
            try:
                threading.Thread(target=self._run, name="bufio ageing", daemon=True).start()
            except RuntimeError:
                return  # no thread can be had: nobody who wants a block should fail for that, and the next one tries
            self.running = True

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        parameters = self._parameters
        while True:
            with self._changed:
                caches = parameters.caches()
                if not caches:
                    self.running = False
                    return
                # Nothing here may keep a cache alive that nobody else wants any more.
                del caches
                self._changed.wait(min(parameters.max_age_seconds / _LOOKS_PER_AGE, _LONGEST_PAUSE_SECONDS))
            now = time.monotonic()
            for cache in parameters.caches():
                cache.evict_old(now)
                del cache


parameters = Parameters()
