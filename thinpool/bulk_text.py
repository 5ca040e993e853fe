"""Lines of text that differ in their numbers, thousands at a time.

A batch is taken apart into lines of one shape: of one kind, with as many digits in each place.  For a shape there are
rows of bytes in which all but the digits is filled in already; they get their digits as columns, and are then laid down
where their lines belong.

Source: docs/design.md, "Text in bulk".
"""

from __future__ import annotations

from sys import getrefcount
from typing import TYPE_CHECKING

import numpy as np

from persistent_data.distinct import Distinct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Numbers = NDArray[np.unsignedinteger]
    Bytes = NDArray[np.uint8]
    Template = tuple[str | int, ...]
    _Part = tuple[int, int, int]
    """Of a code: what it counts for, how many values it has, and the least of these."""

LINES_AT_A_TIME = 1 << 16
"""Lines that are worth formatting together: more take more memory, and no less time each."""

_AT_ONCE = 4
"""Digits that are looked up together."""
_ROWS = 2048
"""Rows of one shape: as many as a processor's cache has room for."""
_MOST_ROOMS = 3
_SPARE = 8
_MOST_SHAPES = 128
"""Shapes whose rows are kept."""


def _digit_table(digits: int) -> NDArray[np.void]:
    """Return the numbers below 10**digits in decimal, by number."""
    numbers = np.arange(10**digits)[:, None]
    text = numbers // 10 ** np.arange(digits)[::-1] % 10 + ord("0")
    return text.astype(np.uint8).view(f"V{digits}")[:, 0]


