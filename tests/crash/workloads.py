"""What the explorer has a pool do, and what plain dictionaries say should have come of it.

A workload is written as text, so that a failure can be repeated from its message::

    small: insert 0 7; snap 5 0; commit

Before the colon stands the pool that it begins with (:data:`POOLS`), then calls of the library, one after the other;
:data:`CALLS` says which.  A call that the library refuses, such as to remove what is not there, changes nothing and
belongs to the workload all the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from bufio import MemoryDevice
from persistent_data import btree_node, layout
from tests.support.image import Details
from tests.support.pools import Content
from thinpool import PoolMetadata, ThinError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bufio.device import Device

BLOCK = 4096
NR_METADATA_BLOCKS = 128
NR_SPARE_BLOCKS = 16
"""The device is larger than the metadata knows, so that this can grow."""
NR_DATA_BLOCKS = 2000
NEEDS_CHECK = 1
_ENTRIES_IN_SMALL_NODES = 12

Mappings = dict[int, tuple[int, int]]
"""Thin block -> (data block, time)."""


class Workload(NamedTuple):
    """Calls, and the pool they are made on."""

    pool: str
    calls: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pool}: {'; '.join(self.calls)}"

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read what :meth:`__str__` writes.

        :raises ValueError: it is not that
        """
        pool, colon, calls = text.partition(":")
        workload = cls(pool.strip(), tuple(call.strip() for call in calls.split(";") if call.strip()))
        if not colon or workload.pool not in POOLS:
            raise ValueError(f"{text!r} does not begin with one of {', '.join(POOLS)} and a colon")
        for call in workload.calls:
            name, *arguments = call.split()
            if name not in CALLS or not all(word.isdecimal() for word in arguments):
                raise ValueError(f"{call!r} is none of the calls {', '.join(CALLS)} with numbers")
        return workload


# What should have come of it


@dataclass
class _Device:
    transaction_id: int
    creation_time: int
    snapshotted_time: int
    mappings: Mappings = field(default_factory=dict)


class Model:
    """A pool in plain dictionaries, and every state that it has put on the device so far."""

    def __init__(self, begin: Content) -> None:
        self.published = [begin]
        self._load(begin)

    def _load(self, content: Content) -> None:
        self.time = content.time
        self.transaction_id = content.transaction_id
        self.flags = content.flags
        self.nr_data_blocks = content.nr_data_blocks
        self.nr_metadata_blocks = content.nr_metadata_blocks
        self.held = content.snap_mappings
        self.devices = {
            dev: _Device(*details[1:], mappings=dict(content.mappings[dev])) for dev, details in content.devices.items()
        }

    def content(self) -> Content:
        """Return the present state.  Counts of data blocks are left out: they follow from who shares which node."""
        return Content(
            time=self.time,
            transaction_id=self.transaction_id,
            flags=self.flags,
            devices={
                dev: Details(len(d.mappings), d.transaction_id, d.creation_time, d.snapshotted_time)
                for dev, d in self.devices.items()
            },
            mappings={dev: dict(d.mappings) for dev, d in self.devices.items()},
            data_counts={},
            nr_data_blocks=self.nr_data_blocks,
            nr_metadata_blocks=self.nr_metadata_blocks,
            snap_mappings=self.held,
        )

    def publish(self) -> None:
        """Commit."""
        self.published.append(self.content())

    def in_flight(self, call: str) -> Content | None:
        """Return what *call*, which has failed, may have put on the device all the same; None if nothing."""
        if call in ("commit", "hold", "reopen"):
            return self.content()
        if call in ("flag", "unflag"):
            flags = self.flags | NEEDS_CHECK if call == "flag" else self.flags & ~NEEDS_CHECK
            return self.published[-1]._replace(flags=flags)
        return None

    def go_on_from(self, content: Content) -> None:
        """Begin a transaction on what was found on the device."""
        self.published.append(content)
        self._load(content)

    def publish_flags(self) -> None:
        """Write the flags into the superblock of the last commit, which is all that changes on the device."""
        self.published.append(self.published[-1]._replace(flags=self.flags))

    def roll_back(self) -> None:
        """Abort."""
        self._load(self.published[-1])


