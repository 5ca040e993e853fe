"""Tell a superblock from anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.checksum import SUPERBLOCK_SALT, block_checksum
from persistent_data.damage import Fault
from persistent_data.node_check import BLOCKNR_MISMATCH
from thinpool.layout import SUPERBLOCK_MAGIC, Superblock

if TYPE_CHECKING:
    from bufio.device import ReadableBuffer

BAD_CHECKSUM = "bad checksum in superblock"
BAD_MAGIC = "bad magic in superblock"
BAD_BLOCKNR = "superblock has a " + BLOCKNR_MISMATCH


def superblock_fault(content: ReadableBuffer, location: int) -> Fault | None:
    """Say what keeps the metadata block *content*, read from *location*, from being a superblock; None if nothing does.

    The kernel looks at the checksum last (:func:`thinpool.layout.superblock_error`).  Here it comes first: of a block
    that is something else altogether, or nothing, every reader of messages expects to hear that.
    """
    sb = Superblock.unpack(content)
    wanted = block_checksum(content, SUPERBLOCK_SALT)
    if sb.csum != wanted:
        return Fault(BAD_CHECKSUM, f"{sb.csum:#010x} is stored, {wanted:#010x} is computed")
    if sb.magic != SUPERBLOCK_MAGIC:
        return Fault(BAD_MAGIC, f"{sb.magic} instead of {SUPERBLOCK_MAGIC}")
    if sb.blocknr != location:
        return Fault(BAD_BLOCKNR, f"the block says it is block {sb.blocknr}")
    return None
