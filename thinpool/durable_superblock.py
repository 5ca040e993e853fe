"""Make sure of the superblock that was found before anything else is written."""

from __future__ import annotations

from mmap import mmap
from typing import TYPE_CHECKING

from persistent_data.layout import BLOCK_SIZE
from thinpool.layout import SUPERBLOCK_LOCATION

if TYPE_CHECKING:
    from bufio.device import Device


def make_superblock_durable(device: Device) -> None:
    """Write the superblock that is found on *device* once more, byte for byte, and flush.

    Whoever wrote it may have been told that the flush failed.  It is read back all the same, but a power cut may bring
    back the one before, and then the blocks that only that one refers to must not have been overwritten.

    :raises OSError: the device cannot be read or written
    """
    superblock = memoryview(mmap(-1, BLOCK_SIZE))  # page-aligned, as O_DIRECT wants it
    device.readinto(superblock, SUPERBLOCK_LOCATION * BLOCK_SIZE)
    device.pwrite(superblock, SUPERBLOCK_LOCATION * BLOCK_SIZE)
    device.flush()