class Run:
    """A workload under way: the pool, and the model of it."""

    def __init__(self, device: Device, begin: Content) -> None:
        self.device = device
        self.model = Model(begin)
        self.pool = PoolMetadata.open(device)

    def call(self, call: str) -> Exception | None:
        """Make one call, and return what it raised, if that is something that a call may raise.

        A refusal changes nothing: whether it was one is seen from what the device says in the end.
        """
        name, *words = call.split()
        try:
            CALLS[name](self, *map(int, words))
        except (ThinError, MemoryError) as error:
            return error
        return None

    @property
    def has_failed(self) -> bool:
        """Whether nothing but an abort goes on from here."""
        return self.pool._failure is not None

    @property
    def is_closed(self) -> bool:
        """Whether not even that does."""
        return self.pool._closed

    def create(self, dev: int) -> None:
        self.pool.create_thin(dev)
        model = self.model
        model.devices[dev] = _Device(model.transaction_id, model.time, model.time)

    def snap(self, dev: int, origin: int) -> None:
        self.pool.create_snap(dev, origin)
        model = self.model
        model.time += 1
        model.devices[origin].snapshotted_time = model.time
        mappings = dict(model.devices[origin].mappings)
        model.devices[dev] = _Device(model.transaction_id, model.time, model.time, mappings)

    def delete(self, dev: int) -> None:
        self.pool.delete_thin_device(dev)
        del self.model.devices[dev]

    def insert(self, dev: int, block: int) -> None:
        with self.pool.open_thin_device(dev) as thin:
            data = self.pool.alloc_data_block()
            try:
                thin.insert_block(block, data)
            except ThinError:
                if not self.has_failed:
                    self.pool.dec_data_range(data, data + 1)
                raise
        self.model.devices[dev].mappings[block] = (data, self.model.time)

    def provision(self, dev: int, begin: int, length: int) -> None:
        with self.pool.open_thin_device(dev) as thin:
            runs = thin.provision(begin, length)
        for run in runs:
            for at in range(run.length):
                self.model.devices[dev].mappings[run.thin_begin + at] = (run.data_begin + at, self.model.time)

    def remove(self, dev: int, block: int) -> None:
        with self.pool.open_thin_device(dev) as thin:
            thin.remove_block(block)
        del self.model.devices[dev].mappings[block]

    def remove_range(self, dev: int, begin: int, length: int) -> None:
        with self.pool.open_thin_device(dev) as thin:
            thin.remove_range(begin, begin + length)
        mappings = self.model.devices[dev].mappings
        for block in [block for block in mappings if begin <= block < begin + length]:
            del mappings[block]

    def set_transaction_id(self, new: int) -> None:
        self.pool.set_transaction_id(self.pool.transaction_id, new)
        self.model.transaction_id = new

    def hold(self) -> None:
        self.pool.reserve_metadata_snap()
        self.model.publish()
        self.model.held = self.model.content().mappings

    def let_go(self) -> None:
        self.pool.release_metadata_snap()
        self.model.held = None

    def grow_data(self, extra: int) -> None:
        self.pool.resize_data_dev(self.model.nr_data_blocks + extra)
        self.model.nr_data_blocks += extra

    def grow_metadata(self, extra: int) -> None:
        self.pool.resize_metadata_dev(self.model.nr_metadata_blocks + extra)
        self.model.nr_metadata_blocks += extra

    def flag(self) -> None:
        self.pool.set_needs_check()
        self.model.flags |= NEEDS_CHECK
        self.model.publish_flags()

    def unflag(self) -> None:
        self.pool.clear_needs_check()
        self.model.flags &= ~NEEDS_CHECK
        self.model.publish_flags()

    def commit(self) -> None:
        self.pool.commit()
        self.model.publish()

    def abort(self) -> None:
        self.pool.abort()
        self.model.roll_back()

    def reopen(self) -> None:
        self.pool.close()
        self.model.publish()
        self.pool = PoolMetadata.open(self.device)


CALLS: dict[str, Callable[..., None]] = {
    "create": Run.create,  # device
    "snap": Run.snap,  # device, origin
    "delete": Run.delete,  # device
    "insert": Run.insert,  # device, thin block
    "provision": Run.provision,  # device, first thin block, number
    "remove": Run.remove,  # device, thin block
    "remove_range": Run.remove_range,  # device, first thin block, number
    "id": Run.set_transaction_id,  # new
    "hold": Run.hold,
    "let_go": Run.let_go,
    "grow_data": Run.grow_data,  # by so many blocks
    "grow_metadata": Run.grow_metadata,  # by so many blocks
    "flag": Run.flag,
    "unflag": Run.unflag,
    "commit": Run.commit,
    "abort": Run.abort,
    "reopen": Run.reopen,
}
"""What a workload may call, and what the numbers behind it are."""


# Pools to begin with


