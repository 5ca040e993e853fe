"""How a pack file writes one metadata block: instructions that give 4096 bytes when they are carried out.

Source: docs/tools/thin_metadata_pack.md, "Encoding of a block".
"""

from __future__ import annotations

from struct import Struct, unpack_from
from typing import TYPE_CHECKING

from persistent_data.layout import BLOCK_SIZE, KEY_SIZE, LEAF_NODE, NODE_HEADER, NODE_HEADER_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_NUMBER = Struct("<Q")
"""In front of each encoded block."""

# Opcodes, as they stand in the high half of an instruction's first byte.
SET, POS, POSW, NEG, NEGW, CONST, CONST8, COUNT, COUNT8, LIT, LITW, SHIFTED_RUN = range(0x00, 0xC0, 0x10)

LOW_BITS = 24
"""A shifted run keeps the numbers above this bit apart from those below: data blocks and times."""
LOW_MASK = (1 << LOW_BITS) - 1
WORD_MASK = (1 << 64) - 1
NUMBER_SIZE = 8

_WIDTHS = (1, 2, 4, 8)
_LITERAL_BLOCK = bytes([LITW | 2]) + BLOCK_SIZE.to_bytes(2, "little")


class BadEncoding(Exception):
    """An encoded block is none; the argument says why."""


# Writing


def encode_literal(block: bytes | memoryview) -> bytes:
    """Encode a block as it is."""
    return _LITERAL_BLOCK + block


def encode_node(block: bytes | memoryview) -> bytes:
    """Encode a btree node: keys, and values where they are numbers, by their differences."""
    nr_keys, nr_values, shifted = node_shape(block)
    if not nr_keys:
        return encode_literal(block)
    values_at = NODE_HEADER_SIZE + nr_keys * KEY_SIZE
    rest_at = values_at + nr_values * NUMBER_SIZE
    out = bytearray(literal(block[:NODE_HEADER_SIZE]))
    _write_numbers(out, unpack_from(f"<{nr_keys}Q", block, NODE_HEADER_SIZE))
    values = unpack_from(f"<{nr_values}Q", block, values_at)
    if shifted:
        out += bytes([SHIFTED_RUN | nr_values >> 8, nr_values & 0xFF])
        _write_numbers(out, [value >> LOW_BITS for value in values])
        _write_numbers(out, [value & LOW_MASK for value in values])
    else:
        _write_numbers(out, values)
    if rest_at < BLOCK_SIZE:
        out += literal(block[rest_at:])
    return bytes(out)


def node_shape(block: bytes | memoryview) -> tuple[int, int, bool]:
    """Return how a btree node is encoded: its keys, the values that are taken for numbers, whether these are shifted.

    No keys if the node cannot be taken apart and is written as it is.  All the entries that there is room for are
    encoded, not just those in use: what is behind the last one stays as it was.
    """
    _, flags, _, _, nr_keys, value_size, _ = NODE_HEADER.unpack_from(block)
    if NODE_HEADER_SIZE + nr_keys * (KEY_SIZE + value_size) > BLOCK_SIZE:
        return 0, 0, False
    is_leaf = flags == LEAF_NODE
    return nr_keys, nr_keys if value_size == NUMBER_SIZE else 0, is_leaf and value_size == NUMBER_SIZE


def _write_numbers(out: bytearray, numbers: Sequence[int]) -> None:
    """Append instructions for *numbers*: the first one, then steps, equal ones counted."""
    if not numbers:
        return
    base = numbers[0]
    _write_wide(out, SET, base)
    step = 0
    count = 0
    for number in numbers[1:]:
        if count and number - base != step:
            _write_steps(out, step, count)
            count = 0
        step = number - base
        count += 1
        base = number
    if count:
        _write_steps(out, step, count)


def _write_steps(out: bytearray, step: int, count: int) -> None:
    if not step:
        out += _counted(CONST, CONST8, count)
        return
    if count > 1:
        out += _counted(COUNT, COUNT8, count)
    narrow, wide = (POS, POSW) if step > 0 else (NEG, NEGW)
    if -16 < step < 16:
        out.append(narrow | abs(step))
    else:
        _write_wide(out, wide, abs(step))


def _write_wide(out: bytearray, opcode: int, operand: int) -> None:
    width = next(width for width in _WIDTHS if operand < 1 << 8 * width)
    out.append(opcode | width)
    out += operand.to_bytes(width, "little")


