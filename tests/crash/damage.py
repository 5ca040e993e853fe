"""Pools to be damaged on purpose, and the damage: all of it follows from a seed and a number.

Uses :mod:`tests.support.image` to find its way, and the engine only to make the pools.
"""

from __future__ import annotations

import random
import struct
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from bufio import MemoryDevice
from tests.crash.workloads import POOLS, use_nodes_of
from tests.support.fixtures import DATA
from tests.support.image import BLOCK, Image
from tests.support.surgeon import DETAILS_FIELDS, NODE_FIELDS, SUPERBLOCK_FIELDS, seal
from thinpool import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NR_DATA_BLOCKS = 3000
_FIXTURES = ("metadata_snapshot_of_deleted", "transaction_id")
"""Made by a kernel, with few mappings."""


class Base(NamedTuple):
    """A pool before it is damaged.

    :ivar older: what was on the device after earlier commits
    :ivar kinds: what each block is that the superblock leads to
    """

    content: bytes
    older: tuple[bytes, ...]
    kinds: dict[int, str]

    @property
    def live(self) -> list[int]:
        return list(self.kinds)

    def of_kind(self, kind: str) -> list[int]:
        return [block for block, found in self.kinds.items() if found == kind]


def _wide() -> Iterator[bytes]:
    """Yield a pool after each of some commits: nodes of full size, several leaves, blocks with many owners."""
    device = MemoryDevice(128 * BLOCK)
    with PoolMetadata.format(device, 128, _NR_DATA_BLOCKS) as pool:
        for dev in (0, 1):
            pool.create_thin(dev)
        for dev, nr_mappings in ((0, 540), (1, 150)):
            with pool.open_thin_device(dev) as thin:
                for block in range(0, 120, 3):
                    thin.insert_block(block, pool.alloc_data_block())
                thin.provision(200, nr_mappings)
    yield device.contents()
    with PoolMetadata.open(device) as pool:
        for dev in (2, 3, 4):
            pool.create_snap(dev, dev % 2)
    yield device.contents()
    with PoolMetadata.open(device) as pool:
        for dev in (0, 2, 3):
            with pool.open_thin_device(dev) as thin:
                thin.insert_block(3 * dev + 1, pool.alloc_data_block())
                thin.remove_range(300, 330)
        pool.reserve_metadata_snap()
    yield device.contents()
    with PoolMetadata.open(device) as pool:
        pool.create_snap(6, 2)
        with pool.open_thin_device(1) as thin:
            thin.provision(2000, 120)
        pool.delete_thin_device(4)
    yield device.contents()


def _changed(name: str) -> Iterator[bytes]:
    """Yield one of the explorer's pools after each of some commits."""
    device = MemoryDevice(POOLS[name]())
    yield device.contents()
    with PoolMetadata.open(device) as pool, pool.open_thin_device(0) as thin:
        thin.insert_block(50, pool.alloc_data_block())
    yield device.contents()
    with PoolMetadata.open(device) as pool:
        pool.create_snap(7, 0)
        pool.create_snap(8, 0)
        with pool.open_thin_device(1) as thin:
            thin.provision(10, 30)
            thin.remove_block(11)
    yield device.contents()
    with PoolMetadata.open(device) as pool, pool.open_thin_device(8) as thin:
        thin.insert_block(51, pool.alloc_data_block())
        thin.remove_block(3)
    yield device.contents()


@cache
def base(name: str) -> Base:
    """Return the pool of that name."""
    if name in _FIXTURES:
        states = [Image.load(DATA / f"{name}.img.xz").to_bytes()]
    elif name == "wide":
        states = list(_wide())
    else:
        use_nodes_of(name)
        try:
            states = list(_changed(name))
        finally:
            use_nodes_of("small")
    image = Image.from_bytes(states[-1])
    kinds = {block: image.kind(block) for block in sorted(image.recount()[0])}
    assert "unknown" not in kinds.values()
    return Base(states[-1], tuple(states[:-1]), kinds)


BASES = (*POOLS, "wide", *_FIXTURES)
_WEIGHTS = (4, 4, 4, 7, 1, 1)


class Case(NamedTuple):
    """A damaged image, and in words how it came about."""

    base: str
    story: str
    content: bytes


def make_case(seed: int, number: int) -> Case:
    """Return case *number* of a campaign."""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choices(BASES, _WEIGHTS)[0]
    victim = _Victim(base(name), rng)
    nr_damages = rng.choices((1, 2, 3), (8, 1, 1))[0]
    story = [rng.choices(list(_DAMAGES), list(_DAMAGES.values()))[0](victim) for _ in range(nr_damages)]
    return Case(name, "; ".join(story), bytes(victim.content))


