"""An independent reading of pack files, from the description of the format alone, to judge our packer and unpacker by.

It shares nothing with the packages under test: a block is decoded by carrying out instructions on a list of 64-bit
words, one word at a time.
"""

from __future__ import annotations

import struct
import zlib
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAGIC = 0xA537A0AA6309EF77
HEADER_SIZE = 32


def header(nr_blocks: int, magic: int = MAGIC, version: int = 3, block_size: int = 4096) -> bytes:
    return struct.pack("<4Q", magic, version, block_size, nr_blocks)


def chunk(stream: bytes) -> bytes:
    compressed = zlib.compress(stream)
    return struct.pack("<Q", len(compressed)) + compressed


def as_is(number: int, block: bytes) -> bytes:
    """The simplest entry there is for a block."""
    return struct.pack("<Q", number) + b"\xa2\x00\x10" + block


def simple_pack(nr_blocks: int, blocks: Mapping[int, bytes]) -> bytes:
    return header(nr_blocks) + chunk(b"".join(as_is(number, block) for number, block in blocks.items()))


def streams(pack: bytes) -> Iterator[bytes]:
    at = HEADER_SIZE
    while at < len(pack):
        (length,) = struct.unpack_from("<Q", pack, at)
        yield zlib.decompress(pack[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(pack)


def entries(pack: bytes) -> dict[int, bytes]:
    """The encoding of each block."""
    found: dict[int, bytes] = {}
    for stream in streams(pack):
        rest = iter(stream)
        at = 0
        while number := bytes(islice(rest, 8)):
            machine = Machine(rest)
            machine.block()
            (block,) = struct.unpack("<Q", number)
            assert block not in found
            found[block] = stream[at + 8 : at + 8 + machine.taken]
            at += 8 + machine.taken
    return found


def blocks(pack: bytes) -> dict[int, bytes]:
    """The content of each block."""
    return {number: Machine(iter(encoded)).block() for number, encoded in entries(pack).items()}


class Machine:
    """Takes one instruction after the other from an iterator over bytes."""

    def __init__(self, code: Iterator[int]) -> None:
        self._code = code
        self._base = 0
        self.taken = 0

    def block(self) -> bytes:
        out = b""
        while len(out) < 4096:
            out += self.step()
        assert len(out) == 4096
        return out

    def _byte(self) -> int:
        self.taken += 1
        return next(self._code)

    def _wide(self, width: int) -> int:
        assert width in (1, 2, 4, 8)
        return sum(self._byte() << 8 * i for i in range(width))

    def step(self, times: int = 1) -> bytes:
        first = self._byte()
        n = first % 16
        match first // 16:
            case 0:
                self._base = self._wide(n)
                return struct.pack("<Q", self._base) * times
            case 1:
                return self._steps(n, times)
            case 2:
                return self._steps(self._wide(n), times)
            case 3:
                return self._steps(-n, times)
            case 4:
                return self._steps(-self._wide(n), times)
            case 5:
                return struct.pack("<Q", self._base) * n
            case 6:
                return struct.pack("<Q", self._base) * (n * 256 + self._byte())
            case 7:
                return self.step(n)
            case 8:
                return self.step(n * 256 + self._byte())
            case 9:
                return bytes(self._byte() for _ in range(n))
            case 10:
                return bytes(self._byte() for _ in range(self._wide(n)))
            case 11:
                length = n * 256 + self._byte()
                high, low = self._numbers(length), self._numbers(length)
                return struct.pack(
                    f"<{length}Q", *((h << 24 | x % (1 << 24)) % (1 << 64) for h, x in zip(high, low, strict=True))
                )
        raise AssertionError(f"instruction {first:#x}")

    def _steps(self, by: int, times: int) -> bytes:
        out = b""
        for _ in range(times):
            self._base = (self._base + by) % (1 << 64)
            out += struct.pack("<Q", self._base)
        return out

    def _numbers(self, length: int) -> tuple[int, ...]:
        out = b""
        while len(out) < 8 * length:
            out += self.step()
        return struct.unpack(f"<{length}Q", out)
