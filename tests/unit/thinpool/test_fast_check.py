"""The check with arrays says what the plain one says, whatever it is given, and accepts what is clean by itself."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from bufio import MemoryDevice
from tests.support import fixtures
from tests.support.image import BLOCK, ENTRIES_PER_BITMAP
from tests.support.surgeon import DETAILS_FIELDS, Surgeon
from thinpool import PoolMetadata, fast_check
from thinpool import check as rules
from thinpool.check import Observer, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from persistent_data.block_reader import BlockReader

BROKEN = ["snapshot_chain", "metadata_snapshot", "random", "mixed", "many_devices", "shared_by_many", "discards"]
"""Images to break."""
EVERY_POOL, NO_POOL = 0, 1 << 62


class Stages(Observer):
    """Remembers what was announced."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def stage(self, title: str) -> None:
        self.titles.append(title)


class Verdicts:
    """Runs both checks, and remembers what the one with arrays thought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.seen: list[bool] = []
        original = fast_check.is_clean

        def is_clean(reader: BlockReader, *arguments: Any) -> bool:
            self.seen.append(original(reader, *arguments))
            return self.seen[-1]

        monkeypatch.setattr(fast_check, "is_clean", is_clean)

    def _check(self, content: bytes, threshold: int) -> tuple[list[str], list[str]]:
        self._monkeypatch.setattr(rules, "WORTH_ARRAYS", threshold)
        stages = Stages()
        findings = [repr(finding) for finding in check(MemoryDevice(content), observer=stages)]
        return findings, stages.titles

    def compare(self, content: bytes) -> list[str]:
        """Check *content* both ways, and return the findings."""
        plainly = self._check(content, NO_POOL)
        assert self._check(content, EVERY_POOL) == plainly
        return plainly[0]


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Verdicts:
    return Verdicts(monkeypatch)


# Images of a kernel


@pytest.mark.parametrize("name", fixtures.GOOD)
def test_sound_images(verdicts: Verdicts, name: str) -> None:
    findings = verdicts.compare(fixtures.image(name))
    assert verdicts.seen == [not findings], findings


@pytest.mark.parametrize("name", fixtures.DAMAGED)
def test_damaged_images(verdicts: Verdicts, name: str) -> None:
    findings = verdicts.compare(fixtures.image(name))
    below = [finding for finding in findings if "tree='mapping tree'" in finding or "space map'" in finding]
    assert not below or True not in verdicts.seen


# Images broken at random


class Breaker:
    """Breaks one thing in an image, checksums put right, and puts it back."""

    def __init__(self, content: bytes, rng: random.Random) -> None:
        self._content = content
        self._rng = rng
        self._image = Surgeon(self._content).image
        self._sb = self._image.superblock()
        self._kinds: dict[str, list[int]] = {}
        for block in self._image.counts("metadata"):
            self._kinds.setdefault(self._image.kind(block), []).append(block)
        self._leaves = {
            node.number for root in self._mapping_roots() for _, node in self._image.nodes(root) if node.leaf
        }

    def _mapping_roots(self) -> set[int]:
        return {int.from_bytes(value, "little") for _, value in self._image.items(self._sb.mapping_root)}

    def _pick(self, kind: str) -> int:
        return self._rng.choice(self._kinds[kind])

    def broken(self) -> tuple[str, bytes]:
        """Return what was broken, and the result."""
        surgeon = Surgeon(self._content)
        ways: list[Callable[[Surgeon], None]] = [
            self._key,
            self._value,
            self._value,
            self._time,
            self._time,
            self._swap,
            self._nr_entries,
            self._bit,
            self._superblock,
            self._details,
            self._bitmap,
            self._bitmap,
            self._index_entry,
            self._overflow,
        ]
        way = self._rng.choice(ways)
        way(surgeon)
        return way.__name__, surgeon.content()

    def _key(self, surgeon: Surgeon) -> None:
        node = self._image.node(self._pick("node"))
        if node.keys:
            i = self._rng.choice([0, len(node.keys) - 1, self._rng.randrange(len(node.keys))])
            surgeon.key(node.number, i, max(0, node.keys[i] + self._rng.choice([-1, 1, 1 << 30])))

    def _value(self, surgeon: Surgeon) -> None:
        """Another child, root or data block, or another count."""
        node = self._image.node(self._pick("node"))
        if node.keys and node.value_size <= 8:
            i = self._rng.randrange(len(node.keys))
            old = node.children[i]
            step = 1 << 24 if node.number in self._leaves else 1
            others = [old + step, max(0, old - step), node.children[0], 0, 1 << 30]
            surgeon.value(node.number, i, self._rng.choice(others))

    def _time(self, surgeon: Surgeon) -> None:
        node = self._image.node(self._rng.choice(sorted(self._leaves)))
        if node.keys:
            i = self._rng.randrange(len(node.keys))
            time = self._rng.choice([self._sb.time, self._sb.time + 1, max(0, self._sb.time - 1), 0, (1 << 24) - 1])
            surgeon.value(node.number, i, node.children[i] >> 24 << 24 | time)

    def _swap(self, surgeon: Surgeon) -> None:
        """Nothing that counts can tell, as long as both are children or mappings."""
        node = self._image.node(self._pick("node"))
        if len(node.keys) > 1 and node.value_size == 8:
            i, j = self._rng.sample(range(len(node.keys)), 2)
            surgeon.value(node.number, i, node.children[j])
            surgeon.value(node.number, j, node.children[i])

    def _nr_entries(self, surgeon: Surgeon) -> None:
        node = self._image.node(self._pick("node"))
        surgeon.node(node.number, nr_entries=max(0, len(node.keys) + self._rng.choice([-1, 1])))

    def _bit(self, surgeon: Surgeon) -> None:
        """A bit anywhere in a node, mostly where nothing is."""
        kind = self._rng.choice(["node", "bitmap", "index"])
        block, offset = self._pick(kind), self._rng.choice([*range(4, 32), self._rng.randrange(4, BLOCK)])
        surgeon.patch(block, offset, 1, surgeon.block(block)[offset] ^ 1 << self._rng.randrange(8), kind)

    def _superblock(self, surgeon: Surgeon) -> None:
        data, metadata = self._sb.data_map, self._sb.metadata_map
        fields = {
            "time": max(0, self._sb.time - 1),
            "data_nr_allocated": data.nr_allocated + 1,
            "metadata_nr_allocated": metadata.nr_allocated - 1,
            "data_nr_blocks": data.nr_blocks + self._rng.choice([-1, 1]),
            "metadata_nr_blocks_counted": metadata.nr_blocks - 1,
            "data_bitmap_root": data.ref_count_root,
            "metadata_ref_count_root": data.ref_count_root,
        }
        name = self._rng.choice(sorted(fields))
        surgeon.superblock(0, **{name: fields[name]})

    def _details(self, surgeon: Surgeon) -> None:
        dev_id, details = self._rng.choice(sorted(self._image.devices().items()))
        name = self._rng.choice(sorted(DETAILS_FIELDS))
        old = dict(zip(DETAILS_FIELDS, details, strict=True))[name]
        surgeon.details(dev_id, **{name: max(0, old + self._rng.choice([-1, 1]))})

    def _bitmap(self, surgeon: Surgeon) -> None:
        which = self._rng.choice(["data", "metadata"])
        nr_blocks = (self._sb.data_map if which == "data" else self._sb.metadata_map).nr_blocks
        used = self._rng.choice(sorted(self._image.counts(which)))
        last = -(-nr_blocks // ENTRIES_PER_BITMAP) * ENTRIES_PER_BITMAP - 1
        block = self._rng.choice([used, used, self._rng.randrange(nr_blocks), last])
        surgeon.count(which, block, self._rng.randrange(4))

    def _index_entry(self, surgeon: Surgeon) -> None:
        which = self._rng.choice(["data", "metadata"])
        entries = self._image.bitmaps(which)
        number = self._rng.randrange(len(entries))
        block, nr_free, none_free_before = entries[number]
        fields = {
            "blocknr": block + 1,
            "nr_free": max(0, nr_free + self._rng.choice([-1, 1])),
            "none_free_before": self._rng.choice([none_free_before + 1, 0, ENTRIES_PER_BITMAP, ENTRIES_PER_BITMAP + 1]),
        }
        name = self._rng.choice(sorted(fields))
        surgeon.index_entry(which, number, **{name: fields[name]})

    def _overflow(self, surgeon: Surgeon) -> None:
        roots = self._sb.data_map.ref_count_root, self._sb.metadata_map.ref_count_root
        leaves = [block for root in roots for block in surgeon.leaves(root)]
        node = self._image.node(self._rng.choice(leaves))
        if node.keys:
            i = self._rng.randrange(len(node.keys))
            surgeon.value(node.number, i, node.children[i] + self._rng.choice([-1, 1, 256]))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(verdicts: Verdicts, name: str) -> None:
    breaker = Breaker(fixtures.image(name), random.Random(name))
    outcomes: Counter[tuple[str, bool]] = Counter()
    for _ in range(70):
        what, content = breaker.broken()
        findings = verdicts.compare(content)
        outcomes[what, bool(findings)] += 1
    assert True in verdicts.seen
    assert False in verdicts.seen
    assert len({what for what, found in outcomes if found}) > 6, outcomes


# Pools of the engine


def busy_pool(seed: int, nr_snapshots: int, *, metadata_snap: bool) -> bytes:
    """Devices, snapshots of snapshots, and writes to all of them."""
    rng = random.Random(seed)
    device = MemoryDevice(2048 * BLOCK)
    with PoolMetadata.format(device, data_block_size=128, nr_data_blocks=40000) as pool:
        pool.create_thin(0)
        for number in range(nr_snapshots + 1):
            if number:
                pool.create_snap(number, rng.randrange(number))
            if metadata_snap and number == nr_snapshots // 2:
                pool.commit()
                pool.reserve_metadata_snap()
            for dev_id in {number, rng.randrange(number + 1)}:
                with pool.open_thin_device(dev_id) as thin:
                    for block in rng.sample(range(3000), 200 if number else 2000):
                        thin.insert_block(block, pool.alloc_data_block())
        pool.commit()
    content = bytearray(device.size_bytes)
    device.readinto(content, 0)
    return bytes(content)


@pytest.mark.parametrize("metadata_snap", [False, True])
@pytest.mark.parametrize("nr_snapshots", [0, 1, 5, 12])
def test_pools_of_the_engine(verdicts: Verdicts, nr_snapshots: int, metadata_snap: bool) -> None:
    for seed in range(3):
        assert verdicts.compare(busy_pool(seed, nr_snapshots, metadata_snap=metadata_snap)) == []
    assert verdicts.seen == [True] * 3


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), nr_snapshots=st.integers(0, 6), metadata_snap=st.booleans())
def test_broken_pools_of_the_engine(verdicts: Verdicts, seed: int, nr_snapshots: int, metadata_snap: bool) -> None:
    breaker = Breaker(busy_pool(seed, nr_snapshots, metadata_snap=metadata_snap), random.Random(seed))
    for _ in range(8):
        what, content = breaker.broken()
        note(what)
        verdicts.compare(content)


@pytest.fixture(scope="module")
def widely_shared() -> bytes:
    """300 devices, of which each has a leaf of its own and most mappings in common with all others."""
    device = MemoryDevice(2048 * BLOCK)
    with PoolMetadata.format(device, data_block_size=128, nr_data_blocks=1000) as pool:
        pool.create_thin(0)
        for number in range(300):
            if number:
                pool.create_snap(number, 0)
            with pool.open_thin_device(number) as thin:
                for block in [number] if number else range(40):
                    thin.insert_block(block, pool.alloc_data_block())
        pool.commit()
    content = bytearray(device.size_bytes)
    device.readinto(content, 0)
    return bytes(content)


def test_counts_that_a_byte_does_not_hold(verdicts: Verdicts, widely_shared: bytes) -> None:
    assert max(Surgeon(widely_shared).image.counts("data").values()) > 255
    assert verdicts.compare(widely_shared) == []
    assert verdicts.seen == [True]


@pytest.mark.parametrize("change", [-256, -1, 1, 256, 65536])
def test_counts_that_are_wrong_by_what_is_lost_in_a_byte(verdicts: Verdicts, widely_shared: bytes, change: int) -> None:
    surgeon = Surgeon(widely_shared)
    node = surgeon.image.node(surgeon.image.superblock().data_map.ref_count_root)
    i = max(range(len(node.keys)), key=node.children.__getitem__)
    surgeon.value(node.number, i, node.children[i] + change)
    assert len(verdicts.compare(surgeon.content())) == 1
    assert verdicts.seen == [False]


def test_a_mapping_too_many_and_one_too_few(verdicts: Verdicts) -> None:
    """As many as there should be, but two to one block: nothing is shared, so blocks are merely marked."""
    surgeon = Surgeon(fixtures.image("random"))
    root = surgeon.device_root(next(iter(surgeon.image.devices())))
    node = surgeon.image.node(surgeon.leaves(root)[0])
    surgeon.value(node.number, 0, node.children[1])
    assert len(verdicts.compare(surgeon.content())) == 3, "looks exclusive; mapped twice; a leak"
    assert verdicts.seen == [False]


@pytest.mark.parametrize("which", ["data", "metadata"])
def test_space_maps_keep_away_from_the_nodes_of_mapping_trees(verdicts: Verdicts, which: str) -> None:
    """Wherever the mappings were counted: it is named the same way."""
    surgeon = Surgeon(fixtures.image("shared_by_many"))
    sb = surgeon.image.superblock()
    leaf = surgeon.leaves(surgeon.device_root(next(iter(surgeon.image.devices()))))[0]
    if which == "data":
        holder = surgeon.image.node(sb.data_map.ref_count_root)
        assert not holder.leaf
        surgeon.value(holder.number, 0, leaf)
    else:
        surgeon.superblock(0, metadata_ref_count_root=leaf)
    findings = verdicts.compare(surgeon.content())
    assert "part of the mapping tree)" in findings[0]
    assert verdicts.seen == [False]


# Choice of path


def test_small_pools_are_checked_without_arrays(verdicts: Verdicts) -> None:
    """The superblock decides, and nothing but that is taken from it."""
    surgeon = Surgeon(fixtures.image("mixed"))
    assert not list(check(surgeon.device()))
    assert verdicts.seen == []
    surgeon.superblock(0, metadata_nr_allocated=rules.WORTH_ARRAYS)
    assert [finding.rule for finding in check(surgeon.device())] == ["nr_allocated is wrong"]
    assert verdicts.seen == [False]
