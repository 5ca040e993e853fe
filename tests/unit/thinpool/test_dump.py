"""The dump: order, sharing, selection, and what it does about damage that only shows on the way."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import image, read_xml
from tests.support.surgeon import Surgeon
from thinpool import ir
from thinpool.dump import Options, dump
from thinpool.errors import Corrupt, ThinError
from thinpool.xml_format import XmlWriter

if TYPE_CHECKING:
    from collections.abc import Collection

    from bufio.device import MemoryDevice


class Recorder:
    """A visitor that writes down what it is told."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def begin_superblock(self, superblock: ir.Superblock) -> None:
        self.log.append(("superblock", superblock.nr_data_blocks))

    def end_superblock(self) -> None:
        self.log.append(("end",))

    def begin_shared(self, name: int) -> None:
        self.log.append(("def", name))

    def end_shared(self) -> None:
        self.log.append(("end def",))

    def begin_device(self, device: ir.Device) -> None:
        self.log.append(("device", device.dev_id))

    def end_device(self) -> None:
        self.log.append(("end device",))

    def mapping(self, thin_begin: int, data_begin: int, length: int, time: int) -> None:
        self.log.append(("run", thin_begin, data_begin, length, time))

    def shared(self, name: int) -> None:
        self.log.append(("ref", name))


def record(device: MemoryDevice, **options: bool | Collection[int]) -> list[tuple[object, ...]]:
    recorder = Recorder()
    dump(device, recorder, Options(**options))  # type: ignore[arg-type]  # keywords of one kind each
    return recorder.log


def xml(device: MemoryDevice, options: Options | None = None) -> bytes:
    out = io.BytesIO()
    dump(device, XmlWriter(out.write), options)
    return out.getvalue()


# Sharing


def test_a_tree_that_two_devices_share_is_one_part() -> None:
    surgeon = Surgeon(image("dirty_4"))
    leaves = surgeon.leaves(surgeon.device_root(0))
    log = record(surgeon.device())
    assert [entry for entry in log if entry[0] in ("def", "ref")] == [
        ("def", leaves[0]),
        ("ref", leaves[0]),
        ("ref", leaves[0]),
    ]
    assert sum(int(str(entry[3])) for entry in log if entry[0] == "run") == 900


def test_names_of_shared_parts_ascend() -> None:
    log = record(Surgeon(image("shared_by_many")).device())
    names = [int(str(entry[1])) for entry in log if entry[0] == "def"]
    assert names == sorted(set(names))
    assert {entry[1] for entry in log if entry[0] == "ref"} == set(names)


def test_one_device_has_no_shared_parts_and_the_same_mappings() -> None:
    device = Surgeon(image("snapshot_chain")).device()
    everything = read_xml(xml(device))
    for dev_id in (0, 10, 20):
        content = xml(device, Options(dev_ids={dev_id}))
        assert b"<def" not in content
        assert b"<ref" not in content
        assert read_xml(content).devices == {dev_id: everything.devices[dev_id]}


def test_two_devices_share_only_what_those_two_share() -> None:
    device = Surgeon(image("snapshot_chain")).device()
    everything = read_xml(xml(device))
    content = read_xml(xml(device, Options(dev_ids=[3, 12])))
    assert content.devices == {dev_id: everything.devices[dev_id] for dev_id in (3, 12)}


def test_runs_go_on_over_the_end_of_a_leaf() -> None:
    surgeon = Surgeon(image("sequential"))
    (dev_id,) = surgeon.image.devices()
    assert len(surgeon.leaves(surgeon.device_root(dev_id))) > 100
    runs = [entry for entry in record(surgeon.device()) if entry[0] == "run"]
    assert sum(int(str(run[3])) for run in runs) == 32768
    assert len(runs) == 1


# Selection


def test_an_unknown_device_gives_a_pool_without_devices() -> None:
    assert record(Surgeon(image("random")).device(), dev_ids=[99]) == [("superblock", 16384), ("end",)]


def test_mappings_can_be_left_out() -> None:
    device = Surgeon(image("snapshot_chain")).device()
    log = record(device, skip_mappings=True, dev_ids=[1, 2])
    assert [entry[0] for entry in log] == ["superblock", "device", "end device", "device", "end device", "end"]


