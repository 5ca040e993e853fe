"""What the pool raises: the kernel's error number, and a sentence that names the device or block and what was found.

Raised for the arguments or the pool's state, with nothing changed: :class:`DeviceExists`, :class:`NoSuchDevice`,
:class:`DeviceBusy`, :class:`NotMapped`, :class:`TransactionMismatch`, :class:`ReadOnly`, and :class:`OutOfSpace` for
data.  Raised midway, after which only ``abort()`` helps: :class:`OutOfSpace` for metadata, :class:`Corrupt`, and a
plain :class:`ThinError` for an I/O error.  Source: docs/design.md, "Errors".
"""

from __future__ import annotations

import errno
import os

from persistent_data.errors import CorruptMetadata, NoFreeBlock, ReadOnlyMetadata
from persistent_data.errors import WouldBlock as BlockNotCached


class ThinError(OSError):
    """Base of everything the pool raises.  ``errno`` is what the kernel returns in the same place."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)


class DeviceExists(ThinError):
    """The device id to be created is taken (EEXIST)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EEXIST, message)


class NoSuchDevice(ThinError, KeyError):
    """The pool has no device of that id (ENODATA, the kernel's number for it)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENODATA, message)

    __str__ = OSError.__str__


class DeviceBusy(ThinError):
    """A device is still open, or a metadata snapshot is already held (EBUSY)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EBUSY, message)


class NotMapped(ThinError, KeyError):
    """The thin block or range has no mapping (ENODATA).  Says nothing about damage: that is :class:`Corrupt`."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENODATA, message)

    __str__ = OSError.__str__


class OutOfSpace(ThinError):
    """No free data block (nothing has changed), or no free metadata block (abort) (ENOSPC)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class WouldBlock(ThinError):
    """The answer needs I/O and the caller asked for none (EWOULDBLOCK).  ``issue_prefetches()`` and try again."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EWOULDBLOCK, message)


class ReadOnly(ThinError):
    """The pool is in read-only mode, or its metadata was opened so (EPERM)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EPERM, message)


class TransactionMismatch(ThinError):
    """The transaction id is not the one the caller expected (EINVAL)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EINVAL, message)


class Corrupt(ThinError):
    """The metadata breaks a rule of its format: checksum, block number, order of keys, an impossible value.

    ``block`` is the metadata block at fault (None if there is no single one), ``rule`` the rule in a few words.
    """

    def __init__(self, block: int | None, rule: str, *, number: int = errno.EILSEQ, message: str = "") -> None:
        self.block = block
        self.rule = rule
        place = "metadata" if block is None else f"metadata block {block}"
        super().__init__(number, message or f"{place}: {rule}")


def from_below(error: OSError) -> ThinError:
    """Return what the pool raises for an error of the layers below."""
    if isinstance(error, ThinError):
        return error
    message = error.strerror or str(error)
    if isinstance(error, CorruptMetadata):
        return Corrupt(error.block, error.rule, number=error.errno or errno.EILSEQ, message=message)
    if isinstance(error, NoFreeBlock):
        return OutOfSpace(message)
    if isinstance(error, ReadOnlyMetadata):
        return ReadOnly(message)
    if isinstance(error, BlockNotCached):
        return WouldBlock(message)
    if error.filename is not None:
        message = f"{os.fsdecode(error.filename)}: {message}"
    return ThinError(error.errno or errno.EIO, message)