class _Victim:
    """An image that is being damaged.  Each method does one thing to it and says what."""

    def __init__(self, intact: Base, rng: random.Random) -> None:
        self.base = intact
        self.content = bytearray(intact.content)
        self._rng = rng
        self._nr_blocks = len(intact.content) // BLOCK

    def _block(self, number: int) -> bytearray:
        block = self.content[number * BLOCK : (number + 1) * BLOCK]
        return block + bytes(BLOCK - len(block))  # an earlier damage may have cut it off

    def _put(self, number: int, block: bytes | bytearray, kind: str | None = None) -> None:
        if (number + 1) * BLOCK <= len(self.content):
            self.content[number * BLOCK : (number + 1) * BLOCK] = block if kind is None else seal(block, kind)

    def _any_block(self, kinds: tuple[str, ...] = ()) -> int:
        """Return a live block; each kind of block is as likely as the others, however many there are of each."""
        kind = self._rng.choice(kinds or sorted(set(self.base.kinds.values())))
        return self._rng.choice(self.base.of_kind(kind))

    def _extreme(self, size: int, old: int) -> int:
        rng = self._rng
        limit = 1 << 8 * size
        value = rng.choice(
            (
                *(0, 1, 2, 3, 7, limit - 1, limit // 2, limit // 2 - 1, (1 << 24) - 1, 1 << 24, 1 << 32, 1 << 40),
                *(self._nr_blocks - 1, self._nr_blocks, self._nr_blocks + 1),
                *(old - 1, old + 1, old ^ 1 << rng.randrange(8 * size), rng.choice(self.base.live)),
                *(_NR_DATA_BLOCKS << 24, old + (1 << 24), rng.getrandbits(8 * size)),
            )
        )
        return value % limit

    def _set(self, number: int, offset: int, size: int, value: int | None = None) -> str:
        block = self._block(number)
        old = int.from_bytes(block[offset : offset + size], "little")
        new = self._extreme(size, old) if value is None else value
        block[offset : offset + size] = new.to_bytes(size, "little")
        kind = self.base.kinds[number]
        self._put(number, block, kind)
        return f"{kind} {number}: {size} bytes at {offset} from {old} to {new}"

    # The kinds of damage

    def flip_bits(self) -> str:
        number = self._any_block()
        block = self._block(number)
        for _ in range(self._rng.choice((1, 1, 1, 2, 8))):
            block[self._rng.randrange(BLOCK)] ^= 1 << self._rng.randrange(8)
        sealed = self._rng.random() < 0.6
        self._put(number, block, self.base.kinds[number] if sealed else None)
        return f"bits of {self.base.kinds[number]} {number} flipped" + (", checksum right" if sealed else "")

    def flip_count(self) -> str:
        number = self._any_block(("bitmap",))
        offset = 16 + self._rng.randrange(self._nr_blocks // 4)
        return self._set(number, offset, 1, self._block(number)[offset] ^ 1 << self._rng.randrange(8))

    def swap(self) -> str:
        a, b = self._any_block(), self._any_block()
        readdressed = self._rng.random() < 0.7
        contents = self._block(a), self._block(b)
        for number, other, block in ((a, b, contents[1]), (b, a, contents[0])):
            kind = self.base.kinds[other]
            if readdressed:
                struct.pack_into("<Q", block, 8, number)
            self._put(number, block, kind if readdressed else None)
        return f"blocks {a} and {b} swapped" + (", addresses right" if readdressed else "")

    def copy(self) -> str:
        source, target = self._any_block(), self._any_block()
        block = self._block(source)
        struct.pack_into("<Q", block, 8, target)
        self._put(target, block, self.base.kinds[source])
        return f"block {target} overwritten with {source}"

    def stale(self) -> str:
        if not self.base.older:
            return self.flip_bits()
        age = self._rng.randrange(len(self.base.older))
        older = self.base.older[age]
        changed = [
            number
            for number in self.base.live
            if older[number * BLOCK : (number + 1) * BLOCK] != self.base.content[number * BLOCK : (number + 1) * BLOCK]
        ]
        if not changed:
            return self.flip_bits()
        how = self._rng.choice(("one", "one", "superblock", "some", "all"))
        numbers = {
            "one": [self._rng.choice(changed)],
            "superblock": [0],
            "some": [number for number in changed if self._rng.random() < 0.5],
            "all": list(range(self._nr_blocks)),
        }[how]
        for number in numbers:
            self._put(number, older[number * BLOCK : (number + 1) * BLOCK])
        return f"{how} as of commit {age}: blocks {numbers[:8]}"

    def set_superblock(self) -> str:
        number = self._any_block(("superblock",))
        name = self._rng.choice(list(SUPERBLOCK_FIELDS))
        offset, size = SUPERBLOCK_FIELDS[name]
        return f"{name}: {self._set(number, offset, min(size, 8))}"

    def set_header(self) -> str:
        number = self._any_block(("node",))
        name = self._rng.choice(list(NODE_FIELDS))
        return f"{name}: {self._set(number, NODE_FIELDS[name], 8 if name == 'blocknr' else 4)}"

    def _entries(self, number: int) -> tuple[int, int, int]:
        """Return the entries of a node before it was damaged, how many it has room for, and the size of a value."""
        return struct.unpack_from("<III", self.base.content, number * BLOCK + 16)

    def _any_node(self) -> int:
        """Return a node that has entries, most likely."""
        for _ in range(8):
            number = self._any_block(("node",))
            if self._entries(number)[0]:
                break
        return number

    def set_key(self) -> str:
        number = self._any_node()
        return f"key: {self._set(number, 32 + 8 * self._rng.randrange(max(self._entries(number)[0], 1)), 8)}"

    def set_value(self) -> str:
        number = self._any_node()
        nr_entries, max_entries, value_size = self._entries(number)
        offset = 32 + 8 * max_entries + value_size * self._rng.randrange(max(nr_entries, 1))
        if value_size == 4:  # a count
            return f"value: {self._set(number, offset, 4)}"
        if value_size == 24:
            inside, size = self._rng.choice(list(DETAILS_FIELDS.values()))
            return f"details: {self._set(number, offset + inside, size)}"
        if value_size == 16:
            inside, size = self._rng.choice(((0, 8), (8, 4), (12, 4)))
            return f"index entry: {self._set(number, offset + inside, size)}"
        return f"value: {self._set(number, offset, 8)}"

    def set_index(self) -> str:
        number = self._any_block(("index",))
        offset, size = self._rng.choice(((4, 4), (8, 8), (16, 8), (24, 4), (28, 4), (32, 8)))
        return f"index: {self._set(number, offset, size)}"

    def set_bitmap(self) -> str:
        number = self._any_block(("bitmap",))
        if self._rng.random() < 0.3:
            return f"bitmap: {self._set(number, self._rng.choice((4, 8)), 4)}"
        return f"bitmap: {self._set(number, 16 + self._rng.randrange(min(_NR_DATA_BLOCKS // 4, BLOCK - 24)), 8)}"

    def redirect(self) -> str:
        """Let a node lead to another of the same tree, of another tree, to itself, or to no node at all."""
        number = self._any_node()
        nr_entries, max_entries, value_size = self._entries(number)
        if value_size != 8:
            return self.set_value()
        target = self._rng.choice((number, self._any_node(), self._any_node(), self._any_block()))
        story = self._set(number, 32 + 8 * max_entries + 8 * self._rng.randrange(max(nr_entries, 1)), 8, target)
        if self._rng.random() < 0.3:
            story += "; " + self._set(number, NODE_FIELDS["flags"], 4, 1)
        return f"redirected: {story}"

    def redirect_root(self) -> str:
        name = self._rng.choice([name for name in SUPERBLOCK_FIELDS if "root" in name])
        offset, size = SUPERBLOCK_FIELDS[name]
        return f"{name}: {self._set(self._any_block(('superblock',)), offset, size, self._any_block())}"

    def resize(self) -> str:
        if self._rng.random() < 0.3:
            extra = self._rng.choice((1, 512, BLOCK, 100 * BLOCK, 100 * BLOCK + 17))
            self.content += self._rng.randbytes(extra) if self._rng.random() < 0.5 else bytes(extra)
            return f"{extra} bytes longer"
        rest = self._rng.randrange(self._nr_blocks) * BLOCK
        rest += self._rng.choice((0, 0, 1, 512, BLOCK - 1))
        del self.content[rest:]
        return f"cut to {rest} bytes"

    def noise(self) -> str:
        number = self._any_block()
        block = bytearray(self._rng.randbytes(BLOCK) if self._rng.random() < 0.7 else bytes(BLOCK))
        kind = self.base.kinds[number]
        if self._rng.random() < 0.7:
            header = 32 if kind == "node" else 16
            block[:header] = self._block(number)[:header]
        sealed = self._rng.random() < 0.8
        self._put(number, block, kind if sealed else None)
        return f"{kind} {number} filled with noise" + (", checksum right" if sealed else "")


_DAMAGES: dict[Callable[[_Victim], str], int] = {
    _Victim.flip_bits: 3,
    _Victim.flip_count: 2,
    _Victim.swap: 2,
    _Victim.copy: 1,
    _Victim.stale: 4,
    _Victim.set_superblock: 4,
    _Victim.set_header: 3,
    _Victim.set_key: 3,
    _Victim.set_value: 5,
    _Victim.set_index: 1,
    _Victim.set_bitmap: 1,
    _Victim.redirect: 4,
    _Victim.redirect_root: 2,
    _Victim.resize: 1,
    _Victim.noise: 1,
}
