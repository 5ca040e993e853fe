"""The encoding of :mod:`thinpool.pack_encoding`, for many btree nodes at once.

What it writes is the same byte for byte; a test compares.  Importing it loads numpy.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from persistent_data.distinct import Distinct
from persistent_data.layout import BLOCK_SIZE, BLOCKNR_OFFSET, KEY_SIZE, NODE_HEADER_SIZE
from thinpool.pack_encoding import (
    BLOCK_NUMBER,
    CONST,
    CONST8,
    COUNT,
    COUNT8,
    LIT,
    LITW,
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


# Reading
#
# Where an instruction begins is known only when all before it have been read, which for one node after the other takes
# longer than anything else.  So the places where nodes seem to begin are looked for first, and then all nodes are read
# in step, an instruction of each at a time.  A node that does not end exactly where the next one seems to begin shows
# that it was a guess, and then the stream is left to thinpool.pack_encoding.


def _instruction_lengths() -> NDArray[np.int64]:
    """Return the bytes that an instruction takes, by its first byte; 0 for literals and for what is none."""
    lengths = np.zeros(256, np.int64)
    for width in (1, 2, 4, 8):
        for opcode in (SET, POSW, NEGW):
            lengths[opcode | width] = 1 + width
    for opcodes, length in (((POS, NEG, CONST, COUNT), 1), ((CONST8, COUNT8, SHIFTED_RUN), 2)):
        for opcode in opcodes:
            lengths[opcode : opcode + 16] = length
    return lengths


_LENGTHS = _instruction_lengths()
_MASKS = np.array([(1 << 8 * min(width, 8)) - 1 for width in range(16)], np.uint64)
_NODE_BEGINS = literal(bytes(NODE_HEADER_SIZE))[:-NODE_HEADER_SIZE]
_BLOCK_BEGINS = encode_literal(b"")
_MASK_OF_BEGINNING = np.uint64((1 << 8 * len(_BLOCK_BEGINS)) - 1)
_WORD_OF_BEGINNING = np.uint64(int.from_bytes(_BLOCK_BEGINS, "little"))
_BODY_AT = BLOCK_NUMBER.size + len(_NODE_BEGINS) + NODE_HEADER_SIZE
_LENGTH_BITS = BLOCK_SIZE.bit_length()
"""Of numbers and bytes in a block."""
_MAX_NUMBERS = 2 * _WORDS_PER_BLOCK
"""In a node: each word of a shifted run takes two."""
_MAX_INSTRUCTIONS = 2 * _MAX_NUMBERS + 1
_PADDING = bytes(16)
"""Behind a stream, so that what an instruction might have behind it can be read before one knows whether it has it."""


class _NoNodesError(Exception):
    """A stream is not what it seemed to be."""


def decode_entries(stream: bytes) -> list[tuple[int, bytes]] | None:
    """Return (block number, content) for the entries of a chunk, in order.

    :returns: None if the entries are not of the usual forms, which does not mean that they are wrong
    """
    if len(stream) < _BODY_AT:
        return None
    padded = stream + _PADDING
    # A word for each byte, which begins there.
    words: Words = np.ndarray((len(stream) + 9,), "<u8", padded, 0, (1,))
    try:
        begins, is_node = _find_entries(stream, words)
        numbers = words[begins]
        ends = np.append(begins[1:], len(stream))
        literals_at = begins + BLOCK_NUMBER.size + len(_BLOCK_BEGINS)
        found = [
            (number, stream[at : at + BLOCK_SIZE])
            for number, at in zip(numbers.tolist(), literals_at.tolist(), strict=True)
        ]
        nodes = np.flatnonzero(is_node)
        if len(nodes):
            steps = _find_instructions(padded, begins[nodes] + _BODY_AT, ends[nodes])
            for start in range(0, len(nodes), _NODES_AT_A_TIME):
                part = nodes[start : start + _NODES_AT_A_TIME]
                blocks = _decode_alike(padded, words, begins[part], ends[part], steps[start : start + _NODES_AT_A_TIME])
                for at, block in zip(part.tolist(), blocks, strict=True):
                    found[at] = found[at][0], block.tobytes()
        return found
    except _NoNodesError:
        return None


def _find_entries(stream: bytes, words: Words) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where the entries of a stream seem to begin, and which of them are nodes."""
    likely_nodes = _find_beginnings(stream, words, _NODE_BEGINS)
    likely = Distinct(np.append(likely_nodes, _find_beginnings(stream, words, _BLOCK_BEGINS))).values.tolist()
    begins: list[int] = []
    position = 0
    while position < len(stream):
        begins.append(position)
        if stream.startswith(_BLOCK_BEGINS, position + BLOCK_NUMBER.size):
            position += BLOCK_NUMBER.size + len(_BLOCK_BEGINS) + BLOCK_SIZE
        else:
            following = bisect_right(likely, position)
            position = likely[following] if following < len(likely) else len(stream)
    found = np.array(begins, np.int64)
    at = np.searchsorted(likely_nodes, found)
    is_node = np.append(likely_nodes, -1)[at] == found
    is_literal = words[found + BLOCK_NUMBER.size] & _MASK_OF_BEGINNING == _WORD_OF_BEGINNING
    if position != len(stream) or not (is_node | is_literal).all():
        raise _NoNodesError
    return found, is_node


