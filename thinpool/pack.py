"""Pack the metadata of a pool into a compressed file, and unpack it.

Source: docs/tools/thin_metadata_pack.md, "File format".  How one block is encoded is in
:mod:`thinpool.pack_encoding`, and again, for many blocks at once, in :mod:`thinpool.pack_batch`; here are the file, its
chunks, and what belongs in it.

Memory is a few chunks, whatever the size of the device.
"""

from __future__ import annotations

import errno
import os
import zlib
from mmap import mmap
from struct import Struct
from typing import TYPE_CHECKING

from persistent_data.checksum import (
    BITMAP_SALT,
    BTREE_NODE_SALT,
    INDEX_SALT,
    SUPERBLOCK_SALT,
    crc32c,
    xor_of,
)
from persistent_data.layout import (
    BITMAP_HEADER_SIZE,
    BLOCK_SIZE,
    BLOCKNR,
    BLOCKNR_OFFSET,
    ENTRIES_PER_BITMAP,
    ENTRIES_PER_BYTE,
    INDEX_ENTRY,
    INDEX_HEADER_SIZE,
    MAX_METADATA_BITMAPS,
)
from thinpool.errors import ThinError
from thinpool.layout import SUPERBLOCK_LOCATION, Superblock, superblock_error
from thinpool.pack_encoding import BLOCK_NUMBER, BadEncoding, decode_block, encode_literal, encode_node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from bufio.device import Device
    from thinpool.layout import SpaceMapRoot

    Progress = Callable[[int, int], None]

MAGIC = 0xA537A0AA6309EF77
VERSION = 3
HEADER = Struct("<QQQQ")
"""magic, version, block size, nr_blocks of the packed device."""
CHUNK_HEADER = Struct("<Q")
"""Bytes of the compressed stream that follows."""
BLOCKS_PER_CHUNK = 1024
"""As many as the reference's packs have at most in a chunk."""

_ARRAY_SALT = 595846735
_CACHE_SUPERBLOCK_SALT = 9031977
_ERA_SUPERBLOCK_SALT = 146538381
_SUPERBLOCK_SALTS = (SUPERBLOCK_SALT, _CACHE_SUPERBLOCK_SALT, _ERA_SUPERBLOCK_SALT)
_KINDS = {xor_of(salt) for salt in (BTREE_NODE_SALT, BITMAP_SALT, INDEX_SALT, _ARRAY_SALT, *_SUPERBLOCK_SALTS)}
_NODE_KIND = xor_of(BTREE_NODE_SALT)
_SUPERBLOCK_KINDS = {xor_of(salt) for salt in _SUPERBLOCK_SALTS}

_COMPRESSED_BYTES_AT_A_TIME = 1 << 16
_MAX_CHUNK_BYTES = 64 << 20
"""A chunk is unpacked in memory; ones that unpack to more than sixteen times what any packer makes are refused."""
_ZEROS_AT_A_TIME = 256 * BLOCK_SIZE
_BATCH_FROM_NODES = 256
"""Nodes that are encoded one by one before numpy is loaded to encode the others in batches."""
_BATCH_FROM_BYTES = 1 << 17
"""Length of a stream from which on numpy is loaded to decode it."""
_ZERO_BLOCK = bytes(BLOCK_SIZE)


