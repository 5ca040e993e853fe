"""Pools with leaks, made on purpose."""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING

from bufio import MemoryDevice
from tests.support.surgeon import Surgeon
from thinpool import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 4096


def with_leaks(content: bytes, *, data: Iterable[int] = (), metadata: Iterable[int] = ()) -> bytes:
    """*content* with those blocks, which are free, counted as in use once; totals stay as they are."""
    surgeon = Surgeon(content)
    for which, blocks in (("data", data), ("metadata", metadata)):
        for block in blocks:
            surgeon.count(which, block, 1)
    return surgeon.content()


def with_random_leaks(content: bytes, seed: int, most: int = 8) -> bytes:
    """*content* with leaks in each space map that has free blocks, less than *most* at first, each with neighbours."""
    dice = random.Random(seed)
    image = Surgeon(content).image
    sb = image.superblock()
    leaks: dict[str, set[int]] = {"data": set(), "metadata": set()}
    for which, root in (("data", sb.data_map), ("metadata", sb.metadata_map)):
        used = image.counts(which)
        free = [block for block in range(root.nr_blocks) if block not in used]
        for first in dice.choices(free, k=dice.randrange(1, most)) if free else ():
            run = range(first, min(first + dice.choice([1, 1, 2, 5]), root.nr_blocks))
            leaks[which].update(block for block in run if block not in used)
    return with_leaks(content, data=leaks["data"], metadata=leaks["metadata"])


@cache
def small_pool(nr_metadata_blocks: int = 64, nr_data_blocks: int = 1000) -> bytes:
    """Two devices that share some blocks."""
    device = MemoryDevice(nr_metadata_blocks * BLOCK)
    with PoolMetadata.format(device, 128, nr_data_blocks) as pool:
        pool.create_thin(1)
        with pool.open_thin_device(1) as thin:
            thin.provision(0, 40)
        pool.create_snap(2, origin=1)
        with pool.open_thin_device(2) as thin:
            thin.provision(100, 10)
        pool.commit()
    return device.contents()
