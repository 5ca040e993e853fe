"""Sequences of pool operations for ``test_replay.py``, and what a kernel made of them.

Each aims at one part of the algorithms that decide which block goes where.  ``RECORDED`` has, for each, a hash over
the device at every checkpoint, taken from Linux 6.1.176: with it the engine is compared where no kernel can be booted.
A sequence that is changed has to be recorded again.  (``random.Random`` gives the same numbers in every Python from
3.11 on.)
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.support import fixtures
from tests.support.image import Image
from tests.support.replay import (
    Activate,
    Checkpoint,
    Commit,
    CreateSnap,
    CreateThin,
    Deactivate,
    Delete,
    Discard,
    Geometry,
    Operation,
    ReleaseMetadataSnap,
    Reopen,
    ReserveMetadataSnap,
    ResizeData,
    ResizeMetadata,
    SetTransactionId,
    Write,
)

#: Writes in one transaction: so few that the kernel is done with them long before its timed commit.
BATCH = 250


@dataclass(frozen=True)
class Sequence:
    """A pool to begin with, and what is done to it."""

    geometry: Geometry
    operations: list[Operation]


def committed(*operations: Operation) -> list[Operation]:
    """The operations, a commit, a checkpoint."""
    return [*operations, Commit(), Checkpoint()]


def writes(dev: int, blocks: Iterable[int], checkpoint_every: int = 1) -> Iterator[Operation]:
    """Writes to all the blocks in their order, in transactions of at most BATCH."""
    source = iter(blocks)
    for n in itertools.count(1):
        batch = tuple(itertools.islice(source, BATCH))
        if not batch:
            return
        yield Write(dev, batch)
        yield Commit()
        if n % checkpoint_every == 0:
            yield Checkpoint()


def new_device(dev: int) -> list[Operation]:
    return [CreateThin(dev), Activate(dev)]


# ---- the sequences


def golden_trace() -> Sequence:
    """The recorded trace, once more in a kernel: it proves the translation to pool operations."""
    c = Checkpoint()
    return Sequence(
        Geometry(2048, 4096, settle=False),
        [
            *(c, Reopen(), CreateThin(0), c, Activate(0)),
            *committed(Write(0, (0,))),
            *committed(Write.to(0, range(1, 301))),
            *committed(Write.to(0, range(1000, 800, -1))),
            *(CreateSnap(1, 0), c),
            *committed(Write(0, (5,))),
            *committed(Write.to(0, range(0, 291, 10))),
            *(CreateSnap(2, 1), CreateSnap(3, 1), c, Activate(1)),
            *committed(Write(1, (7,))),
            *committed(Discard(0, 100, 250)),
            *(ReserveMetadataSnap(), c),
            *committed(Write(0, (8,))),
            *(ReleaseMetadataSnap(), c, Delete(2), c),
            *committed(Discard(0, 0, 2000)),
            *(SetTransactionId(0, 7), c, ResizeMetadata(4096), c),
            *committed(Write(0, (3,))),
            *(Reopen(), CreateThin(9), c),
        ],
    )


def leaves_split_in_every_way() -> Sequence:
    """Ascending, descending, interleaved and random inserts: split beneath, balancing, one to two, two to three."""
    shuffled = list(range(20_000, 26_000, 2))
    random.Random(1).shuffle(shuffled)
    return Sequence(
        Geometry(1024, 16384),
        [
            *new_device(0),
            *writes(0, range(1500)),
            *writes(0, range(9000, 7500, -1)),
            *writes(0, range(10_000, 13_000, 3)),
            *writes(0, range(10_001, 13_000, 3)),
            *writes(0, shuffled),
            *writes(0, range(20_001, 22_000, 2)),
        ],
    )


def inner_nodes_split_and_merge() -> Sequence:
    """On a tree of 120,000 mappings in three levels: random inserts, holes, a snapshot that shares the upper levels."""
    rng = random.Random(2)
    geometry = Geometry.of(fixtures.image("deep"))
    top = 1 << 24
    return Sequence(
        geometry,
        [
            Activate(0),
            *writes(0, (rng.randrange(top) for _ in range(1500)), 2),
            *committed(*(Discard(0, b, b + 5000) for b in range(0, 200_000, 40_000))),
            *committed(Discard(0, 4_000_000, 4_060_000)),
            *(CreateSnap(5, 0), Checkpoint(), Activate(5)),
            *writes(5, (rng.randrange(top) for _ in range(750))),
            *committed(Discard(5, 8_000_000, 8_060_000)),
            *writes(0, (rng.randrange(top) for _ in range(500))),
            *committed(Deactivate(5), Delete(5)),
        ],
    )


def sharing_is_broken_block_by_block() -> Sequence:
    """Snapshots of snapshots, written to at random: counts beyond two in both maps, overflow trees grow and shrink."""
    rng = random.Random(3)
    operations: list[Operation] = [*new_device(0), *writes(0, range(700))]
    for dev in range(1, 9):
        operations += [CreateSnap(dev, rng.randrange(dev)), Checkpoint(), Activate(dev)]
        operations += committed(Write(dev, tuple(rng.randrange(900) for _ in range(40))))
        operations += committed(Write(rng.randrange(dev), tuple(rng.randrange(900) for _ in range(40))))
    for dev in range(20, 26):
        operations += [CreateSnap(dev, 0), Checkpoint()]
    operations += committed(Write.to(0, range(0, 700, 3)))
    for dev in (21, 3, 25, 7, 0, 22, 1, 20):
        operations += [Deactivate(dev)] if dev < 9 else []
        operations += [Delete(dev), Checkpoint()]
    operations += committed(Write.to(2, range(300, 400)))
    return Sequence(Geometry(1024, 16384), operations)


def overflow_trees_have_several_leaves() -> Sequence:
    """Two thousand data blocks with three and more owners: the overflow tree splits, then merges away."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(1500))]
    for dev in range(1, 5):
        # One write in each leaf copies the leaf, and so counts every data block in it once more.
        operations += [CreateSnap(dev, 0), Activate(dev), Write.to(dev, range(0, 1500, 60)), Commit(), Checkpoint()]
    for dev in (2, 4, 1, 3):
        operations += [*committed(Discard(dev, 100, 1400)), Deactivate(dev), Delete(dev), Checkpoint()]
    return Sequence(Geometry(1024, 16384), operations)


