"""CRC-32C of metadata blocks: one checksum, one salt per kind of block.

Source: docs/format.md, "Checksums".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcrc.crc32 import iscsi

if TYPE_CHECKING:
    from collections.abc import Callable

    from bufio.device import ReadableBuffer

SUPERBLOCK_SALT = 160774
BTREE_NODE_SALT = 121107
BITMAP_SALT = 240779
INDEX_SALT = 160478

_NO_FINAL_INVERSION = 0xFFFFFFFF

SALT_NAMES = {
    SUPERBLOCK_SALT: "superblock",
    BTREE_NODE_SALT: "btree node",
    BITMAP_SALT: "space map bitmap",
    INDEX_SALT: "metadata index",
}


def block_checksum(block: ReadableBuffer, salt: int) -> int:
    """Return the checksum that a block of the kind of *salt* must carry in its first four bytes.

    *block* is the whole block; everything behind the checksum itself is covered, unused space included.
    """
    return int(iscsi(memoryview(block)[4:])) ^ _NO_FINAL_INVERSION ^ salt


crc32c: Callable[[ReadableBuffer], int] = iscsi
"""The plain CRC-32C; with :func:`xor_of` the two steps of :func:`block_checksum`, for callers in a hurry."""


def xor_of(salt: int) -> int:
    """Return what the CRC-32C of a block behind its first four bytes is combined with, to be its checksum."""
    return _NO_FINAL_INVERSION ^ salt


def kind_of(block: ReadableBuffer) -> str | None:
    """Name the kind of block whose checksum *block* carries, None if it is no kind's."""
    stored = int.from_bytes(memoryview(block)[:4], "little")
    return SALT_NAMES.get(int(iscsi(memoryview(block)[4:])) ^ _NO_FINAL_INVERSION ^ stored)
