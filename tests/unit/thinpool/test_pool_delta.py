"""Two devices compared without an engine: against plain dicts, against the engine, and on damage."""

from __future__ import annotations

import errno
import os

import pytest

import thinpool
from bufio import MemoryDevice
from bufio.testing import FaultyDevice
from tests.support.comparison import expected, pairs_of
from tests.support.fixtures import GOOD, facts_of, image
from tests.support.image import BLOCK, Image
from tests.support.surgeon import Surgeon
from thinpool.differences import SAME
from thinpool.pool_delta import PoolDelta, Root, Thin

WITH_DEVICES = [name for name in GOOD if facts_of(name).nr_devices]
WITH_SNAPSHOT = [name for name in GOOD if facts_of(name).metadata_snap is not None]


@pytest.mark.parametrize("name", WITH_DEVICES)
def test_differences_are_those_of_the_mappings(name: str) -> None:
    devices = Image.from_bytes(image(name)).mappings()
    for left, right in pairs_of(devices):
        delta = PoolDelta(MemoryDevice(image(name)), Thin(left), Thin(right))
        wanted = expected(devices[left], devices[right])
        assert list(delta.differences()) == wanted
        assert list(delta.differences(same=False)) == [one for one in wanted if one.kind != SAME], "asked once more"


@pytest.mark.parametrize("name", ["mixed", "snapshot_chain", "dirty_3", "discards"])
def test_the_engine_finds_the_same(name: str) -> None:
    devices = Image.from_bytes(image(name)).mappings()
    with thinpool.PoolMetadata.open(MemoryDevice(image(name)), read_only=True) as pool:
        for left, right in pairs_of(devices):
            delta = PoolDelta(MemoryDevice(image(name)), Thin(left), Thin(right))
            with pool.open_thin_device(left) as one:
                if left == right:
                    assert list(thinpool.delta(one, one)) == []
                    continue
                with pool.open_thin_device(right) as other:
                    assert list(delta.differences(same=False)) == list(thinpool.delta(one, other))


@pytest.mark.parametrize("name", WITH_SNAPSHOT)
def test_the_metadata_snapshot_can_be_compared(name: str) -> None:
    content = Image.from_bytes(image(name))
    snap = content.superblock(content.superblock().held_root)
    devices = content.mappings(snap)
    for left, right in pairs_of(devices):
        delta = PoolDelta(MemoryDevice(image(name)), Thin(left), Thin(right), metadata_snap=True)
        assert list(delta.differences()) == expected(devices[left], devices[right])
        assert delta.superblock.nr_data_blocks == 0


@pytest.mark.parametrize("name", ["dirty_3", "mixed", "metadata_snapshot"])
def test_trees_can_be_named_by_their_roots(name: str) -> None:
    surgeon = Surgeon(image(name))
    devices = surgeon.image.mappings()
    left, right = pairs_of(devices)[-1]
    wanted = expected(devices[left], devices[right])
    surgeon.flip(surgeon.image.superblock().details_root)
    surgeon.flip(surgeon.image.superblock().mapping_root)
    one, other = (Surgeon(image(name)).device_root(dev_id) for dev_id in (left, right))
    delta = PoolDelta(surgeon.device(), Root(one), Root(other))
    assert list(delta.differences()) == wanted, "the trees of devices are not needed"
    delta = PoolDelta(MemoryDevice(image(name)), Thin(left), Root(other))
    assert list(delta.differences()) == wanted


def test_a_device_as_it_is_and_as_it_was_at_the_metadata_snapshot() -> None:
    content = Image.from_bytes(image("metadata_snapshot"))
    snap = content.superblock(content.superblock().held_root)
    then = {key: int.from_bytes(value, "little") for key, value in content.items(snap.mapping_root)}
    delta = PoolDelta(MemoryDevice(image("metadata_snapshot")), Root(then[0]), Thin(0))
    assert list(delta.differences()) == expected(content.mappings(snap)[0], content.mappings()[0])


