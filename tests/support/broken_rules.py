"""Every rule of the check, with a way to break it in an image that the kernel made.

A table, so that a test can tell that none is missing, and others can put each through programs of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from persistent_data import btree_walk, node_check, space_map_check
from persistent_data.damage import ADVISORY, FATAL, NON_FATAL
from tests.support.fixtures import image
from tests.support.surgeon import Surgeon, node_block, seal
from thinpool import check, superblock_check

if TYPE_CHECKING:
    from collections.abc import Callable

RULE_MODULES = (node_check, btree_walk, space_map_check, superblock_check, check)
"""Where the rules have their wording, as constants; :data:`NO_RULES` are other constants there."""
NO_RULES = {"SUPERBLOCK", "MISSING_MAPPINGS", "SHARED_DAMAGE", "IO_ERROR"}
"""The name of a structure; what follows from other findings; and what no content of a device can show."""


class Case(NamedTuple):
    """One way to break a rule."""

    name: str
    rule: str
    severity: str
    base: str
    """The image that is broken."""
    break_it: Callable[[Surgeon], object]
    metadata_snap: bool = False
    """It shows only where the metadata snapshot is asked for."""

    def broken(self) -> Surgeon:
        """The image with the rule broken."""
        surgeon = Surgeon(image(self.base))
        self.break_it(surgeon)
        return surgeon


def _leaf(s: Surgeon, number: int = 1) -> int:
    """A leaf of the one device of image "random"."""
    return s.leaves(s.device_root(3))[number]


def _root(s: Surgeon) -> int:
    return s.device_root(3)


def _underfull(s: Surgeon) -> None:
    leaf = _leaf(s)
    s.details(3, mapped_blocks=12000 - len(s.image.node(leaf).keys) + 83)
    s.keep(leaf, 83)


def _odd_max_entries(s: Surgeon) -> None:
    root = s.image.superblock().mapping_root
    s.put(root, node_block(root, [], [], max_entries=250))


def _geometry(s: Surgeon) -> None:
    leaf = _leaf(s)
    node = s.image.node(leaf)
    s.rewrite(leaf, node.keys, node.children, max_entries=249)


def _chain(s: Surgeon) -> None:
    """Seventy internal nodes, each the only child of the one above."""
    used = s.image.counts("metadata")
    free = [block for block in range(s.image.superblock().metadata_map.nr_blocks) if block not in used][:70]
    for block, child in zip([_root(s), *free], [*free, _leaf(s)], strict=True):
        s.put(block, node_block(block, [0], [child], leaf=False))


def _uneven_depth(s: Surgeon) -> None:
    root = s.image.node(s.device_root(next(iter(s.image.devices()))))
    s.value(root.number, 0, s.image.node(root.children[0]).children[0])


def _index_keys(s: Surgeon) -> None:
    root = s.image.superblock().data_map.bitmap_root
    s.rewrite(root, [0, 1, 2], [int.from_bytes(value, "little") for value in s.image.node(root).values[:3]])


def _overflow_leaf(s: Surgeon) -> int:
    return s.leaves(s.image.superblock().data_map.ref_count_root)[0]


def _overflow_key(s: Surgeon) -> None:
    last = s.leaves(s.image.superblock().data_map.ref_count_root)[-1]
    s.key(last, len(s.image.node(last).keys) - 1, 1 << 50)


def _drop_last_device(s: Surgeon, root: int) -> None:
    leaf = s.leaves(root)[-1]
    s.keep(leaf, len(s.image.node(leaf).keys) - 1)


def _large_id(s: Surgeon) -> None:
    for root in (s.image.superblock().details_root, s.image.superblock().mapping_root):
        s.key(root, 0, 1 << 24)


def _future_mapping(s: Surgeon) -> None:
    leaf = _leaf(s)
    s.value(leaf, 7, s.image.node(leaf).children[7] + 5)


def _free(s: Surgeon, which: str) -> int:
    return int(max(s.image.counts(which))) + 5


def _used_once(s: Surgeon, which: str) -> int:
    return next(block for block, count in s.image.counts(which).items() if count == 1 and block)


def _held(s: Surgeon) -> int:
    return int(s.image.superblock().held_root)


def _snapshot_details(s: Surgeon, **fields: int) -> None:
    """Change the details of the snapshot's first device, in a details tree that only the snapshot has."""
    own = Surgeon(s.content())
    own.superblock(device_details_root=s.image.superblock(_held(s)).details_root)
    own.details(next(iter(own.image.devices())), **fields)
    for leaf in own.leaves(own.image.superblock().details_root):
        s.put(leaf, own.block(leaf))


