"""Block devices as the cache sees them: read, write, flush, discard, size.

A device is anything with the methods of :class:`Device`; :class:`FileDevice` is a regular file or a block device,
:class:`MemoryDevice` is bytes in memory.  Offsets and lengths are in bytes.  Source: docs/bufio.md, "Devices".
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from operator import attrgetter
from struct import pack, unpack
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    ReadableBuffer = bytes | bytearray | memoryview
    WritableBuffer = bytearray | memoryview
    PathLike = str | os.PathLike[str]

    class SupportsFileno(Protocol):
        """An open file, as far as a device needs one."""

        def fileno(self) -> int:
            """Return the file descriptor."""


_BLKGETSIZE64 = 0x80081272
_BLKDISCARD = 0x1277
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MAX_IOVECS = 1024


class Device(Protocol):
    """What the cache asks of a device.  Errors are ``OSError``; a transfer is whole or an error.

    What reaches beyond the end is EIO, whether read, written or discarded: a device does not grow by being written.  A
    negative offset is EINVAL.
    """

    @property
    def name(self) -> str:
        """What messages call the device: a path, or a word."""

    @property
    def size_bytes(self) -> int:
        """Present size.  Asked for each time it matters: a device may grow."""

    @property
    def read_only(self) -> bool:
        """True when every write and discard is refused."""

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        """Fill *buffer* from byte *offset*."""

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        """Fill *buffers* one after the other from consecutive bytes beginning at *offset*."""

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        """Write *data* at byte *offset*."""

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        """Write *buffers* one after the other to consecutive bytes beginning at *offset*."""

    def flush(self) -> None:
        """Make durable everything written before the call."""

    def discard(self, offset: int, length: int) -> None:
        """Tell the device that a range holds nothing of interest; EOPNOTSUPP where it cannot be told."""

    def close(self) -> None:
        """Give the device back."""


_NBYTES = attrgetter("nbytes")


def nbytes(buffers: Sequence[ReadableBuffer]) -> int:
    """Return the bytes of all *buffers* together."""
    try:
        # What a cache transfers is views, and a megabyte of them is counted for each call.
        return sum(map(_NBYTES, buffers))
    except AttributeError:
        return sum(memoryview(b).nbytes for b in buffers)


def transfer_whole(
    call: Callable[[Sequence[Any], int], int],
    buffers: Sequence[ReadableBuffer],
    length: int,
    offset: int,
    verb: str,
    name: str,
) -> None:
    """Repeat a vectored *call* until all *buffers* are through.

    Every device whose raw transfers may be short shares this, so that all retry and complain alike.

    :param call: moves bytes between the buffers and consecutive bytes at an offset; returns how many it moved, and
        raises what went wrong with the place in it.  It is never given more buffers than the system takes at once
    :param length: bytes of all *buffers* together
    :param verb: ``read`` or ``write``, for the message
    :param name: what the message calls the device
    :raises OSError: EIO when *call* moves nothing although something is left, as it does at the end of a device
    """
    # Nearly every transfer is over after this, and then nothing has been built or copied.
    done = call(buffers if len(buffers) <= _MAX_IOVECS else buffers[:_MAX_IOVECS], offset)
    missing = length - done
    if not missing:
        return
    offset += done
    views = [memoryview(b).cast("B") for b in buffers]
    at = 0  # the first of the views that is not through
    while missing:
        while done >= views[at].nbytes:
            done -= views[at].nbytes
            at += 1
        views[at] = views[at][done:]
        done = call(views[at : at + _MAX_IOVECS], offset)
        if not done:
            raise OSError(errno.EIO, f"short {verb}: {missing} bytes missing at byte {offset}", name)
        missing -= done
        offset += done


def _at_byte(error: OSError, offset: int, verb: str, name: str) -> OSError:
    """Say of which device and which byte an error of the system speaks."""
    return OSError(error.errno, f"cannot {verb} at byte {offset}: {error.strerror}", name)


class FileDevice:
    """A regular file or a block device, opened by path.

    :param read_only: open without the right to write
    :param direct: open with O_DIRECT; buffers, offsets and lengths must then be aligned (the cache's own are)
    :param exclusive: a block device is opened O_EXCL, a file is locked (shared when *read_only*), so that two writers
        cannot meet
    :raises OSError: as ``open`` does; EINVAL for what is neither a file nor a block device; EBUSY when somebody else
        has it
    """

    def __init__(self, path: PathLike, read_only: bool = False, direct: bool = False, exclusive: bool = False) -> None:
        self.path = os.fspath(path)
        self.direct = direct
        self._read_only = read_only
        mode = os.stat(self.path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "Not a block device or regular file", self.path)
        self._is_block_device = stat.S_ISBLK(mode)
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
        if direct:
            flags |= os.O_DIRECT
        if exclusive and self._is_block_device:
            flags |= os.O_EXCL
        self._fd = os.open(self.path, flags)
        self._size_seen = 0
        if exclusive and not self._is_block_device:
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._fd)
                if error.errno == errno.EWOULDBLOCK:
                    raise OSError(errno.EBUSY, "locked by another process", self.path) from None
                raise

    @classmethod
    def of_open_file(cls, file: SupportsFileno) -> Self:
        """Make a device of a file that is open already, with the rights it was opened with.

        *file* has ``fileno()``; the device has a descriptor of its own, and closing one leaves the other open.
        """
        fd = file.fileno()
        mode = os.fstat(fd).st_mode
        name = str(getattr(file, "name", fd))
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.EINVAL, "Not a block device or regular file", name)
        self = cls.__new__(cls)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_APPEND:
            raise OSError(errno.EINVAL, "opened for appending: writes would not go where they belong", name)
        self.path = name
        self.direct = bool(flags & os.O_DIRECT)
        self._read_only = flags & os.O_ACCMODE == os.O_RDONLY
        self._is_block_device = stat.S_ISBLK(mode)
        self._fd = os.dup(fd)
        self._size_seen = 0
        return self

    @property
    def name(self) -> str:
        return self.path

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def size_bytes(self) -> int:
        if self._is_block_device:
            size: int = unpack("Q", fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8)))[0]
            return size
        return os.fstat(self._fd).st_size

    def fileno(self) -> int:
        """Return the file descriptor, for ``fstat`` and the like."""
        return self._fd

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        # What a cache misses is read here: one call, and the general case only if it comes back short.
        try:
            done = os.preadv(self._fd, (buffer,), offset)
        except OSError as error:
            raise _at_byte(error, offset, "read", self.path) from error
        if done != memoryview(buffer).nbytes:
            self.preadv([memoryview(buffer).cast("B")[done:]], offset + done)

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        transfer_whole(self._preadv, buffers, nbytes(buffers), offset, "read", self.path)

    def _preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> int:
        try:
            return os.preadv(self._fd, buffers, offset)
        except OSError as error:
            raise _at_byte(error, offset, "read", self.path) from error

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        length = memoryview(data).nbytes
        self._check_end(offset + length, offset, "write")
        done = self._pwritev((data,), offset)
        if done != length:
            self.pwritev([memoryview(data).cast("B")[done:]], offset + done)

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        length = nbytes(buffers)
        self._check_end(offset + length, offset, "write")
        transfer_whole(self._pwritev, buffers, length, offset, "write", self.path)

    def _pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> int:
        try:
            return os.pwritev(self._fd, buffers, offset)
        except OSError as error:
            raise _at_byte(error, offset, "write", self.path) from error

    def _check_end(self, end: int, offset: int, verb: str) -> None:
        """Refuse to reach beyond the end, where a file would quietly grow.

        The size is asked for only when it is no longer large enough, as it is once after the device has grown.
        """
        if end > self._size_seen:
            self._size_seen = self.size_bytes
            if end > self._size_seen:
                raise OSError(errno.EIO, f"cannot {verb} at byte {offset}: beyond the end", self.path)

    def flush(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise OSError(error.errno, f"cannot flush: {error.strerror}", self.path) from error

    def discard(self, offset: int, length: int) -> None:
        if offset < 0:
            raise OSError(errno.EINVAL, f"cannot discard at byte {offset}: {os.strerror(errno.EINVAL)}", self.path)
        self._check_end(offset + length, offset, "discard")
        if not length:
            return  # which the system calls an invalid argument
        if self._is_block_device:
            try:
                fcntl.ioctl(self._fd, _BLKDISCARD, pack("QQ", offset, length))
            except OSError as error:
                raise _at_byte(error, offset, "discard", self.path) from error
            return
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if libc.fallocate(self._fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot discard {length} bytes at byte {offset}: {os.strerror(number)}", self.path)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class MemoryDevice:
    """Bytes in memory: for tests, and for work on a copy that nobody shall see.

    :param contents: a size in bytes (zeroed), or the bytes to begin with (copied)
    """

    def __init__(self, contents: int | ReadableBuffer, name: str = "memory") -> None:
        self._bytes = bytearray(contents)
        self._view = memoryview(self._bytes)
        self._name = name
        self._read_only = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def size_bytes(self) -> int:
        return len(self._bytes)

    def grow(self, size_bytes: int) -> None:
        """Make the device larger, with zeros."""
        self._view.release()
        self._bytes.extend(bytes(size_bytes - len(self._bytes)))
        self._view = memoryview(self._bytes)

    def contents(self) -> bytes:
        """Return a copy of everything on the device."""
        return bytes(self._bytes)

    def _range(self, offset: int, length: int, verb: str) -> slice:
        if offset < 0:
            raise OSError(errno.EINVAL, f"cannot {verb} at byte {offset}: {os.strerror(errno.EINVAL)}", self._name)
        if offset + length > len(self._bytes):
            raise OSError(errno.EIO, f"cannot {verb} at byte {offset}: beyond the end", self._name)
        return slice(offset, offset + length)

    def readinto(self, buffer: WritableBuffer, offset: int) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self._bytes[self._range(offset, view.nbytes, "read")]

    def preadv(self, buffers: Sequence[WritableBuffer], offset: int) -> None:
        for buffer in buffers:
            self.readinto(buffer, offset)
            offset += memoryview(buffer).nbytes

    def pwrite(self, data: ReadableBuffer, offset: int) -> None:
        end = offset + len(data)
        if offset >= 0 and end <= len(self._bytes):
            try:
                # What a cache writes; assigned to the bytearray itself it would be copied twice.
                self._view[offset:end] = data
                return
            except ValueError:
                # Not a view of bytes, or the device is just growing.
                pass
        view = memoryview(data).cast("B")
        self._bytes[self._range(offset, view.nbytes, "write")] = view

    def pwritev(self, buffers: Sequence[ReadableBuffer], offset: int) -> None:
        self.pwrite(b"".join(buffers), offset)

    def flush(self) -> None:
        """Do nothing: memory is as durable as it will ever be."""

    def discard(self, offset: int, length: int) -> None:
        self._bytes[self._range(offset, length, "discard")] = bytes(length)

    def close(self) -> None:
        """Do nothing; the contents stay, as those of a device do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
