"""Pools that go from our engine to a real kernel and back, and the other way round.

Whatever one of them writes, the other activates, reads block by block, changes and commits.  After every leg the
dicts in ``World``, the bytes on the disk as an independent reader sees them, our engine, our check, Debian's
``thin_check`` and the kernel's status line have to agree.
"""

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support import fixtures
from tests.support.image import Image
from tests.support.kernel import stamp
from tests.support.round_trip import KernelLeg, Leg, World
from thinpool.errors import OutOfSpace, ReadOnly, ThinError
from thinpool.metadata import PoolMetadata
from thinpool.thin_device import ThinDevice

pytestmark = pytest.mark.kernel

LARGEST_ID = (1 << 24) - 1


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place for images; it goes with the test, because a few of them together fill a disk."""
    with TemporaryDirectory(prefix="round-trip.") as name:
        yield Path(name)


Turn = Callable[[], AbstractContextManager[Leg]]
"""Begins a leg; one of the two in a scenario is the kernel's."""


@dataclass(frozen=True)
class Scenario:
    """What is done to a pool in two turns, and the pool to begin with."""

    run: Callable[[Turn, Turn], None]
    geometry: dict[str, int]


SCENARIOS: dict[str, Scenario] = {}


def scenario(**geometry: int) -> Callable[[Callable[[Turn, Turn], None]], Callable[[Turn, Turn], None]]:
    """Register a function under its name, to be run in both orders."""

    def register(run: Callable[[Turn, Turn], None]) -> Callable[[Turn, Turn], None]:
        SCENARIOS[run.__name__] = Scenario(run, geometry)
        return run

    return register


def scattered(seed: int, count: int, limit: int) -> list[int]:
    """Different numbers below *limit*, in no order."""
    return random.Random(seed).sample(range(limit), count)


# ---- scenarios, each for both orders


@scenario()
def devices_without_mappings(first: Turn, second: Turn) -> None:
    with first() as leg:
        for dev in (0, LARGEST_ID, 7, 8, 300):
            leg.create(dev)
        leg.delete(7)
    with second() as leg:
        leg.snap(1, 300)
        leg.delete(0)
        leg.create(7)
        leg.write(LARGEST_ID, [0])


@scenario()
def one_device_written_in_order(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(700))
    with second() as leg:
        leg.write(0, range(690, 1200))
        leg.write(0, range(1500, 1300, -1))
        leg.write(0, [0, 5, 300])


