"""An independent reader of metadata images: what is on the disk, told without any of the code under test.

Pure struct, no numpy, no engine: where this and the engine agree, two people have read the format description in
the same way.  It trusts the image: damage raises :class:`BadImageError` or a struct error.  For whole images only, and
slow; a million mappings take seconds.
"""

import hashlib
import lzma
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

BLOCK = 4096
MAGIC = 27022010
ENTRIES_PER_BITMAP = 16320
ZEROS = bytes(BLOCK)

#: Block kind -> what its checksum is xored with.
SALTS = {"superblock": 160774, "node": 121107, "bitmap": 240779, "index": 160478}

#: The superblock's bytes that the kernel copies from uninitialised memory.
UNSPECIFIED = ((96, 192), (224, 320))

NODE_HEADER = struct.Struct("<IIQIIII")
INDEX_ENTRY = struct.Struct("<QII")


class BadImageError(AssertionError):
    """The image is not what a metadata device must be."""


class Details(NamedTuple):
    """One entry of the details tree."""

    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


@dataclass(frozen=True)
class SpaceMapRoot:
    """The 32 bytes that describe a space map."""

    nr_blocks: int
    nr_allocated: int
    bitmap_root: int
    ref_count_root: int


@dataclass(frozen=True)
class Superblock:
    """The superblock's fields, less those that never change."""

    flags: int
    version: int
    time: int
    transaction_id: int
    held_root: int
    data_map: SpaceMapRoot
    metadata_map: SpaceMapRoot
    mapping_root: int
    details_root: int
    data_block_size: int
    metadata_nr_blocks: int


@dataclass(frozen=True)
class Node:
    """A btree node: its live entries."""

    number: int
    leaf: bool
    max_entries: int
    value_size: int
    keys: tuple[int, ...]
    values: tuple[bytes, ...]

    @property
    def children(self) -> list[int]:
        """The values, read as block numbers."""
        return [int.from_bytes(v, "little") for v in self.values]


@dataclass(frozen=True)
class TreeShape:
    """Block numbers and fill of a tree, level by level: ``levels[0]`` is the root's."""

    levels: tuple[tuple[tuple[int, int], ...], ...]
    """For each level the (block, nr_entries) pairs from left to right."""


@dataclass(frozen=True)
class Model:
    """Everything a pool's metadata says, as plain values."""

    superblock: Superblock
    devices: dict[int, Details]
    mappings: dict[int, dict[int, tuple[int, int]]]
    """Device -> {virtual block: (data block, time)}."""
    data_counts: dict[int, int]
    """Data block -> reference count, free blocks left out."""
    metadata_counts: dict[int, int]
    shapes: dict[str, TreeShape]
    """The shape of each tree: "top", "details", "device N", and the space maps' trees."""


@dataclass(frozen=True)
class Difference:
    """One metadata block that is not the same in two images."""

    block: int
    kind: str
    reason: str
    left: bytes = field(repr=False)
    right: bytes = field(repr=False)

    def __str__(self) -> str:
        """Where the blocks begin to differ, with both contents there."""
        at = next((i for i in range(BLOCK) if self.left[i : i + 1] != self.right[i : i + 1]), 0) // 16 * 16
        return (
            f"metadata block {self.block} ({self.kind}): {self.reason}; first difference in bytes {at}..{at + 15}:\n"
            f"  left  {self.left[at : at + 16].hex(' ')}\n  right {self.right[at : at + 16].hex(' ')}"
        )


