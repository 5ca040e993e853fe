"""Btrees on a small device in memory, without a pool around them, and what must hold of them."""

from __future__ import annotations

from collections import Counter
from struct import Struct
from typing import TYPE_CHECKING

from bufio import MemoryDevice
from persistent_data.block_manager import BlockManager, Validator
from persistent_data.space_map_metadata import MetadataSpaceMap
from persistent_data.transaction_manager import TransactionManager
from tests.support.devices import SparseDevice
from tests.support.image import Image, SpaceMapRoot, Superblock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio import Device

BLOCK_SIZE = 4096
_HEAD = Struct("<QQQQI")
_AT = 16

ROOTS = Validator("block of roots", 0x1234)
"""Block 0 of a store: the root of its space map, and those of its trees."""


class StoreImage(Image):
    """What a store has on its device, for the independent reader."""

    def superblock(self, number: int = 0) -> Superblock:
        """As far as there is one: the metadata space map's root."""
        *fields, _ = _HEAD.unpack_from(self.block(number), _AT)
        none = SpaceMapRoot(0, 0, 0, 0)
        return Superblock(0, 2, 0, 0, 0, none, SpaceMapRoot(*fields), 0, 0, 0, 0)


class Store:
    """A device, a space map of its blocks and a transaction manager; block 0 takes the place of a superblock.

    :ivar roots: of the trees that the last commit refers to
    """

    def __init__(self, device: Device, *, cache_bytes: int | None = None) -> None:
        self.device = device
        self._cache_bytes = cache_bytes
        self.roots: list[int] = []

    @classmethod
    def format(cls, device: Device, *, cache_bytes: int | None = None) -> Store:
        """Begin with no trees."""
        self = cls(device, cache_bytes=cache_bytes)
        self.bm = BlockManager(device, cache_bytes=cache_bytes)
        self.sm = MetadataSpaceMap()
        self.tm = TransactionManager(self.bm, self.sm)
        self.sm.create(self.tm, self.bm.nr_blocks, 1)
        self.tm.pre_commit()
        self._write_roots([])
        return self

    @classmethod
    def of_size(cls, nr_blocks: int, *, cache_bytes: int | None = None) -> Store:
        """One in memory."""
        return cls.format(MemoryDevice(nr_blocks * BLOCK_SIZE), cache_bytes=cache_bytes)

    def reopen(self) -> None:
        """Forget everything in memory, and begin with the last commit."""
        self.bm = BlockManager(self.device, cache_bytes=self._cache_bytes)
        self.sm = MetadataSpaceMap()
        self.tm = TransactionManager(self.bm, self.sm)
        data = self.bm.borrow(0, ROOTS).data
        count = _HEAD.unpack_from(data, _AT)[-1]
        self.roots = list(Struct(f"<{count}Q").unpack_from(data, _AT + _HEAD.size))
        self.sm.open(self.tm, bytes(data[_AT : _AT + 32]))

    def commit(self, roots: Sequence[int]) -> None:
        """Make the present state durable."""
        self.bm.begin_operation()
        self.tm.pre_commit()
        self._write_roots(roots)

    def _write_roots(self, roots: Sequence[int]) -> None:
        view = self.bm.borrow_zeroed(0, ROOTS)
        _HEAD.pack_into(view.data, _AT, *Struct("<QQQQ").unpack(self.sm.root_blob()), len(roots))
        Struct(f"<{len(roots)}Q").pack_into(view.data, _AT + _HEAD.size, *roots)
        self.tm.commit(view)
        self.roots = list(roots)
        self.bm.begin_operation()

    def image(self) -> StoreImage:
        """What is on the device."""
        if isinstance(self.device, SparseDevice):
            return StoreImage(dict(self.device.blocks), self.device.size_bytes // BLOCK_SIZE)
        contents = bytearray(self.device.size_bytes)
        self.device.readinto(contents, 0)
        return StoreImage.from_bytes(bytes(contents))


def recount(image: StoreImage, roots: Sequence[int], nr_levels: int) -> dict[int, int]:
    """How often each block is referred to, by a reader that has nothing to do with the engine."""
    counts: Counter[int] = Counter([0])

    def walk(block: int, level: int) -> None:
        counts[block] += 1
        if counts[block] > 1:
            return
        node = image.node(block)
        if not node.leaf:
            for child in node.children:
                walk(child, level)
        elif level + 1 < nr_levels:
            for root in node.children:
                walk(root, level + 1)

    for root in roots:
        walk(root, 0)
    sm = image.superblock().metadata_map
    walk(sm.ref_count_root, nr_levels - 1)
    counts[sm.bitmap_root] += 1
    counts.update(block for block, _, _ in image.bitmaps("metadata"))
    return dict(counts)


def leaf_values(image: Image, roots: Sequence[int], nr_levels: int) -> list[bytes]:
    """The last-level values in all different leaves: what the trees hold references to."""
    seen: set[int] = set()
    found: list[bytes] = []

    def walk(block: int, level: int) -> None:
        if block in seen:
            return
        seen.add(block)
        node = image.node(block)
        if not node.leaf:
            for child in node.children:
                walk(child, level)
        elif level + 1 < nr_levels:
            for root in node.children:
                walk(root, level + 1)
        else:
            found.extend(node.values)

    for root in roots:
        walk(root, 0)
    return found


def describe_tree(image: Image, root: int) -> str:
    """A tree, one line a node."""
    lines = []
    for level, node in image.nodes(root):
        what = "leaf" if node.leaf else "internal"
        children = "" if node.leaf else f" -> {node.children}"
        lines.append(f"{'  ' * level}{node.number} {what} {len(node.keys)}/{node.max_entries}: {node.keys}{children}")
    return "\n".join(lines)


def assert_tree_is_sound(image: Image, root: int, value_size: int) -> None:
    """Fail, printing the tree, unless one level of a tree has everything in its place and is filled as it must be."""
    problems = []
    depths = set()
    bounds: dict[int, tuple[int, int]] = {root: (0, 1 << 64)}
    for level, node in image.nodes(root):
        low, high = bounds[node.number]
        if list(node.keys) != sorted(set(node.keys)):
            problems.append(f"{node.number}: keys are not ascending")
        if node.keys and not low <= node.keys[0] <= node.keys[-1] < high:
            problems.append(f"{node.number}: keys are not in {low}..{high}")
        if node.number != root and len(node.keys) < node.max_entries // 3:
            problems.append(f"{node.number}: {len(node.keys)} of {node.max_entries} entries are too few")
        if node.number == root and not node.leaf and not node.keys:
            problems.append(f"{node.number}: an internal root without children")
        if node.leaf:
            depths.add(level)
            if node.value_size != value_size:
                problems.append(f"{node.number}: values of {node.value_size} bytes")
        else:
            ends = [*node.keys[1:], high]
            for key, child, end in zip(node.keys, node.children, ends, strict=True):
                bounds[child] = key, end
                if image.node(child).keys[:1] != (key,) and not image.node(child).keys[0] >= key:
                    problems.append(f"{child}: first key below {key}, the parent's")
    if len(depths) > 1:
        problems.append(f"leaves at depths {sorted(depths)}")
    assert not problems, "\n".join([*problems, describe_tree(image, root)])
