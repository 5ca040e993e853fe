"""A Bcache of three devices against lists of contents, in any order of calls and faults that hypothesis thinks of.

The devices are looked at from below: what they hold, and what a power cut would leave of them.
"""

from __future__ import annotations

import random
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bufio import AsyncEngine, Bcache, BlocksNotWritten, GetFlags, HoldError, SyncEngine, WouldDeadlock, parameters
from bufio.testing import CrashDevice, FaultyDevice
from tests.support.durability import Durability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bufio import Block

SECTOR = 512
NR_BLOCKS = (10, 8, 6)
LAST = len(NR_BLOCKS) - 1
"""The device whose last block is cut short."""
PLACES = [(device, index) for device, nr_blocks in enumerate(NR_BLOCKS) for index in range(nr_blocks)]
IMAGES = 5
"""Power cuts of each device tried at a time."""

Place = tuple[int, int]

places = st.sampled_from(PLACES)
devices = st.integers(0, LAST)
flags = st.sampled_from([GetFlags(0), GetFlags.DIRTY, GetFlags.ZERO, GetFlags.ZERO | GetFlags.DIRTY])
which = st.integers(0, 20)
"""Which of the holds that there are."""
FAULTS = ["read", "write", "write", "tear", "short", "stuck", "flush"]


class BcacheMachine(RuleBasedStateMachine):
    """Does the same to a Bcache and to its model, and compares."""

    @initialize(
        asynchronous=st.booleans(),
        block_sectors=st.sampled_from([1, 8]),
        nr_cache_blocks=st.sampled_from([1, 2, 4, 8, 16, 30]),
        seed=st.integers(0, 1 << 16),
    )
    def begin(self, asynchronous: bool, block_sectors: int, nr_cache_blocks: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.size = block_sectors * SECTOR
        self.nr_cache_blocks = nr_cache_blocks
        self.engine = AsyncEngine() if asynchronous else SyncEngine()
        self.crashes: list[CrashDevice] = []
        self.contents: dict[Place, bytes] = {}
        """What each block has to show, as far as it is on the device."""
        self.durability: list[Durability] = []
        for number, nr_blocks in enumerate(NR_BLOCKS):
            cut = 0 if number != LAST else 100 if block_sectors == 1 else 3 * SECTOR
            image = self.rng.randbytes(nr_blocks * self.size - cut)
            self.crashes.append(CrashDevice(image, f"device {number}"))
            self.durability.append(Durability(image, self.size))
            for index in range(nr_blocks):
                self.contents[number, index] = image[index * self.size : (index + 1) * self.size]
        self.devices = [FaultyDevice(crash, seed=seed) for crash in self.crashes]
        self.dirty: set[Place] = set()
        """Blocks that may have to be written."""
        self.gone: set[Place] = set()
        """Those that were dropped since they were last known to be durable."""
        self.unwritable: set[Place] = set()
        """Blocks every write of which fails, until :meth:`heal`."""
        self.held: list[tuple[Place, Block]] = []
        self.changing: set[Place] = set()
        """Those of the held ones that are held for changing."""
        self.faulty = False
        self.any_errors = False
        """Whether there may be blocks in error, which take room until a flush has written them."""
        self.nr_evictions = 0
        self.allocated_bytes = parameters.current_allocated_bytes
        self.cache = Bcache(block_sectors, nr_cache_blocks, self.engine)

    # Looking at things

    def on_device(self, place: Place) -> bytes:
        """Return what the device holds, durable or not."""
        device, index = place
        return self.crashes[device].contents()[index * self.size : (index + 1) * self.size]

    def held_places(self) -> set[Place]:
        return {place for place, _ in self.held}

    def places_of(self, blocks: Iterable[Block]) -> list[Place]:
        return [(self.devices.index(block.device), block.index) for block in blocks]  # type: ignore[arg-type]

    def excuse(self, error: OSError) -> None:
        """Accept what was injected, and that there is no room; nothing else."""
        if currently_in_test_context():
            note(f"{type(error).__name__}: {error}")
        if isinstance(error, WouldDeadlock):
            held = self.held_places()
            assert sorted(error.blocks) == sorted(index for _, index in held)
            assert len(held) == self.nr_cache_blocks or self.any_errors, "there was room"
        else:
            assert "as told" in str(error) or "short" in str(error), error
            if isinstance(error, BlocksNotWritten):
                self.check_errored(error)

    def check_errored(self, error: BlocksNotWritten) -> set[Place]:
        """Return what an error names, after a look at it."""
        errored = self.places_of(error.blocks)
        assert len(errored) == len(set(errored))
        assert set(errored) <= self.dirty - self.held_places()
        return set(errored)

    def refuses(self, place: Place, wanted: int) -> bool:
        """Whether a get is refused because of other holds."""
        return place in self.changing or (bool(wanted) and place in self.held_places())

    # Holding and changing blocks

    def become(self, place: Place, content: bytes) -> None:
        """Note that a block is about to be changed, and written as a whole at any time after it was put."""
        device, index = place
        self.durability[device].may_become(index, content)
        self.contents[place] = content
        self.dirty.add(place)
        self.gone.discard(place)

    @rule(place=places, wanted=flags, stay=st.booleans())
    def get(self, place: Place, wanted: GetFlags, stay: bool) -> None:
        device, index = place
        before = self.cache.stats
        refused = self.refuses(place, wanted)
        try:
            block = self.cache.get(self.devices[device], index, wanted)
        except HoldError:
            assert refused
            return
        except OSError as error:
            assert place not in self.held_places(), "it was cached"
            self.excuse(error)
            return
        assert not refused
        after = self.cache.stats
        assert after.read_hits + after.read_misses - before.read_hits - before.read_misses == (not wanted)
        assert after.write_hits + after.write_misses - before.write_hits - before.write_misses == bool(wanted)
        self.held.append((place, block))
        if wanted:
            self.changing.add(place)
            self.become(place, self.contents[place])
        if wanted & GetFlags.ZERO:
            self.become(place, bytes(len(self.contents[place])))
        self.compare(place, block)
        if not stay:
            self.put(-1)

    @rule(index=st.sampled_from([-1, *NR_BLOCKS, 99]), device=devices)
    def get_beyond_the_end(self, index: int, device: int) -> None:
        if not 0 <= index < NR_BLOCKS[device]:
            with pytest.raises(OSError, match="beyond the end"):
                self.cache.get(self.devices[device], index)

    def compare(self, place: Place, block: Block) -> None:
        content = self.contents[place]
        assert bytes(block.data) == content.ljust(self.size, b"\0")
        assert self.places_of([block]) == [place]

    @rule(at=which, begin=st.integers(0, 4000), length=st.integers(1, 4096))
    def change(self, at: int, begin: int, length: int) -> None:
        if self.held and self.held[at % len(self.held)][0] in self.changing:
            place, block = self.held[at % len(self.held)]
            content = self.contents[place]
            begin %= len(content)
            end = min(begin + length, len(content))
            block.data[begin:end] = fresh = self.rng.randbytes(end - begin)
            self.become(place, content[:begin] + fresh + content[end:])

    @rule(at=which)
    def put(self, at: int) -> None:
        if self.held:
            place, block = self.held.pop(at % len(self.held))
            self.changing.discard(place)
            block.put()

    @rule(place=places)
    def prefetch(self, place: Place) -> None:
        self.cache.prefetch(self.devices[place[0]], place[1])

    # Bytes

    def cut_up(self, device: int, offset: int, length: int) -> list[tuple[Place, int, int]]:
        """Return the blocks of a range of bytes, and what part of each is in it."""
        parts = []
        for index in range(offset // self.size, -(-(offset + length) // self.size) if length else 0):
            start = index * self.size
            parts.append(((device, index), max(offset - start, 0), min(offset + length - start, self.size)))
        return parts

    def some_bytes(self, place: Place, begin: int, length: int) -> tuple[int, int]:
        """Return a range of bytes that begins in a block; in it entirely where only some of it might be done."""
        device, index = place
        begin %= len(self.contents[place])
        end = self.crashes[device].size_bytes - index * self.size
        if self.any_errors or len(self.held_places()) + 1 >= self.nr_cache_blocks:
            end = len(self.contents[place])
        return index * self.size + begin, min(length, end - begin)

    @rule(place=places, begin=st.integers(0, 4000), length=st.integers(0, 10000))
    def read_bytes(self, place: Place, begin: int, length: int) -> None:
        device = place[0]
        offset, length = self.some_bytes(place, begin, length)
        parts = self.cut_up(device, offset, length)
        refused = any(self.refuses(part, 0) for part, _, _ in parts)
        try:
            found = self.cache.read_bytes(self.devices[device], offset, length)
        except HoldError:
            assert refused
        except OSError as error:
            self.excuse(error)
        else:
            assert not refused
            assert found == b"".join(self.contents[part][begin:end] for part, begin, end in parts)

    @rule(
        place=places,
        begin=st.integers(0, 4000),
        length=st.integers(0, 10000),
        how=st.sampled_from(["write", "zero", "set"]),
    )
    def write_bytes(self, place: Place, begin: int, length: int, how: str) -> None:
        device = place[0]
        offset, length = self.some_bytes(place, begin, length)
        data = {"write": self.rng.randbytes(length), "zero": bytes(length), "set": b"\x07" * length}[how]
        done = 0
        changes = []
        for part, begin, end in self.cut_up(device, offset, length):
            content = self.contents[part]
            changes.append((part, content[:begin] + data[done : done + end - begin] + content[end:]))
            done += end - begin
        refused = [number for number, (part, _) in enumerate(changes) if self.refuses(part, GetFlags.DIRTY)]
        # What comes before the first block that is refused is changed all the same.
        changes = changes[: refused[0]] if refused else changes
        unchanged = {part: self.contents[part] for part, _ in changes}
        for part, content in changes:
            # The device may have it before the call returns.
            self.become(part, content)
        try:
            if how == "write":
                self.cache.write_bytes(self.devices[device], offset, data)
            elif how == "zero":
                self.cache.zero_bytes(self.devices[device], offset, length)
            else:
                self.cache.set_bytes(self.devices[device], offset, length, 7)
        except HoldError:
            assert refused
        except OSError as error:
            self.contents.update(unchanged)
            for part in unchanged:
                self.durability[device].drop(part[1])
            self.excuse(error)
        else:
            assert not refused

    # Writing

    @rule()
    def flush(self) -> None:
        self.write_all()

    def write_all(self) -> bool:
        """Write everything that is not held; tell whether that succeeded."""
        self.engine.drain()
        held = self.held_places()
        doomed = {place for place in self.unwritable - held if self.on_device(place) != self.contents[place]}
        errored: set[Place] = set()
        try:
            skipped = set(self.places_of(self.cache.flush()))
        except BlocksNotWritten as error:
            errored = self.check_errored(error)
            skipped = set(self.places_of(error.skipped))
        except OSError as error:
            self.excuse(error)
            self.flush_has_failed(range(len(NR_BLOCKS)))
            return False
        assert doomed <= errored
        assert self.changing <= skipped <= held & self.dirty
        # A block in error stays so while it is held.
        self.any_errors = self.faulty or (self.any_errors and bool(errored | skipped))
        self.dirty = errored | skipped
        self.settle(set(PLACES) - self.dirty)
        assert self.cache.stats.dirty == len(self.dirty)
        return not errored

    def settle(self, durable: set[Place]) -> None:
        """Go on from the promise that those blocks are durable."""
        for place in durable:
            device, index = place
            assert self.on_device(place) == self.contents[place]
            self.durability[device].settle(index, self.contents[place])
        self.gone -= durable
        if not any(durability.unsettled for durability in self.durability):
            self.nr_evictions = self.cache.stats.evictions

    def flush_has_failed(self, failed: Iterable[int]) -> None:
        """What is still cached is dirty again; of the rest nobody knows."""
        evicted = self.cache.stats.evictions != self.nr_evictions
        for device in failed:
            unsettled = self.durability[device].unsettled
            self.dirty.update((device, index) for index in unsettled)
            certain = set() if evicted else {index for index in unsettled if (device, index) not in self.gone}
            self.durability[device].flush_has_failed(certain)

    # Dropping

    def drop(self, place: Place) -> None:
        """Note that a block is not cached any more."""
        self.dirty.discard(place)
        self.gone.add(place)
        self.durability[place[0]].drop(place[1])

    @rule(place=places)
    def invalidate(self, place: Place) -> None:
        device, index = place
        errored: set[Place] = set()
        try:
            done = self.cache.invalidate(self.devices[device], index)
        except BlocksNotWritten as error:
            errored = self.check_errored(error)
        if errored:
            assert errored == {place}
            return
        assert done == (place not in self.held_places())
        if done:
            assert self.on_device(place) == self.contents[place]
            self.dirty.discard(place)
            self.gone.add(place)

    @rule(device=devices)
    def invalidate_device(self, device: int) -> None:
        unheld = {place for place in PLACES if place[0] == device} - self.held_places()
        errored: set[Place] = set()
        try:
            done = self.cache.invalidate_device(self.devices[device])
            assert done == (len(unheld) == NR_BLOCKS[device])
        except BlocksNotWritten as error:
            errored = self.check_errored(error)
            assert errored <= unheld
        except OSError as error:
            self.excuse(error)
            self.flush_has_failed([device])
            return
        for place in unheld - errored:
            assert self.on_device(place) == self.contents[place]
            self.dirty.discard(place)
            self.gone.add(place)
        if not errored:
            self.settle(unheld)

    @rule(device=devices)
    def abort_device(self, device: int) -> None:
        if any(place[0] == device for place in self.held_places()):
            with pytest.raises(HoldError):
                self.cache.abort_device(self.devices[device])
            return
        self.cache.abort_device(self.devices[device])
        for place in PLACES:
            if place[0] == device:
                self.contents[place] = self.on_device(place)
                self.drop(place)
        # Nobody promises anything about what had been written already.
        self.durability[device].flush_has_failed(set())

    # Faults

    @rule(
        kind=st.sampled_from(FAULTS),
        where=st.lists(places, min_size=1, max_size=len(PLACES)),
        times=st.sampled_from([None, 1, 2]),
    )
    def go_wrong(self, kind: str, where: list[Place], times: int | None) -> None:
        self.faulty = self.any_errors = True
        for number, device in enumerate(self.devices):
            indexes = [index for at, index in where if at == number]
            if not indexes:
                continue
            transfers = device.on("read", "write", blocks=indexes, block_size=self.size, times=times)
            writes = device.on("write", blocks=indexes, block_size=self.size, times=times)
            if kind == "read":
                device.on("read", blocks=indexes, block_size=self.size, times=times).fail()
            elif kind == "write":
                writes.fail()
            elif kind == "tear":
                writes.tear()
            elif kind == "short":
                transfers.shorten(SECTOR)
            elif kind == "stuck":
                transfers.shorten(0)
            else:
                self.crashes[number].fail_flushes(*range(times or 1))
        if kind in ("write", "stuck") and times is None:
            self.unwritable.update(where)

    @rule()
    def heal(self) -> None:
        for device, crash in zip(self.devices, self.crashes, strict=True):
            device.clear()
            crash.fail_flushes()
        self.engine.drain()
        self.faulty = False
        self.unwritable.clear()

    @rule()
    def write_after_healing(self) -> None:
        """What could not be written is tried again, and nothing is left of the errors."""
        self.heal()
        assert self.write_all()

    @rule(seed=st.integers(0, 1 << 16))
    def power_cut(self, seed: int) -> None:
        """Look at what would be left."""
        for crash, durability in zip(self.crashes, self.durability, strict=True):
            position = crash.position
            images = crash.images(begin=position, end=position, exhaustive=3, samples=IMAGES, seed=seed)
            for image in islice(images, IMAGES):
                durability.check(image.contents(), image)

    # The end

    @rule()
    def reopen(self) -> None:
        self.write_after_healing()
        if self.held:
            with pytest.raises(HoldError, match="held"):
                self.cache.close()
            while self.held:
                self.put(0)
        self.cache.close()
        self.dirty.clear()
        self.settle(set(PLACES))
        # Or less: caches that earlier tests have left are collected at any time.
        assert parameters.current_allocated_bytes <= self.allocated_bytes
        self.nr_evictions = 0
        self.cache = Bcache(self.size // SECTOR, self.nr_cache_blocks, self.engine)

    @invariant()
    def holds_show_the_model(self) -> None:
        if not hasattr(self, "cache"):
            return
        for place, block in self.held:
            self.compare(place, block)
        stats = self.cache.stats
        assert stats.held == len(self.held_places())
        assert len(self.changing) <= stats.dirty <= len(self.dirty)
        assert max(stats.held, stats.dirty) <= stats.cached <= self.nr_cache_blocks
        assert stats.hits == stats.read_hits + stats.write_hits
        assert stats.misses == stats.read_misses + stats.write_misses

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        try:
            self.reopen()
            self.power_cut(0)
        finally:
            self.heal()
            for _, block in self.held:
                block.put()
            self.cache.close()
            self.engine.close()


BcacheMachine.TestCase.settings = settings(
    suppress_health_check=list(HealthCheck), print_blob=True, phases=set(Phase) - {Phase.explain}
)
TestBcacheMachine = BcacheMachine.TestCase


def take_a_walk(rng: random.Random, nr_steps: int) -> None:
    """Longer than what hypothesis likes, with a bit of everything and some habits of a user."""
    machine = BcacheMachine()

    def wanted() -> GetFlags:
        return rng.choice([GetFlags(0), GetFlags(0), GetFlags.DIRTY, GetFlags.ZERO])

    steps: list[tuple[int, Callable[[], object]]] = [
        (30, lambda: machine.get(rng.choice(PLACES), wanted(), rng.random() < 0.5)),
        (2, lambda: machine.get_beyond_the_end(rng.choice([-1, *NR_BLOCKS]), rng.randrange(3))),
        (15, lambda: machine.change(rng.randrange(20), rng.randrange(4000), rng.randint(1, 4096))),
        (22, lambda: machine.put(rng.randrange(20))),
        (6, lambda: machine.prefetch(rng.choice(PLACES))),
        (6, lambda: machine.read_bytes(rng.choice(PLACES), rng.randrange(4000), rng.randrange(10000))),
        (
            8,
            lambda: machine.write_bytes(
                rng.choice(PLACES), rng.randrange(4000), rng.randrange(10000), rng.choice(["write", "zero", "set"])
            ),
        ),
        (5, machine.flush),
        (5, lambda: machine.invalidate(rng.choice(PLACES))),
        (2, lambda: machine.invalidate_device(rng.randrange(3))),
        (1, lambda: machine.abort_device(rng.randrange(3))),
        (4, lambda: machine.go_wrong(rng.choice(FAULTS), rng.sample(PLACES, 4), rng.choice([None, 1, 2]))),
        (2, machine.heal),
        (2, machine.write_after_healing),
        (2, lambda: machine.power_cut(rng.randrange(1 << 16))),
        (1, machine.reopen),
    ]
    weights = [weight for weight, _ in steps]
    machine.begin(rng.random() < 0.5, rng.choice([1, 8]), rng.choice([1, 2, 4, 8, 16, 30]), rng.randrange(1 << 16))
    try:
        for _ in range(nr_steps):
            rng.choices(steps, weights)[0][1]()
            machine.holds_show_the_model()
    finally:
        machine.teardown()


@pytest.mark.parametrize("seed", range(settings().max_examples))
def test_a_random_walk_agrees_with_the_model(seed: int) -> None:
    take_a_walk(random.Random(seed), 300)
