"""The encoding of :mod:`thinpool.pack_encoding`, for many btree nodes at once.

What it writes is the same byte for byte; a test compares.  Importing it loads numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from persistent_data.layout import BLOCK_SIZE, KEY_SIZE, NODE_HEADER_SIZE
from thinpool.pack_encoding import (
    CONST,
    CONST8,
    COUNT,
    COUNT8,
    LOW_BITS,
    LOW_MASK,
    NEG,
    NEGW,
    NUMBER_SIZE,
    POS,
    POSW,
    SET,
    SHIFTED_RUN,
    encode_literal,
    literal,
    node_shape,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

_NODES_AT_A_TIME = 64
"""Enough to spread the cost of a call to numpy; few enough for what they become to stay in a processor's cache."""
_WORDS_PER_BLOCK = BLOCK_SIZE // NUMBER_SIZE
_HEADER_WORDS = NODE_HEADER_SIZE // NUMBER_SIZE


def encode_nodes(window: memoryview, begin: int, nodes: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield (block number, encoding) for each of *nodes*, in any order.

    :param window: whole metadata blocks, those from *begin*
    :param nodes: numbers of btree nodes among them
    """
    by_shape: dict[tuple[int, int, bool], list[int]] = {}
    for number in nodes:
        offset = (number - begin) * BLOCK_SIZE
        by_shape.setdefault(node_shape(window[offset : offset + BLOCK_SIZE]), []).append(number)
    words = np.frombuffer(window, "<u8").reshape(-1, _WORDS_PER_BLOCK)
    for (nr_keys, nr_values, shifted), alike in by_shape.items():
        for start in range(0, len(alike), _NODES_AT_A_TIME):
            numbers = alike[start : start + _NODES_AT_A_TIME]
            blocks = words[np.array(numbers) - begin]
            if nr_keys:
                yield from zip(numbers, _encode_alike(blocks, nr_keys, nr_values, shifted), strict=True)
            else:
                yield from (
                    (number, encode_literal(block.tobytes())) for number, block in zip(numbers, blocks, strict=True)
                )


def _encode_alike(blocks: Words, nr_keys: int, nr_values: int, shifted: bool) -> Iterator[bytes]:
    """Yield the encodings of nodes of the same shape, which are the rows of *blocks*."""
    keys_end = _HEADER_WORDS + nr_keys * KEY_SIZE // NUMBER_SIZE
    values = blocks[:, keys_end : keys_end + nr_values]
    lists = [blocks[:, _HEADER_WORDS:keys_end]]
    if shifted:
        lists += [values >> np.uint64(LOW_BITS), values & np.uint64(LOW_MASK)]
    elif nr_values:
        lists.append(values)
    encoded, ends = _encode_lists(lists)
    run = bytes([SHIFTED_RUN | nr_values >> 8, nr_values & 0xFF]) if shifted else b""
    rest_at = NODE_HEADER_SIZE + nr_keys * KEY_SIZE + nr_values * NUMBER_SIZE
    begin = 0
    for block, row_ends in zip(blocks, ends.reshape(len(blocks), len(lists)).tolist(), strict=True):
        content = block.tobytes()
        keys, end = row_ends[0], row_ends[-1]
        rest = literal(content[rest_at:]) if rest_at < BLOCK_SIZE else b""
        yield b"".join((literal(content[:NODE_HEADER_SIZE]), encoded[begin:keys], run, encoded[keys:end], rest))
        begin = end


def _encode_lists(lists: Sequence[Words]) -> tuple[bytes, NDArray[np.int64]]:
    """Encode lists of numbers: the first row of each, then the second row of each, and so on.

    :returns: the instructions, and the offset at which those of each list end
    """
    numbers = np.concatenate(lists, axis=1)
    nr_columns = numbers.shape[1]
    first = np.zeros(nr_columns, bool)
    first[np.cumsum([0, *(part.shape[1] for part in lists[:-1])])] = True
    sets = np.tile(first, len(numbers))
    flat = numbers.reshape(-1)

    # What an instruction does to get from a number to the next one, and where that changes.  A list never goes on with
    # the step of the one before it: it begins with SET, and so does a run of steps behind it.
    rising = np.empty(len(flat), bool)
    rising[0] = False
    np.greater(flat[1:], flat[:-1], out=rising[1:])
    steps = np.empty_like(flat)
    steps[0] = 0
    np.subtract(flat[1:], flat[:-1], out=steps[1:])
    np.negative(steps, out=steps, where=~rising)
    changes = sets.copy()
    changes[1:] |= sets[:-1] | (steps[1:] != steps[:-1]) | (rising[1:] != rising[:-1])
    starts = np.flatnonzero(changes)
    counts = np.diff(starts, append=len(flat))

    is_set = sets[starts]
    operands = np.where(is_set, flat[starts], steps[starts])
    is_const = ~is_set & (operands == 0)
    is_rising = rising[starts]
    is_wide = is_set | (operands > 15)
    is_counted = is_const | (counts > 1)
    widths = 1 + (operands > 0xFF) + 2 * (operands > 0xFFFF).astype(np.int64) + 4 * (operands > 0xFFFFFFFF)

    # Each instruction with its count: two bytes of count, one of opcode, eight of operand; then those it does without
    # are left out.
    parts = np.empty((len(starts), 11), np.uint8)
    wanted = np.empty(parts.shape, bool)
    long_count = counts > 15
    parts[:, 0] = np.where(is_const, CONST8, COUNT8) | (counts >> 8)
    parts[:, 1] = np.where(long_count, counts & 0xFF, np.where(is_const, CONST, COUNT) | counts & 0xFF)
    wanted[:, 0] = is_counted & long_count
    wanted[:, 1] = is_counted
    wide_opcode = np.where(is_set, SET, np.where(is_rising, POSW, NEGW)) | widths
    narrow_opcode = np.where(is_rising, POS, NEG) | (operands & np.uint64(0xF)).astype(np.int64)
    parts[:, 2] = np.where(is_wide, wide_opcode, narrow_opcode)
    wanted[:, 2] = ~is_const
    parts[:, 3:] = operands.astype("<u8").view(np.uint8).reshape(-1, 8)
    wanted[:, 3:] = np.arange(8) < np.where(is_wide, widths, 0)[:, None]

    ends = np.cumsum(np.count_nonzero(wanted, axis=1))
    last = np.append(np.flatnonzero(is_set)[1:], len(starts)) - 1
    return parts[wanted].tobytes(), ends[last]
