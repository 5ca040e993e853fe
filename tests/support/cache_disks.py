"""The kinds of devices that cache scripts run on: made with a given content, looked at from outside, put back after.

``device`` is what a cache is given; ``faulty`` is the same with a :class:`FaultyDevice` in front, for scripts that let
transfers fail.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from bufio import FileDevice, MemoryDevice
from bufio.testing import CrashDevice, FaultyDevice
from bufio.testing.crash import Flush

if TYPE_CHECKING:
    from pathlib import Path

    from bufio import Device

_SECTOR_BYTES = 512


class Disk:
    """A device in memory; and what the other kinds have in common with it."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.device: Device
        self.faulty: FaultyDevice[Device]
        self._open()

    def _open(self) -> None:
        self._use(MemoryDevice(self.image))

    def _use(self, device: Device) -> None:
        self.device = device
        self.faulty = FaultyDevice(device)

    def look(self, offset: int, length: int) -> bytes:
        """Return what the device holds."""
        assert isinstance(self.device, MemoryDevice)
        return self.device.contents()[offset : offset + length]

    def unflushed(self) -> bool:
        """Return whether something may not have been made durable, as far as this kind of device can tell."""
        return False

    def put_back(self) -> None:
        """Let the device be again what it was at the beginning, without faults."""
        self._open()

    def close(self) -> None:
        """Give everything back."""
        self.device.close()


class CrashDisk(Disk):
    """A device that knows what is durable."""

    def _open(self) -> None:
        self._use(CrashDevice(self.image))

    def unflushed(self) -> bool:
        """Return whether the last thing that happened to the device is anything but a flush."""
        assert isinstance(self.device, CrashDevice)
        trace = self.device.trace
        return bool(trace) and not isinstance(trace[-1], Flush)


class FaultyDisk(Disk):
    """A device whose transfers come in pieces, and one in twenty of them late."""

    def _open(self) -> None:
        pieces = FaultyDevice(MemoryDevice(self.image))
        pieces.on("read", "write").shorten(3 * _SECTOR_BYTES)
        pieces.on("read", "write", chance=0.05).delay(100e-6)
        self._use(pieces)

    def look(self, offset: int, length: int) -> bytes:
        """Return what the device behind the faulty one holds."""
        assert isinstance(self.device, FaultyDevice)
        contents: bytes = self.device.inner.contents()
        return contents[offset : offset + length]


class FileDisk(Disk):
    """The file *path*, which is made, looked at through a descriptor of its own.

    :param direct: the device (not that descriptor) has O_DIRECT
    """

    def __init__(self, image: bytes, path: Path, direct: bool = False) -> None:
        self._path = path
        path.write_bytes(image)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._direct = direct
        super().__init__(image)

    def _open(self) -> None:
        self._use(FileDevice(self._path, direct=self._direct))

    def look(self, offset: int, length: int) -> bytes:
        """Return what the file holds."""
        return os.pread(self._fd, length, offset)

    def put_back(self) -> None:
        """Write what is different."""
        present = self.look(0, len(self.image))
        step = max(_SECTOR_BYTES, len(self.image) // 64)
        for at in range(0, len(self.image), step):
            wanted = self.image[at : at + step]
            if present[at : at + step] != wanted:
                os.pwrite(self._fd, wanted, at)
        self._use(self.device)

    def close(self) -> None:
        """Close the device and the descriptor."""
        super().close()
        os.close(self._fd)


def direct_is_refused(directory: Path) -> str | None:
    """Return why files in *directory* cannot be read and written a sector at a time with O_DIRECT; None if they can."""
    path = directory / "probe.img"
    path.write_bytes(bytes(2 * _SECTOR_BYTES))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        return f"no O_DIRECT in {directory}: {error.strerror}"
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as whole, whole[:_SECTOR_BYTES] as sector:
            os.preadv(descriptor, [sector], _SECTOR_BYTES)
            os.pwritev(descriptor, [sector], _SECTOR_BYTES)
    except OSError as error:
        return f"O_DIRECT in {directory} does not take single sectors: {error.strerror}"
    finally:
        os.close(descriptor)
        path.unlink()
    return None