def _cases() -> list[Case]:
    cases: list[Case] = []

    def add(rule: str, severity: str, base: str, break_it: Callable[[Surgeon], object], label: str = "") -> None:
        cases.append(Case(f"{rule}, {label}" if label else rule, rule, severity, base, break_it))

    def superblock(rule: str, severity: str, **fields: int) -> None:
        add(rule, severity, "random", lambda s: s.superblock(**fields), ", ".join(fields))

    # Superblock
    add(superblock_check.BAD_CHECKSUM, FATAL, "random", lambda s: s.flip(0))
    superblock(superblock_check.BAD_MAGIC, FATAL, magic=1)
    superblock(superblock_check.BAD_BLOCKNR, FATAL, blocknr=1)
    superblock(check.INCOMPATIBLE, FATAL, incompat_flags=1)
    superblock(check.INCOMPATIBLE, FATAL, compat_ro_flags=1)
    superblock(check.BAD_DATA_BLOCK_SIZE, FATAL, data_block_size=130)
    for field in ("metadata_bitmap_root", "metadata_ref_count_root", "data_bitmap_root", "data_ref_count_root"):
        superblock(check.BAD_SPACE_MAP_ROOT, FATAL, **{field: 2048})
    superblock(check.BAD_SPACE_MAP_ROOT, FATAL, metadata_nr_blocks_counted=4161601)
    superblock(check.BAD_SPACE_MAP_ROOT, FATAL, data_nr_blocks=1 << 50)
    add(check.BAD_SPACE_MAP_ROOT, FATAL, "random", lambda s: s.cut(2047), "device too small")
    for field, value in (("version", 3), ("flags", 4), ("metadata_block_size", 16), ("uuid", 1)):
        superblock(check.UNUSUAL_SUPERBLOCK, ADVISORY, **{field: value})
    superblock(check.UNUSUAL_SUPERBLOCK, ADVISORY, metadata_nr_blocks=2049)
    superblock(node_check.OUTSIDE_DEVICE, FATAL, held_root=2048)
    add(superblock_check.BAD_CHECKSUM, FATAL, "metadata_snapshot", lambda s: s.flip(_held(s)), "held")
    for fields in ({"magic": 1}, {"blocknr": 1}, {"data_nr_blocks": 1}, {"held_root": 1}, {"time": 1 << 20}):
        add(
            superblock_check.BAD_MAGIC
            if "magic" in fields
            else superblock_check.BAD_BLOCKNR
            if "blocknr" in fields
            else check.UNUSUAL_SUPERBLOCK,
            ADVISORY,
            "metadata_snapshot",
            lambda s, fields=fields: s.superblock(_held(s), **fields),  # type: ignore[misc]  # bound at once
            f"held, {next(iter(fields))}",
        )
    cases.append(Case(check.NO_SNAPSHOT, check.NO_SNAPSHOT, FATAL, "random", lambda s: None, metadata_snap=True))

    # Nodes
    def node(rule: str, severity: str, break_it: Callable[[Surgeon], object], label: str = "") -> None:
        add(rule, severity, "random", break_it, label)

    node(node_check.CHECKSUM_ERROR, FATAL, lambda s: s.flip(_leaf(s)), "leaf")
    node(node_check.CHECKSUM_ERROR, FATAL, lambda s: s.flip(_root(s)), "internal")
    for kind in ("superblock", "bitmap", "index"):
        node(
            node_check.NOT_A_NODE,
            FATAL,
            lambda s, kind=kind: s.put(_leaf(s), seal(s.block(_leaf(s)), kind)),  # type: ignore[misc]  # bound at once
            kind,
        )
    node(node_check.BLOCKNR_MISMATCH, FATAL, lambda s: s.node(_leaf(s), blocknr=3))
    for flags in (0, 3, 4):
        node(
            node_check.BAD_FLAGS,
            FATAL,
            lambda s, flags=flags: s.node(_leaf(s), flags=flags),  # type: ignore[misc]  # bound at once
            str(flags),
        )
    node(node_check.VALUE_SIZE_MISMATCH, FATAL, lambda s: s.node(_leaf(s), value_size=4), "leaf")
    node(node_check.VALUE_SIZE_MISMATCH, FATAL, lambda s: s.node(_root(s), value_size=4), "internal")
    for tree in ("details_root", "mapping_root"):
        add(
            node_check.VALUE_SIZE_MISMATCH,
            FATAL,
            "random",
            lambda s, tree=tree: s.node(getattr(s.image.superblock(), tree), value_size=16),  # type: ignore[misc]  # bound at once
            tree,
        )
    node(node_check.MAX_ENTRIES_TOO_LARGE, FATAL, lambda s: s.node(_leaf(s), max_entries=255))
    node(node_check.MAX_ENTRIES_ZERO, FATAL, lambda s: s.node(_leaf(s), max_entries=0))
    node(node_check.TOO_MANY_ENTRIES, FATAL, lambda s: s.node(_leaf(s), nr_entries=253))
    add(node_check.MAX_ENTRIES_ODD, NON_FATAL, "empty", _odd_max_entries)
    node(node_check.TOO_FEW_ENTRIES, NON_FATAL, _underfull)
    node(node_check.EMPTY_NODE, FATAL, lambda s: s.node(_leaf(s), nr_entries=0), "leaf")
    node(node_check.EMPTY_NODE, FATAL, lambda s: s.node(_root(s), nr_entries=0), "internal")
    node(node_check.KEYS_OUT_OF_ORDER, FATAL, lambda s: s.key(_leaf(s), 5, 0), "descending")
    node(node_check.KEYS_OUT_OF_ORDER, FATAL, lambda s: s.key(_leaf(s), 5, s.image.node(_leaf(s)).keys[4]), "equal")
    node(node_check.KEYS_OUT_OF_ORDER, FATAL, lambda s: s.key(_root(s), 5, s.image.node(_root(s)).keys[4]), "internal")
    node(node_check.OUTSIDE_DEVICE, FATAL, lambda s: s.value(_root(s), 1, 2048))
    node(node_check.PADDING_NOT_ZERO, ADVISORY, lambda s: s.node(_leaf(s), padding=1))
    node(btree_walk.LOOP, FATAL, lambda s: s.value(_root(s), 1, _root(s)))
    node(btree_walk.TWICE, FATAL, lambda s: s.value(_root(s), 2, _leaf(s)))
    node(btree_walk.OTHER_TREE, FATAL, lambda s: s.value(_root(s), 1, s.image.superblock().mapping_root))
    node(btree_walk.TOO_DEEP, FATAL, _chain)
    node(btree_walk.FIRST_KEY_LOW, FATAL, lambda s: s.key(_root(s), 1, s.image.node(_leaf(s)).keys[0] + 1))
    node(btree_walk.LAST_KEY_HIGH, FATAL, lambda s: s.key(_root(s), 2, s.image.node(_leaf(s)).keys[-1]), "equal")
    node(btree_walk.LAST_KEY_HIGH, FATAL, lambda s: s.key(_root(s), 2, s.image.node(_leaf(s)).keys[-1] - 1), "above")
    add(btree_walk.UNEVEN_DEPTH, FATAL, "deep", _uneven_depth)
    node(btree_walk.UNEVEN_GEOMETRY, FATAL, _geometry)

    # Devices and mappings
    chain = "snapshot_chain"
    for tree in ("details_root", "mapping_root"):
        add(
            check.INCONSISTENT_IDS,
            FATAL,
            chain,
            lambda s, tree=tree: _drop_last_device(s, getattr(s.image.superblock(), tree)),  # type: ignore[misc]  # bound at once
            tree,
        )
    add(
        check.INCONSISTENT_IDS,
        FATAL,
        "metadata_snapshot",
        lambda s: _drop_last_device(s, s.image.superblock(_held(s)).details_root),
        "held",
    )
    add(check.DEVICE_ID_TOO_LARGE, ADVISORY, "random", _large_id)
    add(check.MAPPED_BLOCKS, FATAL, "random", lambda s: s.details(3, mapped_blocks=11999))
    add(check.MAPPED_BLOCKS, FATAL, "metadata_snapshot", lambda s: _snapshot_details(s, mapped_blocks=1), "held")
    add(check.DATA_BLOCK_OUTSIDE, FATAL, "random", lambda s: s.value(_leaf(s), 7, 16384 << 24))
    add(check.TIME_IN_FUTURE, ADVISORY, "random", _future_mapping, "mapping")
    add(check.TIME_IN_FUTURE, ADVISORY, chain, lambda s: s.details(7, snapshotted_time=21), "device")
    add(check.TIMES_OUT_OF_ORDER, ADVISORY, chain, lambda s: s.details(7, creation_time=20, snapshotted_time=19))
    add(check.SHARED_LOOKS_EXCLUSIVE, ADVISORY, chain, lambda s: s.details(0, snapshotted_time=0), "data blocks")
    add(
        check.SHARED_LOOKS_EXCLUSIVE,
        ADVISORY,
        "dirty_4",
        lambda s: s.details(1, snapshotted_time=0, creation_time=0),
        "leaf",
    )

    # Space maps
    for which in ("data", "metadata"):

        def space_map(
            rule: str,
            severity: str,
            break_it: Callable[[Surgeon, str], object],
            label: str = "",
            base: str = "random",
            which: str = which,
        ) -> None:
            add(rule, severity, base, lambda s: break_it(s, which), f"{which}, {label}" if label else which)

        space_map(space_map_check.LEAK, NON_FATAL, lambda s, w: s.count(w, _free(s, w), 1))
        space_map(space_map_check.BAD_COUNT, FATAL, lambda s, w: s.count(w, _free(s, w), 2), "0 and 2")
        space_map(space_map_check.BAD_COUNT, FATAL, lambda s, w: s.count(w, _used_once(s, w), 2), "1 and 2")
        space_map(space_map_check.BAD_COUNT, FATAL, lambda s, w: s.count(w, _used_once(s, w), 0), "1 and 0")
        space_map(space_map_check.OVERFLOW_MISSING, FATAL, lambda s, w: s.count(w, _used_once(s, w), 3), "1 and 3")
        space_map(space_map_check.OVERFLOW_MISSING, FATAL, lambda s, w: s.count(w, _free(s, w), 3), "0 and 3")
        space_map(node_check.CHECKSUM_ERROR, FATAL, lambda s, w: s.flip(s.bitmap_of(w, 0)), "bitmap")
        space_map(
            space_map_check.NOT_A_BITMAP,
            FATAL,
            lambda s, w: s.put(s.bitmap_of(w, 0), s.block(s.bitmap_of(w, 0)), "node"),
        )
        space_map(
            node_check.BLOCKNR_MISMATCH, FATAL, lambda s, w: s.patch(s.bitmap_of(w, 0), 8, 8, 3, "bitmap"), "bitmap"
        )
        space_map(node_check.OUTSIDE_DEVICE, FATAL, lambda s, w: s.index_entry(w, 0, blocknr=2048), "bitmap")
        space_map(
            space_map_check.BITS_BEYOND_END,
            ADVISORY,
            lambda s, w: s.count(w, {"data": 16384, "metadata": 1024}[w] + 10, 1),
            base="transaction_id",
        )
        space_map(
            space_map_check.HEADER_NOT_ZERO,
            ADVISORY,
            lambda s, w: s.patch(s.bitmap_of(w, 0), 4, 4, 1, "bitmap"),
            "bitmap",
        )
        space_map(space_map_check.NR_ALLOCATED, ADVISORY, lambda s, w: s.superblock(**{f"{w}_nr_allocated": 5}))
        space_map(space_map_check.NR_FREE, ADVISORY, lambda s, w: s.index_entry(w, 0, nr_free=5))
        space_map(space_map_check.NONE_FREE_BEFORE, ADVISORY, lambda s, w: s.index_entry(w, 0, none_free_before=16320))

    def index(s: Surgeon) -> int:
        return int(s.image.superblock().metadata_map.bitmap_root)

    add(space_map_check.INDEX_CHECKSUM, FATAL, "random", lambda s: s.flip(index(s)))
    add(node_check.BLOCKNR_MISMATCH, FATAL, "random", lambda s: s.patch(index(s), 8, 8, 3, "index"), "index")
    add(space_map_check.HEADER_NOT_ZERO, ADVISORY, "random", lambda s: s.patch(index(s), 4, 4, 1, "index"), "index")
    add(space_map_check.STRAY_INDEX_ENTRIES, ADVISORY, "random", lambda s: s.patch(index(s), 32, 8, 1, "index"))
    add(space_map_check.INDEX_KEYS, FATAL, "resized_data", _index_keys)
    add(space_map_check.OVERFLOW_KEY, FATAL, chain, _overflow_key)
    add(space_map_check.OVERFLOW_VALUE, FATAL, chain, lambda s: s.value(_overflow_leaf(s), 0, 2))
    add(
        space_map_check.OVERFLOW_STRAY,
        FATAL,
        chain,
        lambda s: s.count("data", s.image.node(_overflow_leaf(s)).keys[0], 2),
    )
    add(space_map_check.BAD_COUNT, FATAL, chain, lambda s: s.value(_overflow_leaf(s), 0, 77), "overflow")
    return cases


CASES = _cases()
