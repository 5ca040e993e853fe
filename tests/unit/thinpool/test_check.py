"""Each rule of the check, broken alone in an image that is otherwise the kernel's: it is named, with its place."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from persistent_data import btree_walk, node_check, space_map_check
from persistent_data.damage import ADVISORY, FATAL, NON_FATAL
from tests.support.fixtures import image
from tests.support.surgeon import Surgeon, node_block, seal
from thinpool import check as rules
from thinpool.check import Finding, Observer, Options, Report, check, check_report
from thinpool.trees import DATA_SPACE_MAP, DETAILS_TREE, MAPPING_TREE, METADATA_SPACE_MAP, SNAP_PREFIX, TOP_LEVEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.image import Image
    from thinpool.layout import Superblock


def chain() -> Surgeon:
    """21 devices, most nodes shared, mapping trees of two levels; overflow trees in use."""
    return Surgeon(image("snapshot_chain"))


def many() -> Surgeon:
    """400 devices; the two device trees have two levels."""
    return Surgeon(image("many_devices"))


def plain() -> Surgeon:
    """One device, nothing shared, a mapping tree of two levels."""
    return Surgeon(image("random"))


def with_snapshot() -> Surgeon:
    """A metadata snapshot is held."""
    return Surgeon(image("metadata_snapshot"))


def run(surgeon: Surgeon, **options: bool) -> Report:
    return check_report(surgeon.device(), Options(**options))


def first(report: Report, rule: str) -> Finding:
    """The first finding of a rule; the report must have one."""
    found = [finding for finding in report.findings if finding.rule == rule]
    assert found, f"no finding {rule!r} among:\n{report}"
    return found[0]


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, str(report)
    return report.findings[0]


# The report


def test_a_sound_pool_is_clean() -> None:
    report = run(chain())
    assert report.worst is None
    assert report.ok
    assert str(report) == "clean"


def test_a_report_is_as_bad_as_its_worst_finding() -> None:
    def finding(severity: str) -> Finding:
        return Finding(severity, "rule", "message", "tree")  # type: ignore[arg-type]  # any of the three

    assert Report([finding(ADVISORY)]).ok
    assert Report([finding(NON_FATAL), finding(ADVISORY)]).worst == NON_FATAL
    assert Report([finding(NON_FATAL), finding(FATAL), finding(ADVISORY)]).worst == FATAL
    assert not Report([finding(NON_FATAL)]).ok
    assert len(Report([finding(NON_FATAL), finding(FATAL)]).of(FATAL)) == 1


def test_findings_come_while_the_check_goes_on() -> None:
    surgeon = plain()
    leaf = surgeon.leaves(surgeon.device_root(3))[0]
    surgeon.flip(leaf)
    surgeon.superblock(version=3)
    findings = check(surgeon.device())
    assert next(findings).rule == rules.UNUSUAL_SUPERBLOCK
    assert next(findings).block == leaf


def test_an_observer_hears_of_the_superblock_and_of_each_stage() -> None:
    class Log(Observer):
        def __init__(self) -> None:
            self.heard: list[object] = []

        def accepted(self, superblock: Superblock) -> None:
            self.heard.append(superblock.trans_id)

        def stage(self, title: str) -> None:
            self.heard.append(title)

    log = Log()
    check_report(Surgeon(image("mixed")).device(), observer=log)
    assert log.heard == [12, DETAILS_TREE, MAPPING_TREE, DATA_SPACE_MAP, METADATA_SPACE_MAP]


def test_the_device_is_only_read() -> None:
    device = chain().device()
    before = device.contents()
    check_report(device)
    assert device.contents() == before


def test_a_device_without_a_whole_block_is_refused() -> None:
    assert only(check_report(MemoryDevice(4095))).severity == FATAL


# Superblock


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("superblock has a blocknr mismatch", {"blocknr": 7}),
        ("bad magic in superblock", {"magic": 27022011}),
    ],
)
def test_what_is_no_superblock_ends_the_check(rule: str, fields: dict[str, int]) -> None:
    surgeon = plain()
    surgeon.superblock(**fields)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.block) == (FATAL, rule, 0)


def test_a_bad_superblock_checksum_ends_the_check() -> None:
    surgeon = plain()
    surgeon.flip(0)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.block) == (FATAL, "bad checksum in superblock", 0)
    assert "bad checksum in superblock" in finding.message


@pytest.mark.parametrize(
    ("severity", "rule", "fields"),
    [
        (FATAL, rules.INCOMPATIBLE, {"incompat_flags": 1}),
        (FATAL, rules.INCOMPATIBLE, {"compat_ro_flags": 1 << 31}),
        (FATAL, rules.BAD_DATA_BLOCK_SIZE, {"data_block_size": 0}),
        (FATAL, rules.BAD_DATA_BLOCK_SIZE, {"data_block_size": 64}),
        (FATAL, rules.BAD_DATA_BLOCK_SIZE, {"data_block_size": 129}),
        (FATAL, rules.BAD_DATA_BLOCK_SIZE, {"data_block_size": 2097152 + 128}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"metadata_nr_blocks_counted": 0}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"metadata_nr_blocks_counted": 4161601}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"metadata_bitmap_root": 0}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"metadata_ref_count_root": 1 << 40}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"data_bitmap_root": 1 << 40}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"data_ref_count_root": 0}),
        (FATAL, rules.BAD_SPACE_MAP_ROOT, {"data_nr_blocks": 1 << 60}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"version": 0}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"version": 3}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"flags": 2}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"metadata_block_size": 4}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"uuid": 1}),
        (ADVISORY, rules.UNUSUAL_SUPERBLOCK, {"metadata_nr_blocks": 1 << 20}),
    ],
)
def test_superblock_field_is_judged(severity: str, rule: str, fields: dict[str, int]) -> None:
    surgeon = plain()
    surgeon.superblock(**fields)
    for options in ({"super_block_only": True}, {}):
        finding = first(run(surgeon, **options), rule)
        assert (finding.severity, finding.block) == (severity, 0)
        assert finding.message.startswith("superblock: ")


@pytest.mark.parametrize("fields", [{"version": 1}, {"flags": 1}, {"compat_flags": 1}, {"data_block_size": 2097152}])
def test_allowed_values_are_not_remarked_upon(fields: dict[str, int]) -> None:
    surgeon = plain()
    surgeon.superblock(**fields)
    assert run(surgeon).findings == []


def test_super_block_only_reads_nothing_else() -> None:
    surgeon = with_snapshot()
    surgeon.flip(surgeon.image.superblock().held_root)
    surgeon.flip(surgeon.image.superblock().details_root)
    assert run(surgeon, super_block_only=True).findings == []
    surgeon.cut(1)
    assert run(surgeon, super_block_only=True).findings == []


def test_a_device_smaller_than_the_space_map_says_is_refused() -> None:
    surgeon = plain()
    surgeon.cut(200)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule) == (FATAL, rules.BAD_SPACE_MAP_ROOT)


# Device trees


def test_a_damaged_details_node_is_placed() -> None:
    surgeon = many()
    leaf = surgeon.leaves(surgeon.image.superblock().details_root)[1]
    surgeon.flip(leaf)
    finding = first(run(surgeon), node_check.CHECKSUM_ERROR)
    root = surgeon.image.superblock().details_root
    assert (finding.tree, finding.block, finding.path) == (DETAILS_TREE, leaf, (0, root, leaf))
    begin, end = finding.keys or (0, 0)
    assert begin == surgeon.image.node(root).keys[1]
    assert f"devices [{begin}.." in finding.message
    assert end > begin


def test_a_damaged_top_level_node_is_placed() -> None:
    surgeon = many()
    leaf = surgeon.leaves(surgeon.image.superblock().mapping_root)[0]
    surgeon.flip(leaf)
    finding = only(run(surgeon))
    assert (finding.tree, finding.block, finding.severity) == (TOP_LEVEL, leaf, FATAL)


@pytest.mark.parametrize("field", ["data_mapping_root", "device_details_root"])
def test_a_root_outside_the_device_is_the_superblocks_fault(field: str) -> None:
    surgeon = many()
    surgeon.superblock(**{field: 1 << 40})
    finding = only(run(surgeon))
    assert (finding.rule, finding.block) == (node_check.OUTSIDE_DEVICE, 0)


def test_a_device_without_details_is_named() -> None:
    surgeon = chain()
    leaf = surgeon.leaves(surgeon.image.superblock().details_root)[0]
    surgeon.keep(leaf, len(surgeon.image.node(leaf).keys) - 1)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.device) == (FATAL, rules.INCONSISTENT_IDS, 20)
    assert "Inconsistency between the details tree and the mapping tree" in finding.message


def test_a_device_without_mapping_tree_is_named() -> None:
    surgeon = chain()
    leaf = surgeon.leaves(surgeon.image.superblock().mapping_root)[0]
    surgeon.keep(leaf, len(surgeon.image.node(leaf).keys) - 1)
    finding = only(run(surgeon, skip_mappings=True))
    assert (finding.severity, finding.rule, finding.device) == (FATAL, rules.INCONSISTENT_IDS, 20)


def test_a_device_id_beyond_24_bits_is_advice() -> None:
    surgeon = plain()
    sb = surgeon.image.superblock()
    for root in (sb.details_root, sb.mapping_root):
        surgeon.key(root, 0, 1 << 24)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.device) == (ADVISORY, rules.DEVICE_ID_TOO_LARGE, 1 << 24)


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (rules.TIMES_OUT_OF_ORDER, {"creation_time": 20, "snapshotted_time": 19}),
        (rules.TIME_IN_FUTURE, {"snapshotted_time": 21}),
        (rules.TIME_IN_FUTURE, {"creation_time": 30, "snapshotted_time": 30}),
    ],
)
def test_impossible_times_of_a_device_are_advice(rule: str, fields: dict[str, int]) -> None:
    surgeon = chain()
    surgeon.details(7, **fields)
    finding = first(run(surgeon), rule)
    assert (finding.severity, finding.tree, finding.device) == (ADVISORY, DETAILS_TREE, 7)


def test_skip_mappings_does_not_look_at_mappings_or_space_maps() -> None:
    surgeon = plain()
    surgeon.flip(surgeon.device_root(3))
    surgeon.flip(surgeon.bitmap_of("data", 0))
    assert run(surgeon, skip_mappings=True).findings == []


# Mapping trees


def leaf_of(surgeon: Surgeon, dev_id: int, number: int = 1) -> int:
    return surgeon.leaves(surgeon.device_root(dev_id))[number]


def test_a_damaged_leaf_is_placed_and_its_device_told_what_it_lost() -> None:
    surgeon = plain()
    root, leaf = surgeon.device_root(3), leaf_of(surgeon, 3)
    lost = surgeon.image.node(leaf)
    bounds = surgeon.image.node(root).keys[1:3]
    surgeon.flip(leaf)
    node_error, device_error = run(surgeon).findings
    assert (node_error.rule, node_error.tree, node_error.device) == (node_check.CHECKSUM_ERROR, MAPPING_TREE, 3)
    assert (node_error.block, node_error.keys) == (leaf, bounds)
    assert node_error.path == (0, surgeon.image.superblock().mapping_root, root, leaf)
    assert device_error.rule == rules.MISSING_MAPPINGS
    assert device_error.expected == 12000
    assert device_error.actual == 12000 - len(lost.keys)
    text = f"Thin device 3 has 1 errors and is missing {len(lost.keys)} mappings, while expected 12000"
    assert device_error.message == text


def test_a_damaged_root_loses_the_device() -> None:
    surgeon = plain()
    surgeon.flip(surgeon.device_root(3))
    report = run(surgeon)
    assert first(report, rules.MISSING_MAPPINGS).message == "Thin device 3 is missing root with 12000 mappings"


def test_a_shared_node_is_reported_once_and_every_device_told() -> None:
    surgeon = chain()
    leaf = leaf_of(surgeon, 0)
    content = surgeon.image
    roots = {dev: int.from_bytes(root, "little") for dev, root in content.items(content.superblock().mapping_root)}
    sharers = [dev for dev, root in roots.items() if leaf in {node.number for _, node in content.nodes(root)}]
    assert len(sharers) > 2
    surgeon.flip(leaf)
    report = run(surgeon)
    assert len([f for f in report.findings if f.rule == node_check.CHECKSUM_ERROR]) == 1
    assert [f.device for f in report.findings if f.rule == rules.MISSING_MAPPINGS] == sharers


def test_damage_that_devices_share_is_placed_in_each_of_them() -> None:
    surgeon = chain()
    leaf = leaf_of(surgeon, 0)
    surgeon.flip(leaf)
    findings = run(surgeon).findings
    places = {finding.device: finding for finding in findings if finding.block == leaf}
    assert places.keys() == {finding.device for finding in findings if finding.rule == rules.MISSING_MAPPINGS}
    assert len(places) > 2
    image_now = surgeon.image
    for dev_id, finding in places.items():
        assert dev_id is not None
        root = surgeon.device_root(dev_id)
        keys, children = image_now.node(root).keys, image_now.node(root).children
        at = children.index(leaf)
        bounds = (keys[at], keys[at + 1] if at + 1 < len(keys) else 1 << 64)
        assert (finding.keys, finding.path[-2:]) == (bounds, (root, leaf))
        assert finding.severity == FATAL
        assert f"thin device {dev_id}, thin blocks [{bounds[0]}..{bounds[1] - 1 if bounds[1] < 1 << 64 else ''}]" in (
            finding.message
        )
    assert [f.rule for f in places.values()].count(rules.SHARED_DAMAGE) == len(places) - 1


def test_damage_between_a_shared_node_and_its_child_is_placed_at_the_node() -> None:
    surgeon = Surgeon(image("dirty_4"))  # a snapshot and nothing after it: the whole tree is shared
    root = surgeon.device_root(0)
    surgeon.value(root, 1, 1 << 40)
    findings = run(surgeon).findings
    hit = {
        finding.device: finding
        for finding in findings
        if finding.block == root and finding.rule != rules.MISSING_MAPPINGS
    }
    assert hit.keys() == {0, 1}
    assert (hit[1].rule, hit[1].keys) == (rules.SHARED_DAMAGE, (0, 1 << 64))


@pytest.mark.parametrize("name", ["dirty_4", "snapshot_chain", "metadata_snapshot"])
@pytest.mark.parametrize("seed", range(4))
def test_every_device_that_lost_something_is_told_which_thin_blocks(name: str, seed: int) -> None:
    """Any damage below the mapping trees, compared with what a plain reader still finds."""
    dice = random.Random(seed)
    surgeon = Surgeon(image(name))
    before = surgeon.image.mappings()
    nodes = sorted({node.number for dev in before for _, node in surgeon.image.nodes(surgeon.device_root(dev))})
    broken = set(dice.sample(nodes, dice.choice([1, 2, 5])))
    lost: dict[int, set[int]] = {}
    for dev in before:
        lost[dev] = set(lost_blocks(surgeon.image, surgeon.device_root(dev), broken))
    for block in broken:
        surgeon.flip(block)
    found: dict[int, list[tuple[int, int]]] = {dev: [] for dev in before}
    for finding in run(surgeon).findings:
        if finding.tree == MAPPING_TREE and finding.device is not None and finding.keys is not None:
            found[finding.device].append(finding.keys)
    for dev, blocks in lost.items():
        told = {block for block in before[dev] if any(begin <= block < end for begin, end in found[dev])}
        assert told == blocks, f"thin device {dev}"


def lost_blocks(image: Image, root: int, broken: set[int]) -> Iterator[int]:
    """Thin blocks whose way from *root* leads through a *broken* node."""
    if root in broken:
        yield from (key for key, _ in image.items(root))
    elif not (node := image.node(root)).leaf:
        for child in node.children:
            yield from lost_blocks(image, child, broken)


def test_space_maps_are_not_judged_by_incomplete_counts() -> None:
    surgeon = plain()
    surgeon.flip(leaf_of(surgeon, 3))
    surgeon.flip(surgeon.bitmap_of("data", 0))
    assert {finding.tree for finding in run(surgeon).findings} == {MAPPING_TREE}


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        (node_check.KEYS_OUT_OF_ORDER, lambda s, leaf: s.key(leaf, 5, 0)),
        (node_check.BLOCKNR_MISMATCH, lambda s, leaf: s.node(leaf, blocknr=3)),
        (node_check.VALUE_SIZE_MISMATCH, lambda s, leaf: s.node(leaf, value_size=24)),
        (node_check.TOO_MANY_ENTRIES, lambda s, leaf: s.node(leaf, nr_entries=253)),
        (node_check.EMPTY_NODE, lambda s, leaf: s.node(leaf, nr_entries=0)),
        (node_check.NOT_A_NODE, lambda s, leaf: s.put(leaf, seal(s.block(leaf), "bitmap"))),
        (btree_walk.LOOP, lambda s, leaf: s.value(s.device_root(3), 1, s.device_root(3))),
        (btree_walk.TWICE, lambda s, leaf: s.value(s.device_root(3), 2, leaf)),
        (btree_walk.OTHER_TREE, lambda s, leaf: s.value(s.device_root(3), 1, s.image.superblock().mapping_root)),
        (node_check.OUTSIDE_DEVICE, lambda s, leaf: s.value(s.device_root(3), 1, 2048)),
        (btree_walk.FIRST_KEY_LOW, lambda s, leaf: s.key(s.device_root(3), 1, s.image.node(leaf).keys[0] + 1)),
        (btree_walk.LAST_KEY_HIGH, lambda s, leaf: s.key(s.device_root(3), 2, s.image.node(leaf).keys[-1])),
    ],
)
def test_broken_rule_of_a_mapping_tree_is_named(rule: str, break_it: Callable[[Surgeon, int], None]) -> None:
    surgeon = plain()
    break_it(surgeon, leaf_of(surgeon, 3))
    finding = first(run(surgeon), rule)
    assert (finding.severity, finding.tree, finding.device) == (FATAL, MAPPING_TREE, 3)
    assert "thin device 3" in finding.message
    assert f"block {finding.block}" in finding.message


def test_leaves_at_different_depths_are_found() -> None:
    surgeon = Surgeon(image("deep"))
    dev_id = next(iter(surgeon.image.devices()))
    root = surgeon.image.node(surgeon.device_root(dev_id))
    shallow = surgeon.image.node(root.children[0]).children[0]
    surgeon.value(root.number, 0, shallow)
    assert first(run(surgeon), btree_walk.UNEVEN_DEPTH).block in root.children


def test_an_underfull_leaf_is_not_fatal() -> None:
    surgeon = plain()
    leaf = leaf_of(surgeon, 3)
    surgeon.details(3, mapped_blocks=12000 - len(surgeon.image.node(leaf).keys) + 83)
    surgeon.keep(leaf, 83)
    report = run(surgeon)
    finding = first(report, node_check.TOO_FEW_ENTRIES)
    assert (finding.severity, finding.block, finding.device) == (NON_FATAL, leaf, 3)
    assert report.worst == NON_FATAL, "what the lost mappings leave behind are leaks"


def test_max_entries_that_do_not_divide_by_three_are_not_fatal() -> None:
    surgeon = Surgeon(image("empty"))
    root = surgeon.image.superblock().mapping_root
    surgeon.put(root, node_block(root, [], [], max_entries=250))
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.block) == (NON_FATAL, node_check.MAX_ENTRIES_ODD, root)


def test_padding_is_advice() -> None:
    surgeon = plain()
    leaf = leaf_of(surgeon, 3)
    surgeon.node(leaf, padding=1)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.block) == (ADVISORY, node_check.PADDING_NOT_ZERO, leaf)


@pytest.mark.parametrize("mapped", [11999, 12001, 0])
def test_a_wrong_number_of_mappings_is_fatal(mapped: int) -> None:
    surgeon = plain()
    surgeon.details(3, mapped_blocks=mapped)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.device) == (FATAL, rules.MAPPED_BLOCKS, 3)
    assert finding.message == f"Thin device 3 has unexpected number of mappings, expected {mapped}, actual 12000"


def test_a_mapping_outside_the_data_device_is_fatal() -> None:
    surgeon = plain()
    leaf = leaf_of(surgeon, 3)
    surgeon.value(leaf, 7, 16384 << 24)
    key = surgeon.image.node(leaf).keys[7]
    finding = first(run(surgeon), rules.DATA_BLOCK_OUTSIDE)
    assert (finding.severity, finding.device, finding.block, finding.keys) == (FATAL, 3, leaf, (key, key + 1))
    assert f"thin block {key} to data block 16384 of 16384" in finding.message


def test_a_mapping_newer_than_the_pool_is_advice() -> None:
    surgeon = plain()
    leaf = leaf_of(surgeon, 3)
    surgeon.value(leaf, 7, int.from_bytes(surgeon.image.node(leaf).values[7], "little") + 5)
    key = surgeon.image.node(leaf).keys[7]
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.keys) == (ADVISORY, rules.TIME_IN_FUTURE, (key, key + 1))


def test_a_data_block_that_two_devices_map_must_not_look_exclusive() -> None:
    """Breaking sharing copied the leaf, not the data: such a block has two leaves."""
    surgeon = chain()
    surgeon.details(0, snapshotted_time=0)
    finding = first(run(surgeon), rules.SHARED_LOOKS_EXCLUSIVE)
    assert (finding.severity, finding.tree) == (ADVISORY, MAPPING_TREE)


def test_a_shared_leaf_must_not_look_exclusive() -> None:
    surgeon = Surgeon(image("dirty_4"))  # a snapshot and nothing after it: the whole tree is shared
    assert surgeon.device_root(0) == surgeon.device_root(1)
    surgeon.details(1, snapshotted_time=0, creation_time=0)
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule) == (ADVISORY, rules.SHARED_LOOKS_EXCLUSIVE)
    assert (finding.device, finding.block) == (1, surgeon.device_root(0))


# Metadata snapshot


def test_a_damaged_snapshot_superblock_is_fatal() -> None:
    surgeon = with_snapshot()
    held = surgeon.image.superblock().held_root
    surgeon.flip(held)
    finding = only(run(surgeon))
    assert (finding.severity, finding.tree, finding.block) == (FATAL, SNAP_PREFIX + "superblock", held)
    assert finding.message.startswith("metadata snap: bad checksum in superblock")


def test_a_snapshot_outside_the_device_is_fatal() -> None:
    surgeon = with_snapshot()
    surgeon.superblock(held_root=1 << 50)
    assert first(run(surgeon), node_check.OUTSIDE_DEVICE).tree == SNAP_PREFIX + "superblock"
    assert run(surgeon, metadata_snap=True).worst == FATAL


@pytest.mark.parametrize(
    "fields", [{"magic": 1}, {"blocknr": 3}, {"held_root": 3}, {"data_nr_blocks": 1}, {"time": 1000}]
)
def test_an_unusual_snapshot_superblock_is_advice(fields: dict[str, int]) -> None:
    surgeon = with_snapshot()
    held = surgeon.image.superblock().held_root
    surgeon.superblock(held, **fields)
    finding = only(run(surgeon))
    assert (finding.severity, finding.block) == (ADVISORY, held)


def test_damage_below_the_snapshot_only_is_attributed_to_it() -> None:
    surgeon = with_snapshot()
    copy = surgeon.image.superblock(surgeon.image.superblock().held_root)
    surgeon.flip(copy.details_root)
    finding = only(run(surgeon))
    assert (finding.tree, finding.block) == (SNAP_PREFIX + DETAILS_TREE, copy.details_root)
    assert run(surgeon, metadata_snap=True).worst == FATAL


def test_only_the_snapshot_is_checked_when_asked_for() -> None:
    surgeon = with_snapshot()
    surgeon.flip(surgeon.image.superblock().details_root)
    surgeon.flip(surgeon.bitmap_of("data", 0))
    assert run(surgeon, metadata_snap=True).findings == []
    assert run(surgeon).worst == FATAL


def test_a_snapshot_asked_for_must_be_there() -> None:
    finding = only(run(plain(), metadata_snap=True))
    assert (finding.severity, finding.message) == (FATAL, "no current metadata snap")


def test_mappings_of_the_snapshot_may_look_exclusive() -> None:
    """After a snapshot of the metadata, the kernel goes on overwriting what only it shares with the pool."""
    assert run(with_snapshot()).findings == []


# Space maps


@pytest.mark.parametrize(("which", "tree"), [("data", DATA_SPACE_MAP), ("metadata", METADATA_SPACE_MAP)])
class TestCounts:
    def free_block(self, surgeon: Surgeon, which: str) -> int:
        return max(surgeon.image.counts(which)) + 5

    def used_block(self, surgeon: Surgeon, which: str) -> int:
        counts = surgeon.image.counts(which)
        return next(block for block, count in counts.items() if count == 1 and block)

    def test_a_leak_is_not_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        block = self.free_block(surgeon, which)
        surgeon.count(which, block, 1)
        surgeon.count(which, block + 1, 1)
        report = run(surgeon)
        finding = first(report, space_map_check.LEAK)
        assert (finding.severity, finding.tree, finding.keys) == (NON_FATAL, tree, (block, block + 2))
        assert (finding.expected, finding.actual) == (0, 1)
        assert finding.block == surgeon.bitmap_of(which, block)
        assert f"{which} block {block}" in finding.message
        assert report.worst == NON_FATAL

    def test_a_count_without_references_is_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        block = self.free_block(surgeon, which)
        surgeon.count(which, block, 2)
        finding = first(run(surgeon), space_map_check.BAD_COUNT)
        assert (finding.severity, finding.tree, finding.keys) == (FATAL, tree, (block, block + 1))

    @pytest.mark.parametrize("count", [0, 2])
    def test_a_wrong_count_is_fatal(self, which: str, tree: str, count: int) -> None:
        surgeon = plain()
        block = self.used_block(surgeon, which)
        surgeon.count(which, block, count)
        finding = first(run(surgeon), space_map_check.BAD_COUNT)
        assert (finding.severity, finding.expected, finding.actual) == (FATAL, 1, count)
        text = f"Bad reference count for {which} block {block}.  Expected 1, but space map contains {count}."
        assert finding.message.startswith(text)

    def test_a_high_count_without_overflow_entry_is_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.count(which, self.used_block(surgeon, which), 3)
        finding = first(run(surgeon), space_map_check.OVERFLOW_MISSING)
        assert (finding.severity, finding.actual) == (FATAL, None)
        assert "but space map says it's >= 3." in finding.message

    def test_a_damaged_bitmap_is_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        bitmap = surgeon.bitmap_of(which, 0)
        surgeon.flip(bitmap)
        finding = only(run(surgeon))
        assert (finding.severity, finding.tree, finding.block) == (FATAL, tree, bitmap)
        assert finding.rule == node_check.CHECKSUM_ERROR
        assert (finding.keys or (1, 0))[0] == 0

    def test_a_bitmap_of_another_place_is_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        bitmap = surgeon.bitmap_of(which, 0)
        surgeon.patch(bitmap, 8, 8, 3, "bitmap")
        assert only(run(surgeon)).rule == node_check.BLOCKNR_MISMATCH

    def test_a_node_is_not_a_bitmap(self, which: str, tree: str) -> None:
        surgeon = plain()
        bitmap = surgeon.bitmap_of(which, 0)
        surgeon.put(bitmap, surgeon.block(bitmap), "node")
        assert only(run(surgeon)).rule == space_map_check.NOT_A_BITMAP

    def test_a_bitmap_outside_the_device_is_fatal(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.index_entry(which, 0, blocknr=1 << 40)
        finding = only(run(surgeon))
        assert (finding.severity, finding.rule, finding.tree) == (FATAL, node_check.OUTSIDE_DEVICE, tree)

    def test_entries_beyond_the_end_are_advice(self, which: str, tree: str) -> None:
        surgeon = Surgeon(image("transaction_id"))
        block = {"data": 16384 + 10, "metadata": 1024 + 10}[which]
        surgeon.count(which, block, 1)
        finding = only(run(surgeon))
        assert (finding.severity, finding.rule) == (ADVISORY, space_map_check.BITS_BEYOND_END)
        assert finding.block == surgeon.bitmap_of(which, block)

    def test_a_bitmaps_header_is_advice(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.patch(surgeon.bitmap_of(which, 0), 4, 4, 1, "bitmap")
        assert (only(run(surgeon)).severity, only(run(surgeon)).rule) == (ADVISORY, space_map_check.HEADER_NOT_ZERO)

    def test_a_wrong_total_is_advice(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.superblock(**{f"{which}_nr_allocated": 5})
        finding = only(run(surgeon))
        assert (finding.severity, finding.rule, finding.tree) == (ADVISORY, space_map_check.NR_ALLOCATED, tree)

    def test_a_wrong_free_count_is_advice(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.index_entry(which, 0, nr_free=5)
        finding = only(run(surgeon))
        assert (finding.severity, finding.rule, finding.tree) == (ADVISORY, space_map_check.NR_FREE, tree)

    def test_a_hint_behind_the_first_free_entry_is_advice(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.index_entry(which, 0, none_free_before=16320)
        finding = only(run(surgeon))
        assert (finding.severity, finding.rule) == (ADVISORY, space_map_check.NONE_FREE_BEFORE)

    def test_a_hint_before_the_first_free_entry_is_fine(self, which: str, tree: str) -> None:
        surgeon = plain()
        surgeon.index_entry(which, 0, none_free_before=0)
        assert run(surgeon).findings == []


def test_free_counts_of_older_restore_tools_are_accepted() -> None:
    """They count only entries that stand for a block."""
    surgeon = plain()
    sb = surgeon.image.superblock()
    surgeon.index_entry("metadata", 0, nr_free=sb.metadata_map.nr_blocks - sb.metadata_map.nr_allocated)
    assert run(surgeon).findings == []


def test_a_damaged_index_block_is_fatal() -> None:
    surgeon = plain()
    index = surgeon.image.superblock().metadata_map.bitmap_root
    surgeon.flip(index)
    finding = only(run(surgeon))
    assert (finding.severity, finding.tree, finding.block) == (FATAL, METADATA_SPACE_MAP, index)
    assert finding.message.startswith("metadata space map: bad checksum in index block")


def test_an_index_block_of_another_place_is_fatal() -> None:
    surgeon = plain()
    surgeon.patch(surgeon.image.superblock().metadata_map.bitmap_root, 8, 8, 3, "index")
    assert only(run(surgeon)).rule == node_check.BLOCKNR_MISMATCH


def test_stray_index_entries_and_padding_are_advice() -> None:
    surgeon = plain()
    index = surgeon.image.superblock().metadata_map.bitmap_root
    surgeon.patch(index, 16 + 16, 8, 1, "index")
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule) == (ADVISORY, space_map_check.STRAY_INDEX_ENTRIES)
    surgeon.patch(index, 16 + 16, 8, 0, "index")
    surgeon.patch(index, 4, 4, 1, "index")
    assert (only(run(surgeon)).severity, only(run(surgeon)).rule) == (ADVISORY, space_map_check.HEADER_NOT_ZERO)


@pytest.mark.parametrize("keys", [[0, 1, 2], [0, 1, 2, 4], [1, 2, 3, 4]])
def test_the_data_index_must_name_every_bitmap(keys: list[int]) -> None:
    surgeon = Surgeon(image("resized_data"))
    root = surgeon.image.superblock().data_map.bitmap_root
    node = surgeon.image.node(root)
    assert node.keys == (0, 1, 2, 3)
    values = [int.from_bytes(value, "little") for value in node.values]
    surgeon.rewrite(root, keys, values[: len(keys)])
    finding = only(run(surgeon))
    assert (finding.severity, finding.rule, finding.block) == (FATAL, space_map_check.INDEX_KEYS, root)


def test_a_damaged_overflow_node_is_placed() -> None:
    surgeon = chain()
    leaf = surgeon.leaves(surgeon.image.superblock().data_map.ref_count_root)[0]
    surgeon.flip(leaf)
    finding = only(run(surgeon))
    assert (finding.severity, finding.tree, finding.block) == (FATAL, DATA_SPACE_MAP, leaf)


def overflow_leaf(surgeon: Surgeon) -> int:
    return surgeon.leaves(surgeon.image.superblock().data_map.ref_count_root)[0]


def test_a_wrong_high_count_is_fatal() -> None:
    surgeon = chain()
    leaf = overflow_leaf(surgeon)
    block = surgeon.image.node(leaf).keys[0]
    true_count = surgeon.image.counts("data")[block]
    surgeon.value(leaf, 0, 77)
    finding = only(run(surgeon))
    assert (finding.rule, finding.expected, finding.actual) == (space_map_check.BAD_COUNT, true_count, 77)


def test_an_overflow_entry_below_three_is_fatal() -> None:
    surgeon = chain()
    surgeon.value(overflow_leaf(surgeon), 0, 2)
    assert first(run(surgeon), space_map_check.OVERFLOW_VALUE).severity == FATAL


def test_an_overflow_entry_without_mark_in_the_bitmap_is_fatal() -> None:
    surgeon = chain()
    block = surgeon.image.node(overflow_leaf(surgeon)).keys[0]
    surgeon.count("data", block, 2)
    finding = first(run(surgeon), space_map_check.OVERFLOW_STRAY)
    assert (finding.severity, finding.keys) == (FATAL, (block, block + 1))


def test_an_overflow_entry_beyond_the_end_is_fatal() -> None:
    surgeon = chain()
    root = surgeon.image.superblock().data_map.ref_count_root
    last = surgeon.leaves(root)[-1]
    surgeon.key(last, len(surgeon.image.node(last).keys) - 1, 1 << 50)
    assert first(run(surgeon), space_map_check.OVERFLOW_KEY).severity == FATAL


def test_damage_in_the_data_space_map_leaves_the_metadata_counts_alone() -> None:
    """With the overflow tree cut off, references to its nodes would be missing."""
    surgeon = chain()
    surgeon.flip(surgeon.image.superblock().data_map.ref_count_root)
    surgeon.count("metadata", max(surgeon.image.counts("metadata")) + 5, 1)
    assert {finding.tree for finding in run(surgeon).findings} == {DATA_SPACE_MAP}
