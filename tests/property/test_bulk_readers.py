"""thin_rmap and thin_delta in bulk, on pools of any history: against plain dicts, and the text of single lines."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thinpool
from bufio import MemoryDevice
from persistent_data import block_batches, node_batches
from tests.support.comparison import expected
from tests.support.image import BLOCK, Image
from tests.support.reverse import reverse_map_of
from thinpool import delta_batch, pool_delta, reverse_batch, reverse_map
from thinpool.delta_format import delta_text
from thinpool.pool_delta import PoolDelta, Thin

if TYPE_CHECKING:
    from collections.abc import Iterator

NR_DATA_BLOCKS = 6000


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (block_batches, node_batches, delta_batch):
            patch.setattr(module, "WINDOW_BLOCKS", 5)
        patch.setattr(reverse_batch, "_WORDS_AT_A_TIME", 100)
        yield


def any_pool(dice: Random) -> bytes:
    """Devices that were written in runs, snapshotted, discarded from, and written again."""
    device = MemoryDevice(512 * BLOCK)
    with thinpool.PoolMetadata.format(device, data_block_size=128, nr_data_blocks=NR_DATA_BLOCKS) as pool:
        ids = [dice.randrange(100)]
        pool.create_thin(ids[0])
        sparse = dice.choice([1, 1, 1000, 1 << 40])
        for _ in range(dice.randrange(1, 12)):
            with pool.open_thin_device(dice.choice(ids)) as thin:
                begin = dice.randrange(1500)
                for at in range(begin, begin + dice.randrange(400), dice.choice([1, 1, 2])):
                    if dice.random() < 0.9:
                        thin.insert_block(at * sparse, pool.alloc_data_block())
                if dice.random() < 0.3:
                    thin.remove_range(begin * sparse, (begin + dice.randrange(1, 200)) * sparse)
            dev_id = dice.randrange(100)
            if dev_id not in ids and dice.random() < 0.5:
                pool.create_snap(dev_id, origin=dice.choice(ids))
                ids.append(dev_id)
            if dice.random() < 0.5:
                pool.commit()
        pool.commit()
    return bytes(device.contents())


def not_to_be_used(*arguments: object) -> None:
    raise AssertionError("a pool that the engine has made is clean")


@settings(max_examples=25)
@given(st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 20, 40_000, 5_000]))
def test_rmap(seed: int, memory: int) -> None:
    dice = Random(seed)
    content = any_pool(dice)
    begins = [dice.randrange(NR_DATA_BLOCKS) for _ in range(dice.randrange(3))]
    regions = [(begin, begin + dice.randrange(1, 1000)) for begin in begins] or [(0, NR_DATA_BLOCKS)]
    owned = reverse_map_of(Image.from_bytes(content), reverse_map.disjoint(regions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reverse_map, "BULK_FROM_MAPPINGS", 0)
        patch.setattr(reverse_batch, "MEMORY", memory)
        patch.setattr(reverse_batch, "_MOST_STRETCHES", 1 << 30)
        patch.setattr(reverse_map, "_one_by_one", not_to_be_used)
        text = b"".join(map(bytes, reverse_map.reverse_map_text(MemoryDevice(content), regions)))
    assert text.decode().splitlines() == [str(one) for one in owned]


@settings(max_examples=25)
@given(st.integers(0, (1 << 64) - 1))
def test_delta(seed: int) -> None:
    dice = Random(seed)
    content = any_pool(dice)
    devices = Image.from_bytes(content).mappings()
    left, right = dice.choice(sorted(devices)), dice.choice(sorted(devices))
    delta = PoolDelta(MemoryDevice(content), Thin(left), Thin(right))
    verbose, json, same = dice.random() < 0.5, dice.random() < 0.5, dice.random() < 0.7
    in_lines = b"".join(map(bytes, delta_text(delta, verbose=verbose, json=json, same=same)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_delta, "BULK_FROM_MAPPINGS", 0)
        patch.setattr(PoolDelta, "_one_by_one", not_to_be_used)
        assert b"".join(map(bytes, delta_text(delta, verbose=verbose, json=json, same=same))) == in_lines
        assert list(delta.differences()) == expected(devices[left], devices[right])
