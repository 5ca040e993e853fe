"""What the cache raises besides plain ``OSError`` from the device.

*A mistake of the caller* is a :class:`HoldError`; *a wait that cannot end* is a :class:`WouldDeadlock`.  An I/O error
is the ``OSError`` that the device gave, with the device and the place in its message.
"""

from __future__ import annotations

import errno


class HoldError(ValueError):
    """A buffer was used in a way its holds do not allow: released too often, or closed or dropped while held."""


class WouldDeadlock(OSError):
    """No buffer can be had, and no other thread can give one back: every one is held by the thread that asks.

    ``blocks`` names the held blocks.  Release one, or give the client more memory or more reserved buffers.
    """

    def __init__(self, message: str, blocks: tuple[int, ...]) -> None:
        super().__init__(errno.EDEADLK, message)
        self.blocks = blocks
