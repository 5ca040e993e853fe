"""What the tests of the buffer client share: a device of numbered blocks, threads, and short words for long calls."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from bufio import parameters
from bufio.core import BUFFER_OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from bufio import Client
    from tests.support.devices import FaultyMemory

T = TypeVar("T")

SIZE = 4096
NR_BLOCKS = 64
DEADLINE = 20.0  # seconds
FEW = 8
"""Buffers of a client that is given hardly any memory."""
FEW_BYTES = FEW * (SIZE + BUFFER_OVERHEAD_BYTES)


def allocated_bytes() -> int:
    """What buffers take now, after those of caches that earlier tests have left were collected."""
    gc.collect()
    return parameters.current_allocated_bytes


def dismiss_other_caches() -> None:
    """Have what earlier tests have left take no share of the limit of memory any more."""
    for cache in parameters.caches():
        parameters.leave(cache)


def content(block: int) -> bytes:
    """What a block of the device holds before anything is written."""
    return bytes([block + 1]) * SIZE


class Threads:
    """Runs calls in threads of their own, which do not keep a test from ending when one of them hangs."""

    def submit(self, call: Callable[..., T], *args: object) -> Future[T]:
        """Start a call."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future


def result_of(future: Future[T]) -> T:
    """Wait for a result, not for ever."""
    return future.result(DEADLINE)


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until *condition* holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)  # the others get their turn


def read(client: Client, block: int) -> bytes:
    """Read a block and let go of it."""
    buffer = client.read(block)
    try:
        return bytes(buffer.data)
    finally:
        buffer.release()


def dirty(client: Client, block: int, value: int) -> None:
    """Change a block and let go of it."""
    buffer = client.new(block)
    buffer.data[:] = bytes([value]) * SIZE
    buffer.mark_dirty()
    buffer.release()


def on_device(device: FaultyMemory, block: int) -> int:
    """The byte that a block of the device is full of."""
    found = set(device.contents()[block * SIZE : (block + 1) * SIZE])
    assert len(found) == 1
    return found.pop()
