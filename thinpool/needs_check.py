"""Clear the flag by which the kernel asks for a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.block_reader import BlockReader
from persistent_data.checksum import SUPERBLOCK_SALT, block_checksum
from thinpool.errors import Corrupt
from thinpool.layout import NEEDS_CHECK_FLAG, SUPERBLOCK_LOCATION, Superblock
from thinpool.superblock_check import superblock_fault

if TYPE_CHECKING:
    from bufio.device import Device


def clear_needs_check(device: Device) -> bool:
    """Clear the needs_check flag in the superblock on *device*, and make that durable; say whether it was set.

    Nothing is written if it was not.  Everything else in the block stays as it is.

    :raises Corrupt: there is no sound superblock
    :raises OSError: the device cannot be read or written
    """
    content = BlockReader(device).read(SUPERBLOCK_LOCATION)
    fault = superblock_fault(content, SUPERBLOCK_LOCATION)
    if fault is not None:
        raise Corrupt(SUPERBLOCK_LOCATION, fault.rule, message=f"{fault} (block {SUPERBLOCK_LOCATION})")
    sb = Superblock.unpack(content)
    if not sb.needs_check:
        return False
    sb.flags &= ~NEEDS_CHECK_FLAG
    sb.pack_into(content)
    sb.csum = block_checksum(content, SUPERBLOCK_SALT)
    sb.pack_into(content)
    device.pwrite(content, 0)
    device.flush()
    return True
