"""Many threads on one cache: deadlines, an order that follows from a seed, and a device that sees what must not be."""

from __future__ import annotations

import random
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bufio import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bufio import Device
    from bufio.device import ReadableBuffer, WritableBuffer
    from bufio.testing import FaultyDevice, Gate

_PAUSE_SECONDS = 0.0001
_CALM = 4
"""Looks in a row at which nobody had got any further, until all are taken to wait for the schedule."""


def stacks() -> str:
    """Return where every thread is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames)


class Team:
    """Threads that work together until all have ended, one has failed or the deadline is over.

    A worker asks :meth:`goes_on` before each step, so that the failure of one is the end of all.
    """

    def __init__(self) -> None:
        self.nr_running = 0
        self.progress = 0
        """Steps that were begun."""
        self._changed = threading.Condition()
        self._failures: list[BaseException] = []

    def start(self, work: Callable[..., object], *args: object) -> None:
        """Let a thread do *work*."""

        def run() -> None:
            try:
                work(*args)
            except BaseException as failure:
                self._failures.append(failure)
            finally:
                with self._changed:
                    self.nr_running -= 1
                    self._changed.notify_all()

        self.nr_running += 1
        threading.Thread(target=run, name=f"worker {args}", daemon=True).start()

    def goes_on(self) -> bool:
        """Whether there is reason for another step."""
        self.progress += 1
        return not self._failures

    def join(self) -> None:
        """Wait until all have ended; raise what one of them raised."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: not self.nr_running, DEADLINE)
        if self._failures:
            raise self._failures[0]
        if not in_time:
            pytest.fail(f"{self.nr_running} threads hang\n{stacks()}")


class Schedule:
    """Stops every call of some devices, and lets one go on at a time, chosen by a seed, when nobody can go on without.

    What happens between two calls is left to the interpreter, so that a seed gives much the same order again and not
    exactly the same.
    """

    def __init__(self, seed: int, devices: Sequence[FaultyDevice[Any]]) -> None:
        self._rng = random.Random(seed)
        self._devices = devices
        self._gates: list[Gate] = [device.on("read", "write", "flush").gate(DEADLINE) for device in devices]

    def drive(self, team: Team) -> None:
        """Let the team do its work, and wait for its end."""
        deadline = time.monotonic() + DEADLINE
        try:
            while team.nr_running and time.monotonic() < deadline:
                self._await_calm(team)
                waiting = [(gate, at) for gate in self._gates for at in range(len(gate.waiting))]
                if waiting:
                    gate, at = self._rng.choice(waiting)
                    gate.release(at)
        finally:
            for gate in self._gates:
                gate.remove()
        team.join()

    def _await_calm(self, team: Team) -> None:
        seen = None
        calm = 0
        while calm < _CALM and sum(len(gate.waiting) for gate in self._gates) < team.nr_running:
            time.sleep(_PAUSE_SECONDS)
            now = (team.progress, team.nr_running, [len(device.log) for device in self._devices])
            calm = calm + 1 if now == seen else 0
            seen = now


class SharedLock:
    """Any number of readers, or one writer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0  # -1 for a writer

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Be one of the readers."""
        with self._changed:
            self._await(lambda: self._users >= 0)
            self._users += 1
        try:
            yield
        finally:
            self._leave(-1)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Be the writer."""
        with self._changed:
            self._await(lambda: self._users == 0)
            self._users = -1
        try:
            yield
        finally:
            self._leave(1)

    def _await(self, condition: Callable[[], bool]) -> None:
        assert self._changed.wait_for(condition, DEADLINE), f"a lock of the test was not given back\n{stacks()}"

    def _leave(self, change: int) -> None:
        with self._changed:
            self._users += change
            self._changed.notify_all()


class Traffic:
    """Passes calls on to a device, and takes note of what no cache may ask of it.

    That is: a transfer of a block while another of the same block is on its way, because two reads of it are one too
    many, what is read while it is written is old or torn, and two writes come in any order; and the read of a block
    that somebody has in his hands (:meth:`holding`).
    """

    read_only = False

    def __init__(self, inner: Device, block_size: int) -> None:
        self.inner = inner
        self.violations: list[str] = []
        self._block_size = block_size
        self._lock = threading.Lock()
        self._under_way: Counter[tuple[str, int]] = Counter()
        self._held: Counter[int] = Counter()

    @property
    def name(self) -> str:
        """That of the device below."""
        return self.inner.name

    @property
    def size_bytes(self) -> int:
        """That of the device below."""
        return self.inner.size_bytes

    @contextmanager
    def holding(self, block: int) -> Iterator[None]:
        """Say that the caller holds a block."""
        with self._lock:
            self._held[block] += 1
            if self._under_way["read", block]:
                self.violations.append(f"block {block} is held while it is being read")
        try:
            yield
        finally:
            with self._lock:
                self._held[block] -= 1

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Read."""
        with self._transfer("read", [buffer], offset):
            self.inner.readinto(buffer, offset)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Read neighbours."""
        with self._transfer("read", buffers, offset):
            self.inner.preadv(buffers, offset)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write."""
        with self._transfer("write", [data], offset):
            self.inner.pwrite(data, offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write neighbours."""
        with self._transfer("write", buffers, offset):
            self.inner.pwritev(buffers, offset)

    def flush(self) -> None:
        """Flush."""
        self.inner.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard."""
        self.inner.discard(offset, length)

    def close(self) -> None:
        """Close the device below."""
        self.inner.close()

    @contextmanager
    def _transfer(self, kind: str, buffers: Sequence[ReadableBuffer], offset: int) -> Iterator[None]:
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        blocks = range(offset // self._block_size, (offset + length - 1) // self._block_size + 1)
        with self._lock:
            for block in blocks:
                if kind == "read" and self._held[block]:
                    self.violations.append(f"block {block} is read while it is held")
                for other in ("read", "write"):
                    if self._under_way[other, block]:
                        self.violations.append(f"{kind} of block {block} during a {other} of it")
                self._under_way[kind, block] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way.subtract((kind, block) for block in blocks)