def _counted(short: int, long: int, count: int) -> bytes:
    return bytes([short | count]) if count < 16 else bytes([long | count >> 8, count & 0xFF])


def literal(content: bytes | memoryview) -> bytes:
    """Encode bytes as they are."""
    if len(content) < 16:
        return bytes([LIT | len(content)]) + content
    out = bytearray()
    _write_wide(out, LITW, len(content))
    return bytes(out + content)


# Reading


def decode_block(stream: bytes, position: int) -> tuple[bytes, int]:
    """Return the block that is encoded at *position* of *stream*, and the position behind it.

    :raises BadEncoding: what is there is no encoded block
    """
    if stream[position : position + len(_LITERAL_BLOCK)] == _LITERAL_BLOCK:
        position += len(_LITERAL_BLOCK)
        block = stream[position : position + BLOCK_SIZE]
        if len(block) == BLOCK_SIZE:
            return block, position + BLOCK_SIZE
        raise BadEncoding("it ends within a block")
    decoder = _Decoder(stream, position)
    try:
        return decoder.run(BLOCK_SIZE), decoder.position
    except IndexError:
        raise BadEncoding("it ends within a block") from None


class _Decoder:
    """Carries out instructions.

    :ivar position: of the next instruction
    """

    def __init__(self, stream: bytes, position: int) -> None:
        self._stream = stream
        self.position = position
        self._base = 0

    def run(self, nr_bytes: int, in_shifted_run: bool = False) -> bytes:
        """Carry out instructions until they have given *nr_bytes*, and return these.

        :raises IndexError: the stream ends too early
        """
        stream = self._stream
        out = bytearray()
        count = 0
        while len(out) < nr_bytes:
            instruction = stream[self.position]
            self.position += 1
            opcode, nibble = instruction & 0xF0, instruction & 0x0F
            if count and opcode > NEGW:
                raise BadEncoding("a count in front of an instruction that cannot be repeated")
            if opcode <= NEGW:
                self._emit_steps(out, opcode, nibble, count or 1)
                count = 0
            elif opcode in (COUNT, COUNT8):
                count = self._count(opcode == COUNT8, nibble)
                if not count:
                    raise BadEncoding("a count of nothing")
            elif opcode in (CONST, CONST8):
                out += self._base.to_bytes(NUMBER_SIZE, "little") * self._count(opcode == CONST8, nibble)
            elif opcode in (LIT, LITW):
                out += self._take(self._operand(nibble) if opcode == LITW else nibble)
            elif opcode == SHIFTED_RUN and not in_shifted_run:
                out += self._shifted_run(self._count(True, nibble))
            else:
                raise BadEncoding(f"no instruction begins with {instruction:#04x}")
        if len(out) > nr_bytes:
            raise BadEncoding(f"{len(out)} bytes instead of {nr_bytes}")
        return bytes(out)

    def _emit_steps(self, out: bytearray, opcode: int, nibble: int, count: int) -> None:
        operand = nibble if opcode in (POS, NEG) else self._operand(nibble)
        if opcode == SET:
            self._base = operand
            step = 0
        else:
            step = -operand if opcode >= NEG else operand
        for _ in range(count):
            self._base = (self._base + step) & WORD_MASK
            out += self._base.to_bytes(NUMBER_SIZE, "little")

    def _shifted_run(self, nr_numbers: int) -> bytes:
        shape = Struct(f"<{nr_numbers}Q")
        high = shape.unpack(self.run(shape.size, in_shifted_run=True))
        low = shape.unpack(self.run(shape.size, in_shifted_run=True))
        return shape.pack(*((h << LOW_BITS | v & LOW_MASK) & WORD_MASK for h, v in zip(high, low, strict=True)))

    def _count(self, long: bool, nibble: int) -> int:
        if not long:
            return nibble
        self.position += 1
        return nibble << 8 | self._stream[self.position - 1]

    def _operand(self, width: int) -> int:
        if width not in _WIDTHS:
            raise BadEncoding(f"no operand has {width} bytes")
        return int.from_bytes(self._take(width), "little")

    def _take(self, nr_bytes: int) -> bytes:
        end = self.position + nr_bytes
        if end > len(self._stream):
            raise IndexError
        taken = self._stream[self.position : end]
        self.position = end
        return taken
