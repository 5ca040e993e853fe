"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import signal

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Replacement:
    """A new file beside *path* that takes its place once it is complete, and is removed if it does not get there.

    Within the context, signals that ask the program to end are interrupts, so they leave nothing behind either.

    :ivar path: where the new file is meanwhile
    :param status: that of *path*, None if there is no such file; its mode and, if permitted, its owner are kept
    :raises OSError: *path* must not be written, or there cannot be a file beside it
    """

    def __init__(self, path: str, status: os.stat_result | None) -> None:
        self._target = os.path.realpath(path)
        self._directory = os.path.dirname(self._target)
        self.path = os.path.join(self._directory, f".thinpool-{os.getpid()}.partial")
        if status is not None:
            os.close(os.open(self._target, os.O_WRONLY | os.O_CLOEXEC))
        self._status = status
        self._handlers = [(number, signal.getsignal(number)) for number in _ENDING_SIGNALS]

    def __enter__(self) -> Replacement:
        for number, handler in self._handlers:
            if handler == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
        try:
            self._create()
        except BaseException:
            self._give_signals_back()
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
            self._give_signals_back()

    def _flush_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers:
            if handler == signal.SIG_DFL:
                signal.signal(number, handler)


def _copy_rights(status: os.stat_result, fd: int) -> None:
    try:
        os.fchown(fd, status.st_uid, status.st_gid)
    except PermissionError:
        pass  # a file of somebody else becomes one's own
    os.fchmod(fd, status.st_mode & 0o7777)
