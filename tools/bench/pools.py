"""Pools to measure on, and a device that counts what is read."""

from __future__ import annotations

import shutil
import subprocess
from struct import Struct
from typing import TYPE_CHECKING

from bufio import FileDevice
from persistent_data.layout import BLOCK_SIZE, INTERNAL_NODE, NODE_HEADER, NODE_HEADER_SIZE
from thinpool import PoolMetadata
from thinpool.layout import Superblock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bufio import Device
    from bufio.device import ReadableBuffer, WritableBuffer

__all__ = ["DATA_BLOCK_SIZE", "CountingDevice", "make_linear_pool", "metadata_bytes", "tree_depth"]

DATA_BLOCK_SIZE = 128  # sectors
_COMMIT_EVERY = 100_000
_U64 = Struct("<Q")


def metadata_bytes(nr_mappings: int) -> int:
    """Size of a metadata device with room for *nr_mappings* in half-full leaves, their copies, and the space maps."""
    return (nr_mappings // 40 + nr_mappings // 4000 + 2048) * BLOCK_SIZE


def make_linear_pool(path: Path, nr_mappings: int) -> str:
    """Make a pool with device 0 mapping [0..nr_mappings] in order, as a sparse file.  Returns what made it.

    ``thin_restore`` is used where it is installed, since what it writes is not of our making.
    """
    with open(path, "wb") as file:
        file.truncate(metadata_bytes(nr_mappings))
    restore = shutil.which("thin_restore", path="/usr/sbin:/sbin")
    if restore is not None:
        xml = path.with_suffix(".xml")
        xml.write_text(
            f'<superblock uuid="" time="0" transaction="0" version="2" data_block_size="{DATA_BLOCK_SIZE}" '
            f'nr_data_blocks="{2 * nr_mappings}">\n'
            f'<device dev_id="0" mapped_blocks="{nr_mappings}" transaction="0" creation_time="0" snap_time="0">\n'
            f'<range_mapping origin_begin="0" data_begin="0" length="{nr_mappings}" time="0"/>\n'
            "</device>\n</superblock>\n"
        )
        subprocess.run([restore, "-i", xml, "-o", path], check=True, capture_output=True)
        xml.unlink()
        return "thin_restore"
    with PoolMetadata.format(path, DATA_BLOCK_SIZE, 2 * nr_mappings) as pool:
        pool.create_thin(0)
        with pool.open_thin_device(0) as device:
            for begin in range(0, nr_mappings, _COMMIT_EVERY):
                device.provision(begin, min(_COMMIT_EVERY, nr_mappings - begin))
                pool.commit()
    return "thinpool"


class CountingDevice:
    """A device that hands everything on to another and counts the metadata blocks that are read from it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.blocks_read = 0

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
        """Fill *buffer*, and count."""
        self.blocks_read += memoryview(buffer).nbytes // BLOCK_SIZE
        self._device.readinto(buffer, offset)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Fill *buffers*, and count."""
        self.blocks_read += sum(memoryview(buffer).nbytes for buffer in buffers) // BLOCK_SIZE
        self._device.preadv(buffers, offset)

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write *data*."""
        self._device.pwrite(data, offset)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write *buffers*."""
        self._device.pwritev(buffers, offset)

    def flush(self) -> None:
        """Make durable what was written."""
        self._device.flush()

    def discard(self, offset: int, length: int) -> None:
        """Discard a range."""
        self._device.discard(offset, length)

    def close(self) -> None:
        """Close the other device."""
        self._device.close()


def tree_depth(path: Path) -> int:
    """Levels of the mapping tree from the top node to the first leaf of the first device, both included."""
    with FileDevice(path, read_only=True) as device:
        block = bytearray(BLOCK_SIZE)

        def first_value(location: int) -> tuple[bool, int]:
            device.readinto(block, location * BLOCK_SIZE)
            _, flags, _, _, max_entries, _, _ = NODE_HEADER.unpack_from(block)
            (value,) = _U64.unpack_from(block, NODE_HEADER_SIZE + 8 * max_entries)
            return bool(flags & INTERNAL_NODE), value

        device.readinto(block, 0)
        location = Superblock.unpack(block).data_mapping_root
        depth = 0
        for _level in ("devices", "thin blocks"):
            internal = True
            while internal:
                internal, location = first_value(location)
                depth += 1
        return depth
