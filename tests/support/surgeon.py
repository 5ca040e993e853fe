"""Break metadata on purpose: one thing at a time, checksums put right afterwards, on a copy in memory.

Uses the independent reader of :mod:`tests.support.image` and nothing of the packages under test but the device that
the result is handed over on.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from bufio.device import MemoryDevice
from tests.support.image import BLOCK, ENTRIES_PER_BITMAP, NODE_HEADER, SALTS, Image, raw_checksum

if TYPE_CHECKING:
    from collections.abc import Sequence

NODE_FIELDS = {"flags": 4, "blocknr": 8, "nr_entries": 16, "max_entries": 20, "value_size": 24, "padding": 28}
SUPERBLOCK_FIELDS = {
    "flags": (4, 4),
    "blocknr": (8, 8),
    "uuid": (16, 16),
    "magic": (32, 8),
    "version": (40, 4),
    "time": (44, 4),
    "trans_id": (48, 8),
    "held_root": (56, 8),
    "data_nr_blocks": (64, 8),
    "data_nr_allocated": (72, 8),
    "data_bitmap_root": (80, 8),
    "data_ref_count_root": (88, 8),
    "metadata_nr_blocks_counted": (192, 8),
    "metadata_nr_allocated": (200, 8),
    "metadata_bitmap_root": (208, 8),
    "metadata_ref_count_root": (216, 8),
    "data_mapping_root": (320, 8),
    "device_details_root": (328, 8),
    "data_block_size": (336, 4),
    "metadata_block_size": (340, 4),
    "metadata_nr_blocks": (344, 8),
    "compat_flags": (352, 4),
    "compat_ro_flags": (356, 4),
    "incompat_flags": (360, 4),
}
DETAILS_FIELDS = {
    "mapped_blocks": (0, 8),
    "transaction_id": (8, 8),
    "creation_time": (16, 4),
    "snapshotted_time": (20, 4),
}
PAIR_OF_COUNT = {0: 0, 1: 2, 2: 1, 3: 3}


def seal(block: bytes | bytearray, kind: str) -> bytes:
    """The block with the checksum of its kind: "superblock", "node", "bitmap" or "index"."""
    return (raw_checksum(bytes(block)) ^ SALTS[kind]).to_bytes(4, "little") + bytes(block[4:])


def node_block(
    location: int,
    keys: Sequence[int],
    values: Sequence[int],
    *,
    leaf: bool = True,
    max_entries: int = 252,
    value_size: int = 8,
) -> bytes:
    """A sound btree node: a leaf, or an internal node whose values are children."""
    block = bytearray(BLOCK)
    NODE_HEADER.pack_into(block, 0, 0, 2 if leaf else 1, location, len(keys), max_entries, value_size, 0)
    struct.pack_into(f"<{len(keys)}Q", block, 32, *keys)
    begin = 32 + 8 * max_entries
    block[begin : begin + len(values) * value_size] = b"".join(v.to_bytes(value_size, "little") for v in values)
    return seal(block, "node")


class Surgeon:
    """An image to operate on.  Each operation leaves every checksum right unless it says otherwise."""

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)

    def device(self) -> MemoryDevice:
        """What has become of the image, on a device."""
        return MemoryDevice(self._content)

    def content(self) -> bytes:
        """What has become of the image."""
        return bytes(self._content)

    @property
    def image(self) -> Image:
        """The image as it is now, for the independent reader."""
        return Image.from_bytes(self.content())

    def block(self, number: int) -> bytearray:
        """A copy of one block."""
        return self._content[number * BLOCK : (number + 1) * BLOCK]

    def put(self, number: int, block: bytes | bytearray, kind: str | None = None) -> None:
        """Replace a block; *kind* None leaves the checksum as it is."""
        self._content[number * BLOCK : (number + 1) * BLOCK] = block if kind is None else seal(block, kind)

    def flip(self, number: int, byte: int = 100) -> None:
        """Flip a bit, and leave the checksum wrong."""
        self._content[number * BLOCK + byte] ^= 0x10

    def patch(self, number: int, offset: int, size: int, value: int, kind: str) -> None:
        """Write an integer into a block."""
        block = self.block(number)
        block[offset : offset + size] = value.to_bytes(size, "little")
        self.put(number, block, kind)

    def cut(self, nr_blocks: int) -> None:
        """Make the device smaller."""
        del self._content[nr_blocks * BLOCK :]

    # Superblock

    def superblock(self, number: int = 0, /, **fields: int) -> None:
        """Set fields of the superblock, or of the copy at block *number*."""
        for name, value in fields.items():
            offset, size = SUPERBLOCK_FIELDS[name]
            self.patch(number, offset, size, value, "superblock")

    # Nodes

    def node(self, number: int, **fields: int) -> None:
        """Set fields of a node's header."""
        for name, value in fields.items():
            self.patch(number, NODE_FIELDS[name], 8 if name == "blocknr" else 4, value, "node")

    def key(self, number: int, index: int, value: int) -> None:
        """Set a key of a node."""
        self.patch(number, 32 + 8 * index, 8, value, "node")

    def value(self, number: int, index: int, value: int) -> None:
        """Set a value of a node."""
        node = self.image.node(number)
        self.patch(number, 32 + 8 * node.max_entries + index * node.value_size, node.value_size, value, "node")

    def rewrite(self, number: int, keys: Sequence[int], values: Sequence[int], max_entries: int | None = None) -> None:
        """Replace everything in a node but its kind."""
        node = self.image.node(number)
        block = node_block(
            number,
            keys,
            values,
            leaf=node.leaf,
            max_entries=max_entries or node.max_entries,
            value_size=node.value_size,
        )
        self.put(number, block)

    def keep(self, number: int, nr_entries: int, max_entries: int | None = None) -> None:
        """Drop all but the first entries of a node."""
        node = self.image.node(number)
        values = [int.from_bytes(value, "little") for value in node.values[:nr_entries]]
        self.rewrite(number, node.keys[:nr_entries], values, max_entries)

    def device_root(self, dev_id: int) -> int:
        """The root of a device's mapping tree."""
        roots = dict(self.image.items(self.image.superblock().mapping_root))
        return int.from_bytes(roots[dev_id], "little")

    def leaves(self, root: int) -> list[int]:
        """The leaves of a tree, left to right."""
        return [node.number for _, node in self.image.nodes(root) if node.leaf]

    def details(self, dev_id: int, **fields: int) -> None:
        """Set fields of a device's details."""
        for leaf in self.leaves(self.image.superblock().details_root):
            node = self.image.node(leaf)
            if dev_id in node.keys:
                entry = 32 + 8 * node.max_entries + node.keys.index(dev_id) * node.value_size
                for name, value in fields.items():
                    offset, size = DETAILS_FIELDS[name]
                    self.patch(leaf, entry + offset, size, value, "node")

    # Space maps

    def bitmap_of(self, which: str, block: int) -> int:
        """The bitmap block that has the count of *block* in the "data" or "metadata" space map."""
        return int(self.image.bitmaps(which)[block // ENTRIES_PER_BITMAP][0])

    def count(self, which: str, block: int, count: int) -> None:
        """Set the bitmap entry of *block*; 3 for three and more."""
        bitmap = self.bitmap_of(which, block)
        byte, entry = divmod(block % ENTRIES_PER_BITMAP, 4)
        old = self.block(bitmap)[16 + byte]
        new = old & ~(3 << 2 * entry) | PAIR_OF_COUNT[count] << 2 * entry
        self.patch(bitmap, 16 + byte, 1, new, "bitmap")

    def index_entry(self, which: str, number: int, **fields: int) -> None:
        """Set "blocknr", "nr_free" or "none_free_before" of a bitmap's index entry."""
        sb = self.image.superblock()
        offsets = {"blocknr": (0, 8), "nr_free": (8, 4), "none_free_before": (12, 4)}
        if which == "metadata":
            holder, entry, kind = sb.metadata_map.bitmap_root, 16 + 16 * number, "index"
        else:
            holder = self.leaves(sb.data_map.bitmap_root)[0]
            node = self.image.node(holder)
            entry, kind = 32 + 8 * node.max_entries + 16 * node.keys.index(number), "node"
        for name, value in fields.items():
            offset, size = offsets[name]
            self.patch(holder, entry + offset, size, value, kind)
