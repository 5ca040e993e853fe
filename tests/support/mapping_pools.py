"""Pools whose mapping trees are put together node by node: leaves of any size, shared in any way, numbers of any width.

Only what readers of mappings look at is made; the space maps are those of an empty pool.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from tests.support.fixtures import image
from tests.support.surgeon import Surgeon, node_block, seal

if TYPE_CHECKING:
    from random import Random

Mappings = dict[int, tuple[int, int]]
"""Thin block to data block and time."""

_FIRST_FREE = 20
_MAX_ENTRIES = 252
_MAX_DETAILS = 126
MAX_DATA_BLOCK = (1 << 40) - 1


class MadePool(NamedTuple):
    """A pool, and what its mapping trees hold."""

    content: bytes
    devices: dict[int, Mappings]
    leaves: list[int]


class _Maker:
    def __init__(self, nr_data_blocks: int) -> None:
        self.surgeon = Surgeon(image("empty"))
        self.surgeon.superblock(data_nr_blocks=nr_data_blocks)
        self._next = _FIRST_FREE
        self._known: dict[tuple[object, ...], int] = {}
        self.leaves: list[int] = []

    def node(self, keys: list[int], values: list[int], leaf: bool) -> int:
        """The block of a node; nodes with the same content are one."""
        key = (tuple(keys), tuple(values), leaf)
        if key not in self._known or not keys:
            block = self._known[key] = self._next
            self._next += 1
            self.surgeon.put(block, node_block(block, keys, values, leaf=leaf))
            if leaf:
                self.leaves.append(block)
        return self._known[key]

    def details(self, devices: dict[int, Mappings]) -> int:
        block = bytearray(node_block(self._next, list(devices), [], max_entries=_MAX_DETAILS, value_size=24))
        for at, (dev_id, mappings) in enumerate(devices.items()):
            struct.pack_into("<QQII", block, 32 + 8 * _MAX_DETAILS + 24 * at, len(mappings), dev_id, dev_id, dev_id)
        self.surgeon.put(self._next, seal(block, "node"))
        self._next += 1
        return self._next - 1


def made_pool(
    dice: Random, *, nr_data_blocks: int = 1 << 30, max_leaves: int = 12, small_leaves: bool = True
) -> MadePool:
    """A pool with some devices that have some leaves in common.

    Every range of thin blocks has a few versions of its leaf, and each device has one of them or none.
    """
    maker = _Maker(min(nr_data_blocks, 1 << 35))
    nr_places = dice.randint(1, max_leaves)
    thin = dice.choice([0, 7, 99990, (1 << 32) - 300, 10**12 - 40, (1 << 64) - 4 * _MAX_ENTRIES * nr_places - 1])
    times = dice.choice([[0], [0, 1], [9, 10, 99, 100, (1 << 24) - 1]])
    places: list[list[Mappings]] = []
    following: tuple[int, int] | None = None
    for _ in range(nr_places):
        nr_versions = dice.randint(1, 3)
        versions = [_leaf(dice, thin, nr_data_blocks, times, following, small_leaves) for _ in range(nr_versions)]
        last = max(max(version) for version in versions)
        chosen = dice.choice(versions)
        # The next leaf may go on where one version of this one ends.
        following = chosen.get(last)
        thin = last + (1 if dice.random() < 0.7 else dice.randint(1, _MAX_ENTRIES))
        places.append(versions)

    devices: dict[int, Mappings] = {}
    roots: dict[int, int] = {}
    groups = _cuts(dice, nr_places)
    for dev_id in sorted(dice.sample(range(1 << 24), dice.randint(0, 5))):
        taken = [dice.choice([*versions, None]) if dice.random() < 0.3 else versions[0] for versions in places]
        devices[dev_id] = {key: value for leaf in taken if leaf is not None for key, value in leaf.items()}
        roots[dev_id] = _tree(maker, taken, groups)
    top = maker.node(list(roots), list(roots.values()), True)
    maker.leaves = [block for block in maker.leaves if block != top]
    maker.surgeon.superblock(data_mapping_root=top, device_details_root=maker.details(devices))
    return MadePool(maker.surgeon.content(), devices, maker.leaves)


def _cuts(dice: Random, nr_places: int) -> list[tuple[int, int]]:
    """Which leaves may stand below one node; all of them as often as not."""
    if dice.random() < 0.5:
        return [(0, nr_places)]
    at = [0, *sorted(dice.sample(range(1, nr_places), dice.randint(0, min(3, nr_places - 1)))), nr_places]
    return list(pairwise(at))


def _leaf(
    dice: Random,
    thin: int,
    nr_data_blocks: int,
    times: list[int],
    following: tuple[int, int] | None,
    small: bool,
) -> Mappings:
    count = dice.choice([1, 5, 84, 200, _MAX_ENTRIES] if small else [84, 200, _MAX_ENTRIES])
    end = nr_data_blocks - 1
    data, time = (following[0] + 1, following[1]) if following and dice.random() < 0.8 else (dice.randint(0, end), 0)
    keep_on = dice.choice([0.0, 0.5, 0.95, 1.0])
    mappings: Mappings = {}
    for _ in range(count):
        mappings[thin] = min(data, end), time
        data += 1
        thin += 1
        if dice.random() >= keep_on:
            what = dice.randrange(4)
            thin += what in (0, 3)
            data = dice.randint(0, end) if what in (1, 3) else data
            time = dice.choice(times)
    return mappings


def _tree(maker: _Maker, leaves: list[Mappings | None], groups: list[tuple[int, int]]) -> int:
    nodes: list[tuple[int, int]] = []
    for begin, end in groups:
        below = []
        for leaf in leaves[begin:end]:
            if leaf is not None:
                values = [data << 24 | time for data, time in leaf.values()]
                below.append((min(leaf), maker.node(list(leaf), values, True)))
        if below:
            nodes.append((below[0][0], maker.node([key for key, _ in below], [block for _, block in below], False)))
    if not nodes:
        return maker.node([], [], True)
    if len(groups) == 1:
        return nodes[0][1]
    return maker.node([key for key, _ in nodes], [block for _, block in nodes], False)