@scenario(metadata_blocks=2048)
def one_device_written_at_random(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(5)
        leg.write(5, scattered(1, 2500, 1 << 24))
    with second() as leg:
        leg.write(5, scattered(2, 1500, 1 << 24))
        leg.discard(5, 1 << 22, (1 << 22) + (1 << 15))


@scenario()
def sharing_that_one_made_is_broken_by_the_other(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(600))
        leg.snap(1, 0)
        leg.write(0, range(0, 600, 50))
        leg.snap(2, 1)
    with second() as leg:
        leg.write(1, range(0, 600, 30))
        leg.write(0, range(10, 200, 10))
        leg.snap(3, 1)
        leg.write(2, range(590, 700))
        leg.delete(1)


@scenario()
def twenty_snapshots_in_a_chain(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(500))
        for dev in range(1, 21):
            leg.snap(dev, dev - 1)
            leg.write(dev, range(dev * 20, dev * 20 + 5))
    with second() as leg:
        for dev in (20, 10, 0):
            leg.write(dev, range(0, 500, 61))
        for dev in (5, 6, 19, 12):
            leg.delete(dev)
        leg.snap(21, 20)


@scenario()
def ten_snapshots_of_one_origin(first: Turn, second: Turn) -> None:
    """So many owners that the counts are in the overflow trees, those of data and those of metadata."""
    with first() as leg:
        leg.create(0)
        leg.write(0, range(900))
        for dev in range(1, 11):
            leg.snap(dev, 0)
        for dev in range(1, 6):
            leg.write(dev, range(dev, 900, 100))
    with second() as leg:
        for dev in range(6, 11):
            leg.write(dev, range(dev, 900, 100))
        for dev in (0, 2, 4, 9):
            leg.delete(dev)
        leg.discard(1, 100, 700)
        leg.write(3, range(0, 900, 7))


@scenario(metadata_blocks=2048)
def three_hundred_devices(first: Turn, second: Turn) -> None:
    with first() as leg:
        for n, dev in enumerate(scattered(3, 300, 1000)):
            leg.create(dev)
            if n % 3 == 0:
                leg.write(dev, [n, n + 1, 5 * n])
    with second() as leg:
        devices = sorted(leg.world.devices)
        for dev in devices[::2]:
            leg.delete(dev)
        for dev in devices[1::40]:
            leg.snap(dev + 2000, dev)
            leg.write(dev + 2000, range(3))


@scenario()
def ids_that_are_used_again(first: Turn, second: Turn) -> None:
    with first() as leg:
        for dev in range(8):
            leg.create(dev)
            leg.write(dev, range(dev * 10, dev * 10 + 60))
        for dev in (1, 3, 5):
            leg.delete(dev)
    with second() as leg:
        for dev in (1, 5):
            leg.create(dev)
            leg.write(dev, [0, 99])
        leg.snap(3, 1)
        leg.delete(1)
        leg.create(1)


@scenario()
def discards_of_blocks_and_ranges(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(2000))
        leg.snap(1, 0)
        for begin in range(0, 2000, 97):
            leg.discard(0, begin, begin + begin % 60 + 1)
    with second() as leg:
        leg.discard(1, 0, 1900)
        for begin in range(3, 2000, 101):
            leg.discard(0, begin, begin + 1)
        leg.write(1, range(500, 520))
        leg.discard(0, 1000, 60_000)


@scenario()
def a_device_that_is_emptied_and_filled_again(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(4)
        leg.write(4, range(1000))
        leg.discard(4, 0, 1000)
    with second() as leg:
        leg.write(4, range(999, 0, -3))
        leg.discard(4, 0, 50_000)
        leg.write(4, [123])


@scenario(block=384, data_blocks=4096)
def data_blocks_of_192_kib(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(300))
        leg.snap(1, 0)
    with second() as leg:
        leg.write(1, range(0, 300, 20))
        leg.discard(0, 100, 200)


@scenario(block=2048, data_blocks=2048)
def data_blocks_of_1_mib(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(0, 900, 3))
        leg.snap(9, 0)
    with second() as leg:
        leg.write(9, range(1, 500, 6))
        leg.discard(9, 0, 30)
        leg.write(0, [0, 3])


@scenario(block=2097152, data_blocks=200)
def data_blocks_of_1_gib(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, scattered(4, 90, 1 << 30))
    with second() as leg:
        leg.write(0, scattered(5, 90, 1 << 30))
        leg.snap(1, 0)


@scenario()
def keys_far_apart(first: Turn, second: Turn) -> None:
    """Blocks of a 4 EiB device, beyond 2**45."""
    with first() as leg:
        leg.create(1)
        leg.write(1, [0, *scattered(6, 600, 1 << 46), (1 << 46) - 1])
    with second() as leg:
        leg.snap(2, 1)
        leg.write(2, scattered(7, 200, 1 << 46))
        leg.discard(1, (1 << 46) - 1, 1 << 46)


@scenario()
def metadata_snapshot_held_by_one_and_released_by_the_other(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.create(1)
        leg.write(0, range(500))
        leg.reserve()
        leg.write(0, range(450, 550))
        leg.snap(2, 0)
        leg.delete(1)
    with second() as leg:
        leg.write(2, range(0, 500, 45))
        leg.discard(0, 0, 100)
        leg.release()
        leg.create(1)
        leg.reserve()
        leg.write(1, [1])


@scenario(data_blocks=1000)
def data_device_that_grows_in_both(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(300))
        leg.grow_data(20_000)
        leg.write(0, range(300, 900))
    with second() as leg:
        leg.grow_data(50_000)
        leg.write(0, range(900, 1300))


@scenario(metadata_blocks=256)
def metadata_device_that_grows_in_both(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(300))
        leg.grow_metadata(600)
        leg.write(0, range(1000, 1300))
    with second() as leg:
        leg.grow_metadata(17_000)
        leg.snap(1, 0)
        leg.write(1, range(0, 300, 20))


@scenario()
def largest_transaction_id(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.set_transaction_id((1 << 63) + 1)
        leg.create(0)
        leg.set_transaction_id((1 << 64) - 1)
        leg.create(1)
    with second() as leg:
        leg.snap(2, 1)
        leg.set_transaction_id(3)
        leg.create(3)


@scenario(data_blocks=500)
def every_data_block_in_use(first: Turn, second: Turn) -> None:
    with first() as leg:
        leg.create(0)
        leg.write(0, range(500))
    with second() as leg:
        leg.discard(0, 10, 20)
        leg.commit()
        leg.write(0, range(700, 710))
        leg.grow_data(600)
        leg.write(0, range(800, 900))


@pytest.mark.parametrize("name", SCENARIOS)
def test_kernel_reads_and_changes_what_we_made(name: str, directory: Path) -> None:
    world = World(directory, **SCENARIOS[name].geometry)
    SCENARIOS[name].run(world.ours, world.kernel)


@pytest.mark.parametrize("name", SCENARIOS)
def test_we_read_and_change_what_the_kernel_made(name: str, directory: Path) -> None:
    world = World(directory, **SCENARIOS[name].geometry)
    SCENARIOS[name].run(world.kernel, world.ours)
    with world.kernel():
        pass  # it reads everything


# ---- pools that a kernel left behind


@pytest.mark.parametrize(
    "name",
    [
        "deep",
        "deleted_devices",
        "dirty_2",
        "many_devices",
        "metadata_nearly_full",
        "metadata_snapshot",
        "metadata_snapshot_of_deleted",
        "mixed",
        "resized_metadata",
        "shared_by_many",
        "snapshot_chain",
    ],
)
def test_recorded_pools_go_through_us_to_the_kernel_and_back(name: str, directory: Path) -> None:
    """Old pools, with a past that is hard to make in a test: crashes, growth, many owners, a full metadata device."""
    world = World.of_image(directory, fixtures.image(name))
    world.verify()
    oldest = min(world.devices)
    with world.ours() as leg:
        if leg.pool.free_metadata_block_count < 100:
            leg.grow_metadata(2 * world.metadata_blocks)
        leg.snap(LARGEST_ID, oldest)
        leg.write(oldest, [*scattered(8, 40, 4000), 1 << 40])
        leg.create(LARGEST_ID - 1)
        leg.write(LARGEST_ID - 1, range(20))
        leg.set_transaction_id(leg.world.transaction_id + 1)
    with world.kernel() as kernel:
        kernel.write(LARGEST_ID, scattered(9, 40, 4000))
        kernel.discard(oldest, 100, 400)
        kernel.delete(LARGEST_ID - 1)


# ---- large and small


def test_kernel_reads_a_hundred_thousand_random_mappings(directory: Path) -> None:
    """A mapping tree of three levels that we built by single inserts, with commits in between."""
    world = World(directory, data_blocks=120_000, metadata_blocks=4096)
    blocks = scattered(10, 100_000, 1 << 24)
    with world.ours() as leg:
        leg.create(0)
        for n in range(0, len(blocks), 10_000):
            leg.write(0, blocks[n : n + 10_000])
            leg.commit()
        leg.snap(1, 0)
    assert len(Image.load(world.meta).shapes()["device 0"].levels) == 3
    with world.kernel() as kernel:
        kernel.delete(1)
        kernel.write(0, scattered(11, 1500, 1 << 24))
        kernel.discard(0, 1 << 20, (1 << 20) + 60_000)


def test_mappings_made_by_the_bulk_calls_are_the_kernels_too(directory: Path) -> None:
    world = World(directory)
    with world.ours() as leg:
        leg.create(0)
        leg.create(1)
        runs = leg.thin(0).provision(50, 700)
        leg.commit()
        leg.thin(1).remove_range(0, 10)
        mapped = {run.thin_begin + i: run.data_begin + i for run in runs for i in range(run.length)}
        assert mapped.keys() == set(range(50, 750))
        leg.pool.inc_data_range(0, 300)
        leg.thin(1).insert_range(1000, 0, 200)
        leg.thin(1).insert_blocks(list(range(3000, 3200, 2)), list(range(200, 300)))
        leg.thin(0).remove_block(60)
        del mapped[60]
        # The blocks were never written: they are what the data device held there before.
        stamp(world.data, world.block, range(700))
        world.devices[0] = {v: (1, data, 0) for v, data in mapped.items()}
        world.devices[1] = {1000 + i: (1, i, 0) for i in range(200)} | {
            3000 + 2 * i: (1, 200 + i, 0) for i in range(100)
        }
    with world.kernel() as kernel:
        kernel.write(0, range(40, 60))
        kernel.discard(1, 1000, 1100)


def test_a_kernel_that_zeroes_new_blocks_finds_ours_as_we_left_them(directory: Path) -> None:
    """It zeroes the blocks that it allocates, not those that it finds mapped."""
    world = World(directory, data_blocks=200)
    with world.data.open("r+b") as data:
        for n in range(200):
            data.seek(n * 65536)
            data.write(b"old" * 1000)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(50))
    with world.kernel("no_discard_passdown") as kernel:
        kernel.write(0, range(50, 100))
        kernel_made = kernel.steps.add("rest_is_zero", dev=0, blocks=[[50, 100]])
        we_made = kernel.steps.add("rest_is_zero", dev=0, blocks=[[0, 1]])
    assert kernel.values[kernel_made] is True
    assert kernel.values[we_made] is False


def test_metadata_snapshot_that_the_kernel_took_shows_us_the_pool_of_that_time(directory: Path) -> None:
    """What the kernel changes afterwards, down to deleted devices and freed blocks, is not in it."""
    world = World(directory)
    with world.kernel() as kernel:
        kernel.create(0)
        kernel.write(0, range(400))
        kernel.snap(1, 0)
        kernel.create(2)
        kernel.reserve()
        then = {dev: set(blocks) for dev, blocks in world.devices.items()}
        kernel.write(0, range(380, 500))
        kernel.discard(1, 0, 250)
        kernel.delete(2)
        kernel.snap(3, 1)
    with PoolMetadata.open_metadata_snap(world.meta) as pool:
        assert pool.devices().keys() == then.keys()
        for dev, blocks in then.items():
            with pool.open_thin_device(dev) as thin:
                assert {run.thin_begin + i for run in thin.mappings() for i in range(run.length)} == blocks
    image = Image.load(world.meta)
    copy = image.superblock(image.superblock().held_root)
    assert {dev: set(blocks) for dev, blocks in image.mappings(copy).items()} == then


def test_metadata_snapshot_that_we_took_is_the_kernels_to_release(directory: Path) -> None:
    world = World(directory)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(300))
        leg.reserve()
        leg.discard(0, 0, 300)
        held = leg.pool.metadata_snap
    with world.kernel() as kernel:
        kernel.statuses.append(kernel.steps.add("status"))
        first = kernel.statuses[-1]
        kernel.fails(kernel.steps.message("reserve_metadata_snap"), errno.EBUSY)
        kernel.release()
        kernel.fails(kernel.steps.message("release_metadata_snap"), errno.EINVAL)
        kernel.reserve()
    assert f" {held} rw" in kernel.values[first]


# ---- no space left


def test_kernel_finds_no_free_data_block_where_we_found_none(directory: Path) -> None:
    world = World(directory, data_blocks=300)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(300))
        with pytest.raises(OutOfSpace):
            leg.pool.alloc_data_block()
    with world.kernel("skip_block_zeroing", "error_if_no_space") as kernel:
        kernel.fails(kernel.steps.write(0, [400], kernel.seed, size=512), errno.ENOSPC)
        kernel.discard(0, 0, 50)
        kernel.commit()
        kernel.write(0, range(400, 440))
    with world.ours() as leg:
        leg.write(0, range(500, 510))
        with pytest.raises(OutOfSpace):
            leg.pool.alloc_data_block()


def fill(pool: PoolMetadata, thin: ThinDevice) -> int:
    """Map every 300th block, with a commit after each fifty, until there is no room; returns how many are committed."""
    committed = 0
    for n in range(pool.data_dev_size):
        try:
            if n % 50 == 0:
                pool.commit()
                committed = n
            thin.insert_block(n * 300, pool.alloc_data_block())
        except OutOfSpace:
            return committed
    raise AssertionError("the data device is full")


def test_a_pool_that_we_filled_with_metadata_is_the_kernels_to_grow(directory: Path) -> None:
    """We run out of metadata space, abort, and lose only the open transaction."""
    world = World(directory, data_blocks=40_000, metadata_blocks=48)
    with world.ours() as leg:
        leg.create(0)
        committed = fill(leg.pool, leg.thin(0))
        leg.pool.abort()
        world.devices[0] = {n * 300: (1, n, 0) for n in range(committed)}
        stamp(world.data, world.block, range(committed))
        assert leg.thin(0).mapped_count == committed
    assert committed > 300
    with world.kernel() as kernel:
        kernel.grow_metadata(512)
        kernel.write(0, range(100))


def test_the_kernel_runs_out_of_metadata_space_and_we_grow_it(directory: Path) -> None:
    world = World(directory, data_blocks=40_000, metadata_blocks=96)
    kernel = KernelLeg(world)
    kernel.create(0)
    kernel.write(0, range(0, 600_000, 300))
    kernel.commit()
    kernel.fails(kernel.steps.write(0, range(700_000, 10_000_000, 100), kernel.seed, size=512), errno.EIO)
    kernel.run()
    # What the kernel committed before it gave up is what the pool holds.
    found = Image.load(world.meta).mappings()[0]
    assert found.keys() >= world.devices[0].keys()
    world.devices[0] = {v: (2, v, kernel.seed << 24) for v in found}
    world.leaks = True
    with world.ours() as leg:
        leg.grow_metadata(1024)
        if leg.pool.needs_check:
            leg.pool.clear_needs_check()
        leg.write(0, range(100))
    with world.kernel() as kernel:
        kernel.write(0, range(50, 200))


# ---- flags and modes


def test_kernel_keeps_a_pool_read_only_while_needs_check_is_set_by_us(directory: Path) -> None:
    world = World(directory)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(100))
        leg.commit()
        leg.pool.set_needs_check()
    with world.kernel() as kernel:
        kernel.fails(kernel.steps.message("create_thin 1"), errno.EOPNOTSUPP)
        kernel.fails(kernel.steps.write(0, [100], kernel.seed, size=512), errno.EIO)
    assert b" ro " in kernel.status
    assert b"needs_check" in kernel.status
    with world.ours() as leg:
        assert leg.pool.needs_check
        leg.pool.clear_needs_check()
    with world.kernel() as kernel:
        kernel.write(0, range(90, 110))
    assert b" rw " in kernel.status


