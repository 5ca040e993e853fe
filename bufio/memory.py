"""Aligned memory for buffers, and the process-wide account of it.

Buffers are cut from anonymous maps of a megabyte, so that they are page-aligned (O_DIRECT asks for that), neighbours
cost no bookkeeping of their own, and an emptied map goes back to the system.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Protocol

    class Budgeted(Protocol):
        """Somebody who shares the process-wide limit."""

        def limit_changed(self) -> None:
            """Take notice of a new share."""


_MAP_BYTES = 1 << 20
_MEMORY_FRACTION = 50
_LEAST_LIMIT_BYTES = 32 << 20


class _Map:
    """One anonymous map, cut into views of equal size."""

    __slots__ = ("free", "nr_views")

    def __init__(self, view_bytes: int) -> None:
        size = max(_MAP_BYTES, view_bytes)
        whole = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.free = [whole[at : at + view_bytes] for at in range(0, size - view_bytes + 1, view_bytes)]
        self.nr_views = len(self.free)


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
        view = owner.free.pop()
        if not owner.free:
            self._with_room.pop()
        self._owner[id(view)] = owner
        return view

    def give_back(self, view: memoryview) -> None:
        """Take a view back.  All but one of the maps that are not in use at all are returned to the system."""
        owner = self._owner.pop(id(view))
        if not owner.free:
            self._with_room.append(owner)
        owner.free.append(view)
        if len(owner.free) == owner.nr_views and len(self._with_room) > 1:
            self._with_room.remove(owner)


class Parameters:
    """The process-wide limits, as dm-bufio shows them under /sys/module; ``bufio.parameters`` is the only instance.

    A change takes effect at once on every client that exists.  Source: docs/bufio.md, "Memory".
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sharers: weakref.WeakSet[Budgeted] = weakref.WeakSet()
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._max_cache_size_bytes = max(physical // _MEMORY_FRACTION, _LEAST_LIMIT_BYTES)
        self._current = 0
        self._peak = 0

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
    def current_allocated_bytes(self) -> int:
        """Memory that buffers take at present, their bookkeeping included."""
        return self._current

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that buffers have taken at any time."""
        return self._peak

    def account(self, change_bytes: int) -> None:
        """Note that buffers take *change_bytes* more (or less) than before."""
        with self._lock:
            self._current += change_bytes
            if self._current > self._peak:
                self._peak = self._current

    def join(self, sharer: Budgeted) -> None:
        """Add somebody to those among whom the limit is divided."""
        self._sharers.add(sharer)
        self._tell_sharers()

    def leave(self, sharer: Budgeted) -> None:
        """Remove somebody; the others get more."""
        self._sharers.discard(sharer)
        self._tell_sharers()

    def share_bytes(self) -> int:
        """Return what one of the sharers may take."""
        return self._max_cache_size_bytes // max(1, len(self._sharers))

    def _tell_sharers(self) -> None:
        for sharer in list(self._sharers):
            sharer.limit_changed()


parameters = Parameters()