def discards_empty_the_tree() -> Sequence:
    """Single blocks and ranges removed until nothing is left: rebalancing, merging, the tree loses its levels."""
    rng = random.Random(4)
    operations: list[Operation] = [*new_device(0), *writes(0, range(3000), 4)]
    singles = [rng.randrange(3000) for _ in range(300)]
    for n in range(0, len(singles), 50):
        operations += committed(*(Discard(0, b, b + 1) for b in singles[n : n + 50]))
    operations += committed(Discard(0, 500, 900))
    operations += committed(Discard(0, 2900, 5000), Discard(0, 0, 30))
    operations += committed(*(Discard(0, b, b + 200) for b in range(1000, 2600, 400)))
    operations += writes(0, range(600, 800))
    operations += committed(*(Discard(0, b, b + 100) for b in range(2900, 0, -150)))
    operations += committed(Discard(0, 40, 2800))
    operations += committed(Discard(0, 0, 60_000))
    operations += committed(Discard(0, 0, 10), Write(0, (77,)))
    return Sequence(Geometry(1024, 16384), operations)


def discards_under_sharing() -> Sequence:
    """Ranges removed from devices that share all or a part of their trees."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(2000), 4), CreateSnap(1, 0), Activate(1)]
    operations += committed(Discard(0, 300, 700))
    operations += committed(Discard(1, 500, 1200), Discard(1, 1500, 1501))
    operations += [CreateSnap(2, 1), CreateSnap(3, 0), Activate(2), Activate(3), Checkpoint()]
    operations += committed(Discard(2, 0, 3000))
    operations += committed(Discard(3, 0, 150), Write.to(3, range(100, 200)), Discard(3, 1800, 1999))
    operations += committed(Discard(0, 0, 1999))
    operations += [Deactivate(1), Delete(1), Checkpoint()]
    return Sequence(Geometry(1024, 16384), operations)


def root_with_a_single_shared_child_collapses() -> Sequence:
    """Two leaves merge, a snapshot shares the root that is left with one child, then either device loses a block."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(400))]
    # The descent that looks for one more mapping to remove finds 169 left in two leaves, and merges them.
    operations += committed(Discard(0, 100, 331))
    operations += [CreateSnap(1, 0), Activate(1), Checkpoint(), CreateSnap(2, 0), Checkpoint()]
    operations += committed(Discard(0, 0, 1))
    operations += committed(Discard(1, 5, 7), Discard(0, 10, 12))
    operations += [Deactivate(0), Delete(0), Checkpoint(), Activate(2)]
    operations += committed(Discard(2, 0, 500), Discard(1, 0, 3))
    return Sequence(Geometry(512, 4096), operations)


