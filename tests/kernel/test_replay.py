"""The same operations in a real kernel and in our engine give the same device: trees, block numbers, every byte.

Compared at every checkpoint, mostly after each commit: first the shape of each tree, because its differences are the
easiest to read, then each live block, then the hash of the whole device, which covers stale slots and free blocks.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import test_golden_trace
from tests.kernel.sequences import RECORDED, SEQUENCES, Sequence, digest, golden_trace
from tests.support.image import Image
from tests.support.replay import Checkpoint, replay_in_engine, replay_in_kernel


def assert_same_device(kernel: Image, engine: Image, where: str) -> None:
    """Fail at the first difference, in words that lead to its cause."""
    assert engine.superblock() == kernel.superblock(), f"{where}: the superblocks differ"
    assert engine.shapes() == kernel.shapes(), f"{where}: the trees differ in shape"
    differences = [str(d) for d in kernel.differences(engine)]
    assert not differences, f"{where}: {len(differences)} live blocks differ (left: kernel); {differences[0]}"
    stale = [n for n, block in kernel.blocks.items() if n and engine.block(n) != block]
    assert not stale, f"{where}: only in stale slots or free blocks, metadata blocks {stale[:20]} differ"
    assert engine.sha256() == kernel.sha256(), where


every_sequence = pytest.mark.parametrize("make", SEQUENCES, ids=lambda make: make.__name__)


@every_sequence
def test_engine_writes_the_device_that_the_kernel_was_recorded_to_write(
    make: Callable[[], Sequence], tmp_path: Path
) -> None:
    sequence = make()
    assert digest(replay_in_engine(sequence.geometry, sequence.operations, tmp_path)) == RECORDED[make.__name__]


@pytest.mark.kernel
@every_sequence
def test_kernel_and_engine_write_the_same_device(make: Callable[[], Sequence], tmp_path: Path) -> None:
    sequence = make()
    by_kernel = replay_in_kernel(sequence.geometry, sequence.operations, tmp_path)
    by_engine = replay_in_engine(sequence.geometry, sequence.operations, tmp_path)
    ends = [i for i, operation in enumerate(sequence.operations) if isinstance(operation, Checkpoint)]
    assert len(by_kernel) == len(by_engine) == len(ends) > 0
    for kernel, engine, end in zip(by_kernel, by_engine, ends, strict=True):
        recent = sequence.operations[max(0, end - 3) : end]
        assert_same_device(kernel, engine, f"after operation {end}, {recent}")
    assert digest(by_kernel) == RECORDED[make.__name__]


@pytest.mark.kernel
def test_the_pool_target_reproduces_the_recorded_trace(tmp_path: Path) -> None:
    """The hashes in ``test_golden_trace.py`` are what this kernel writes today."""
    sequence = golden_trace()
    images = replay_in_kernel(sequence.geometry, sequence.operations, tmp_path)
    hashes = [Image(i.blocks, max(2048, i.superblock().metadata_map.nr_blocks)).sha256()[:16] for i in images]
    assert hashes == [step.sha256 for step in test_golden_trace.RECORDED[1:]]
