"""Packing and unpacking metadata: nothing lost, nothing accepted that is not whole."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from persistent_data.checksum import (
    BITMAP_SALT,
    BTREE_NODE_SALT,
    INDEX_SALT,
    SUPERBLOCK_SALT,
    block_checksum,
)
from tests.support import packs
from tests.support.fixtures import BLOCK_SIZE, DAMAGED, DATA, GOOD, image
from thinpool import pack as pack_module
from thinpool.pack import PackError, PackReader, PackSummary, pack, unpack, verify_pack
from thinpool.pack_batch import decode_entries

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORDED = sorted(path.stem for path in (DATA / "packs").glob("*.pack"))
KINDS = {
    "superblock": SUPERBLOCK_SALT,
    "node": BTREE_NODE_SALT,
    "bitmap": BITMAP_SALT,
    "index": INDEX_SALT,
    "array": 595846735,
    "cache superblock": 9031977,
    "era superblock": 146538381,
}


def packed(content: bytes, *, everything: bool = False) -> bytes:
    return packed_with_summary(content, everything=everything)[0]


def packed_with_summary(content: bytes, *, everything: bool = False) -> tuple[bytes, PackSummary]:
    pieces: list[bytes] = []
    summary = pack(MemoryDevice(content), pieces.append, everything=everything)
    return b"".join(pieces), summary


def unpacked(content: bytes, *, incomplete: bool = False, onto: int = 0) -> bytes:
    """What a device holds, of *onto* blocks more than there were, and full of ones."""
    verify_pack(PackReader(io.BytesIO(content)), incomplete=incomplete)
    reader = PackReader(io.BytesIO(content))
    device = MemoryDevice(b"\xff" * (reader.size_bytes + onto * BLOCK_SIZE))
    unpack(reader, device)
    return device.contents()


def refused(content: bytes, reason: str) -> None:
    with pytest.raises(PackError, match=reason):
        unpacked(content, incomplete=True)


def block_of(kind: int, number: int, seed: int = 0) -> bytes:
    content = bytearray(random.Random(seed).randbytes(BLOCK_SIZE))
    struct.pack_into("<Q", content, 8, number)
    struct.pack_into("<I", content, 0, block_checksum(content, kind))
    return bytes(content)


def device_of(nr_blocks: int, blocks: Mapping[int, bytes]) -> bytes:
    content = bytearray(nr_blocks * BLOCK_SIZE)
    for number, block in blocks.items():
        content[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE] = block
    return bytes(content)


# Round trips


@pytest.mark.parametrize("name", GOOD)
def test_every_sound_image_comes_back_as_it_was(name: str) -> None:
    content = image(name)
    pack_file, summary = packed_with_summary(content)
    assert summary.nr_damaged == 0
    assert unpacked(pack_file) == content


@pytest.mark.parametrize("name", DAMAGED)
def test_every_damaged_image_comes_back_if_everything_is_packed(name: str) -> None:
    content = image(name)
    content = content[: len(content) // BLOCK_SIZE * BLOCK_SIZE]
    assert unpacked(packed(content, everything=True), incomplete=True) == content


@pytest.mark.parametrize("name", RECORDED)
def test_each_block_is_encoded_as_the_reference_does(name: str) -> None:
    assert packs.entries(packed(image(name))) == packs.entries((DATA / "packs" / f"{name}.pack").read_bytes())


@pytest.mark.parametrize("name", RECORDED)
def test_what_the_reference_packed_is_unpacked(name: str) -> None:
    assert unpacked((DATA / "packs" / f"{name}.pack").read_bytes()) == image(name)


@pytest.mark.parametrize("nr_blocks", [1, 2, 127, 128, 129, 1023, 1024, 1025, 2047, 3000])
def test_no_block_is_lost_whatever_the_size(nr_blocks: int) -> None:
    """The reference loses a chunk where the size is not a multiple of its chunks'."""
    content = device_of(nr_blocks, {number: block_of(BITMAP_SALT, number, number) for number in range(nr_blocks)})
    pack_file, summary = packed_with_summary(content)
    assert summary.nr_packed == nr_blocks
    assert unpacked(pack_file, incomplete=True) == content


@pytest.mark.parametrize("name", ["mixed", "many_devices", "random"])
def test_batches_and_single_nodes_are_encoded_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one, in_batches = (_packed_from(name, limit, monkeypatch) for limit in (1 << 60, 0))
    assert one_by_one == in_batches


