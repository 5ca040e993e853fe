"""What is not used for a while leaves the cache, by itself; what is used, held or dirty does not."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from bufio import Client, parameters
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.memory import Parameters
from tests.support.bufio import DEADLINE, NR_BLOCKS, SIZE, content, dirty, on_device, read, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.devices import FaultyMemory

AGE = 100.0  # seconds


@pytest.fixture(autouse=True)
def age() -> Iterator[None]:
    """An age that no test waits for, and nothing that is kept whatever its age."""
    before = parameters.max_age_seconds, parameters.retain_bytes
    parameters.max_age_seconds, parameters.retain_bytes = AGE, 0
    yield
    parameters.max_age_seconds, parameters.retain_bytes = before


def cached(client: Client) -> set[int]:
    found = {block: client.get(block) for block in range(NR_BLOCKS)}
    for buffer in found.values():
        if buffer is not None:
            buffer.release()
    return {block for block, buffer in found.items() if buffer is not None}


def test_unused_buffer_goes_when_its_time_has_come(client: Client) -> None:
    read(client, 1)
    client.evict_old(1000)
    client.evict_old(1000 + AGE - 1)
    assert client.stats.cached == 1
    client.evict_old(1000 + AGE)
    assert (client.stats.cached, client.stats.evictions) == (0, 1)
    assert read(client, 1) == content(1)


def test_use_makes_young_again(client: Client) -> None:
    for block in (1, 2, 3):
        read(client, block)
    for now in (1000, 1060, 1120):
        read(client, 2)
        client.evict_old(now)
    assert cached(client) == {2}


def test_held_buffer_never_goes_and_its_time_begins_at_the_release(client: Client) -> None:
    buffer = client.read(1)
    client.evict_old(1000)
    client.evict_old(2000)
    assert buffer.data == content(1)
    buffer.release()
    client.evict_old(2000 + AGE - 1)
    assert client.stats.cached == 1
    client.evict_old(2000 + AGE)
    assert client.stats.cached == 0


def test_dirty_buffer_stays_until_it_is_written(client: Client, device: FaultyMemory) -> None:
    dirty(client, 1, 100)
    client.evict_old(1000)
    client.evict_old(5000)
    assert client.stats.cached == 1
    client.write_dirty_buffers()
    client.evict_old(5000)
    client.evict_old(5000 + AGE)
    assert client.stats.cached == 0
    assert on_device(device, 1) == 100


def test_some_memory_is_kept_whatever_its_age(client: Client) -> None:
    for block in range(10):
        read(client, block)
    parameters.retain_bytes = 4 * (SIZE + BUFFER_OVERHEAD_BYTES)
    client.evict_old(1000)
    client.evict_old(1000 + AGE)
    assert cached(client) == {6, 7, 8, 9}


def test_order_of_use_outlives_a_look_at_ages(few: Client) -> None:
    """A look forgets the marks of use that eviction goes by: the order has to tell instead."""
    full = 7  # from there on each new one pushes an old one out
    for block in range(full):
        read(few, block)
    read(few, 0)
    few.evict_old(1000)
    read(few, 20)
    assert cached(few) == {0, 2, 3, 4, 5, 6, 20}


def test_owner_keeps_what_it_borrows_while_it_has_its_lock(client: Client) -> None:
    lock = threading.Lock()
    client.epoch = 2
    client.owner_lock = lock
    client.borrow(1)
    client.epoch = 3
    client.borrow(2)
    with lock:
        client.evict_old(1000)
        client.evict_old(5000)
        assert client.stats.cached == 2
    client.evict_old(10000)
    client.evict_old(10000 + AGE)
    assert client.peek(1) is None
    assert client.peek(2) is not None, "borrowed in the present epoch"


def test_owner_without_a_lock_is_left_alone(client: Client) -> None:
    client.epoch = 2
    client.borrow(1)
    client.epoch = 3
    client.evict_old(1000)
    client.evict_old(5000)
    assert client.peek(1) is not None


# By itself


def test_buffers_go_by_themselves(client: Client) -> None:
    for block in range(20):
        read(client, block)
    parameters.max_age_seconds = 0.02
    wait_until(lambda: client.stats.cached == 0)


def test_smaller_minimum_has_an_effect_on_clients_that_exist(client: Client) -> None:
    parameters.retain_bytes = 1 << 20
    read(client, 1)
    parameters.max_age_seconds = 0.02
    time.sleep(0.1)
    assert client.stats.cached == 1
    parameters.retain_bytes = 0
    wait_until(lambda: client.stats.cached == 0)


def test_thread_ends_with_the_last_cache() -> None:
    """With parameters of its own: of clients that other tests have left there may be some yet."""

    class Cache:
        def limit_changed(self) -> None:
            pass

        def evict_old(self, now: float) -> None:
            pass

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "bufio ageing"}

    others = threads()
    own = Parameters()
    one, two = Cache(), Cache()
    own.join(one)
    own.join(two)
    own.start_ageing()
    (mine,) = threads() - others
    own.leave(one)
    assert mine.is_alive()
    own.leave(two)
    mine.join(DEADLINE)
    assert not mine.is_alive()


def test_client_that_nobody_has_any_more_does_not_stay_alive_for_its_age(device: FaultyMemory) -> None:
    told = threading.Event()

    class Cache:
        def limit_changed(self) -> None:
            pass

        def evict_old(self, now: float) -> None:
            told.set()

    own = Parameters()
    own.max_age_seconds = 0.02
    cache = Cache()
    own.join(cache)
    own.start_ageing()
    assert told.wait(DEADLINE)
    del cache
    wait_until(lambda: not own.caches())


@pytest.mark.parametrize("age", [0, -1, float("nan")])
def test_age_has_to_be_positive(age: float) -> None:
    with pytest.raises(ValueError, match=str(age)):
        Parameters().max_age_seconds = age


def test_nothing_less_than_nothing_can_be_retained() -> None:
    with pytest.raises(ValueError, match="-1"):
        Parameters().retain_bytes = -1