def test_we_read_the_pool_whose_metadata_device_failed_under_the_kernel(directory: Path) -> None:
    """An I/O error on commit makes the kernel abort and set needs_check; the last good commit is all there."""
    world = World(directory)
    kernel = KernelLeg(world)
    kernel.create(0)
    kernel.write(0, range(300))
    kernel.commit()
    # What is in use stays good; what is allocated next is behind the edge.
    kernel.steps.add("meta_window", sectors=1024 * 8, good=40 * 8)
    kernel.may_fail(kernel.steps.write(0, scattered(12, 5000, 1 << 24), kernel.seed, size=512), errno.EIO)
    kernel.commit()
    kernel.fails(kernel.steps.write(0, [1 << 25], kernel.seed, size=512), errno.EIO)
    kernel.run()
    found = Image.load(world.meta).mappings()[0]
    assert found.keys() >= world.devices[0].keys()
    world.devices[0] = {v: (2, v, kernel.seed << 24) for v in found}
    world.leaks = True
    with PoolMetadata.open(world.meta, read_only=True) as pool:
        assert pool.needs_check
        with pytest.raises(ReadOnly):
            pool.create_thin(1)
    with world.ours() as leg:
        leg.pool.clear_needs_check()
        leg.write(0, range(250, 350))
    with world.kernel() as kernel:
        kernel.create(1)