@pytest.mark.parametrize("name", ["mixed", "many_devices", "random"])
def test_chunks_are_decoded_alike_in_batches_and_block_by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_file = packed(image(name))
    found = []
    for limit in (1 << 60, 0):
        monkeypatch.setattr(pack_module, "_BATCH_FROM_BYTES", limit)
        found.append(list(PackReader(io.BytesIO(pack_file)).blocks()))
    assert found[0] == found[1]


def test_the_usual_chunks_need_no_second_decoder() -> None:
    for name in RECORDED:
        for stream in packs.streams((DATA / "packs" / f"{name}.pack").read_bytes()):
            assert decode_entries(stream) is not None


def _packed_from(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(pack_module, "_BATCH_FROM_NODES", limit)
    return packed(image(name))


# What is packed


def test_an_example_to_the_byte() -> None:
    content = image("transaction_id")
    pack_file = packed(content)
    assert pack_file[:32] == bytes.fromhex("77ef0963aaa037a5 0300000000000000 0010000000000000 0004000000000000")
    (stream,) = packs.streams(pack_file)
    assert stream.startswith(bytes(8) + b"\xa2\x00\x10" + content[:BLOCK_SIZE])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_metadata_is_packed_by_its_checksum(kind: str) -> None:
    content = device_of(9, {5: block_of(KINDS[kind], 5)})
    pack_file, summary = packed_with_summary(content)
    assert (summary.nr_packed, summary.nr_damaged) == (1, 0)
    assert packs.blocks(pack_file) == {5: content[5 * BLOCK_SIZE : 6 * BLOCK_SIZE]}


def test_a_block_in_another_place_than_its_own_is_packed() -> None:
    """Its checksum is right; what is wrong with it is for a check to say."""
    content = device_of(9, {5: block_of(BITMAP_SALT, 7)})
    assert set(packs.blocks(packed(content))) == {5}


def test_damaged_blocks_are_left_out_and_counted() -> None:
    damaged = bytearray(block_of(BITMAP_SALT, 5))
    damaged[100] ^= 1
    content = device_of(9, {5: bytes(damaged), 6: random.Random(1).randbytes(BLOCK_SIZE), 7: block_of(INDEX_SALT, 7)})
    pack_file, summary = packed_with_summary(content)
    assert (summary.nr_packed, summary.nr_damaged) == (1, 1)
    assert set(packs.blocks(pack_file)) == {7}
    assert set(packs.blocks(packed(content, everything=True))) == {5, 6, 7}


def test_a_partial_block_at_the_end_is_not_packed() -> None:
    content = image("transaction_id")
    assert packed(content + b"tail") == packed(content)


def test_a_chunk_has_1024_blocks_at_most() -> None:
    content = device_of(1030, {number: block_of(BITMAP_SALT, number) for number in range(1030)})
    assert [len(stream) // (8 + 3 + BLOCK_SIZE) for stream in packs.streams(packed(content))] == [1024, 6]


def test_progress_ends_with_everything() -> None:
    calls: list[tuple[int, int]] = []
    pieces: list[bytes] = []
    pack(MemoryDevice(image("mixed")), pieces.append, progress=lambda *call: calls.append(call))
    assert calls == [(1024, 2048), (2048, 2048)]
    pack_file = b"".join(pieces)
    verify_pack(PackReader(io.BytesIO(pack_file)), progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(pack_file), len(pack_file))


# Unpacking onto a device


def test_blocks_that_are_not_in_the_pack_become_zeros_and_those_behind_stay() -> None:
    blocks = {number: block_of(BITMAP_SALT, number) for number in (0, 1, 9, 10, 2000)}
    content = packs.simple_pack(3000, dict(reversed(blocks.items())))
    assert unpacked(content, incomplete=True, onto=2) == device_of(3000, blocks) + b"\xff" * 2 * BLOCK_SIZE


def test_a_sparse_giant_takes_no_memory_for_its_holes() -> None:
    nr_blocks = 1 << 40
    block = block_of(BITMAP_SALT, nr_blocks - 1)
    reader = PackReader(io.BytesIO(packs.simple_pack(nr_blocks, {nr_blocks - 1: block})))
    assert dict(reader.blocks()) == {nr_blocks - 1: block}


def test_literals_of_either_form_and_steps_of_every_width() -> None:
    """Instructions that no known packer writes in these places are understood all the same."""
    steps = (
        bytes.fromhex("01ff 7f 1f 22ffff 24ffffffff 28ffffffffffffffff 31 8005 4105 6004 54 9f") + bytes(15) + b"\x91\0"
    )
    encoded = steps + b"\xa2" + struct.pack("<H", 4096 - len_of(steps)) + bytes(4096 - len_of(steps))
    (number, block), *rest = PackReader(io.BytesIO(packs.header(1) + packs.chunk(bytes(8) + encoded))).blocks()
    assert (number, rest) == (0, [])
    assert block == packs.Machine(iter(encoded)).block()


def len_of(encoded: bytes) -> int:
    machine = packs.Machine(iter(encoded))
    length = 0
    while machine.taken < len(encoded):
        length += len(machine.step())
    return length


# What is refused


def test_what_is_no_pack_is_refused() -> None:
    refused(b"", "^.*Not a pack file, or one that is cut off: it has 0 bytes")
    refused(image("empty"), "Not a pack file$")
    refused(packs.header(1, magic=packs.MAGIC - 1), "Not a pack file$")


def test_other_versions_and_block_sizes_are_refused() -> None:
    refused(packs.header(1, version=2), r"unsupported pack file version \(2\)\.$")
    refused(packs.header(1, version=4), r"unsupported pack file version \(4\)\.$")
    refused(packs.header(1, block_size=8192), "block size is not 4096$")
    refused(packs.header(0), "without blocks")


def test_every_truncation_is_refused() -> None:
    whole = (DATA / "packs" / "transaction_id.pack").read_bytes()
    ends = [32, len(whole)]
    assert len(list(packs.streams(whole))) == 1
    for size in range(len(whole)):
        reason = "no superblock" if size in ends else "cut off"
        with pytest.raises(PackError, match=reason):
            unpacked(whole[:size])


def test_a_pack_that_ends_between_two_chunks_lacks_blocks() -> None:
    whole = packed(image("many_devices"))
    (length,) = struct.unpack_from("<Q", whole, 32)
    first_chunk_only = whole[: 32 + 8 + length]
    assert len(first_chunk_only) < len(whole)
    with pytest.raises(PackError, match=r"blocks that the pool uses, \d+ are missing; the first is block 1\d\d\d$"):
        unpacked(first_chunk_only)
    assert (
        unpacked(first_chunk_only, incomplete=True)[: 1024 * BLOCK_SIZE] == image("many_devices")[: 1024 * BLOCK_SIZE]
    )


def test_any_flipped_bit_of_a_chunk_is_noticed_unless_it_means_nothing() -> None:
    whole = (DATA / "packs" / "transaction_id.pack").read_bytes()
    refusals = 0
    for at in range(40, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        try:
            assert unpacked(bytes(damaged)) == image("transaction_id")
        except PackError:
            refusals += 1
    assert refusals > len(whole) - 48


def test_a_chunk_with_something_behind_its_stream_is_refused() -> None:
    compressed = zlib.compress(packs.as_is(0, bytes(BLOCK_SIZE)))
    refused(packs.header(1) + struct.pack("<Q", len(compressed) + 3) + compressed + b"abc", "wrong length")
    refused(packs.header(1) + struct.pack("<Q", len(compressed) - 3) + compressed[:-3], "wrong length")
    refused(packs.header(1) + struct.pack("<Q", 1 << 63) + compressed, "cut off")


def test_a_chunk_that_never_ends_is_refused_before_it_fills_memory() -> None:
    refused(packs.header(1) + packs.chunk(bytes(65 << 20)), "too large")


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"abc", "it ends within an entry"),
        (packs.as_is(0, bytes(4095)), "it ends within a block"),
        (bytes(8), "it ends within a block"),
        (bytes(8) + b"\x04ab", "it ends within a block"),
        (bytes(8) + b"\xc0", "no instruction begins with 0xc0"),
        (bytes(8) + b"\x03abc", "no operand has 3 bytes"),
        (bytes(8) + b"\xb0\x01\xb0\x01", "no instruction begins with 0xb0"),
        (bytes(8) + b"\x72\x51", "a count in front of an instruction that cannot be repeated"),
        (bytes(8) + b"\x70\x11", "a count of nothing"),
        (bytes(8) + b"\x01\x01\x6f\xff", "4104 bytes instead of 4096|bytes instead of 4096"),
        (packs.as_is(1, bytes(BLOCK_SIZE)), "block 1 is outside the device of 1 blocks"),
        (packs.as_is(0, bytes(BLOCK_SIZE)) * 2, "block 0 is in the pack twice"),
    ],
)
def test_a_stream_that_is_none_is_refused(stream: bytes, reason: str) -> None:
    refused(packs.header(1) + packs.chunk(stream), f"^.*damaged pack file: the chunk at byte 32: .*({reason})")


def test_random_streams_are_refused_or_decoded_and_never_anything_else() -> None:
    dice = random.Random(4)
    for _ in range(2000):
        stream = bytes(8) + dice.randbytes(dice.randrange(200))
        try:
            unpacked(packs.header(1) + packs.chunk(stream), incomplete=True)
        except PackError:
            pass