def test_skipping_mappings_does_not_read_them() -> None:
    surgeon = Surgeon(image("random"))
    surgeon.flip(surgeon.device_root(3))
    assert ("device", 3) in record(surgeon.device(), skip_mappings=True)


def test_the_snapshot_must_exist() -> None:
    with pytest.raises(ThinError, match="no current metadata snap"):
        record(Surgeon(image("random")).device(), metadata_snap=True)


# Damage


def test_a_damaged_leaf_ends_the_dump_with_its_place() -> None:
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    content = surgeon.image
    root = content.node(surgeon.device_root(dev_id))
    middle = content.node(root.children[1])
    leaf = middle.children[3]
    surgeon.flip(leaf)
    recorder = Recorder()
    with pytest.raises(Corrupt) as caught:
        dump(surgeon.device(), recorder)
    assert caught.value.block == leaf
    assert caught.value.rule == "checksum error"
    path = f"{content.superblock().mapping_root}/{root.number}/{middle.number}/{leaf}"
    assert path in str(caught.value)
    assert f"thin device {dev_id}" in str(caught.value)
    first_lost = middle.keys[3]
    assert f"[{first_lost}.." in str(caught.value)
    assert all(int(str(entry[1])) < first_lost for entry in recorder.log if entry[0] == "run")


def test_damage_in_an_internal_node_comes_before_anything_is_written() -> None:
    surgeon = Surgeon(image("random"))
    surgeon.flip(surgeon.device_root(3))
    recorder = Recorder()
    with pytest.raises(Corrupt):
        dump(surgeon.device(), recorder)
    assert recorder.log == []


def test_damage_in_a_shared_leaf_names_a_device() -> None:
    surgeon = Surgeon(image("dirty_4"))
    surgeon.flip(surgeon.leaves(surgeon.device_root(1))[2])
    with pytest.raises(Corrupt, match="thin device 0"):
        record(surgeon.device())


def test_a_leaf_is_held_against_the_keys_of_all_its_parents() -> None:
    """The leaf is fine for the device that is dumped first, and not for the other."""
    surgeon = Surgeon(image("snapshot_chain"))
    content = surgeon.image
    roots = [content.node(surgeon.device_root(dev_id)) for dev_id in content.devices()]
    seen: set[int] = set(roots[0].children)
    last, place = next(
        (root, i)
        for root in roots[1:]
        if root != roots[0]
        for i, child in enumerate(root.children)
        if child in seen and i
    )
    surgeon.key(last.number, place, last.keys[place] + 1)
    with pytest.raises(Corrupt) as caught:
        record(surgeon.device())
    assert caught.value.rule == "first key below the parent's key"
    assert caught.value.block == last.children[place]


@pytest.mark.parametrize("level", ["leaf", "internal"])
def test_siblings_of_different_geometry_are_refused(level: str) -> None:
    """A wrong max_entries moves the place where the values are looked for."""
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    node = surgeon.image.node(surgeon.image.node(surgeon.device_root(dev_id)).children[1])
    block = node.children[3] if level == "leaf" else node.number
    surgeon.keep(block, 100, max_entries=249)
    with pytest.raises(Corrupt, match="max_entries differs") as caught:
        record(surgeon.device())
    assert caught.value.block == block


def test_a_wide_fan_of_one_child_is_refused_at_once() -> None:
    """252 pointers to the same node on each of several levels would be 252 to the power of that many leaves."""
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    root = surgeon.device_root(dev_id)
    middle = surgeon.image.node(root).children[0]
    for i in range(1, len(surgeon.image.node(root).keys)):
        surgeon.value(root, i, middle)
    with pytest.raises(Corrupt, match="below the parent's key"):
        record(surgeon.device())


def test_a_tree_that_points_at_itself_is_refused() -> None:
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    root = surgeon.device_root(dev_id)
    surgeon.value(root, 0, root)
    with pytest.raises(Corrupt, match="too deep"):
        record(surgeon.device())


def test_a_wrong_number_of_mappings_is_not_passed_on_silently() -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    surgeon.details(5, mapped_blocks=7)
    with pytest.raises(Corrupt, match="Thin device 5 has unexpected number of mappings, expected 7"):
        record(surgeon.device())
