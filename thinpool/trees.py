"""The trees of a pool under the names that findings give them, and what their leaves hold.

Source: docs/format.md, "The four tree types".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from persistent_data.btree_walk import NoVisitor, TreeKind
from persistent_data.damage import UNBOUNDED, show_range
from thinpool.layout import DEVICE_DETAILS

if TYPE_CHECKING:
    from persistent_data.damage import Damage
    from persistent_data.node_check import Node

DETAILS_TREE = "device details tree"
TOP_LEVEL = "mapping top-level"
MAPPING_TREE = "mapping tree"
DATA_SPACE_MAP = "data space map"
METADATA_SPACE_MAP = "metadata space map"
SNAP_PREFIX = "metadata snap: "
"""Precedes the name of a tree that belongs to the metadata snapshot."""
NODE_ERROR = "node error: "
DATA_BLOCK_OUTSIDE = "data block outside the data device"
MAPPED_BLOCKS = "mapped_blocks is wrong"

DETAILS_KIND = TreeKind(DETAILS_TREE, DEVICE_DETAILS.size)
TOP_LEVEL_KIND = TreeKind(TOP_LEVEL, 8)
MAPPING_KIND = TreeKind(MAPPING_TREE, 8)

_KEY_UNITS = {MAPPING_TREE: "thin blocks", TOP_LEVEL: "devices", DETAILS_TREE: "devices"}


def describe_damage(damage: Damage, tree: str, dev_id: int | None = None, label: str = NODE_ERROR) -> str:
    """Word *damage* found in *tree*, of thin device *dev_id* if that is not None, as one sentence."""
    text = f"{tree}: {label}{damage.fault.rule}: block {damage.block}"
    if damage.fault.detail:
        text += f" ({damage.fault.detail})"
    if dev_id is not None:
        text += f", thin device {dev_id}"
    unit = _KEY_UNITS.get(tree.removeprefix(SNAP_PREFIX))
    if unit or damage.begin or damage.end < UNBOUNDED:
        text += f", {unit or 'blocks'} {show_range(damage.begin, damage.end)}"
    return text + ", path " + "/".join(map(str, damage.path))


class DeviceEntry:
    """A thin device as the two device trees describe it.

    :ivar mapped_blocks: mappings, in data blocks; -1 for a device without details
    :ivar transaction_id: of the pool when the device was created
    :ivar creation_time: of the pool when the device was created
    :ivar snapshotted_time: of the pool when the device was last snapshotted
    :ivar root: metadata block of the root of its mapping tree
    :ivar path: metadata blocks from the superblock to the leaf that names the root
    """

    __slots__ = ("creation_time", "dev_id", "mapped_blocks", "path", "root", "snapshotted_time", "transaction_id")

    def __init__(self, dev_id: int, details: tuple[int, ...]) -> None:
        self.dev_id = dev_id
        self.mapped_blocks, self.transaction_id, self.creation_time, self.snapshotted_time = details
        self.root = 0
        self.path: tuple[int, ...] = ()


class DetailsVisitor(NoVisitor):
    """Collects the details of each device, and the way to the leaf that holds them."""

    def __init__(self) -> None:
        self.devices: dict[int, DeviceEntry] = {}
        self.paths: dict[int, tuple[int, ...]] = {}

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        """Take the entries of a leaf."""
        for dev_id, details in zip(node.keys, node.records(DEVICE_DETAILS), strict=True):
            self.devices[dev_id] = DeviceEntry(dev_id, details)
            self.paths[dev_id] = path
        return 0


class TopLevelVisitor(NoVisitor):
    """Collects the root of each device, and the way to the leaf that names it."""

    def __init__(self) -> None:
        self.roots: dict[int, tuple[int, tuple[int, ...]]] = {}

    def leaf(self, node: Node, path: tuple[int, ...]) -> int:
        """Take the entries of a leaf."""
        for dev_id, root in zip(node.keys, node.numbers(), strict=True):
            self.roots[dev_id] = (root, path)
        return 0