# What is read


def blocks_read(device: FaultyDevice[MemoryDevice]) -> list[int]:
    return [block for call in device.log for block in range(call.offset // BLOCK, (call.offset + call.length) // BLOCK)]


@pytest.fixture(scope="module")
def related() -> bytes:
    """Device 1, of some hundred leaves, and its snapshot 2, in which every 500th differs."""
    device = MemoryDevice(4096 * BLOCK)
    with thinpool.PoolMetadata.format(device, data_block_size=128, nr_data_blocks=1 << 20) as pool:
        pool.create_thin(1)
        with pool.open_thin_device(1) as thin:
            for at in range(0, 60000, 2):
                thin.insert_block(at, pool.alloc_data_block())
        pool.create_snap(2, origin=1)
        pool.commit()
        with pool.open_thin_device(2) as snap:
            for at in range(0, 60000, 20000):
                snap.insert_block(at, pool.alloc_data_block())
    return bytes(device.contents())


def test_what_is_shared_is_not_read_unless_somebody_wants_to_know(related: bytes) -> None:
    device = FaultyDevice(MemoryDevice(related))
    delta = PoolDelta(device, Thin(1), Thin(2))
    surgeon = Surgeon(related)
    leaves = [surgeon.leaves(surgeon.device_root(dev_id)) for dev_id in (1, 2)]
    shared = {*leaves[0]} & {*leaves[1]}
    assert len(shared) > 100
    for block in shared:
        surgeon.flip(block)
    broken = PoolDelta(surgeon.device(), Thin(1), Thin(2))
    assert sum(one.length for one in broken.differences(same=False)) == 3
    with pytest.raises(thinpool.Corrupt, match="checksum"):
        list(broken.differences())
    device.log.clear()
    assert sum(one.length for one in delta.differences()) == 30000
    read = blocks_read(device)
    through_gaps = 1.1
    assert len(read) <= through_gaps * len({*leaves[0], *leaves[1]})
    assert len(device.log) < len(read) / 8, "many at a time"


# What is refused


def refused(surgeon: Surgeon, rule: str, block: int) -> str:
    with pytest.raises(thinpool.Corrupt, match=rule) as caught:
        list(PoolDelta(surgeon.device(), Thin(1), Thin(2)).differences())
    assert caught.value.block == block
    assert f"block {block}" in str(caught.value)
    return str(caught.value)


def test_damage_is_named_with_device_range_and_path(related: bytes) -> None:
    surgeon = Surgeon(related)
    root = surgeon.device_root(2)
    leaf = surgeon.leaves(root)[0]
    keys = surgeon.image.node(leaf).keys
    surgeon.flip(leaf)
    message = refused(surgeon, "checksum error", leaf)
    assert "thin device 2" in message
    assert f"thin blocks [{keys[0]}.." in message
    assert message.endswith(f"/{root}/{leaf}")


@pytest.mark.parametrize("dev_id", [1, 2])
def test_keys_must_be_where_the_parents_say(related: bytes, dev_id: int) -> None:
    surgeon = Surgeon(related)
    leaves = surgeon.leaves(surgeon.device_root(dev_id))
    node = surgeon.image.node(leaves[0])
    surgeon.key(leaves[0], len(node.keys) - 1, 59999)
    refused(surgeon, "last key not below", leaves[0])
    surgeon = Surgeon(related)
    surgeon.key(leaves[1], 0, 0)
    refused(surgeon, "first key below", leaves[1])


def test_a_shared_leaf_must_fit_both_parents(related: bytes) -> None:
    surgeon = Surgeon(related)
    root = surgeon.device_root(2)
    children = surgeon.image.node(root).children
    leaf = next(i for i, child in enumerate(children) if child in surgeon.leaves(surgeon.device_root(1)) and i)
    key = surgeon.image.node(root).keys[leaf]
    surgeon.key(root, leaf, key + 1)
    assert "thin device 2" in refused(surgeon, "first key below", children[leaf])


def test_pointers_must_lead_to_metadata_blocks(related: bytes) -> None:
    surgeon = Surgeon(related)
    root = surgeon.device_root(2)
    surgeon.value(root, 3, 1 << 40)
    refused(surgeon, "block outside the device", root)
    surgeon.value(root, 0, 0)
    refused(surgeon, "block outside the device", root)


def test_mappings_must_lead_to_data_blocks(related: bytes) -> None:
    surgeon = Surgeon(related)
    leaf = surgeon.leaves(surgeon.device_root(1))[5]
    surgeon.value(leaf, 3, 1 << 20 << 24)
    assert "data block 1048576 of 1048576" in refused(surgeon, "data block outside", leaf)


def test_leaves_must_be_equally_deep(related: bytes) -> None:
    surgeon = Surgeon(related)
    root = surgeon.device_root(2)
    surgeon.value(root, 1, root)
    refused(surgeon, "different depths", root)


def test_a_loop_is_not_followed_for_ever(related: bytes) -> None:
    surgeon = Surgeon(related)
    root = surgeon.device_root(2)
    surgeon.value(root, 0, root)
    refused(surgeon, "too deep", root)


def test_siblings_must_be_of_one_geometry(related: bytes) -> None:
    surgeon = Surgeon(related)
    leaf = surgeon.leaves(surgeon.device_root(1))[7]
    node = surgeon.image.node(leaf)
    values = [int.from_bytes(value, "little") for value in node.values]
    surgeon.rewrite(leaf, node.keys, values, max_entries=249)
    assert "249 instead of 252" in refused(surgeon, "max_entries differs", leaf)


def test_a_shared_leaf_must_be_of_the_geometry_of_its_siblings_on_the_right_too(related: bytes) -> None:
    surgeon = Surgeon(related)
    first, second = surgeon.leaves(surgeon.device_root(2))[:2]
    shared = surgeon.leaves(surgeon.device_root(1))
    assert first not in shared
    assert second in shared
    node = surgeon.image.node(first)
    values = [int.from_bytes(value, "little") for value in node.values]
    surgeon.rewrite(first, node.keys, values, max_entries=249)
    message = refused(surgeon, "max_entries differs", second)
    assert "252 instead of 249" in message
    assert "thin device 2" in message


def test_the_number_of_mappings_must_be_that_of_the_details(related: bytes) -> None:
    surgeon = Surgeon(related)
    surgeon.details(2, mapped_blocks=29999)
    root = surgeon.device_root(2)
    assert "expected 29999, actual 30000" in refused(surgeon, "unexpected number of mappings", root)
    delta = PoolDelta(surgeon.device(), Thin(1), Root(root))
    assert sum(one.length for one in delta.differences()) == 30000, "a root has no details"


def test_an_unreadable_node_is_an_error_of_the_device(related: bytes) -> None:
    device = FaultyDevice(MemoryDevice(related))
    leaf = Surgeon(related).leaves(Surgeon(related).device_root(1))[9]
    device.on("read", blocks=[leaf]).fail()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        list(PoolDelta(device, Thin(1), Thin(2)).differences())


def test_devices_and_roots_must_exist(related: bytes) -> None:
    with pytest.raises(thinpool.NoSuchDevice, match=r"Unable to find mapping tree for snap2 \(9\)"):
        PoolDelta(MemoryDevice(related), Thin(1), Thin(9))
    for block in (0, 4096, 1 << 63):
        with pytest.raises(thinpool.ThinError, match="cannot be the root") as caught:
            PoolDelta(MemoryDevice(related), Root(block), Thin(1))
        assert caught.value.errno == errno.EINVAL


def test_a_block_that_is_no_node_is_no_root(related: bytes) -> None:
    with pytest.raises(thinpool.Corrupt, match="value_size mismatch"):
        PoolDelta(MemoryDevice(related), Root(Surgeon(related).image.superblock().details_root), Thin(1))