class PackError(ThinError):
    """A pack file is none, is damaged, cut off, or does not hold all that its pool uses (EILSEQ)."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EILSEQ, message)


class PackSummary:
    """What :func:`pack` did, in metadata blocks.

    :ivar nr_packed: blocks in the pack
    :ivar nr_damaged: blocks left out that bear their own number, as all metadata does, but no checksum of any kind
    """

    __slots__ = ("nr_damaged", "nr_packed")

    def __init__(self) -> None:
        self.nr_packed = 0
        self.nr_damaged = 0


def kind_of_block(block: bytes | memoryview) -> int | None:
    """Return what the checksum of *block* is salted with, as :func:`xor_of` gives it; None if it is no metadata."""
    kind = crc32c(block[4:]) ^ int.from_bytes(block[:4], "little")
    return kind if kind in _KINDS else None


def is_superblock(block: bytes | memoryview) -> bool:
    """Tell whether *block* is the sound superblock of a thin pool, a cache or an era device."""
    return kind_of_block(block) in _SUPERBLOCK_KINDS


# Packing


def pack(
    device: Device, write: Callable[[bytes], object], *, everything: bool = False, progress: Progress | None = None
) -> PackSummary:
    """Write a pack of the metadata on *device*.

    In it is each block whose checksum is right for a kind of metadata, in use or not.

    :param write: takes the pack, in pieces, in order
    :param everything: pack also blocks that are no metadata by their checksum, unless they are all zeros.  The
        reference's unpacker does not take such packs
    :param progress: called now and then with the blocks that are done and those of the device
    :raises OSError: *device* cannot be read, or what *write* raises
    """
    nr_blocks = device.size_bytes // BLOCK_SIZE
    summary = PackSummary()
    write(HEADER.pack(MAGIC, VERSION, BLOCK_SIZE, nr_blocks))
    # Anonymous maps begin at a page, as devices opened with O_DIRECT demand.
    window = memoryview(mmap(-1, BLOCKS_PER_CHUNK * BLOCK_SIZE))
    zeros = bytes(len(window))
    encoder = _Encoder()
    for begin in range(0, nr_blocks, BLOCKS_PER_CHUNK):
        end = min(begin + BLOCKS_PER_CHUNK, nr_blocks)
        view = window[: (end - begin) * BLOCK_SIZE]
        device.readinto(view, begin * BLOCK_SIZE)
        # Most of a large device has never been written.
        nodes: list[int] = []
        literals: list[int] = []
        if view.tobytes() != zeros[: len(view)]:
            nodes, literals = _classify(view, begin, everything, summary)
        if nodes or literals:
            stream = zlib.compress(encoder.encode(view, begin, nodes, literals))
            write(CHUNK_HEADER.pack(len(stream)))
            write(stream)
        if progress is not None:
            progress(end, nr_blocks)
    return summary


def _classify(window: memoryview, begin: int, everything: bool, summary: PackSummary) -> tuple[list[int], list[int]]:
    """Return the blocks of *window* to pack, which holds those from *begin*: btree nodes, and others."""
    nodes: list[int] = []
    literals: list[int] = []
    for offset in range(0, len(window), BLOCK_SIZE):
        block = window[offset : offset + BLOCK_SIZE]
        kind = kind_of_block(block)
        number = begin + offset // BLOCK_SIZE
        if kind is not None:
            (nodes if kind == _NODE_KIND else literals).append(number)
        elif block.tobytes() != _ZERO_BLOCK:
            if everything:
                literals.append(number)
            elif BLOCKNR.unpack_from(block, BLOCKNR_OFFSET)[0] == number:
                summary.nr_damaged += 1
    summary.nr_packed += len(nodes) + len(literals)
    return nodes, literals


class _Encoder:
    """Makes the stream of a chunk; block by block at first, in batches once there is enough to do."""

    def __init__(self) -> None:
        self._nr_nodes = 0

    def encode(self, window: memoryview, begin: int, nodes: list[int], literals: list[int]) -> bytes:
        """Return the entries of the blocks *nodes* and *literals* of *window*, which holds the blocks from *begin*."""
        entries: dict[int, bytes] = {}
        for number in literals:
            offset = (number - begin) * BLOCK_SIZE
            entries[number] = encode_literal(window[offset : offset + BLOCK_SIZE])
        self._nr_nodes += len(nodes)
        if self._nr_nodes <= _BATCH_FROM_NODES:
            for number in nodes:
                offset = (number - begin) * BLOCK_SIZE
                entries[number] = encode_node(window[offset : offset + BLOCK_SIZE])
        else:
            from thinpool.pack_batch import encode_nodes

            entries.update(encode_nodes(window, begin, nodes))
        return b"".join(BLOCK_NUMBER.pack(number) + entries[number] for number in sorted(entries))


# Unpacking


class PackReader:
    """A pack file, read from its beginning to its end.

    :param file: open for reading at its beginning, and able to seek
    :raises PackError: it is none, or one of another version or block size
    :ivar nr_blocks: metadata blocks of the device that was packed
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        header = file.read(HEADER.size)
        if len(header) >= CHUNK_HEADER.size and CHUNK_HEADER.unpack_from(header)[0] != MAGIC:
            raise PackError("Not a pack file")
        if len(header) != HEADER.size:
            raise PackError(f"Not a pack file, or one that is cut off: it has {len(header)} bytes")
        _, version, block_size, self.nr_blocks = HEADER.unpack(header)
        if version != VERSION:
            raise PackError(f"unsupported pack file version ({version}).")
        if block_size != BLOCK_SIZE:
            raise PackError("block size is not 4096")
        if not self.nr_blocks:
            raise PackError("damaged pack file: it is of a device without blocks")
        self._size = file.seek(0, os.SEEK_END)
        # By the place and the length of a chunk: the lowest and the highest block in it.
        self._ranges: dict[tuple[int, int], tuple[int, int]] = {}
        self._seen = _BlockSet()

    @property
    def size_bytes(self) -> int:
        """Size of the device that was packed, without what follows its last whole block."""
        return int(self.nr_blocks) * BLOCK_SIZE

    def chunks(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (offset in the file, compressed bytes, uncompressed stream) for each chunk.

        :raises PackError: a chunk is cut off or damaged
        """
        offset = HEADER.size
        while offset < self._size:
            self._file.seek(offset)
            header = self._file.read(CHUNK_HEADER.size)
            if len(header) != CHUNK_HEADER.size:
                raise PackError(f"the pack file is cut off: it ends within the chunk at byte {offset}")
            (length,) = CHUNK_HEADER.unpack(header)
            if offset + CHUNK_HEADER.size + length > self._size:
                raise PackError(f"the pack file is cut off: it ends within the chunk at byte {offset}")
            yield offset, length, self._decompress(offset, length)
            offset += CHUNK_HEADER.size + length

    def _decompress(self, offset: int, length: int) -> bytes:
        """Return the stream of the chunk at *offset*, of *length* compressed bytes; the file stands at these."""
        decompressor = zlib.decompressobj()
        pieces = []
        nr_bytes = 0
        try:
            while length:
                compressed = self._file.read(min(length, _COMPRESSED_BYTES_AT_A_TIME))
                if not compressed:
                    raise PackError(f"the pack file is cut off: it ends within the chunk at byte {offset}")
                length -= len(compressed)
                while compressed:
                    piece = decompressor.decompress(compressed, _MAX_CHUNK_BYTES + 1 - nr_bytes)
                    compressed = decompressor.unconsumed_tail
                    pieces.append(piece)
                    nr_bytes += len(piece)
                    if nr_bytes > _MAX_CHUNK_BYTES:
                        raise PackError(f"damaged pack file: the chunk at byte {offset} is too large")
        except zlib.error as error:
            raise PackError(f"damaged pack file: the chunk at byte {offset} does not decompress: {error}") from None
        if not decompressor.eof or decompressor.unused_data:
            raise PackError(f"damaged pack file: the chunk at byte {offset} has a wrong length")
        return b"".join(pieces)

    def find(self, wanted: set[int]) -> dict[int, bytes]:
        """Return the content of those of *wanted* that are in the pack, which :meth:`blocks` has been through."""
        found: dict[int, bytes] = {}
        for (offset, length), (first, last) in self._ranges.items():
            if any(first <= number <= last for number in wanted):
                self._file.seek(offset + CHUNK_HEADER.size)
                entries = _entries(self._decompress(offset, length))
                found.update((number, block) for number, block in entries if number in wanted)
        return found

    def has(self, number: int) -> bool:
        """Tell whether a block is in the pack, which :meth:`blocks` has been through."""
        return number in self._seen

    def blocks(self, progress: Progress | None = None) -> Iterator[tuple[int, bytes]]:
        """Yield (number, content) for each block in the pack, in the pack's order.

        :param progress: called after each chunk with the bytes of the file that are done and all of them
        :raises PackError: the pack is damaged or cut off
        """
        seen = self._seen = _BlockSet()
        for offset, length, stream in self.chunks():
            first, last = self.nr_blocks, 0
            try:
                for number, block in _entries(stream):
                    first, last = min(first, number), max(last, number)
                    if number >= self.nr_blocks:
                        raise BadEncoding(f"block {number} is outside the device of {self.nr_blocks} blocks")
                    if not seen.add(number):
                        raise BadEncoding(f"block {number} is in the pack twice")
                    yield number, block
            except BadEncoding as error:
                raise PackError(f"damaged pack file: the chunk at byte {offset}: {error}") from None
            self._ranges[offset, length] = first, last
            if progress is not None:
                progress(self._file.tell(), self._size)


def _entries(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (block number, content) for the entries of a chunk."""
    if len(stream) >= _BATCH_FROM_BYTES:
        from thinpool.pack_batch import decode_entries

        entries = decode_entries(stream)
        if entries is not None:
            yield from entries
            return
    position = 0
    while position < len(stream):
        if len(stream) - position < BLOCK_NUMBER.size:
            raise BadEncoding("it ends within an entry")
        (number,) = BLOCK_NUMBER.unpack_from(stream, position)
        block, position = decode_block(stream, position + BLOCK_NUMBER.size)
        yield number, block


class _BlockSet:
    """A set of block numbers that takes a bit for each block, where there are any nearby."""

    _BITS_AT_A_TIME = 1 << 15

    def __init__(self) -> None:
        self._parts: dict[int, bytearray] = {}

    def __contains__(self, number: int) -> bool:
        part, bit = divmod(number, self._BITS_AT_A_TIME)
        bits = self._parts.get(part)
        return bits is not None and bool(bits[bit >> 3] & 1 << (bit & 7))

    def add(self, number: int) -> bool:
        """Add a block; False if it was there already."""
        part, bit = divmod(number, self._BITS_AT_A_TIME)
        bits = self._parts.get(part)
        if bits is None:
            bits = self._parts[part] = bytearray(self._BITS_AT_A_TIME // 8)
        mask = 1 << (bit & 7)
        if bits[bit >> 3] & mask:
            return False
        bits[bit >> 3] |= mask
        return True

    def gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of each run of numbers below *end* that are not in the set, in order."""
        begin = 0
        number = 0
        while number < end:
            part, bit = divmod(number, self._BITS_AT_A_TIME)
            bits = self._parts.get(part)
            if bits is None:
                number = (part + 1) * self._BITS_AT_A_TIME
            elif not bit & 7 and not bits[bit >> 3]:
                number += 8
            else:
                if bits[bit >> 3] & 1 << (bit & 7):
                    if begin < number:
                        yield begin, number
                    begin = number + 1
                number += 1
        if begin < end:
            yield begin, end


def verify_pack(reader: PackReader, *, incomplete: bool = False, progress: Progress | None = None) -> None:
    """Read and decode a pack from one end to the other.

    :param incomplete: accept a pack that :func:`verify_complete` does not
    :raises PackError: it is damaged, cut off, or lacks blocks
    """
    for _ in reader.blocks(progress):
        pass
    if not incomplete:
        verify_complete(reader)


def verify_complete(reader: PackReader) -> None:
    """Look whether a pack that has been read to its end has all the blocks that its pool uses.

    The format has no end mark: a file that ends between two chunks looks whole, and so does one whose packer lost a
    chunk.  But a pool counts references to its metadata blocks, and those that it uses belong in its pack.  What is a
    cache's or an era device's is not looked at so closely.

    :raises PackError: it lacks blocks
    """
    superblock = reader.find({SUPERBLOCK_LOCATION}).get(SUPERBLOCK_LOCATION)
    if superblock is None:
        raise PackError("the pack file is cut off or was made of damaged metadata: it has no superblock")
    if superblock_error(superblock) is not None:
        return
    missing = (
        number for number in _used_blocks(reader, Superblock.unpack(superblock).metadata_root) if not reader.has(number)
    )
    first = next(missing, None)
    if first is not None:
        raise PackError(
            f"the pack file is cut off, or its packer lost blocks or left out damaged ones: "
            f"of the blocks that the pool uses, {1 + sum(1 for _ in missing)} are missing; the first is block {first}"
        )


def _used_blocks(reader: PackReader, root: SpaceMapRoot) -> Iterator[int]:
    """Yield the metadata blocks that a pool uses, from the bitmaps in its pack, which are used blocks themselves."""
    yield root.bitmap_root
    for index in reader.find({root.bitmap_root}).values():
        bitmap_of = {}
        for at in range(min(-(-root.nr_blocks // ENTRIES_PER_BITMAP), MAX_METADATA_BITMAPS)):
            bitmap_of[at], _, _ = INDEX_ENTRY.unpack_from(index, INDEX_HEADER_SIZE + at * INDEX_ENTRY.size)
        yield from bitmap_of.values()
        bitmaps = reader.find(set(bitmap_of.values()))
        for at, location in bitmap_of.items():
            for offset, counts in enumerate(bitmaps.get(location, b"")[BITMAP_HEADER_SIZE:]):
                if counts:
                    first = at * ENTRIES_PER_BITMAP + offset * ENTRIES_PER_BYTE
                    yield from (first + i for i in range(ENTRIES_PER_BYTE) if counts >> 2 * i & 3)


def unpack(reader: PackReader, device: Device, *, zeroed: bool = False, progress: Progress | None = None) -> None:
    """Write the metadata in a pack to *device* and flush it.

    Blocks that are not in the pack become zeros, those behind the device that was packed stay as they are.

    :param zeroed: *device* holds nothing but zeros, and only what is in the pack is written
    :raises PackError: the pack is damaged, which is not found before some of it was written: call
        :func:`verify_pack` first, unless *device* can be thrown away, and then :func:`verify_complete` at the end
    :raises OSError: *device* cannot be written
    """
    written = _BlockSet()
    batch = bytearray()
    batch_begin = batch_end = 0
    for number, block in reader.blocks(progress):
        written.add(number)
        if batch and (number != batch_end or len(batch) >= _ZEROS_AT_A_TIME):
            device.pwrite(batch, batch_begin * BLOCK_SIZE)
            batch = bytearray()
        if not batch:
            batch_begin = number
        batch += block
        batch_end = number + 1
    if batch:
        device.pwrite(batch, batch_begin * BLOCK_SIZE)
    if not zeroed:
        for begin, end in written.gaps(reader.nr_blocks):
            _write_zeros(device, begin, end)
    device.flush()


def _write_zeros(device: Device, begin: int, end: int) -> None:
    zeros = memoryview(bytes(min(_ZEROS_AT_A_TIME, (end - begin) * BLOCK_SIZE)))
    for offset in range(begin * BLOCK_SIZE, end * BLOCK_SIZE, _ZEROS_AT_A_TIME):
        device.pwrite(zeros[: end * BLOCK_SIZE - offset], offset)
