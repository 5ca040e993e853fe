"""What the cache raises besides plain ``OSError`` from the device.

*A mistake of the caller* is a :class:`HoldError`; *a wait that cannot end* is a :class:`WouldDeadlock`; what a
:class:`bufio.Bcache` could not write is :class:`BlocksNotWritten`.  Any other I/O error is the ``OSError`` that the
device gave, with the device and the place in its message.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bufio.bcache import Block


class HoldError(ValueError):
    """A buffer was used in a way its holds do not allow: released too often, or closed or dropped while held."""


class WouldDeadlock(OSError):
    """No buffer can be had, and no thread will give one back: every one is held by the thread that asks, or by others
    that wait in vain for one as well.

    ``blocks`` names the held blocks.  Release one, or give the client more memory or more reserved buffers.
    """

    def __init__(self, message: str, blocks: tuple[int, ...]) -> None:
        super().__init__(errno.EDEADLK, message)
        self.blocks = blocks


class BlocksNotWritten(OSError):
    """Some blocks could not be written (EIO).  They are still known and dirty; the next flush tries again.

    ``blocks`` are those in error, ``skipped`` the dirty ones that were not tried because they are held.  The cause is
    the device's error for the first of them.
    """

    def __init__(self, blocks: list[Block], skipped: list[Block]) -> None:
        names = ", ".join(f"block {block.index} of {block.device.name}" for block in blocks)
        super().__init__(errno.EIO, f"{names} could not be written: {blocks[0].write_error}")
        self.blocks = blocks
        self.skipped = skipped
