"""Many threads on one cache: nothing is lost, torn or read twice, and nobody waits for ever.

The work and what it is checked against is in tests/support/cache_workload.py.  Here it is done freely, with a switch
of threads wherever the interpreter can, and by schedules in which a seed decides whose transfer is next.
"""

from __future__ import annotations

import random
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from bufio import AsyncEngine, Bcache, Client, GetFlags, HoldError, MemoryDevice, SyncEngine, WouldDeadlock, parameters
from bufio.testing import CrashDevice, FaultyDevice
from tests.support.bufio import DEADLINE, FEW, FEW_BYTES, Threads, result_of, wait_until
from tests.support.cache_workload import SIZE, BcacheWorkload, ClientWorkload
from tests.support.threads import Schedule, Team

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio import Block, Buffer, Device
    from bufio.engine import Engine

NR_THREADS = 8
EFFORT = max(1, settings().max_examples // 50)
"""How much more there is to do under the longer profiles."""
SEEDS = range(2 * EFFORT)
FREE_STEPS = 150
SCHEDULED_STEPS = 15

healthy_or_not = pytest.mark.parametrize("faulty", [False, True], ids=["healthy", "faulty"])


@pytest.fixture(params=[SyncEngine, AsyncEngine])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made: Engine = request.param()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Give clients hardly any, whatever its age."""
    before = parameters.max_cache_size_bytes, parameters.retain_bytes
    parameters.max_cache_size_bytes = FEW_BYTES
    parameters.retain_bytes = 0
    yield
    parameters.max_cache_size_bytes, parameters.retain_bytes = before


@pytest.fixture
def hectic() -> Iterator[None]:
    """Switch threads as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def put_to_work(workload: ClientWorkload | BcacheWorkload, nr_steps: int) -> Team:
    team = Team()
    for number in range(NR_THREADS):
        team.start(workload.work, team, number, nr_steps)
    return team


@pytest.mark.usefixtures("hectic")
@healthy_or_not
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_run_freely_agree_with_the_ledger_of_a_client(engine: Engine, seed: int, faulty: bool) -> None:
    workload = ClientWorkload(engine, seed, faulty=faulty)
    put_to_work(workload, FREE_STEPS).join()
    workload.finish()


@pytest.mark.usefixtures("hectic")
@healthy_or_not
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_run_freely_agree_with_the_ledger_of_a_bcache(engine: Engine, seed: int, faulty: bool) -> None:
    workload = BcacheWorkload(engine, seed, NR_THREADS, faulty=faulty)
    put_to_work(workload, FREE_STEPS).join()
    workload.finish()


@healthy_or_not
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_on_a_schedule_agree_with_the_ledger_of_a_client(engine: Engine, seed: int, faulty: bool) -> None:
    workload = ClientWorkload(engine, seed, faulty=faulty)
    schedule = Schedule(seed, workload.devices)
    schedule.drive(put_to_work(workload, SCHEDULED_STEPS))
    workload.finish()


@healthy_or_not
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_on_a_schedule_agree_with_the_ledger_of_a_bcache(engine: Engine, seed: int, faulty: bool) -> None:
    workload = BcacheWorkload(engine, seed, NR_THREADS, faulty=faulty)
    schedule = Schedule(seed, workload.devices)
    schedule.drive(put_to_work(workload, SCHEDULED_STEPS))
    workload.finish()


# Waiting for what others hold


def greedy(team: Team, number: int, hold: Callable[[int], Buffer | Block], give_back: Callable[..., None]) -> None:
    """Want three blocks of eight at a time, in any order, and give all back when told that it cannot be."""
    rng = random.Random(number)
    for _ in range(FREE_STEPS):
        if not team.goes_on():
            return
        wanted = rng.sample(range(3 * NR_THREADS), 3)
        held: list[Buffer | Block] = []
        try:
            while wanted:
                held.append(hold(wanted.pop()))
        except WouldDeadlock:
            # Who has nothing is not what the others wait for: it is one of them that has to give way.
            if not held:
                raise
        finally:
            for buffer in held:
                give_back(buffer)


@pytest.mark.usefixtures("hectic")
def test_greedy_threads_on_a_client_never_hang(engine: Engine) -> None:
    team = Team()
    with Client(MemoryDevice(3 * NR_THREADS * SIZE), SIZE, engine=engine, cache_bytes=FEW_BYTES) as client:
        for number in range(NR_THREADS):
            team.start(greedy, team, number, client.read, client.release)
        team.join()
        assert client.stats.held == 0


@pytest.mark.usefixtures("hectic")
def test_greedy_threads_on_a_bcache_never_hang(engine: Engine) -> None:
    team = Team()
    device = MemoryDevice(3 * NR_THREADS * SIZE)
    with Bcache(SIZE // 512, NR_THREADS, engine) as cache:
        for number in range(NR_THREADS):
            team.start(greedy, team, number, lambda index: cache.get(device, index), cache.put)
        team.join()
        assert cache.stats.held == 0


def test_a_waiter_that_has_become_the_only_holder_is_told(threads: Threads) -> None:
    """Block 0 is held by two: when one of them lets go, if not before, the other waits for nobody but itself."""
    client = Client(MemoryDevice(20 * SIZE), SIZE, cache_bytes=FEW_BYTES)
    shared = client.read(0)

    def want_one_too_many() -> WouldDeadlock:
        held = [client.read(block) for block in range(FEW + 1)]
        with pytest.raises(WouldDeadlock) as caught:
            client.read(FEW + 1)
        for buffer in held:
            buffer.release()
        return caught.value

    waiter = threads.submit(want_one_too_many)
    wait_until(lambda: waiter.done() or client.stats.waits == 1)
    shared.release()
    assert result_of(waiter).blocks == tuple(range(FEW + 1))
    client.close()


def test_waiting_for_a_waiter_is_no_deadlock_while_that_one_waits_for_somebody_else(threads: Threads) -> None:
    """We hold block 3; the first thread waits for it with block 2 in its hands, and the second for block 2."""
    client = Client(MemoryDevice(20 * SIZE), SIZE, cache_bytes=FEW_BYTES)
    # No transfers, whose ends would wake the waiters, so that they would count twice.
    client.prefetch(0, 5)
    ours = client.read(3)

    def move_to_ours() -> None:
        source, other = client.read(1), client.read(2)
        source.release_move(3)
        other.release()

    def move_to_theirs() -> None:
        client.read(4).release_move(2)

    first = threads.submit(move_to_ours)
    wait_until(lambda: client.stats.waits == 1)
    second = threads.submit(move_to_theirs)
    wait_until(lambda: client.stats.waits == 2 or second.done())
    ours.release()
    result_of(first)
    result_of(second)
    client.close()


def test_more_memory_ends_a_wait_for_it(threads: Threads) -> None:
    client = Client(MemoryDevice(40 * SIZE), SIZE, reserved_buffers=0)
    held = [client.read(block) for block in range(FEW)]
    waiter = threads.submit(lambda: client.read(20).release())
    wait_until(lambda: client.stats.waits == 1)
    assert not waiter.done()
    parameters.max_cache_size_bytes = 2 * FEW_BYTES
    result_of(waiter)
    for buffer in held:
        buffer.release()
    client.close()


# What others do while a transfer is on its way


def filled(value: int) -> bytes:
    return bytes([value]) * SIZE


def change(client: Client, block: int, value: int) -> None:
    buffer = client.new(block)
    buffer.data[:] = filled(value)
    buffer.mark_dirty()
    buffer.release()


def change_in(cache: Bcache, device: Device, index: int, value: int) -> None:
    block = cache.get(device, index, GetFlags.ZERO)
    block.data[:] = filled(value)
    block.put()


def block_of(device: MemoryDevice, block: int) -> bytes:
    return device.contents()[block * SIZE : (block + 1) * SIZE]


def test_a_block_changed_while_it_is_written_is_written_again() -> None:
    memory = MemoryDevice(8 * SIZE)
    device = FaultyDevice(memory)
    with AsyncEngine() as engine, Client(device, SIZE, engine=engine) as client:
        buffer = client.read(1)
        buffer.data[1000:2000] = filled(1)[1000:2000]
        buffer.mark_dirty(1000, 2000)
        with device.on("write", times=1).gate() as gate:
            client.write_dirty_buffers_async()
            gate.wait_for()
            buffer.data[:500] = filled(2)[:500]
            buffer.mark_dirty(0, 500)
        wanted = bytes(buffer.data)
        buffer.release()
        client.write_dirty_buffers()
        assert block_of(memory, 1) == wanted


@pytest.mark.usefixtures("hectic")
def test_parts_marked_dirty_while_others_are_written_go_where_they_belong(threads: Threads) -> None:
    """What is marked begins further and further in front, while somebody works out what there is to write."""
    nr_blocks = 250
    image = b"".join(filled(block) for block in range(nr_blocks))
    device = MemoryDevice(image)
    parameters.max_cache_size_bytes = 2 * nr_blocks * SIZE
    with Client(device, SIZE) as client:
        buffers = [client.read(block) for block in range(nr_blocks)]
        for _ in range(20 * EFFORT):
            for buffer in buffers:
                buffer.mark_dirty(3000, 3100)
            writer = threads.submit(client.write_dirty_buffers_async)
            for buffer in buffers:
                buffer.mark_dirty(100, 200)
            result_of(writer)
            client.write_dirty_buffers()
            assert device.contents() == image
        for buffer in buffers:
            buffer.release()


@pytest.mark.parametrize("leave", [Client.drop_buffers, Client.close])
def test_what_others_change_during_its_flush_is_not_dropped(threads: Threads, leave: Callable[[Client], None]) -> None:
    memory = MemoryDevice(8 * SIZE)
    device = FaultyDevice(memory)
    client = Client(device, SIZE)
    change(client, 1, 1)
    with device.on("flush", times=1).gate() as gate:
        leaving = threads.submit(leave, client)
        gate.wait_for()
        change(client, 2, 2)
    result_of(leaving)
    client.close()
    assert block_of(memory, 2) == filled(2)


def test_a_failed_flush_covers_what_was_on_its_way_during_the_one_before() -> None:
    """A flush says nothing about a write that has not ended: it is for the next one, and dirty again if that fails."""
    memory = CrashDevice(8 * SIZE)
    device = FaultyDevice(memory)
    with AsyncEngine() as engine, Client(device, SIZE, engine=engine) as client:
        change(client, 1, 1)
        with device.on("write", times=1).gate() as gate:
            client.write_dirty_buffers_async()
            gate.wait_for()
            client.issue_flush()
        memory.fail_flushes(0)
        with pytest.raises(OSError, match="flush failed"):
            client.write_dirty_buffers()
        assert client.stats.dirty == 1
        client.write_dirty_buffers()
        assert {image.contents() for image in memory.images(begin=memory.position)} == {memory.contents()}


def test_a_bcache_flushes_what_was_on_its_way_during_the_flush_before(threads: Threads) -> None:
    """Block 1 is written, by way of preemption, from within the flush that block 0 asked for, and ends after it."""
    memory = CrashDevice(8 * SIZE)
    device = FaultyDevice(memory)
    with AsyncEngine() as engine, Bcache(SIZE // 512, 1, engine) as cache:
        change_in(cache, device, 0, 1)
        with device.on("flush", times=1).gate() as flushes, device.on("write", blocks=[1]).gate() as writes:
            flusher = threads.submit(cache.flush)
            flushes.wait_for()
            change_in(cache, device, 1, 2)
            writes.wait_for()
            flushes.open()
            result_of(flusher)
        cache.flush()
        assert {image.contents() for image in memory.images(begin=memory.position)} == {memory.contents()}


class TwoDevices:
    """A Bcache with a dirty block 0 on each of two devices."""

    def __init__(self, engine: Engine) -> None:
        self.memories = [MemoryDevice(8 * SIZE, name) for name in ("first", "second")]
        self.first, self.second = (FaultyDevice(memory) for memory in self.memories)
        self.cache = Bcache(SIZE // 512, 4, engine)
        for device in (self.first, self.second):
            change_in(self.cache, device, 0, 1)


def test_a_flush_does_not_write_what_somebody_has_got_meanwhile(engine: Engine, threads: Threads) -> None:
    """It would be clean then, and what the holder changes after the transfer would be lost."""
    two = TwoDevices(engine)
    with two.first.on("write", times=1).gate() as gate:
        flusher = threads.submit(two.cache.flush)
        gate.wait_for()
        # With an asynchronous engine it may be on its way already, and is waited for.
        block = two.cache.get(two.second, 0, GetFlags.DIRTY)
    result_of(flusher)
    block.data[:] = filled(2)
    block.put()
    two.cache.close()
    assert block_of(two.memories[1], 0) == filled(2)


def test_a_flush_does_not_write_to_one_device_what_belongs_to_another(engine: Engine, threads: Threads) -> None:
    """The memory of a block of the second device is given to one of the first, while the flush is busy there."""
    two = TwoDevices(engine)
    with two.first.on("write", times=1).gate() as gate:
        flusher = threads.submit(two.cache.flush)
        gate.wait_for()
        two.cache.invalidate(two.second, 0)
        change_in(two.cache, two.first, 5, 5)
    result_of(flusher)
    two.cache.close()
    assert block_of(two.memories[0], 5) == filled(5)
    assert block_of(two.memories[1], 5) == bytes(SIZE)


@pytest.mark.parametrize("drop", [Bcache.invalidate_device, Bcache.abort_device])
def test_a_block_waited_for_while_its_device_is_dropped_is_known(
    threads: Threads, drop: Callable[[Bcache, Device], object]
) -> None:
    first, second = MemoryDevice(8 * SIZE), MemoryDevice(8 * SIZE)
    with Bcache(SIZE // 512, 4) as cache:
        held = [cache.get(first, index) for index in range(4)]
        waiter = threads.submit(change_in, cache, second, 0, 7)
        wait_until(lambda: cache.stats.waits == 1)
        drop(cache, second)
        for block in held:
            block.put()
        result_of(waiter)
        assert cache.read_bytes(second, 0, SIZE) == filled(7)


def test_two_threads_may_abort_one_device(threads: Threads) -> None:
    device = FaultyDevice(MemoryDevice(8 * SIZE))
    with AsyncEngine() as engine, Bcache(SIZE // 512, 4, engine) as cache:
        with device.on("read").gate() as gate:
            cache.prefetch(device, 0)
            gate.wait_for()
            aborts = [threads.submit(cache.abort_device, device) for _ in range(2)]
            wait_until(lambda: cache.stats.waits == 2)
        for abort in aborts:
            result_of(abort)


# Holds that exclude each other, and one that many have


@pytest.mark.usefixtures("hectic")
def test_holds_of_a_bcache_for_changing_are_locks(engine: Engine) -> None:
    """No thread has a lock of its own here: whoever gets a block for changing counts, the others are refused."""
    device = MemoryDevice(2 * SIZE)
    counts = [0] * NR_THREADS
    team = Team()

    def count(number: int) -> None:
        while counts[number] < 20 * EFFORT and team.goes_on():
            try:
                block = cache.get(device, 0, GetFlags.DIRTY)
            except HoldError:
                continue
            before = int.from_bytes(block.data[:8], "little")
            block.data[:8] = (before + 1).to_bytes(8, "little")
            counts[number] += 1
            block.put()
            cache.flush()

    with Bcache(SIZE // 512, 1, engine) as cache:
        for number in range(NR_THREADS):
            team.start(count, number)
        team.join()
    assert int.from_bytes(device.contents()[:8], "little") == sum(counts)


@pytest.mark.usefixtures("hectic")
def test_many_holders_of_one_block_may_move_it(engine: Engine) -> None:
    """Each to a place of its own: all but the last leave a copy there, and the last one takes it along."""
    device = MemoryDevice((NR_THREADS + 1) * SIZE)
    team = Team()
    with Client(device, SIZE, engine=engine, reserved_buffers=2) as client:
        for value in range(20 * EFFORT):
            change(client, 0, value % 256)
            barrier = threading.Barrier(NR_THREADS)

            def move(target: int, barrier: threading.Barrier = barrier) -> None:
                buffer = client.read(0)
                barrier.wait(DEADLINE)
                buffer.release_move(target)

            for target in range(1, NR_THREADS + 1):
                team.start(move, target)
            team.join()
            client.write_dirty_buffers()
            assert device.contents() == filled(value % 256) * (NR_THREADS + 1)


# Memory


@pytest.mark.usefixtures("hectic")
def test_clients_come_and_go_while_their_memory_changes(engine: Engine) -> None:
    allocated = parameters.current_allocated_bytes
    team = Team()

    def use_clients(number: int) -> None:
        for value in range(10 * EFFORT):
            if not team.goes_on():
                return
            device = MemoryDevice(12 * SIZE)
            with Client(device, SIZE, engine=engine) as client:
                for block in range(12):
                    change(client, block, (number + value) % 256)
                parameters.max_cache_size_bytes = (1 + value % 3) * NR_THREADS * FEW_BYTES
            assert device.contents() == filled((number + value) % 256) * 12

    for number in range(NR_THREADS):
        team.start(use_clients, number)
    team.join()
    # Or less: caches that earlier tests have left are collected at any time.
    assert parameters.current_allocated_bytes <= allocated


@pytest.mark.usefixtures("hectic")
def test_the_last_limit_that_was_set_is_the_one_that_counts() -> None:
    """Whoever works out a share of an older one does not have the last word."""
    team = Team()
    device = MemoryDevice(64 * SIZE)
    with Client(device, SIZE) as client:
        for _ in range(20 * EFFORT):

            def set_limit(factor: int) -> None:
                parameters.max_cache_size_bytes = factor * FEW_BYTES

            for factor in range(2, 2 + NR_THREADS):
                team.start(set_limit, factor)
            team.join()
            limit = parameters.max_cache_size_bytes // FEW_BYTES * FEW
            for block in range(64):
                client.read(block).release()
            cached = client.stats.cached
            # Eviction begins at seven eighths of the limit.
            assert limit - limit // 8 <= cached <= limit, (limit, cached)