class _Shape:
    """Rows for lines of one kind with as many digits in each place.

    :ivar size: bytes in a line
    """

    def __init__(self, template: Template, digits: Sequence[int]) -> None:
        self._fields: list[tuple[int, int, int]] = []
        line = b""
        for part in template:
            if isinstance(part, int):
                self._fields.append((part, len(line), digits[part]))
                line += bytes(digits[part])
            else:
                line += part.encode()
        self.size = len(line)
        self._rows = np.empty((_ROWS, self.size), np.uint8)
        self._rows[:] = np.frombuffer(line, np.uint8)

    def rows(self, columns: Sequence[Numbers], tables: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
        """Return the lines, :data:`_ROWS` at most, with the numbers in *columns*; they hold until the next call."""
        for column, offset, digits in self._fields:
            numbers = columns[column]
            end = offset + digits
            while digits > _AT_ONCE:
                higher = numbers // 10**_AT_ONCE
                self._put(end - _AT_ONCE, tables[_AT_ONCE], numbers - higher * 10**_AT_ONCE)
                numbers = higher
                end -= _AT_ONCE
                digits -= _AT_ONCE
            self._put(offset, tables[digits], numbers)
        return self._rows[: len(columns[0])].view(f"V{self.size}")[:, 0]

    def _put(self, offset: int, table: NDArray[np.void], numbers: Numbers) -> None:
        where = np.ndarray((len(numbers),), table.dtype, self._rows, offset, (self.size,))
        where[:] = table.take(numbers)


class BulkText:
    """Writes lines of several kinds.

    :param templates: for each kind its pieces of text, ASCII, and between them the columns whose numbers go there
    """

    def __init__(self, templates: Sequence[Template]) -> None:
        self._templates = templates
        self._tables = [np.empty(0, "V1"), *(_digit_table(digits) for digits in range(1, _AT_ONCE + 1))]
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._rooms: list[Bytes] = []

    def lines(self, kinds: NDArray[np.uint8] | None, columns: Sequence[Numbers]) -> memoryview:
        """Return lines as text.

        :param kinds: the kind of each line; None if there is only one
        :param columns: the numbers of the lines, arrays of one length
        """
        if not len(columns[0]):
            return memoryview(b"")
        columns = [_narrowed(column) for column in columns]
        codes, parts = _shape_codes(kinds, columns)
        if codes is None:
            return self._alike(self._shape(_parts_of(0, parts)), columns)
        if codes.itemsize == np.uint16().itemsize:
            counts = np.bincount(codes)
            present = distinct = np.flatnonzero(counts)
        else:
            found = Distinct(codes)
            distinct, codes, counts = found.values, found.places, found.counts
            present = np.arange(len(distinct))
        shapes = [self._shape(_parts_of(code, parts)) for code in distinct.tolist()]
        sizes = np.zeros(len(counts), np.int64)
        sizes[present] = [shape.size for shape in shapes]
        lengths = sizes.take(codes)
        ends = np.cumsum(lengths)
        order = np.argsort(codes, kind="stable")
        begins = (ends - lengths).take(order)
        columns = [column.take(order) for column in columns]
        out = self._room(int(ends[-1]))
        at = 0
        for code, shape in zip(present.tolist(), shapes, strict=True):
            # Windows as wide as a line, one at each byte: assigning to one lays a line down there.
            windows = np.ndarray((len(out) - shape.size + 1,), f"V{shape.size}", out, 0, (1,))
            end = at + int(counts[code])
            while at < end:
                following = min(at + _ROWS, end)
                windows[begins[at:following]] = shape.rows([column[at:following] for column in columns], self._tables)
                at = following
        return out.data

    def _alike(self, shape: _Shape, columns: Sequence[Numbers]) -> memoryview:
        """Return lines that are all of one shape."""
        count = len(columns[0])
        out = self._room(count * shape.size)
        lines = out.view(f"V{shape.size}")
        for at in range(0, count, _ROWS):
            following = at + _ROWS
            lines[at:following] = shape.rows([column[at:following] for column in columns], self._tables)
        return out.data

    def _room(self, size: int) -> Bytes:
        """Return an array of *size* bytes, old memory where possible: new memory takes longer to get than to fill."""
        # Texts that somebody still has hold references to theirs.
        for old, nr_references in zip(self._rooms, _reference_counts(self._rooms), strict=True):
            if len(old) >= size and nr_references == _UNUSED:
                return old[:size]
        new = np.empty(size + size // _SPARE, np.uint8)
        self._rooms = [*self._rooms[-_MOST_ROOMS + 1 :], new]
        return new[:size]

    def _shape(self, parts: tuple[int, ...]) -> _Shape:
        shape = self._shapes.get(parts)
        if shape is None:
            if len(self._shapes) == _MOST_SHAPES:
                self._shapes.clear()
            kind, *digits = parts
            shape = self._shapes[parts] = _Shape(self._templates[kind], digits)
        return shape


def _reference_counts(arrays: list[Bytes]) -> list[int]:
    return [getrefcount(array) for array in arrays]


_UNUSED = _reference_counts([np.empty(0, np.uint8)])[0]
"""What is counted of an array that is nowhere but in a list: this differs between interpreters."""


def _narrowed(numbers: Numbers) -> Numbers:
    """Return numbers in as few bits as computing with them takes."""
    return numbers if numbers.itemsize == 4 or int(numbers.max()) >> 32 else numbers.astype(np.uint32)


def _shape_codes(
    kinds: NDArray[np.uint8] | None, columns: Sequence[Numbers]
) -> tuple[NDArray[np.integer] | None, list[_Part]]:
    """Return a code for the kind of each line and its digits, None if all are equal, and how codes are put together."""
    parts: list[_Part] = []
    codes: NDArray[np.integer] | None = None
    factor = 1
    for values in (kinds, *map(_digits, columns)):
        if values is None or isinstance(values, int):
            parts.append((1, 1, values or 0))
            continue
        least = int(values.min())
        radix = int(values.max()) - least + 1
        parts.append((factor, radix, least))
        if radix > 1:
            # Sorting is much faster as long as the codes take 16 bits.
            size = np.dtype(np.uint16 if factor * radix <= 1 << 16 else np.int64)
            term = (values - np.uint8(least)).astype(size) * size.type(factor)
            codes = term if codes is None else codes.astype(size) + term
            factor *= radix
    return codes, parts


def _parts_of(code: int, parts: Sequence[_Part]) -> tuple[int, ...]:
    return tuple(code // factor % radix + least for factor, radix, least in parts)


def _digits(numbers: Numbers) -> NDArray[np.uint8] | int:
    """Return how many digits each number has, one number if all have as many."""
    least, most = (len(str(number)) for number in (numbers.min(), numbers.max()))
    if least == most:
        return least
    digits = np.full(len(numbers), least, np.uint8)
    for power in range(least, most):
        digits += numbers >= numbers.dtype.type(10**power)
    return digits
