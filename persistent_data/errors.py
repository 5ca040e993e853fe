"""What the copy-on-write structures raise, with the kernel's error numbers.

Absence (:class:`KeyNotFound`) and damage (:class:`CorruptMetadata`) never share a class.  Errors of the device itself
come through as the ``OSError`` that it raised.  Source: docs/design.md, "Errors".
"""

from __future__ import annotations

import errno


class MetadataError(OSError):
    """Base of everything here; ``errno`` is the number the kernel's engine returns in the same place."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)


class CorruptMetadata(MetadataError):
    """A block cannot be what it has to be.  Never raised for a value that is merely absent.

    ``block`` is the metadata block at fault (None if there is no single one), ``rule`` the rule of
    docs/format.md that it breaks, in a few words.
    """

    def __init__(self, block: int | None, rule: str, *, number: int = errno.EILSEQ, where: str = "") -> None:
        self.block = block
        self.rule = rule
        self.where = where
        place = "metadata" if block is None else f"metadata block {block}"
        super().__init__(number, f"{place}: {rule}" + (f" ({where})" if where else ""))


class KeyNotFound(MetadataError, KeyError):
    """The tree has no such key."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENODATA, message)

    __str__ = OSError.__str__


class NoFreeBlock(MetadataError):
    """A space map has no block that is free both now and in the last commit."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class NoFreeMetadataBlock(NoFreeBlock):
    """It was the metadata space map: whatever was being changed is left half done."""


class ReadOnlyMetadata(MetadataError):
    """The block manager is in read-only mode."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EPERM, message)


class WouldBlock(MetadataError):
    """The block is not cached and the caller asked for no I/O, or it is locked by somebody else."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EWOULDBLOCK, message)


class InvalidArgument(MetadataError):
    """A block or a count out of range, or a call in a state that does not allow it."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)
