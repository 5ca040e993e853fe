"""A buffer client against a list of contents, in any order of calls and faults that hypothesis thinks of.

The device is looked at from below: what it holds, and what a power cut would leave of it.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bufio import AsyncEngine, Client, HoldError, SyncEngine, WouldDeadlock, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.testing import CrashDevice, FaultyDevice
from tests.support.bufio import dismiss_other_caches
from tests.support.durability import Durability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio import Buffer

NR_BLOCKS = 24
SECTOR = 512
LEAST_BUFFERS = 8
"""A client has room for so many, however little memory it is given."""
IMAGES = 8
"""Power cuts tried at a time."""

blocks = st.integers(0, NR_BLOCKS - 1)
lengths = st.integers(1, 6)
which = st.integers(0, 20)
"""Which of the holds that there are."""
FAULTS = ["read", "write", "write", "tear", "short", "stuck", "flush", "flush unasked", "discard"]


class ClientMachine(RuleBasedStateMachine):
    """Does the same to a client and to its model, and compares."""

    @initialize(
        asynchronous=st.booleans(),
        aligned=st.booleans(),
        block_size=st.sampled_from([512, 4096]),
        nr_buffers=st.integers(LEAST_BUFFERS, 2 * LEAST_BUFFERS),
        reserved=st.integers(1, 3),
        seed=st.integers(0, 1 << 16),
    )
    def begin(
        self, asynchronous: bool, aligned: bool, block_size: int, nr_buffers: int, reserved: int, seed: int
    ) -> None:
        """Begin with an empty cache; if *aligned*, changes are of sectors, and transfers may come in pieces."""
        self.rng = random.Random(seed)
        self.aligned = aligned
        self.block_size = block_size
        self.reserved = reserved
        self.engine = AsyncEngine() if asynchronous else SyncEngine()
        image = self.rng.randbytes(NR_BLOCKS * block_size)
        self.crash = CrashDevice(image)
        self.device = FaultyDevice(self.crash, seed=seed)
        self.contents = [image[at : at + block_size] for at in range(0, len(image), block_size)]
        """What a buffer of each block has to show."""
        self.durability = Durability(image, block_size)
        self.dirty: set[int] = set()
        """Blocks that may have to be written."""
        self.partly: set[int] = set()
        """Those of which perhaps only a part has to be written."""
        self.unwritable: set[int] = set()
        """Blocks every write of which fails, until :meth:`heal`."""
        self.held: list[tuple[int, Buffer]] = []
        self.faulty = False
        dismiss_other_caches()
        self.before = parameters.max_cache_size_bytes, parameters.retain_bytes
        self.allocated_bytes = parameters.current_allocated_bytes
        parameters.retain_bytes = 0
        self.minimum = 0
        self.change_limit(nr_buffers)
        self.client = Client(self.device, block_size, reserved_buffers=reserved, engine=self.engine)

    # Looking at things

    @property
    def limit(self) -> int:
        """How many buffers there may be."""
        return max(self.nr_buffers, self.minimum, LEAST_BUFFERS)

    def on_device(self, block: int) -> bytes:
        """Return what the device holds, durable or not."""
        return self.crash.contents()[block * self.block_size : (block + 1) * self.block_size]

    def held_blocks(self) -> set[int]:
        return {block for block, _ in self.held}

    def is_cached(self, block: int) -> bool:
        """Ask the client, and see that it has the right content."""
        buffer = self.client.get(block)
        if buffer is None:
            return False
        found = bytes(buffer.data)
        buffer.release()
        assert found == self.contents[block]
        return True

    def excuse(self, error: OSError) -> None:
        """Accept what was injected, and nothing else."""
        if currently_in_test_context():
            note(f"{type(error).__name__}: {error}")
        assert "as told" in str(error) or "short" in str(error), error

    @contextmanager
    def lookups(self, *counts: int) -> Iterator[None]:
        """See that what is done counts as one of so many hits and misses."""
        before = self.client.stats
        yield
        after = self.client.stats
        assert after.hits + after.misses - before.hits - before.misses in counts

    def check_named(self, error: WouldDeadlock, blocks: set[int]) -> None:
        """See that an error names what is waited for."""
        assert set(error.blocks) == blocks

    def check_deadlock(self, error: WouldDeadlock) -> None:
        """Accept that there is no buffer to be had."""
        held = self.held_blocks()
        self.check_named(error, held)
        assert len(held) >= self.limit or self.faulty, "there was room"

    # Changing things

    def fill(self, block: int, buffer: Buffer, begin: int, end: int) -> None:
        """Change bytes of a held buffer, and mark them."""
        content = self.contents[block]
        content = content[:begin] + self.rng.randbytes(end - begin) + content[end:]
        whole = end - begin == self.block_size
        # Before it is done: what is on its way to the device may have it with it.
        self.durability.may_become(block, content, begin, end)
        self.contents[block] = content
        self.dirty.add(block)
        if not whole:
            self.partly.add(block)
        buffer.data[begin:end] = content[begin:end]
        buffer.mark_dirty(begin, end)

    def keep(self, block: int, buffer: Buffer, stay: bool) -> None:
        assert bytes(buffer.data) == self.contents[block]
        assert buffer.block_number == block
        if stay:
            self.held.append((block, buffer))
        else:
            buffer.release()

    @rule(block=blocks, stay=st.booleans(), look=st.booleans())
    def read(self, block: int, stay: bool, look: bool) -> None:
        was_cached = look and self.is_cached(block)
        nr_reads = self.client.stats.reads
        try:
            with self.lookups(1):
                buffer = self.client.read(block)
        except WouldDeadlock as error:
            assert not was_cached
            self.check_deadlock(error)
        except OSError as error:
            assert not was_cached
            self.excuse(error)
        else:
            assert not was_cached or self.client.stats.reads == nr_reads, "it was cached"
            if look and not was_cached:
                assert len(self.held_blocks() | {block}) <= self.limit + self.reserved
            self.keep(block, buffer, stay)

    @rule(block=st.sampled_from([-1, NR_BLOCKS, NR_BLOCKS + 7]))
    def read_beyond_the_end(self, block: int) -> None:
        with self.lookups(0), pytest.raises(OSError, match="beyond the end"):
            self.client.read(block)

    @rule(block=blocks, stay=st.booleans())
    def get(self, block: int, stay: bool) -> None:
        with self.lookups(0, 1):
            buffer = self.client.get(block)
        if buffer is not None:
            self.keep(block, buffer, stay)
        else:
            assert block not in self.held_blocks()

    @rule(block=blocks, stay=st.booleans())
    def new(self, block: int, stay: bool) -> None:
        was_cached = self.is_cached(block)
        try:
            with self.lookups(0):
                buffer = self.client.new(block)
        except WouldDeadlock as error:
            assert not was_cached
            self.check_deadlock(error)
        except OSError as error:
            assert not was_cached
            self.excuse(error)
        else:
            assert not was_cached or bytes(buffer.data) == self.contents[block]
            self.fill(block, buffer, 0, self.block_size)
            self.keep(block, buffer, stay)

    @rule(at=which, begin=st.integers(0, SECTOR - 1), length=st.integers(1, 700), whole=st.booleans())
    def change(self, at: int, begin: int, length: int, whole: bool) -> None:
        if self.held:
            block, buffer = self.held[at % len(self.held)]
            end = min(begin + length, self.block_size)
            if self.aligned:
                begin, end = 0, -(-end // SECTOR) * SECTOR
            if whole:
                begin, end = 0, self.block_size
            self.fill(block, buffer, begin, end)

    @rule(at=which)
    def release(self, at: int) -> None:
        if self.held:
            _, buffer = self.held.pop(at % len(self.held))
            buffer.release()

    @rule(at=which, to=blocks)
    def release_move(self, at: int, to: int) -> None:
        if not self.held or self.held[at % len(self.held)][0] == to:
            return
        source, buffer = self.held[at % len(self.held)]
        nr_holds = buffer.hold_count
        self.durability.may_become(to, self.contents[source], 0, 0)
        try:
            buffer.release_move(to)
        except OSError as error:
            if not isinstance(error, WouldDeadlock):
                self.excuse(error)
            elif to in self.held_blocks():
                self.check_named(error, {to})
            else:
                self.check_deadlock(error)
            # What was cached of the target, dirty perhaps, may be gone; what was written of it may be anything.
            self.engine.drain()
            self.compare_dropped(to)
            return
        assert to not in self.held_blocks(), "it was held"
        del self.held[at % len(self.held)]
        assert self.on_device(source) == self.contents[source], "it should have been written before it was moved"
        self.durability.may_become(to, self.contents[source])
        self.contents[to] = self.contents[source]
        self.dirty.discard(source)
        self.dirty.add(to)
        if nr_holds > 1:
            self.dirty.discard(to)
            assert self.on_device(to) == self.contents[to]

    def compare_dropped(self, block: int) -> None:
        """If a block is not cached any more, go on with what the device has of it."""
        buffer = self.client.get(block)
        if buffer is not None:
            buffer.release()
        else:
            self.contents[block] = self.on_device(block)
            self.dirty.discard(block)
            self.durability.drop(block)

    @rule(block=blocks, length=lengths)
    def prefetch(self, block: int, length: int) -> None:
        with self.lookups(*range(length + 1)):
            self.client.prefetch(block, length)

    # Writing

    @rule()
    def write_dirty_buffers_async(self) -> None:
        self.client.write_dirty_buffers_async()

    @rule()
    def write_dirty_buffers(self) -> None:
        self.write_all(self.client.write_dirty_buffers)

    @rule()
    def drop_buffers(self) -> None:
        if self.write_all(self.client.drop_buffers):
            assert self.client.stats.cached == len(self.held_blocks())

    def write_all(self, call: Callable[[], None]) -> bool:
        """Write everything; tell whether that succeeded."""
        self.engine.drain()
        doomed = {block for block in self.unwritable if self.on_device(block) != self.contents[block]}
        try:
            call()
        except OSError as error:
            self.excuse(error)
            if "flush" in str(error):
                self.flush_has_failed()
            assert all(map(self.is_cached, doomed)), "what could not be written is not forgotten"
            return False
        assert not doomed, "writes have failed"
        assert self.client.stats.dirty == 0
        for block in range(NR_BLOCKS):
            assert self.on_device(block) == self.contents[block]
            self.durability.settle(block, self.contents[block])
        self.dirty.clear()
        self.partly.clear()
        return True

    @rule()
    def issue_flush(self) -> None:
        try:
            self.client.issue_flush()
        except OSError as error:
            self.excuse(error)
            self.flush_has_failed()

    def flush_has_failed(self) -> None:
        """What is still cached is dirty again; of the rest nobody knows."""
        cached = set(filter(self.is_cached, self.durability.unsettled))
        self.dirty |= cached
        self.durability.flush_has_failed(cached)

    # Dropping

    @rule(block=blocks, length=lengths)
    def forget(self, block: int, length: int) -> None:
        end = min(block + length, NR_BLOCKS)
        if length == 1:
            self.client.forget(block)
        else:
            self.client.forget_buffers(block, length)
        self.have_forgotten(range(block, end), certainly=isinstance(self.engine, SyncEngine))

    @rule()
    def reset(self) -> None:
        self.client.reset()
        self.have_forgotten(range(NR_BLOCKS), certainly=True)

    def have_forgotten(self, forgotten: range, *, certainly: bool) -> None:
        """Compare after unheld blocks were dropped; not *certainly* those that were being written."""
        held = self.held_blocks()
        for block in forgotten:
            if block not in held:
                self.compare_dropped(block)
                assert not certainly or self.client.get(block) is None

    @rule(block=blocks, length=lengths)
    def issue_discard(self, block: int, length: int) -> None:
        discarded = range(block, min(block + length, NR_BLOCKS))
        # What a buffer of a discarded block shows as long as it is held, or once a part of it was written, is
        # anybody's guess.
        if not (self.held_blocks() | self.partly).isdisjoint(discarded):
            return
        for at in discarded:
            self.durability.may_be_discarded(at)
        try:
            self.client.issue_discard(block, len(discarded))
        except OSError as error:
            self.excuse(error)
        for at in discarded:
            self.compare_dropped(at)

    # Memory

    @rule(now=st.sampled_from([0.0, 1e3, 1e6, 1e9]))
    def evict_old(self, now: float) -> None:
        self.engine.drain()
        before = self.client.stats
        self.client.evict_old(now)
        after = self.client.stats
        assert max(after.dirty, after.held) <= after.cached <= before.cached

    @rule(nr_buffers=st.integers(1, 2 * LEAST_BUFFERS))
    def change_limit(self, nr_buffers: int) -> None:
        self.nr_buffers = nr_buffers
        parameters.max_cache_size_bytes = nr_buffers * (self.block_size + BUFFER_OVERHEAD_BYTES)
        self.is_within_limit()

    @rule(minimum=st.integers(0, 2 * LEAST_BUFFERS))
    def set_minimum_buffers(self, minimum: int) -> None:
        self.minimum = minimum
        self.client.set_minimum_buffers(minimum)
        self.is_within_limit()

    def is_within_limit(self) -> None:
        """Nothing keeps a client from becoming smaller but holds, and writes that fail."""
        if hasattr(self, "client") and not (self.held or self.faulty):
            stats = self.client.stats
            assert stats.cached <= self.limit

    # Faults

    @rule(
        kind=st.sampled_from(FAULTS),
        where=st.lists(blocks, min_size=1, max_size=NR_BLOCKS),
        times=st.sampled_from([None, 1, 2]),
    )
    def go_wrong(self, kind: str, where: list[int], times: int | None) -> None:
        if kind in ("tear", "short") and not self.aligned:
            # They might write a part of a sector, and the model knows sectors only.
            return
        self.faulty = True
        transfers = self.device.on("read", "write", blocks=where, block_size=self.block_size, times=times)
        writes = self.device.on("write", blocks=where, block_size=self.block_size, times=times)
        if kind == "read":
            self.device.on("read", blocks=where, block_size=self.block_size, times=times).fail()
        elif kind == "write":
            writes.fail()
        elif kind == "tear":
            writes.tear()
        elif kind == "short":
            transfers.shorten(SECTOR)
        elif kind == "stuck":
            transfers.shorten(0)
        elif kind == "flush":
            self.crash.fail_flushes(*range(times or 1))
        elif kind == "flush unasked":
            self.device.on("flush", times=1).fail()
        else:
            self.device.on("discard", times=times).fail()
        if kind in ("write", "stuck") and times is None:
            self.unwritable.update(where)

    @rule()
    def heal(self) -> None:
        self.device.clear()
        self.crash.fail_flushes()
        self.faulty = False
        self.unwritable.clear()
        self.engine.drain()

    @rule()
    def write_after_healing(self) -> None:
        """An error that nobody was told of yet is told once."""
        self.heal()
        if not self.write_all(self.client.write_dirty_buffers):
            assert self.write_all(self.client.write_dirty_buffers), "it was told before"

    @rule(seed=st.integers(0, 1 << 16))
    def power_cut(self, seed: int) -> None:
        """Look at what would be left."""
        position = self.crash.position
        images = self.crash.images(begin=position, end=position, exhaustive=3, samples=IMAGES, seed=seed)
        for image in islice(images, IMAGES):
            self.durability.check(image.contents(), image)

    # The end

    @rule()
    def reopen(self) -> None:
        self.write_after_healing()
        if self.held:
            with pytest.raises(HoldError, match=str(sorted(self.held_blocks())).replace("[", r"\[")):
                self.client.close()
            while self.held:
                self.release(0)
        self.client.close()
        # Or less: caches that earlier tests have left are collected at any time.
        assert parameters.current_allocated_bytes <= self.allocated_bytes
        self.minimum = 0
        self.client = Client(self.device, self.block_size, reserved_buffers=self.reserved, engine=self.engine)

    @invariant()
    def holds_show_the_model(self) -> None:
        if not hasattr(self, "client"):
            return
        for block, buffer in self.held:
            assert bytes(buffer.data) == self.contents[block]
        stats = self.client.stats
        assert stats.held == len(self.held_blocks())
        assert stats.dirty <= len(self.dirty)
        assert max(stats.held, stats.dirty) <= stats.cached

    def teardown(self) -> None:
        if not hasattr(self, "client"):
            return
        try:
            self.reopen()
            self.power_cut(0)
        finally:
            self.heal()
            for _, buffer in self.held:
                buffer.release()
            self.client.discard_all()
            self.engine.close()
            parameters.max_cache_size_bytes, parameters.retain_bytes = self.before


ClientMachine.TestCase.settings = settings(
    suppress_health_check=list(HealthCheck), print_blob=True, phases=set(Phase) - {Phase.explain}
)
TestClientMachine = ClientMachine.TestCase


def take_a_walk(rng: random.Random, nr_steps: int) -> None:
    """Longer than what hypothesis likes, with a bit of everything and some habits of a user."""
    machine = ClientMachine()
    steps: list[tuple[int, Callable[[], object]]] = [
        (20, lambda: machine.read(rng.randrange(NR_BLOCKS), rng.random() < 0.4, rng.random() < 0.5)),
        (3, lambda: machine.read_beyond_the_end(NR_BLOCKS)),
        (6, lambda: machine.get(rng.randrange(NR_BLOCKS), rng.random() < 0.4)),
        (12, lambda: machine.new(rng.randrange(NR_BLOCKS), rng.random() < 0.4)),
        (20, lambda: machine.change(rng.randrange(20), rng.randrange(SECTOR), rng.randint(1, 700), rng.random() < 0.4)),
        (20, lambda: machine.release(rng.randrange(20))),
        (12, lambda: machine.release_move(rng.randrange(20), rng.randrange(NR_BLOCKS))),
        (5, lambda: machine.prefetch(rng.randrange(NR_BLOCKS), rng.randint(1, 6))),
        (6, machine.write_dirty_buffers_async),
        (4, machine.write_dirty_buffers),
        (1, machine.drop_buffers),
        (2, machine.issue_flush),
        (4, lambda: machine.forget(rng.randrange(NR_BLOCKS), rng.randint(1, 6))),
        (1, machine.reset),
        (3, lambda: machine.issue_discard(rng.randrange(NR_BLOCKS), rng.randint(1, 6))),
        (2, lambda: machine.evict_old(rng.choice([0.0, 1e3, 1e9]))),
        (2, lambda: machine.change_limit(rng.randint(1, 2 * LEAST_BUFFERS))),
        (1, lambda: machine.set_minimum_buffers(rng.randint(0, 2 * LEAST_BUFFERS))),
        (4, lambda: machine.go_wrong(rng.choice(FAULTS), rng.sample(range(NR_BLOCKS), 3), rng.choice([None, 1, 2]))),
        (3, machine.heal),
        (2, machine.write_after_healing),
        (2, lambda: machine.power_cut(rng.randrange(1 << 16))),
        (1, machine.reopen),
    ]
    weights = [weight for weight, _ in steps]
    machine.begin(
        rng.random() < 0.5,
        rng.random() < 0.5,
        rng.choice([512, 4096]),
        rng.randint(LEAST_BUFFERS, 2 * LEAST_BUFFERS),
        rng.randint(1, 3),
        rng.randrange(1 << 16),
    )
    try:
        for _ in range(nr_steps):
            rng.choices(steps, weights)[0][1]()
            machine.holds_show_the_model()
    finally:
        machine.teardown()


@pytest.mark.parametrize("seed", range(settings().max_examples))
def test_a_random_walk_agrees_with_the_model(seed: int) -> None:
    take_a_walk(random.Random(seed), 300)