class Image:
    """The blocks of a metadata device; those not stored are zero."""

    def __init__(self, blocks: Mapping[int, bytes], nr_blocks: int) -> None:
        self.blocks = blocks
        self.nr_blocks = nr_blocks

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an image file, packed (``.xz``) or not."""
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return cls.from_bytes(data)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The device that holds exactly these bytes."""
        nr_blocks = len(data) // BLOCK
        view = memoryview(data)
        blocks = {n: bytes(b) for n in range(nr_blocks) if (b := view[n * BLOCK : (n + 1) * BLOCK]) != ZEROS}
        return cls(blocks, nr_blocks)

    def block(self, number: int) -> bytes:
        """The 4096 bytes of a block."""
        if not 0 <= number < self.nr_blocks:
            raise BadImageError(f"block {number} is not on the device of {self.nr_blocks} blocks")
        return self.blocks.get(number, ZEROS)

    def to_bytes(self) -> bytes:
        """The whole device."""
        return b"".join(self.block(n) for n in range(self.nr_blocks))

    # ---- single blocks

    def superblock(self, number: int = 0) -> Superblock:
        """The superblock, or the copy of it that a metadata snapshot is."""
        b = self.block(number)
        flags, blocknr, _, magic, version, time, trans_id, held = struct.unpack_from("<IQ16sQIIQQ", b, 4)
        if magic != MAGIC or blocknr != number:
            raise BadImageError(f"block {number} is no superblock (magic {magic}, self address {blocknr})")
        mapping, details, block_size, _, metadata_nr_blocks = struct.unpack_from("<QQIIQ", b, 320)
        return Superblock(
            flags=flags,
            version=version,
            time=time,
            transaction_id=trans_id,
            held_root=held,
            data_map=SpaceMapRoot(*struct.unpack_from("<QQQQ", b, 64)),
            metadata_map=SpaceMapRoot(*struct.unpack_from("<QQQQ", b, 192)),
            mapping_root=mapping,
            details_root=details,
            data_block_size=block_size,
            metadata_nr_blocks=metadata_nr_blocks,
        )

    def node(self, number: int) -> Node:
        """A btree node."""
        b = self.block(number)
        _, flags, blocknr, nr_entries, max_entries, value_size, _ = NODE_HEADER.unpack_from(b)
        if blocknr != number or flags not in (1, 2) or nr_entries > max_entries:
            raise BadImageError(f"block {number} is no btree node (self address {blocknr}, flags {flags})")
        values_at = 32 + 8 * max_entries
        return Node(
            number=number,
            leaf=flags == 2,
            max_entries=max_entries,
            value_size=value_size,
            keys=struct.unpack_from(f"<{nr_entries}Q", b, 32),
            values=tuple(
                b[at : at + value_size] for at in range(values_at, values_at + nr_entries * value_size, value_size)
            ),
        )

    def kind(self, number: int) -> str:
        """What a block is, by its checksum; "unknown" if that fits nothing."""
        b = self.block(number)
        salt = raw_checksum(b) ^ int.from_bytes(b[:4], "little")
        return next((kind for kind, s in SALTS.items() if s == salt), "unknown")

    # ---- trees

    def nodes(self, root: int) -> Iterator[tuple[int, Node]]:
        """(level, node) of a tree, a parent before its children, left to right."""
        stack = [(0, root)]
        while stack:
            level, number = stack.pop()
            node = self.node(number)
            yield level, node
            if not node.leaf:
                stack += [(level + 1, child) for child in reversed(node.children)]

    def items(self, root: int) -> Iterator[tuple[int, bytes]]:
        """The entries of a tree, in key order."""
        for _, node in self.nodes(root):
            if node.leaf:
                yield from zip(node.keys, node.values, strict=True)

    def shape(self, root: int) -> TreeShape:
        """The blocks of a tree and how full they are."""
        levels: list[list[tuple[int, int]]] = []
        for level, node in self.nodes(root):
            if level == len(levels):
                levels.append([])
            levels[level].append((node.number, len(node.keys)))
        return TreeShape(tuple(tuple(level) for level in levels))

    # ---- space maps

    def bitmaps(self, which: str) -> list[tuple[int, int, int]]:
        """(block, nr_free, none_free_before) of each bitmap of the "data" or "metadata" map."""
        sb = self.superblock()
        if which == "data":
            return [INDEX_ENTRY.unpack(v) for _, v in self.items(sb.data_map.bitmap_root)]
        count = -(-sb.metadata_map.nr_blocks // ENTRIES_PER_BITMAP)
        index = self.block(sb.metadata_map.bitmap_root)
        return [INDEX_ENTRY.unpack_from(index, 16 + 16 * i) for i in range(count)]

    def counts(self, which: str) -> dict[int, int]:
        """Block -> reference count of every block in use."""
        sb = self.superblock()
        root = (sb.data_map if which == "data" else sb.metadata_map).ref_count_root
        overflow = {k: int.from_bytes(v, "little") for k, v in self.items(root)}
        counts: dict[int, int] = {}
        for i, (number, _, _) in enumerate(self.bitmaps(which)):
            b = self.block(number)
            for byte_index in range(16, BLOCK):
                byte = b[byte_index]
                if not byte:
                    continue
                first = i * ENTRIES_PER_BITMAP + (byte_index - 16) * 4
                for j in range(4):
                    pair = byte >> (2 * j) & 3
                    if pair:
                        n = first + j
                        counts[n] = {2: 1, 1: 2}.get(pair) or overflow.pop(n)
        if overflow:
            raise BadImageError(f"the {which} overflow tree has counts of blocks not marked so: {sorted(overflow)[:5]}")
        return counts

    # ---- everything

    def devices(self, superblock: Superblock | None = None) -> dict[int, Details]:
        """The details tree."""
        root = (superblock or self.superblock()).details_root
        return {k: Details(*struct.unpack("<QQII", v)) for k, v in self.items(root)}

    def mappings(self, superblock: Superblock | None = None) -> dict[int, dict[int, tuple[int, int]]]:
        """Every device's mappings; those of devices that share a root are the same dict."""
        by_root: dict[int, dict[int, tuple[int, int]]] = {}
        result = {}
        for dev, value in self.items((superblock or self.superblock()).mapping_root):
            root = int.from_bytes(value, "little")
            if root not in by_root:
                packed = ((k, int.from_bytes(v, "little")) for k, v in self.items(root))
                by_root[root] = {k: (v >> 24, v & 0xFFFFFF) for k, v in packed}
            result[dev] = by_root[root]
        return result

    def shapes(self) -> dict[str, TreeShape]:
        """The shape of every tree reachable from the superblock (the metadata snapshot's excepted)."""
        sb = self.superblock()
        shapes = {
            "top": self.shape(sb.mapping_root),
            "details": self.shape(sb.details_root),
            "data index": self.shape(sb.data_map.bitmap_root),
            "data overflow": self.shape(sb.data_map.ref_count_root),
            "metadata overflow": self.shape(sb.metadata_map.ref_count_root),
        }
        for dev, value in self.items(sb.mapping_root):
            shapes[f"device {dev}"] = self.shape(int.from_bytes(value, "little"))
        return shapes

    def model(self) -> Model:
        """Everything the metadata says."""
        return Model(
            superblock=self.superblock(),
            devices=self.devices(),
            mappings=self.mappings(),
            data_counts=self.counts("data"),
            metadata_counts=self.counts("metadata"),
            shapes=self.shapes(),
        )

    def recount(self) -> tuple[dict[int, int], dict[int, int]]:
        """(metadata, data) reference counts as the trees imply them, for comparison with the space maps."""
        sb = self.superblock()
        metadata: Counter[int] = Counter([0])
        data: Counter[int] = Counter()

        def walk(root: int, leaf_values: str) -> None:
            metadata[root] += 1
            if metadata[root] > 1:
                return
            node = self.node(root)
            if not node.leaf:
                for child in node.children:
                    walk(child, leaf_values)
            elif leaf_values == "roots":
                for child in node.children:
                    walk(child, "block times")
            elif leaf_values == "block times":
                data.update(v >> 24 for v in node.children)

        walk(sb.mapping_root, "roots")
        walk(sb.details_root, "none")
        if sb.held_root:
            metadata[sb.held_root] += 1
            copy = self.superblock(sb.held_root)
            walk(copy.mapping_root, "roots")
            walk(copy.details_root, "none")
        for space_map in (sb.data_map, sb.metadata_map):
            walk(space_map.ref_count_root, "none")
        walk(sb.data_map.bitmap_root, "none")
        metadata[sb.metadata_map.bitmap_root] += 1
        for which in ("data", "metadata"):
            metadata.update(number for number, _, _ in self.bitmaps(which))
        return dict(metadata), dict(data)

    # ---- comparison

    def canonical(self, number: int) -> bytes:
        """A block without the bytes that two correct engines may write differently.

        Blanked are the checksum, the superblock's unspecified bytes and the slots of a node behind nr_entries.  The
        checksum is checked first: a block of unknown kind raises.
        """
        b = bytearray(self.block(number))
        kind = self.kind(number)
        if kind == "unknown":
            raise BadImageError(f"block {number}: its checksum fits no kind of block")
        b[0:4] = bytes(4)
        if kind == "superblock":
            for begin, end in UNSPECIFIED:
                b[begin:end] = bytes(end - begin)
        elif kind == "node":
            nr_entries, max_entries, value_size = struct.unpack_from("<III", b, 16)
            values_at = 32 + 8 * max_entries
            b[32 + 8 * nr_entries : values_at] = bytes(8 * (max_entries - nr_entries))
            live_end = values_at + value_size * nr_entries
            b[live_end:] = bytes(BLOCK - live_end)
        return bytes(b)

    def with_specified_superblock(self) -> "Image":
        """The same device with the superblock's unspecified bytes zero, and its checksum set accordingly."""
        b = bytearray(self.block(0))
        for begin, end in UNSPECIFIED:
            b[begin:end] = bytes(end - begin)
        b[0:4] = (raw_checksum(bytes(b)) ^ SALTS["superblock"]).to_bytes(4, "little")
        return Image({**self.blocks, 0: bytes(b)}, self.nr_blocks)

    def sha256(self) -> str:
        """The hash of the whole device, free blocks included, less the superblock's unspecified bytes."""
        digest = hashlib.sha256()
        specified = self.with_specified_superblock()
        for n in range(specified.nr_blocks):
            digest.update(specified.block(n))
        return digest.hexdigest()

    def live_blocks(self) -> list[int]:
        """The blocks in use, by the metadata space map."""
        return sorted(self.counts("metadata"))

    def differences(self, other: "Image") -> Iterator[Difference]:
        """The live blocks that are not the same in *other*, in ascending order."""
        mine, theirs = self.counts("metadata"), other.counts("metadata")
        for n in sorted(mine.keys() | theirs.keys()):
            left, right = self.block(n), other.block(n)
            if mine.get(n) != theirs.get(n):
                kind = (self if n in mine else other).kind(n)
                yield Difference(n, kind, f"reference counts {mine.get(n, 0)} and {theirs.get(n, 0)}", left, right)
            elif self.canonical(n) != other.canonical(n):
                yield Difference(
                    n, f"{self.kind(n)}, {other.kind(n)}", "contents", self.canonical(n), other.canonical(n)
                )


def _crc32c_tables() -> list[list[int]]:
    first = []
    for n in range(256):
        c = n
        for _ in range(8):
            c = c >> 1 ^ 0x82F63B78 if c & 1 else c >> 1
        first.append(c)
    tables = [first]
    for _ in range(7):
        tables.append([first[c & 255] ^ c >> 8 for c in tables[-1]])
    return tables


_TABLES = _crc32c_tables()
_CHECKSUMS: dict[bytes, int] = {}


def raw_checksum(block: bytes) -> int:
    """CRC-32C of bytes 4..4095, register preset, without the final inversion.

    Eight bytes a step, in Python: 0.2 ms a block, so results are remembered by content; comparing two nearly equal
    devices over and over asks for the same blocks again and again.
    """
    known = _CHECKSUMS.get(block)
    if known is not None:
        return known
    t0, t1, t2, t3, t4, t5, t6, t7 = _TABLES
    crc: int = 0xFFFFFFFF ^ int.from_bytes(block[4:8], "little")
    crc = t3[crc & 255] ^ t2[crc >> 8 & 255] ^ t1[crc >> 16 & 255] ^ t0[crc >> 24]
    for low, high in struct.iter_unpack("<II", block[8:]):
        crc ^= low
        crc = (
            t7[crc & 255]
            ^ t6[crc >> 8 & 255]
            ^ t5[crc >> 16 & 255]
            ^ t4[crc >> 24]
            ^ t3[high & 255]
            ^ t2[high >> 8 & 255]
            ^ t1[high >> 16 & 255]
            ^ t0[high >> 24]
        )
    _CHECKSUMS[block] = crc
    return crc
