"""A kernel goes on with pools whose leaks were repaired, and with those where a power cut came between."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from bufio import FileDevice
from bufio.testing import CrashDevice
from tests.support import fixtures
from tests.support.leaks import small_pool, with_leaks, with_random_leaks
from tests.support.round_trip import World
from thinpool import repair_leaks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kernel


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="leak-repair.") as name:
        yield Path(name)


def go_on(world: World) -> None:
    """Let a kernel read everything, use blocks that were given back, and free others; it is verified at the end."""
    oldest = min(world.devices)
    with world.kernel() as kernel:
        kernel.write(oldest, random.Random(1).sample(range(4000), 40))
        kernel.discard(oldest, 100, 400)
        kernel.commit()


@pytest.mark.parametrize("name", ["dirty_2", "metadata_snapshot"])
def test_a_kernel_goes_on_with_a_repaired_pool(name: str, directory: Path) -> None:
    content = fixtures.image(name)
    world = World.of_image(directory, content if name == "dirty_2" else with_random_leaks(content, seed=3))
    assert world.leaks
    with FileDevice(world.meta) as device:
        assert repair_leaks(device).has_written
    world.leaks = False
    world.verify()
    go_on(world)


@pytest.mark.parametrize("number", range(4))
def test_a_kernel_goes_on_with_what_a_power_cut_leaves_of_a_repair(number: int, directory: Path) -> None:
    content = with_leaks(small_pool(), data=[300, 301, 999])
    device = CrashDevice(content)
    repair_leaks(device)
    images = [left.contents() for left in device.images(exhaustive=3, samples=4, seed=1)]
    *cut, whole = [left for left in images if left != content]
    left = [*random.Random(2).sample(cut, 3), whole][number]
    world = World.of_image(directory, left)
    assert world.leaks == (left[:4096] == content[:4096]), "repaired once the superblock is there, not before"
    go_on(world)
