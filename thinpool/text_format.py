"""What the writers of a dump have in common: each passes on one line after the other, some kilobytes at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BUFFERED_LINES = 1024


class TextWriter:
    """Passes lines of ASCII to *write*, some kilobytes at a time."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._lines: list[str] = []

    def _line(self, text: str) -> None:
        self._lines.append(text)
        if len(self._lines) >= _BUFFERED_LINES:
            self.flush()

    def flush(self) -> None:
        """Pass on everything visited so far."""
        if self._lines:
            data = "".join(self._lines).encode("ascii")
            self._lines.clear()
            self._write(data)