def many_devices_come_and_go() -> Sequence:
    """Enough devices, in mixed order, that the details tree and the top level split; most are deleted again."""
    order = list(range(0, 900, 3))
    random.Random(5).shuffle(order)
    operations: list[Operation] = []
    for n, dev in enumerate(order, 1):
        operations += [CreateThin(dev)]
        if n % 4 == 0:
            operations += [Activate(dev), Write(dev, (n, n + 7)), Commit(), Deactivate(dev)]
        if n % 20 == 0:
            operations += [CreateSnap(1000 + n, dev), Checkpoint()]
    for n, dev in enumerate(order[:270], 1):
        operations += [Delete(dev)] + [Checkpoint()] * (n % 15 == 0)
    operations += [CreateThin(1), CreateThin(16_777_215), Checkpoint()]
    return Sequence(Geometry(2048, 16384), operations)


def metadata_snapshot_is_held_across_changes() -> Sequence:
    """Reserved, then every kind of change, a reopen, release; and once more with nothing in between."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(600)), *new_device(1)]
    operations += [*committed(Write(1, (1, 2, 3))), ReserveMetadataSnap(), Checkpoint()]
    operations += committed(Write.to(0, range(590, 640)))
    operations += [CreateSnap(2, 0), Checkpoint(), Activate(2)]
    operations += committed(Write.to(2, range(0, 600, 40)), Discard(0, 100, 130))
    operations += [Deactivate(1), Delete(1), Checkpoint(), CreateThin(1), Checkpoint()]
    operations += [Reopen(), SetTransactionId(0, 1), Checkpoint(), Activate(0)]
    operations += committed(Write.to(0, range(2000, 2040)))
    operations += [ReleaseMetadataSnap(), Checkpoint(), ReserveMetadataSnap(), Checkpoint()]
    operations += [ReleaseMetadataSnap(), Checkpoint(), *committed(Write(0, (5000,)))]
    return Sequence(Geometry(1024, 16384), operations)


def data_device_grows() -> Sequence:
    """By less than a bitmap, past the second one, and to 140 bitmaps, more than the index cache has slots for."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(250))]
    operations += [ResizeData(1500), Checkpoint(), *writes(0, range(250, 900))]
    operations += [ResizeData(40_000), Checkpoint(), *writes(0, range(900, 1700))]
    operations += [ResizeData(140 * 16320 - 5), Checkpoint(), *writes(0, range(1700, 2200))]
    operations += [*committed(Discard(0, 0, 1200)), Reopen(), Activate(0), *writes(0, range(3000, 3300))]
    return Sequence(Geometry(1024, 1000), operations)


