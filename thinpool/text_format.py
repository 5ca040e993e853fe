"""What the writers of a dump have in common: lines go out by the thousand, and runs may come in by the thousand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from bufio.device import ReadableBuffer
    from persistent_data.block_batches import Words
    from thinpool.bulk_text import BulkText

_BUFFERED_LINES = 1024
WORTH_ARRAYS = 512
"""Runs from which on array operations are faster than one after the other."""


class TextWriter:
    """Passes lines of ASCII to *write*, some kilobytes or megabytes at a time.

    A subclass tells how runs become lines, one by one in :meth:`mapping` and by the thousand in :meth:`_columns`.

    :cvar lines_of_runs: text with ``%d`` for each kind of line that a run can become, and for each ``%d`` the column
        of what :meth:`_columns` returns
    """

    lines_of_runs: Sequence[tuple[str, tuple[int, ...]]]

    def __init__(self, write: Callable[[ReadableBuffer], object]) -> None:
        self._write = write
        self._lines: list[str] = []
        self._bulk: BulkText | None = None

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

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        """Write a run."""
        raise NotImplementedError

    def mappings(self, thin_begins: Words, data_begins: Words, lengths: Words, times: Words) -> None:
        """Write runs."""
        if len(lengths) < WORTH_ARRAYS:
            for run in zip(thin_begins.tolist(), data_begins.tolist(), lengths.tolist(), times.tolist(), strict=True):
                self.mapping(*run)
            return
        if self._bulk is None:
            from thinpool.bulk_text import BulkText

            self._bulk = BulkText([_template(*line) for line in self.lines_of_runs])
        self.flush()
        self._write(self._bulk.lines(*self._columns(thin_begins, data_begins, lengths, times)))

    def _columns(
        self, thin_begins: Words, data_begins: Words, lengths: Words, times: Words
    ) -> tuple[NDArray[np.uint8] | None, list[Words]]:
        """Return for each run the kind of its line, and the numbers that go there."""
        raise NotImplementedError


def _template(text: str, columns: Sequence[int]) -> tuple[str | int, ...]:
    """Return *text* with the columns in place of each ``%d``, in the form of :class:`thinpool.bulk_text.BulkText`."""
    first, *others = text.split("%d")
    return (first, *(piece for pair in zip(columns, others, strict=True) for piece in pair))
