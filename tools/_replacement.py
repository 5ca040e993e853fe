"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

from ._cli import Failure, os_error

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Replacement:
    """A new file beside *path* that takes its place once it is complete, and is removed if it does not get there.

    A file that somebody has locked, such as a pool that is open, is not replaced: what is written to it from then on
    would be lost.  Within the context, signals that ask the program to end are interrupts, so they leave nothing behind
    either.

    :ivar path: where the new file is meanwhile
    :param status: that of *path*, None if there is no such file; its mode and, if permitted, its owner are kept
    :raises OSError: *path* must not be written, or there cannot be a file beside it
    :raises Failure: *path* is in use
    """

    def __init__(self, path: str, status: os.stat_result | None) -> None:
        self._target = os.path.realpath(path)
        self._directory = os.path.dirname(self._target)
        self.path = os.path.join(self._directory, f".thinpool-{os.getpid()}.partial")
        self._locked = None if status is None else _lock(self._target)
        self._status = status
        self._handlers = [(number, signal.getsignal(number)) for number in _ENDING_SIGNALS]

    def __enter__(self) -> Replacement:
        for number, handler in self._handlers:
            if handler == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
        try:
            self._create()
        except BaseException:
            self._let_go()
            raise
        return self

    def _create(self) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if self._status is not None:
                _copy_rights(self._status, fd)
        finally:
            os.close(fd)

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        try:
            if kind is None:
                os.rename(self.path, self._target)
                self._flush_directory()
        finally:
            if os.path.exists(self.path):
                os.unlink(self.path)
            self._let_go()

    def _flush_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _let_go(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
        for number, handler in self._handlers:
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def _lock(path: str) -> int:
    """Open *path* for writing, so that nobody else can; return the descriptor."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EWOULDBLOCK:
            raise
        busy = os_error(OSError(errno.EBUSY, os.strerror(errno.EBUSY)))
        raise Failure(f"Couldn't open output file '{path}': {busy}: it is in use") from None
    return fd


def _copy_rights(status: os.stat_result, fd: int) -> None:
    try:
        os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError:
        pass  # a file of somebody else becomes one's own
    os.fchmod(fd, status.st_mode & 0o7777)