def test_pool_of_another_data_block_size_is_refused_as_the_kernel_refuses_it(directory: Path) -> None:
    world = World(directory)
    with world.ours() as leg:
        leg.create(0)
    with pytest.raises(ThinError) as refused:
        PoolMetadata.open(world.meta, 256)
    assert refused.value.errno == errno.EINVAL
    with world.kernel() as kernel:
        kernel.steps.steps.clear()
        kernel.reads.clear()
        kernel.active.clear()
        kernel.fails(kernel.steps.pool_create(256, 1000), errno.EINVAL)
        kernel.steps.pool_create(128, world.data_blocks)


# ---- crashes


@pytest.mark.parametrize("seed", range(2))
def test_we_open_what_a_power_cut_left_of_the_kernels_pool(seed: int, directory: Path) -> None:
    """All that was committed is there, and of what came later only what the kernel committed by itself."""
    world = World(directory, metadata_blocks=2048)
    rng = random.Random(seed)
    kernel = KernelLeg(world)
    kernel.create(0)
    kernel.write(0, scattered(seed, 800, 5000))
    kernel.snap(1, 0)
    kernel.write(1, rng.sample(sorted(world.devices[1]), 200))
    kernel.commit()
    committed = {dev: dict(blocks) for dev, blocks in world.devices.items()}
    later = range(100_000, 100_700)
    kernel.steps.write(0, later, kernel.seed, size=512)
    kernel.cut_power()
    found = Image.load(world.meta).mappings()
    for dev, blocks in found.items():
        new = blocks.keys() - committed[dev].keys()
        assert committed[dev].keys() <= blocks.keys()
        assert new <= set(later)
        world.devices[dev] = committed[dev] | {v: (2, v, kernel.seed << 24 | dev) for v in new}
    world.leaks = True
    world.verify()
    with world.ours() as leg:
        leg.write(0, range(100))
        leg.delete(1)
    with world.kernel():
        pass