def _find_beginnings(stream: bytes, words: Words, beginning: bytes) -> NDArray[np.int64]:
    """Return where entries seem to begin whose encoding begins so, and goes on with the header of a block."""
    content = np.frombuffer(stream, np.uint8)
    matches = content[: len(stream) - len(beginning) + 1] == beginning[0]
    for at, byte in enumerate(beginning[1:], 1):
        matches &= content[at : len(stream) - len(beginning) + 1 + at] == byte
    begins = np.flatnonzero(matches) - BLOCK_NUMBER.size
    begins = begins[(begins >= 0) & (begins + _BODY_AT <= len(stream))]
    # A block bears its number, and the entry has the number in front of it.
    sound: NDArray[np.bool_] = words[begins] == words[begins + BLOCK_NUMBER.size + len(beginning) + BLOCKNR_OFFSET]
    return begins[sound]


def _find_instructions(padded: bytes, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the instructions of each node begin, a row for each; behind its last one the row repeats a place.

    That place is the node's end, or that of the literal which ends it.
    """
    content = np.frombuffer(padded, np.uint8)
    steps = [begins]
    position = begins
    while True:
        following = position + _LENGTHS[content[position]]
        # Behind the end of a node stands the next one, whose bytes mean nothing here.
        following = np.where(position < ends, following, position)
        if (following == position).all():
            return np.stack(steps, axis=1)
        if len(steps) > _MAX_INSTRUCTIONS or (following > ends).any():
            raise _NoNodesError
        steps.append(following)
        position = following


def _decode_alike(
    padded: bytes, words: Words, begins: NDArray[np.int64], ends: NDArray[np.int64], steps: NDArray[np.int64]
) -> Words:
    """Return the blocks of nodes, a row for each.

    :param steps: where their instructions begin, as :func:`_find_instructions` gives it
    """
    content = np.frombuffer(padded, np.uint8)
    nr_nodes = len(begins)
    used = np.zeros(steps.shape, bool)
    np.less(steps[:, :-1], steps[:, 1:], out=used[:, :-1])
    at = steps[used]
    node = np.repeat(np.arange(nr_nodes), np.count_nonzero(used, axis=1))
    first_of_node = np.ones(len(at), bool)
    first_of_node[1:] = node[1:] != node[:-1]
    if not len(at):
        raise _NoNodesError

    opcodes = content[at] & 0xF0
    nibbles = (content[at] & 0x0F).astype(np.int64)
    long_counts = nibbles << 8 | content[at + 1]
    wide = (opcodes == SET) | (opcodes == POSW) | (opcodes == NEGW)
    operands = np.where(wide, words[at + 1] & _MASKS.take(nibbles), nibbles.astype(np.uint64))
    is_set = opcodes == SET
    is_count = (opcodes == COUNT) | (opcodes == COUNT8)
    is_run = opcodes == SHIFTED_RUN
    is_step = (opcodes >= POS) & (opcodes <= NEGW)

    if is_count[-1]:
        raise _NoNodesError

    # How many numbers each instruction gives.
    counts = np.where((opcodes == COUNT8) | (opcodes == CONST8), long_counts, nibbles)
    counted = np.append(False, is_count[:-1])
    repeats = np.where(is_set | is_step, 1, counts)
    counters, runs = np.flatnonzero(is_count), np.flatnonzero(is_run)
    repeats[counters + 1] = counts[counters]
    repeats[counters] = 0
    repeats[runs] = 0
    number_begins = np.cumsum(repeats) - repeats
    first_ones = np.flatnonzero(first_of_node)
    nr_numbers = np.add.reduceat(repeats, first_ones)
    # An instruction that gives nothing would belong to the next entry if it came last.
    gives_nothing = repeats == 0
    gives_nothing[counters] = counts[counters] == 0
    gives_nothing[runs] = long_counts[runs] == 0
    if (
        len(first_ones) != nr_nodes
        or not is_set[first_of_node].all()
        or (counted & (~is_step | first_of_node)).any()
        or gives_nothing.any()
        or nr_numbers.max() > _MAX_NUMBERS
    ):
        raise _NoNodesError

    # The numbers: sums of steps, from the last SET on.
    deltas = np.where(opcodes >= NEG, np.negative(operands), operands) * is_step
    sums = np.cumsum(np.repeat(deltas, repeats))
    sets_at = number_begins[is_set]
    numbers = sums + np.repeat(operands[is_set] - sums[sets_at], np.diff(sets_at, append=len(sums)))

    # The shape of each node: numbers in front of a shifted run, half of those in it, bytes behind the last one.
    node_begins = number_begins[first_ones]
    nr_keys = nr_numbers.copy()
    run_length = np.zeros(nr_nodes, np.int64)
    if len(Distinct(node[runs]).values) != len(runs):
        raise _NoNodesError
    nr_keys[node[runs]] = number_begins[runs] - node_begins[node[runs]]
    run_length[node[runs]] = long_counts[runs]
    is_boundary = np.zeros(len(numbers) + 1, bool)
    is_boundary[number_begins] = True
    if (
        not (nr_keys + 2 * run_length == nr_numbers)[node[runs]].all()
        or not is_boundary[number_begins[runs] + long_counts[runs]].all()
    ):
        raise _NoNodesError
    rest_at, rest_length = _rests(content, words, steps[:, -1], ends)
    if (NODE_HEADER_SIZE + (nr_keys + run_length) * NUMBER_SIZE + rest_length != BLOCK_SIZE).any():
        raise _NoNodesError

    blocks = np.empty((nr_nodes, _WORDS_PER_BLOCK), np.uint64)
    block_bytes = blocks.view(np.uint8)
    header_at = begins + _BODY_AT - NODE_HEADER_SIZE
    block_bytes[:, :NODE_HEADER_SIZE] = content[header_at[:, None] + np.arange(NODE_HEADER_SIZE)]
    shapes = Distinct((nr_keys << 2 * _LENGTH_BITS) + (run_length << _LENGTH_BITS) + rest_length)
    for shape, first in enumerate(shapes.first.tolist()):
        rows = np.flatnonzero(shapes.places == shape)
        keys, run, rest = int(nr_keys[first]), int(run_length[first]), int(rest_length[first])
        if len(rows) == nr_nodes:
            alike = numbers.reshape(nr_nodes, keys + 2 * run)
        else:
            alike = numbers[node_begins[rows][:, None] + np.arange(keys + 2 * run)]
        values = (alike[:, keys : keys + run] << np.uint64(LOW_BITS)) | (alike[:, keys + run :] & np.uint64(LOW_MASK))
        keys_end = _HEADER_WORDS + keys
        blocks[rows, _HEADER_WORDS:keys_end] = alike[:, :keys]
        blocks[rows, keys_end : keys_end + run] = values
        block_bytes[rows, BLOCK_SIZE - rest :] = content[rest_at[rows][:, None] + np.arange(rest)]
    return blocks


def _rests(
    content: NDArray[np.uint8], words: Words, at: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the bytes of the literals that end nodes begin, and how many they are."""
    opcodes, nibbles = content[at] & 0xF0, content[at] & 0x0F
    is_long = opcodes == LITW
    begins = at + 1 + np.where(is_long, nibbles, 0)
    operands = words[at + 1] & _MASKS[nibbles]
    lengths = np.where(is_long, np.minimum(operands, np.uint64(BLOCK_SIZE)).astype(np.int64), nibbles)
    none = at == ends
    sound = (opcodes == LIT) | is_long & ((nibbles == 1) | (nibbles == 2))
    if not (none | sound & (lengths > 0) & (begins + lengths == ends)).all():
        raise _NoNodesError
    return np.where(none, at, begins), np.where(none, 0, lengths)
