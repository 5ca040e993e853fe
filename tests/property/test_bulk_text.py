"""Text made in bulk, against lines formatted one by one."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinpool import bulk_text
from thinpool.bulk_text import BulkText

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The last kind leaves a column out, and has the others the other way round.
TEMPLATES = [("a", 0, " -> ", 1, "..", 2, "\n"), ("<", 0, "/", 1, "+", 2, ">\n"), ("longer text ", 2, 0, "\n")]
#: Where numbers get one digit more.
EDGES = [edge for digits in range(20) for edge in (10**digits - 1, 10**digits)] + [
    (1 << 32) - 1,
    1 << 32,
    (1 << 64) - 1,
]
NUMBERS = st.one_of(st.integers(0, 1000), st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1))


def expected(kinds: Sequence[int], columns: Sequence[Sequence[int]]) -> bytes:
    lines = []
    for at, kind in enumerate(kinds):
        lines += [str(columns[part][at]) if isinstance(part, int) else part for part in TEMPLATES[kind]]
    return "".join(lines).encode()


@given(st.lists(st.tuples(st.integers(0, 2), NUMBERS, NUMBERS, NUMBERS), max_size=40))
def test_lines_are_those_made_one_by_one(lines: list[tuple[int, int, int, int]]) -> None:
    text = BulkText(TEMPLATES)
    kinds, *columns = zip(*lines, strict=True) if lines else ((), (), (), ())
    arrays = [np.array(column, np.uint64) for column in columns]
    assert text.lines(np.array(kinds, np.uint8), arrays) == expected(kinds, columns)
    for kind, template in enumerate(TEMPLATES):
        assert BulkText([template]).lines(None, arrays) == expected([kind] * len(lines), columns)


@pytest.mark.parametrize("bits", [4, 20, 40, 64])
def test_one_writer_serves_batches_of_any_size(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_text, "_ROWS", 64)
    monkeypatch.setattr(bulk_text, "_MOST_SHAPES", 5)
    dice = Random(bits)
    text = BulkText(TEMPLATES)
    for size in (1, 1000, 63, 64, 65, 3, 129):
        kinds = [dice.randrange(3) for _ in range(size)]
        columns = [[dice.getrandbits(dice.randrange(1, bits + 1)) for _ in range(size)] for _ in range(3)]
        arrays = [np.array(column, np.uint64) for column in columns]
        assert text.lines(np.array(kinds, np.uint8), arrays) == expected(kinds, columns)


def test_a_text_stays_as_long_as_somebody_has_it() -> None:
    text = BulkText([("<", 0, ">")])
    arrays = [np.arange(1000 * i, 1000 * i + 1000, dtype=np.uint64) for i in range(20)]
    kept = [text.lines(None, [array]) for array in arrays]
    again = [bytes(text.lines(None, [array])) for array in arrays]
    assert [bytes(view) for view in kept] == again
    assert again[3].startswith(b"<3000><3001>")


def test_memory_is_used_again() -> None:
    text = BulkText([("<", 0, ">")])
    places = set()
    for first in range(10000, 60000, 1000):
        view = text.lines(None, [np.arange(first, first + 1000, dtype=np.uint64)])
        places.add(np.frombuffer(view, np.uint8).ctypes.data)
    assert len(places) <= 2


def test_there_may_be_more_shapes_than_16_bits_count() -> None:
    dice = Random(1)
    template = ("", *(part for column in range(5) for part in (column, " ")), "\n")
    columns = [[dice.getrandbits(dice.randrange(1, 65)) for _ in range(2000)] for _ in range(5)]
    text = BulkText([template]).lines(None, [np.array(column, np.uint64) for column in columns])
    assert (
        text == "".join("".join(f"{number} " for number in line) + "\n" for line in zip(*columns, strict=True)).encode()
    )