def test_kernel_finds_the_last_commit_of_a_transaction_that_we_never_finished(directory: Path) -> None:
    """Blocks of the open transaction may be on the disk already; nothing that is committed refers to them."""
    world = World(directory, data_blocks=30_000)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(500))
        leg.snap(1, 0)
    committed = world.meta.read_bytes()
    devices = {dev: dict(blocks) for dev, blocks in world.devices.items()}
    # A cache of a few blocks is under pressure from the start, and writes early.
    with PoolMetadata.open(world.meta, cache_bytes=16 * 4096) as pool:
        with pool.open_thin_device(0) as thin:
            thin.provision(0, 20_000)
        pool.delete_thin_device(1)
        torn = world.meta.read_bytes()
        pool.abort()
    assert torn != committed
    world.meta.write_bytes(torn)
    world.devices = devices
    world.verify()
    with world.kernel() as kernel:
        kernel.write(1, range(400, 600))


def test_what_we_aborted_never_happened_for_the_kernel(directory: Path) -> None:
    world = World(directory)
    with world.ours() as leg:
        leg.create(0)
        leg.write(0, range(300))
        leg.commit()
        before = {dev: dict(blocks) for dev, blocks in world.devices.items()}
        leg.pool.create_snap(1, 0)
        leg.thin(0).provision(5000, 300)
        leg.thin(0).remove_range(0, 200)
        leg.pool.set_transaction_id(0, 9)
        leg.pool.abort()
        world.devices = before
        leg.write(0, range(295, 310))
    with world.kernel() as kernel:
        kernel.create(1)