def metadata_device_grows() -> Sequence:
    """Within a bitmap, then past its end, in use; allocation stays in the new part until the pool is reopened."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(400))]
    operations += [ResizeMetadata(700), Checkpoint(), *writes(0, range(1000, 1500))]
    operations += [CreateSnap(1, 0), ResizeMetadata(17_000), Checkpoint(), *writes(0, range(1200, 1800))]
    operations += [Reopen(), Checkpoint(), Activate(1), *writes(1, range(200))]
    operations += [Deactivate(1), Delete(1), Checkpoint()]
    return Sequence(Geometry(256, 16384), operations)


def allocation_wraps_around() -> Sequence:
    """A small data device filled, partly freed and filled again: the cursor wraps, and restarts when reopened."""
    operations: list[Operation] = [*new_device(0), *writes(0, range(700))]
    operations += committed(Discard(0, 100, 300))
    operations += committed(Discard(0, 500, 520), *(Discard(0, b, b + 1) for b in range(310, 400, 5)))
    operations += [*writes(0, range(2000, 2320)), Reopen(), Activate(0)]
    operations += [*committed(Discard(0, 2300, 2310), Discard(0, 0, 3)), *writes(0, range(4000, 4009))]
    return Sequence(Geometry(512, 1040), operations)


def random_walk() -> Sequence:
    """Two hundred operations at random, with everything that the pool target has a message for."""
    rng = random.Random(6)
    devices: dict[int, bool] = {}
    operations: list[Operation] = []
    held = False
    transaction_id = 0
    for n in range(200):
        pick = rng.random()
        dev = rng.choice(list(devices)) if devices else 0
        if len(devices) < 3 or pick < 0.08:
            devices[1000 + n * 7 % 200] = False
            operations += [CreateThin(1000 + n * 7 % 200), Checkpoint()]
        elif pick < 0.20:
            devices[2000 + n] = False
            operations += [CreateSnap(2000 + n, dev), Checkpoint()]
        elif pick < 0.27 and len(devices) > 4:
            if devices.pop(dev):
                operations += [Deactivate(dev)]
            operations += [Delete(dev), Checkpoint()]
        elif pick < 0.30:
            operations += [SetTransactionId(transaction_id, transaction_id + 3), Checkpoint()]
            transaction_id += 3
        elif pick < 0.34:
            operations += [ReleaseMetadataSnap() if held else ReserveMetadataSnap(), Checkpoint()]
            held = not held
        elif pick < 0.36:
            devices = dict.fromkeys(devices, False)
            operations += [Reopen()]
        elif devices[dev] and pick < 0.42:
            devices[dev] = False
            operations += [Deactivate(dev)]
        else:
            if not devices[dev]:
                devices[dev] = True
                operations += [Activate(dev)]
            begin = rng.randrange(1500)
            if pick < 0.60:
                operations += committed(Discard(dev, begin, begin + rng.choice([1, 5, 100, 400])))
            elif pick < 0.80:
                operations += committed(Write.to(dev, range(begin, begin + rng.randrange(1, 150))))
            else:
                operations += committed(Write(dev, tuple(rng.randrange(1500) for _ in range(rng.randrange(1, 100)))))
    return Sequence(Geometry(1024, 16384), operations)


SEQUENCES: list[Callable[[], Sequence]] = [
    golden_trace,
    leaves_split_in_every_way,
    inner_nodes_split_and_merge,
    sharing_is_broken_block_by_block,
    overflow_trees_have_several_leaves,
    discards_empty_the_tree,
    discards_under_sharing,
    root_with_a_single_shared_child_collapses,
    many_devices_come_and_go,
    metadata_snapshot_is_held_across_changes,
    data_device_grows,
    metadata_device_grows,
    allocation_wraps_around,
    random_walk,
]

#: The digest of each sequence's checkpoints, as the kernel wrote them.
RECORDED: dict[str, str] = {
    "golden_trace": "326f2bc0d8fd451d6deb76fe771d84fe6e3eb251dac25cb8bb83d1fac19481ec",
    "leaves_split_in_every_way": "77b56a7dab2103e5d3ebae33d3b2078242449e81fa847a73b16dd5d8c80fad8e",
    "inner_nodes_split_and_merge": "d6796ee551e08480d88561ea9622f1859d8bbe6d099831e19ef9a7e3dba5df14",
    "sharing_is_broken_block_by_block": "2346c842ec2bb2a42708e493b8409e124a8e94e30b9ab0ccbb8d7daecd696978",
    "overflow_trees_have_several_leaves": "d8ab16a17e71478e1dd4520e0ccfa9157a9bea832c55544cc8971ce8fae32bf6",
    "discards_empty_the_tree": "d811f5314e7e3bd36e9a1edb98abf9b80a26b4867bedc9e46d20fe3001cccd3e",
    "discards_under_sharing": "e93486040f1fd0b93841e6edb48dd4260bedc72bfb20803956266ae267b731b0",
    "root_with_a_single_shared_child_collapses": "a16d13f369f76e734f81fe9926dc4f57d86af38024309bed22b9f1afebdccaa5",
    "many_devices_come_and_go": "7b0fe637ff8c4188320db7cdac4e3a114001bf08de33eca910ab62201b82f6a9",
    "metadata_snapshot_is_held_across_changes": "ea3b430770404d5ebab5f223d60862d1a2987d0eb4b8459ca15d82ad7a3aa3bb",
    "data_device_grows": "76b84b0391de8c287067e6d2236089319d127bf752d8e82cc4ad10c261d06e1a",
    "metadata_device_grows": "6ecac597367261dcf910195a6ef760484a2e844f79737324367b5006117d14bf",
    "allocation_wraps_around": "10e8b37d47fe41508295044b79c0fa220d23c7ae8e7aaf5ccda97eda04ff72fe",
    "random_walk": "0839010eb7a42ae31fcbcca7f48024a8a9e61423b7629cc2160943d89c9f9d3b",
}


def digest(checkpoints: Iterable[Image]) -> str:
    """One hash over the whole device, stale slots and free blocks included, at every checkpoint."""
    return hashlib.sha256("".join(image.sha256() for image in checkpoints).encode()).hexdigest()
