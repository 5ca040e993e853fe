"""Blocks and streams of any kind: encoded for an independent decoder, decoded as it does."""

from __future__ import annotations

import io
import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bufio.device import MemoryDevice
from persistent_data.checksum import BTREE_NODE_SALT, block_checksum
from tests.support import packs
from thinpool import pack as pack_module
from thinpool.pack import PackError, PackReader, pack
from thinpool.pack_batch import decode_entries, encode_nodes
from thinpool.pack_encoding import BadEncoding, decode_block, encode_node

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_SIZE = 4096

#: Numbers in runs: equal ones, steps up and down, of every width, with overflow.
STEPS = st.one_of(
    st.sampled_from([0, 1, -1, 15, 16, -15, -16, 255, 256, 1 << 24, 1 << 63]), st.integers(-(1 << 64), 1 << 64)
)
RUNS = st.lists(st.tuples(STEPS, st.integers(1, 40)), min_size=1, max_size=40)


def numbers(runs: Sequence[tuple[int, int]], count: int) -> list[int]:
    out: list[int] = []
    number = 0
    while len(out) < count:
        for step, times in runs:
            for _ in range(times):
                number = (number + step) % (1 << 64)
                out.append(number)
    return out[:count]


@st.composite
def nodes(draw: st.DrawFn, number: int = 0) -> bytes:
    """A btree node by its checksum, whose header may be nonsense."""
    value_size = draw(st.sampled_from([0, 4, 8, 8, 8, 24, 100]))
    room = (BLOCK_SIZE - 32) // (8 + value_size)
    nr_entries = draw(st.one_of(st.just(room // 3 * 3), st.integers(0, room + 1)))
    header = struct.pack(
        "<IIQIIII", 0, draw(st.integers(0, 3)), number, draw(st.integers(0, 300)), nr_entries, value_size, 0
    )
    body = struct.pack("<508Q", *numbers(draw(RUNS), 508))
    return sealed(header + body)


def sealed(content: bytes) -> bytes:
    return struct.pack("<I", block_checksum(content, BTREE_NODE_SALT)) + content[4:]


@given(nodes())
def test_a_node_is_decoded_from_its_encoding(block: bytes) -> None:
    encoded = encode_node(block)
    assert packs.Machine(iter(encoded)).block() == block
    assert decode_block(encoded + b"behind", 0) == (block, len(encoded))


@given(st.lists(nodes(), min_size=1, max_size=6))
def test_nodes_are_encoded_and_decoded_in_batches_as_one_by_one(contents: list[bytes]) -> None:
    blocks = {}
    for number, content in enumerate(contents, 5):
        blocks[number] = sealed(content[:8] + struct.pack("<Q", number) + content[16:])
    window = memoryview(b"".join(blocks.values()))
    encoded = dict(encode_nodes(window, 5, list(blocks)))
    assert encoded == {number: encode_node(block) for number, block in blocks.items()}
    stream = b"".join(struct.pack("<Q", number) + encoded[number] for number in blocks)
    assert decode_entries(stream) in (None, list(blocks.items()))


@given(st.lists(nodes(), min_size=1, max_size=3), st.randoms(use_true_random=False), st.integers(1, 3))
def test_a_damaged_stream_is_decoded_alike_or_left_to_the_decoder_of_single_nodes(
    contents: list[bytes], dice: random.Random, nr_flips: int
) -> None:
    encoded = [encode_node(sealed(block[:8] + struct.pack("<Q", at) + block[16:])) for at, block in enumerate(contents)]
    stream = bytearray(b"".join(struct.pack("<Q", at) + block for at, block in enumerate(encoded)))
    for _ in range(nr_flips):
        stream[dice.randrange(len(stream))] ^= 1 << dice.randrange(8)
    in_batches = decode_entries(bytes(stream))
    if in_batches is None:
        return
    one_by_one = []
    position = 0
    while position < len(stream):
        number = int.from_bytes(stream[position : position + 8], "little")
        block, position = decode_block(bytes(stream), position + 8)
        one_by_one.append((number, block))
    assert in_batches == one_by_one


INSTRUCTIONS = st.one_of(
    st.binary(min_size=1, max_size=9),
    st.sampled_from(
        [b"\x01\x05", b"\x73\x11", b"\x80\x40\x31", b"\x52", b"\x6f\xff", b"\x94abcd", b"\xa1\x03abc", b"\xb0\x02"]
    ),
)


@given(st.lists(INSTRUCTIONS, max_size=60))
def test_any_instructions_are_carried_out_as_the_independent_decoder_does(instructions: list[bytes]) -> None:
    code = b"".join(instructions) + b"\xa2\x00\x10" + bytes(BLOCK_SIZE)
    try:
        block, length = decode_block(code, 0)
    except BadEncoding:
        return
    machine = packs.Machine(iter(code))
    assert machine.block() == block
    assert machine.taken == length


@pytest.mark.parametrize("limit", [0, 1 << 60])
@given(
    contents=st.lists(st.one_of(nodes(), st.just(bytes(BLOCK_SIZE)), st.binary(min_size=20, max_size=20)), max_size=8)
)
def test_a_device_is_packed_for_the_independent_decoder(limit: int, contents: list[bytes]) -> None:
    blocks = [content if len(content) == BLOCK_SIZE else content.ljust(BLOCK_SIZE, b"x") for content in contents]
    pieces: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "_BATCH_FROM_NODES", limit)
        pack(MemoryDevice(b"".join(blocks)), pieces.append, everything=True)
    pack_file = b"".join(pieces)
    expected = {number: block for number, block in enumerate(blocks) if any(block)}
    assert packs.blocks(pack_file) == expected
    if blocks:
        assert dict(PackReader(io.BytesIO(pack_file)).blocks()) == expected
    else:
        with pytest.raises(PackError):
            PackReader(io.BytesIO(pack_file))