# ---- a random walk


def random_operations(leg: Leg, rng: random.Random, count: int) -> None:
    """Anything a pool can be asked for, with ranges that often meet."""
    world = leg.world
    for _ in range(count):
        devices = sorted(world.devices)
        pick = rng.random()
        dev = rng.choice(devices) if devices else 0
        new = rng.choice([n for n in range(60) if n not in world.devices])
        if len(devices) < 3 or pick < 0.10:
            leg.create(new)
        elif pick < 0.24 and len(devices) < 40:
            leg.snap(new, dev)
        elif pick < 0.32:
            leg.delete(dev)
        elif pick < 0.36:
            leg.set_transaction_id(world.transaction_id + rng.choice([1, 1 << 40]))
        elif pick < 0.40:
            (leg.release if world.held else leg.reserve)()
        elif pick < 0.42:
            leg.grow_data(world.data_blocks + rng.randrange(1, 3000))
        elif pick < 0.43:
            leg.grow_metadata(world.metadata_blocks + rng.randrange(1, 500))
        elif pick < 0.47:
            leg.commit()
        elif pick < 0.62:
            begin = rng.randrange(1200)
            leg.discard(dev, begin, begin + rng.choice([1, 3, 50, 500]))
        elif pick < 0.85:
            begin = rng.randrange(1200)
            leg.write(dev, range(begin, begin + rng.randrange(1, 60)))
        else:
            leg.write(dev, [rng.randrange(1200) for _ in range(rng.randrange(1, 40))])


def test_a_random_walk_of_600_operations_alternates_between_the_kernel_and_us(directory: Path) -> None:
    world = World(directory, data_blocks=12_000)
    rng = random.Random(2024)
    for leg_number in range(12):
        if leg_number % 2 == 0:
            with world.ours() as leg:
                random_operations(leg, rng, 50)
        else:
            with world.kernel() as kernel:
                random_operations(kernel, rng, 50)
    assert len(world.devices) > 3
