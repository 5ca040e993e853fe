"""A device with latency and nothing else, for measuring what engines make of it.

:class:`bufio.testing.FaultyDevice` has latency too, but logs every call and holds it against rules.  That takes 5
microseconds of the interpreter, which no device does, and where 16 calls overlap it is a fifth of the time of each.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio import Device
    from bufio.device import ReadableBuffer, WritableBuffer

__all__ = ["SlowDevice"]


class SlowDevice:
    """Hands everything on to another device; what transfers or flushes first sleeps for *latency_seconds*.

    The sleeps of several threads overlap.  The system makes them longer: 100 microseconds come to some 160 on Linux.
    """

    def __init__(self, device: Device, latency_seconds: float) -> None:
        self._device = device
        self._latency_seconds = latency_seconds

    @property
    def name(self) -> str:
        """What messages call the device."""
        return self._device.name

    @property
    def size_bytes(self) -> int:
        """Present size."""
        return self._device.size_bytes

    @property
    def read_only(self) -> bool:
        """True when every write and discard is refused."""
        return self._device.read_only

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill *buffer*, late."""
        time.sleep(self._latency_seconds)
        self._device.readinto(buffer, offset)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Fill *buffers*, late."""
        time.sleep(self._latency_seconds)
        self._device.preadv(buffers, offset)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write *data*, late."""
        time.sleep(self._latency_seconds)
        self._device.pwrite(data, offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write *buffers*, late."""
        time.sleep(self._latency_seconds)
        self._device.pwritev(buffers, offset)

    def flush(self) -> None:
        """Make durable what was written, late."""
        time.sleep(self._latency_seconds)
        self._device.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard a range."""
        self._device.discard(offset, length)

    def close(self) -> None:
        """Close the other device."""
        self._device.close()