def _pool(scattered: Iterable[int]) -> bytes:
    """Device 0 with 20 mappings and *scattered* ones, 1 that is its snapshot and has one of its own, and 2, empty."""
    device = MemoryDevice(NR_METADATA_BLOCKS * BLOCK)
    with PoolMetadata.format(device, 128, NR_DATA_BLOCKS) as pool:
        for dev in (0, 2):
            pool.create_thin(dev)
        with pool.open_thin_device(0) as thin:
            thin.provision(0, 20)
            for block in scattered:
                thin.insert_block(block, pool.alloc_data_block())
        pool.create_snap(1, 0)
        with pool.open_thin_device(1) as thin:
            thin.insert_block(3, pool.alloc_data_block())
        pool.set_transaction_id(0, 5)
    device.grow((NR_METADATA_BLOCKS + NR_SPARE_BLOCKS) * BLOCK)
    return device.contents()


def _small() -> bytes:
    """Trees of one leaf each."""
    return _pool(())


def _deep() -> bytes:
    """Nodes of twelve entries: three levels, of which the snapshot shares all but one path."""
    return _pool(range(100, 300, 2))


def _held() -> bytes:
    """The small one with a metadata snapshot, and a state that has gone on since."""
    device = MemoryDevice(_small())
    with PoolMetadata.open(device) as pool:
        pool.reserve_metadata_snap()
        pool.commit()
        with pool.open_thin_device(0) as thin:
            thin.insert_block(2, pool.alloc_data_block())
            thin.remove_block(5)
    return device.contents()


POOLS: dict[str, Callable[[], bytes]] = {"small": _small, "deep": _deep, "held": _held}
"""What makes the pool that a workload begins with."""

_SMALL_NODES = {"deep"}


def use_nodes_of(pool: str) -> None:
    """Have new nodes be as large as those of that pool: those of ``deep`` have few entries."""

    def few(size: int) -> int:
        return _ENTRIES_IN_SMALL_NODES if size == 8 else layout.max_entries(size)

    setattr(btree_node, "max_entries", few if pool in _SMALL_NODES else layout.max_entries)  # noqa: B010


# Which workloads there are

_EACH_CALL = (
    "create 9",
    "snap 9 0",
    "delete 1",
    "delete 2",
    "insert 0 7",
    "insert 0 500",
    "insert 1 3",
    "insert 2 0",
    "provision 0 15 10",
    "provision 2 0 40",
    "remove 0 7",
    "remove 1 3",
    "remove_range 0 5 10",
    "remove_range 1 0 1000",
    "id 6",
    "hold",
    "let_go",
    "grow_data 17000",
    "grow_metadata 16",
    "flag",
    "unflag",
    "commit",
    "abort",
    "reopen",
)
"""Each call, with the arguments that make a difference."""

_ALPHABET = (
    "snap 9 0",
    "delete 1",
    "insert 0 7",
    "insert 1 3",
    "provision 0 15 10",
    "remove 0 7",
    "remove_range 1 0 1000",
    "hold",
    "let_go",
    "commit",
    "abort",
)
"""What the exhaustive sequences are made of."""


def scripted() -> Iterator[Workload]:
    """Each call and each pair of calls, in one transaction and in two."""
    for pool in POOLS:
        for call in _EACH_CALL:
            yield Workload(pool, (call, "commit"))
    for pool in POOLS:
        for first, second in product(_EACH_CALL, repeat=2):
            yield Workload(pool, (first, second, "commit"))
            if "commit" not in (first, second):
                yield Workload(pool, (first, "commit", second, "commit"))


def exhaustive(length: int) -> Iterator[Workload]:
    """Every sequence of *length* calls on the small pool, with a commit at the end."""
    for calls in product(_ALPHABET, repeat=length):
        yield Workload("small", (*calls, "commit"))


def random_workload(seed: int) -> Workload:
    """A longer one, which follows from *seed*."""
    rnd = random.Random(seed)
    pool = rnd.choice(list(POOLS))
    calls = []
    for _ in range(rnd.randrange(3, 14)):
        call = rnd.choice((*_EACH_CALL, *_ALPHABET, "commit", "commit"))
        name, *words = call.split()
        if name in ("insert", "remove"):
            words[1] = str(rnd.choice([rnd.randrange(25), rnd.randrange(100, 320), 1 << rnd.randrange(10, 64)]))
        elif name in ("provision", "remove_range"):
            words[1:] = [str(rnd.randrange(300)), str(rnd.choice([1, 5, 60]))]
        elif name == "snap":
            words = [str(rnd.randrange(5, 12)), str(rnd.choice([0, 0, 1, 2, 9]))]
        if words and name in ("insert", "remove", "provision", "remove_range", "delete"):
            words[0] = str(rnd.choice([int(words[0]), 0, 1, 2, 9]))
        calls.append(" ".join([name, *words]))
    return Workload(pool, (*calls, "commit"))


def without_call(workload: Workload, at: int) -> Workload:
    """Leave one call out: what a failure is made smaller with."""
    return workload._replace(calls=workload.calls[:at] + workload.calls[at + 1 :])
