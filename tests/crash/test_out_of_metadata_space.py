"""Metadata space that runs out at each allocation in turn: the call says so, and the last commit is still there.

Two ways: a counter that makes allocation number n fail, on a device with plenty of room; and devices that are really
too small.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from bufio import MemoryDevice
from persistent_data.errors import NoFreeMetadataBlock
from persistent_data.space_map_metadata import MetadataSpaceMap
from tests.support.pools import assert_sound, content_of, outcome_of
from tests.support.scenario import OWNED, STEPS, STEPS_WITH_SNAP, build, build_with_snap
from thinpool import OutOfSpace, PoolMetadata, ThinDevice, ThinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.pools import Content

BLOCK = 4096
MANY = 1 << 20
NEEDS_NO_BLOCK = ("set_transaction_id", "resize_metadata_dev")
MADE_OURS = {"inc_data_range": dict.fromkeys(range(50), 1)}
"""References to data blocks that a step makes and nothing maps."""


class Budget:
    """How many allocations are still possible."""

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self) -> None:
        if self.left == 0:
            raise NoFreeMetadataBlock("no free metadata block: as told")
        self.left -= 1


@contextmanager
def limited_to(nr_allocations: int) -> Iterator[Budget]:
    """Let the metadata space map give out that many blocks and then none, whichever way it is asked for one."""
    budget = Budget(nr_allocations)
    new_block, replace = MetadataSpaceMap.new_block, MetadataSpaceMap.replace

    def limited_new_block(self: MetadataSpaceMap) -> int:
        budget.spend()
        return new_block(self)

    def limited_replace(self: MetadataSpaceMap, block: int) -> int | None:
        found = replace(self, block)
        if found is not None:
            budget.spend()
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(MetadataSpaceMap, "new_block", limited_new_block)
    patch.setattr(MetadataSpaceMap, "replace", limited_replace)
    try:
        yield budget
    finally:
        patch.undo()


def do_and_commit(step: Callable[[PoolMetadata, ThinDevice], object], pool: PoolMetadata, thin: ThinDevice) -> None:
    step(pool, thin)
    pool.commit()


def nr_allocations_of(step: Callable[[PoolMetadata, ThinDevice], object], image: bytes) -> int:
    """How many blocks a step and its commit allocate."""
    pool = PoolMetadata.open(MemoryDevice(image))
    thin = pool.open_thin_device(0)
    with limited_to(MANY) as budget:
        do_and_commit(step, pool, thin)
    return MANY - budget.left


def readable_state(pool: PoolMetadata) -> list[object]:
    """Devices with their mappings, by way of the engine."""
    state: list[object] = [dict(pool.devices()), pool.time, pool.transaction_id, pool.free_block_count]
    for dev in pool.devices():
        with pool.open_thin_device(dev) as thin:
            state.append((thin.mapped_count, thin.highest_mapped_block, list(thin.mappings())))
    return state


def fail_at_each_allocation(
    step: Callable[[PoolMetadata, ThinDevice], object], image: bytes, ours: dict[int, int]
) -> None:
    before = content_of(image)
    with PoolMetadata.open(MemoryDevice(image), read_only=True) as pool:
        state = readable_state(pool)
    nr_allocations = nr_allocations_of(step, image)
    assert nr_allocations >= 3
    for number in range(nr_allocations):
        device = MemoryDevice(image)
        pool = PoolMetadata.open(device)
        thin = pool.open_thin_device(0)
        with limited_to(number):
            error = outcome_of(lambda pool=pool, thin=thin: do_and_commit(step, pool, thin))  # type: ignore[misc]
        assert isinstance(error, OutOfSpace), f"allocation {number} of {nr_allocations}"
        assert error.errno == errno.ENOSPC
        assert content_of(device.contents()) == before
        with pytest.raises(ThinError, match="abort"):
            pool.commit()
        if number % 2:
            pool.abort()
            assert readable_state(pool) == state
            # The same again, now that there is room.
            do_and_commit(step, pool, thin)
            thin.close()
            pool.close()
            assert_sound(device, owned_after(content_of(device.contents())) | ours)
        else:
            thin.close()
            pool.close()
            assert content_of(device.contents()) == before
        with PoolMetadata.open(MemoryDevice(device.contents())) as again:
            if not number % 2:
                assert readable_state(again) == state
                assert_sound(device, OWNED)
            again.create_thin(77)


def owned_after(content: Content) -> dict[int, int]:
    """Data blocks that no device maps: those we had, and one if the step was to allocate one."""
    owned = content.data_counts.keys() - content.mapped_data_blocks()
    assert len(owned - OWNED.keys()) <= 1
    return dict.fromkeys(owned, 1)


@pytest.fixture(scope="module")
def sound() -> bytes:
    return build()


@pytest.fixture(scope="module")
def with_snap() -> bytes:
    return build_with_snap()


@pytest.mark.parametrize("what", [what for what in STEPS if what not in NEEDS_NO_BLOCK])
def test_each_allocation_of_a_step_can_fail(what: str, sound: bytes) -> None:
    fail_at_each_allocation(STEPS[what], sound, MADE_OURS.get(what, {}))


@pytest.mark.parametrize("what", STEPS_WITH_SNAP)
def test_each_allocation_of_a_step_beside_a_metadata_snapshot_can_fail(what: str, with_snap: bytes) -> None:
    fail_at_each_allocation(STEPS_WITH_SNAP[what], with_snap, {})


# One sequence, all in one go


def sequence(pool: PoolMetadata) -> Iterator[None]:
    """Yields after each commit."""
    pool.resize_data_dev(3000)
    pool.commit()
    yield
    pool.create_thin(0)
    pool.commit()
    yield
    with pool.open_thin_device(0) as thin:
        thin.provision(0, 300)
        pool.commit()
        yield
        pool.create_snap(1, 0)
        pool.commit()
        yield
        for block in range(0, 300, 60):
            thin.insert_block(block, pool.alloc_data_block())
        pool.commit()
        yield
        pool.reserve_metadata_snap()
        pool.commit()
        yield
        for block in range(2000, 1500, -2):
            thin.provision(block, 1)
        pool.commit()
        yield
        thin.remove_range(100, 1800)
        pool.commit()
        yield
    pool.release_metadata_snap()
    pool.commit()
    yield
    pool.delete_thin_device(0)
    pool.commit()
    yield


def run_until_it_fails(device: MemoryDevice, number: int) -> tuple[OSError | None, list[Content]]:
    """Do the sequence with *number* allocations; return the error, and what was there after each commit."""
    pool = PoolMetadata.format(device, 128)
    contents = [content_of(device.contents())]
    with limited_to(number):
        try:
            contents.extend(content_of(device.contents()) for _ in sequence(pool))
        except OSError as error:
            assert_sound(device)
            pool.abort()
            assert content_of(device.contents()) == contents[-1]
            with PoolMetadata.open(MemoryDevice(device.contents())) as again:
                assert readable_state(pool) == readable_state(again)
            return error, contents
    return None, contents


def test_each_allocation_of_a_sequence_can_fail() -> None:
    error, expected = run_until_it_fails(MemoryDevice(200 * BLOCK), MANY)
    assert error is None
    seen: set[int] = set()
    number = 0
    while True:
        device = MemoryDevice(200 * BLOCK)
        error, contents = run_until_it_fails(device, number)
        if error is None:
            break
        assert isinstance(error, OutOfSpace)
        assert contents == expected[: len(contents)]
        assert content_of(device.contents()) == contents[-1]
        seen.add(len(contents))
        number += 1
    assert number > 50
    assert seen == set(range(1, len(expected)))


@pytest.mark.parametrize("nr_blocks", range(9, 48))
def test_device_that_is_really_too_small(nr_blocks: int) -> None:
    """No counter: a small device fills up, and what was committed before can be read and gone on with."""
    device = MemoryDevice(nr_blocks * BLOCK)
    error, contents = run_until_it_fails(device, MANY)
    _, expected = run_until_it_fails(MemoryDevice(200 * BLOCK), MANY)
    expected = [content._replace(nr_metadata_blocks=nr_blocks) for content in expected]
    assert contents == expected[: len(contents)]
    assert_sound(device)
    if error is None:
        assert nr_blocks >= 30
        assert len(contents) == len(expected)
        return
    assert isinstance(error, OutOfSpace)
    assert content_of(device.contents()) == contents[-1]
    # More room, and it goes on.
    device.grow(200 * BLOCK)
    with PoolMetadata.open(device) as pool:
        pool.resize_metadata_dev(200)
        pool.commit()
        pool.create_thin(50)
    assert 50 in content_of(device.contents()).devices
    assert_sound(device)
