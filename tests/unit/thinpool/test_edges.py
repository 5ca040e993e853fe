"""Odd arguments, failures within failures, interrupts: what a review found that the other tests had let pass.

Each test tells one story that once ended badly.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bufio import FileDevice, MemoryDevice
from bufio.core import CachedBlock, Core
from bufio.testing import Call
from tests.support.devices import FaultyMemory
from tests.support.image import ENTRIES_PER_BITMAP
from tests.support.pools import assert_sound, content_of
from tests.support.scenario import FRESH_DATA_BLOCK, NR_DATA_BLOCKS, OWNED, build
from tests.support.surgeon import Surgeon
from thinpool import (
    Corrupt,
    DeviceBusy,
    NotMapped,
    OutOfSpace,
    PoolMetadata,
    ReadOnly,
    ThinDevice,
    ThinError,
    delta,
)
from thinpool.thin_device import Handle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import FrameType

    from tests.support.pools import Content

BLOCK = 4096
NR_CACHED_ENTRIES = 64
"""Entries of the data map's index that are in memory; bitmaps this far apart share a place there."""
LAST_BITMAP = NR_CACHED_ENTRIES * ENTRIES_PER_BITMAP
"""A data block whose bitmap shares its place with that of data block 0."""
NR_MANY_DATA_BLOCKS = LAST_BITMAP + 10
MANY_LEAVES = 40000
"""Mappings that take hundreds of leaves."""


@pytest.fixture(scope="module")
def sound() -> bytes:
    return build()


@pytest.fixture(scope="module")
def many_bitmaps() -> bytes:
    """A pool with more data bitmaps than entries of their index are in memory, and an empty device 0."""
    device = MemoryDevice(512 * BLOCK)
    with PoolMetadata.format(device, 128, NR_MANY_DATA_BLOCKS) as pool:
        pool.create_thin(0)
    return device.contents()


def opened(image: bytes, cache_bytes: int | None = None) -> tuple[FaultyMemory, PoolMetadata, ThinDevice]:
    """A pool on a device of its own, with its device 0."""
    device = FaultyMemory(image)
    pool = PoolMetadata.open(device, cache_bytes=cache_bytes)
    return device, pool, pool.open_thin_device(0)


def forget_what_is_clean(pool: PoolMetadata, device: FaultyMemory) -> None:
    """Have the cache read everything again that need not be written, as it would when memory ran short."""
    client = pool._storage.bm.client
    for block in range(device.size_bytes // BLOCK):
        buffer = client.peek(block)
        if buffer is not None and not buffer.dirty:
            client.forget(block)


def interrupt(_call: Call) -> None:
    """The user loses patience."""
    raise KeyboardInterrupt


# Queries


QUERIES: dict[str, Callable[[PoolMetadata, ThinDevice], object]] = {
    "block_is_used": lambda pool, thin: pool.block_is_used(LAST_BITMAP + 1),
    "block_is_shared": lambda pool, thin: pool.block_is_shared(LAST_BITMAP + 1),
    "insert_block of a free data block": lambda pool, thin: thin.insert_block(9, LAST_BITMAP + 1),
    "insert_blocks of a free data block": lambda pool, thin: thin.insert_blocks([9], [LAST_BITMAP + 1]),
}


@pytest.mark.parametrize("query", ["block_is_used", "block_is_shared"])
def test_query_of_another_bitmap_in_read_only_mode_loses_no_count(many_bitmaps: bytes, query: str) -> None:
    """Looking at bitmap 64 once pushed the changed entry of bitmap 0 out of memory, into a tree that was frozen."""
    device, pool, thin = opened(many_bitmaps)
    thin.insert_block(0, pool.alloc_data_block())
    pool.set_read_only()
    for _ in range(2):
        assert not QUERIES[query](pool, thin)
    pool.set_read_write()
    pool.commit()
    assert_sound(device)


@pytest.mark.parametrize("query", QUERIES)
def test_query_that_cannot_read_loses_no_count(many_bitmaps: bytes, query: str) -> None:
    """The same by a read error: the query says EIO, and what the transaction had counted before is still there."""
    device, pool, thin = opened(many_bitmaps)
    thin.insert_block(0, pool.alloc_data_block())
    forget_what_is_clean(pool, device)
    device.on("read").fail()
    with pytest.raises(ThinError) as caught:
        QUERIES[query](pool, thin)
    assert caught.value.errno == errno.EIO
    device.clear()
    assert not pool.block_is_used(LAST_BITMAP + 1)
    pool.commit()
    assert_sound(device)
    assert content_of(device.contents()).mappings[0].keys() == {0}


def test_query_shadows_nothing(many_bitmaps: bytes) -> None:
    """Of two pools with the same change one is asked about every bitmap; their commits have the same bytes."""
    images = []
    for ask in (False, True):
        device, pool, thin = opened(many_bitmaps)
        thin.insert_block(0, pool.alloc_data_block())
        if ask:
            for block in range(0, NR_MANY_DATA_BLOCKS, ENTRIES_PER_BITMAP):
                pool.block_is_used(block)
        thin.insert_block(1, pool.alloc_data_block())
        pool.commit()
        images.append(device.contents())
    assert images[0] == images[1]


# Numbers of other kinds


INTEGERS = [np.int16, np.int32, np.uint16, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("kind", INTEGERS)
def test_numpy_integers_map_the_block_they_name(sound: bytes, kind: type[np.integer]) -> None:
    """np.int32(256) << 24 is 0, so a mapping to data block 256 once was one to block 0."""
    device, pool, thin = opened(sound)
    thin.insert_block(kind(3000), kind(FRESH_DATA_BLOCK))  # type: ignore[arg-type]
    thin.insert_blocks(
        np.array([3002, 3004], kind),
        np.array([FRESH_DATA_BLOCK + 2, FRESH_DATA_BLOCK + 3], kind),
    )
    expected = {3000: FRESH_DATA_BLOCK, 3002: FRESH_DATA_BLOCK + 2, 3004: FRESH_DATA_BLOCK + 3}
    for block, data in expected.items():
        assert thin.find_block(kind(block)).block == data  # type: ignore[arg-type]
    found = thin.lookup_blocks(np.array([3004, 3001, 3000], kind))
    assert [result and result.block for result in found] == [FRESH_DATA_BLOCK + 3, None, FRESH_DATA_BLOCK]
    thin.remove_block(kind(5))  # type: ignore[arg-type]
    pool.commit()
    mappings = content_of(device.contents()).mappings[0]
    assert {block: data for block, (data, _) in mappings.items() if 3000 <= block < 4000} == expected
    assert 5 not in mappings
    assert_sound(device, {FRESH_DATA_BLOCK + 1: 1})


NOT_INTEGERS: dict[str, Callable[[PoolMetadata, ThinDevice], object]] = {
    "insert_block at a float": lambda pool, thin: thin.insert_block(1.5, FRESH_DATA_BLOCK),  # type: ignore[arg-type]
    "insert_block of a float": lambda pool, thin: thin.insert_block(1, float(FRESH_DATA_BLOCK)),  # type: ignore[arg-type]
    "insert_block at a string": lambda pool, thin: thin.insert_block("1", FRESH_DATA_BLOCK),  # type: ignore[arg-type]
    "insert_block of a string": lambda pool, thin: thin.insert_block(1, "5"),  # type: ignore[arg-type]
    "insert_block at None": lambda pool, thin: thin.insert_block(None, FRESH_DATA_BLOCK),  # type: ignore[arg-type]
    "insert_blocks at a float": lambda pool, thin: thin.insert_blocks([1.5], [FRESH_DATA_BLOCK]),  # type: ignore[list-item]
    "insert_blocks of a string": lambda pool, thin: thin.insert_blocks([1], ["5"]),  # type: ignore[list-item]
    "lookup_blocks of floats": lambda pool, thin: thin.lookup_blocks([0.7]),  # type: ignore[list-item]
    "lookup_blocks of a string": lambda pool, thin: thin.lookup_blocks("12"),  # type: ignore[arg-type]
    "find_block of a float": lambda pool, thin: thin.find_block(1.0),  # type: ignore[arg-type]
    "find_mapped_range of floats": lambda pool, thin: thin.find_mapped_range(0.5, 1.5),  # type: ignore[arg-type]
    "remove_block of a float": lambda pool, thin: thin.remove_block(1.0),  # type: ignore[arg-type]
    "remove_range of floats": lambda pool, thin: thin.remove_range(0.5, 1.5),  # type: ignore[arg-type]
    "provision of floats": lambda pool, thin: thin.provision(2000.0, 2.0),  # type: ignore[arg-type]
    "create_thin of a float": lambda pool, thin: pool.create_thin(50.0),  # type: ignore[arg-type]
    "create_thin of a string": lambda pool, thin: pool.create_thin("50"),  # type: ignore[arg-type]
    "create_snap of a float": lambda pool, thin: pool.create_snap(50.0, 0),  # type: ignore[arg-type]
    "create_snap from a float": lambda pool, thin: pool.create_snap(50, 0.0),  # type: ignore[arg-type]
    "delete_thin_device of a float": lambda pool, thin: pool.delete_thin_device(3.0),  # type: ignore[arg-type]
    "open_thin_device of a float": lambda pool, thin: pool.open_thin_device(3.0),  # type: ignore[arg-type]
    "block_is_used of a float": lambda pool, thin: pool.block_is_used(1.0),  # type: ignore[arg-type]
    "inc_data_range of floats": lambda pool, thin: pool.inc_data_range(0.0, 1.0),  # type: ignore[arg-type]
    "dec_data_range of floats": lambda pool, thin: pool.dec_data_range(3900.0, 3901.0),  # type: ignore[arg-type]
    "set_transaction_id to a float": lambda pool, thin: pool.set_transaction_id(5, 6.0),  # type: ignore[arg-type]
    "set_transaction_id from a float": lambda pool, thin: pool.set_transaction_id(5.0, 6),  # type: ignore[arg-type]
    "resize_data_dev to a float": lambda pool, thin: pool.resize_data_dev(NR_DATA_BLOCKS + 0.5),  # type: ignore[arg-type]
    "resize_metadata_dev to a float": lambda pool, thin: pool.resize_metadata_dev(140.5),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def undisturbed(sound: bytes) -> bytes:
    """What a small transaction makes of the device when nobody interferes."""
    device, pool, thin = opened(sound)
    thin.provision(7000, 1)
    thin.provision(7001, 2)
    pool.commit()
    return device.contents()


@pytest.mark.parametrize("call", NOT_INTEGERS)
def test_what_is_no_integer_is_a_type_error_and_changes_nothing(sound: bytes, undisturbed: bytes, call: str) -> None:
    device, pool, thin = opened(sound)
    thin.provision(7000, 1)
    with pytest.raises(TypeError):
        NOT_INTEGERS[call](pool, thin)
    thin.provision(7001, 2)
    pool.commit()
    assert device.contents() == undisturbed


@pytest.mark.parametrize("source", [5, None, 1.5, object()])
def test_opening_what_is_neither_path_nor_device_is_a_type_error(source: object) -> None:
    for call in (PoolMetadata.open, PoolMetadata.open_metadata_snap, lambda d: PoolMetadata.format(d, 128)):
        with pytest.raises(TypeError, match=type(source).__name__):
            call(source)  # type: ignore[arg-type]


# The pre-commit callback


def test_failure_that_the_pre_commit_callback_swallows_stops_the_commit(sound: bytes) -> None:
    """Half a remove_range was committed, because the callback did not let its error through."""
    device, pool, thin = opened(sound)
    thin.provision(7000, 1)

    def careless() -> None:
        forget_what_is_clean(pool, device)
        device.on("read").fail()
        with pytest.raises(ThinError) as inner:
            thin.remove_range(0, 100)
        assert inner.value.errno == errno.EIO
        device.clear()

    pool.register_pre_commit_callback(careless)
    with pytest.raises(ThinError, match="abort") as caught:
        pool.commit()
    assert caught.value.errno == errno.EINVAL
    assert device.contents() == sound
    pool.register_pre_commit_callback(None)
    pool.abort()
    thin.provision(7000, 1)
    pool.commit()
    assert_sound(device, OWNED)


# Opening


def test_file_opened_for_appending_is_refused(tmp_path: Path, sound: bytes) -> None:
    """Linux appends whatever offset pwrite is given: a commit once went to the end of the file."""
    path = tmp_path / "pool"
    path.write_bytes(sound)
    with open(path, "a+b") as file:
        for call in (PoolMetadata.open, FileDevice.of_open_file, lambda f: PoolMetadata.format(f, 128)):
            with pytest.raises(OSError, match="append") as caught:
                call(file)
            assert caught.value.errno == errno.EINVAL
    assert path.read_bytes() == sound


def test_locked_file_is_device_busy(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "pool"
    path.write_bytes(sound)
    with PoolMetadata.open(path):
        for call in (PoolMetadata.open, lambda p: PoolMetadata.format(p, 128)):
            with pytest.raises(DeviceBusy, match=path.name) as caught:
                call(path)
            assert caught.value.errno == errno.EBUSY


def test_pool_opened_read_only_stays_so(sound: bytes) -> None:
    device = FaultyMemory(sound)
    pool = PoolMetadata.open(device, read_only=True)
    with pytest.raises(ReadOnly) as caught:
        pool.set_read_write()
    assert caught.value.errno == errno.EPERM
    assert pool.is_read_only
    with pytest.raises(ReadOnly):
        pool.create_thin(50)
    with pytest.raises(ReadOnly):
        pool.set_needs_check()
    pool.close()
    assert not device.ops("write")


def test_features_that_allow_reading_only_cannot_be_got_round(sound: bytes) -> None:
    """A newer kernel's pool opened read-only and then switched would have been written by who does not know how."""
    surgeon = Surgeon(sound)
    surgeon.superblock(compat_ro_flags=4)
    device = FaultyMemory(surgeon.content())
    with pytest.raises(Corrupt, match="reading only"):
        PoolMetadata.open(device)
    with PoolMetadata.open(device, read_only=True) as pool, pool.open_thin_device(0) as thin:
        with pytest.raises(ReadOnly):
            pool.set_read_write()
        with pytest.raises(ReadOnly):
            thin.remove_block(0)
        pool.abort()
        with pytest.raises(ReadOnly):
            pool.set_read_write()
        assert thin.find_block(0)
    assert device.contents() == surgeon.content()


@pytest.mark.parametrize(
    ("nr_data_blocks", "number"),
    [(-5, errno.EINVAL), ((1 << 40) + 1, errno.EINVAL), (1 << 41, errno.EINVAL), (16320 * 3000, errno.ENOSPC)],
)
def test_refused_format_leaves_block_0_zero(nr_data_blocks: int, number: int) -> None:
    """The second attempt, with better numbers, once found a pool that nobody had asked for."""
    calls: list[Callable[[MemoryDevice, int], PoolMetadata]] = [
        lambda device, n: PoolMetadata.format(device, 128, n),
        lambda device, n: PoolMetadata.open(device, 128, format_device=True, nr_data_blocks=n),
    ]
    for make in calls:
        device = MemoryDevice(64 * BLOCK)
        with pytest.raises(ThinError) as caught:
            make(device, nr_data_blocks)
        assert caught.value.errno == number
        assert device.contents()[:BLOCK] == bytes(BLOCK)
        with make(device, 10) as pool:
            assert pool.data_dev_size == 10
        assert_sound(device)


@pytest.mark.parametrize("bad", [1.5, "9"])
def test_format_with_what_is_no_number_leaves_block_0_zero(bad: object) -> None:
    device = MemoryDevice(64 * BLOCK)
    with pytest.raises(TypeError):
        PoolMetadata.format(device, 128, bad)  # type: ignore[arg-type]
    assert device.contents()[:BLOCK] == bytes(BLOCK)


# Interrupts


class InterruptAtCall:
    """KeyboardInterrupt when Python enters function number *number* of the package, counted from 0."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOTS):
            self.left -= 1
            if self.left == -1:
                self.where = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                sys.setprofile(None)
                raise KeyboardInterrupt

    def during(self, call: Callable[[], object]) -> BaseException | None:
        """Do it; returns what it raised."""
        # What the collector would finalize now belongs to other tests, and swallows what is raised in it.
        gc.disable()
        sys.setprofile(self)
        try:
            call()
        except BaseException as error:
            return error
        finally:
            sys.setprofile(None)
            gc.enable()
        return None


PACKAGES = "bufio", "persistent_data", "thinpool"
ROOTS = tuple(os.path.dirname(sys.modules[package].__file__ or "") + os.sep for package in PACKAGES)


def change_much(pool: PoolMetadata, thin: ThinDevice) -> None:
    """A transaction that leaves a finger in a shadowed leaf."""
    pool.create_thin(8)
    thin.remove_range(100, 150)
    for block in range(7000, 7010):
        thin.insert_block(block, pool.alloc_data_block())


def after_change(sound: bytes) -> Content:
    """What is there once :func:`change_much` is committed."""
    device, pool, thin = opened(sound)
    change_much(pool, thin)
    pool.commit()
    return content_of(device.contents())


def assert_recovers(device: FaultyMemory, pool: PoolMetadata, thin: ThinDevice, *expected: Content) -> None:
    """A failed pool refuses to go on, returns to one of *expected* by an abort, and works from there."""
    assert_sound(MemoryDevice(device.contents()), OWNED)
    for call in (pool.commit, lambda: pool.create_thin(60), lambda: thin.provision(8000, 1)):
        with pytest.raises(ThinError, match="abort") as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    pool.abort()
    found = content_of(device.contents())
    assert found in expected
    assert {run.thin_begin for run in thin.mappings()} <= found.mappings[0].keys()
    assert thin.mapped_count == len(found.mappings[0])
    go_on(device, pool, thin)


def go_on(device: FaultyMemory, pool: PoolMetadata, thin: ThinDevice) -> None:
    """Do some more; at no time does that hurt what is committed."""
    thin.insert_block(7010, pool.alloc_data_block())
    thin.remove_block(7)
    pool._storage.bm.begin_operation()
    pool._storage.bm.client.write_dirty_buffers()
    assert_sound(MemoryDevice(device.contents()), OWNED)
    pool.commit()
    found = content_of(device.contents())
    assert 7010 in found.mappings[0]
    assert 7 not in found.mappings[0]
    assert_sound(device, OWNED)


def test_interrupt_at_the_end_of_a_commit_leaves_a_failed_pool(sound: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superblock was written, but the handle kept its finger: the next insert changed a committed leaf in place."""
    device, pool, thin = opened(sound)
    change_much(pool, thin)

    def note_commit(self: Handle) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "note_commit", note_commit)
        with pytest.raises(KeyboardInterrupt):
            pool.commit()
    assert_recovers(device, pool, thin, after_change(sound))


def test_interrupt_within_an_abort_leaves_a_failed_pool(sound: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of the cache forgotten the transaction was open again, and could be committed."""
    device, pool, thin = opened(sound)
    change_much(pool, thin)
    destroy = Core.destroy
    calls = 0

    def impatient(self: Core, buffer: CachedBlock) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        destroy(self, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(Core, "destroy", impatient)
        with pytest.raises(KeyboardInterrupt):
            pool.abort()
    assert_recovers(device, pool, thin, content_of(sound))


def test_abort_may_be_interrupted_as_often_as_one_likes(sound: bytes) -> None:
    device, pool, thin = opened(sound)
    change_much(pool, thin)
    for block in (0, *range(1, 8)):
        device.on("read", blocks=[block]).call(interrupt)
        try:
            pool.abort()
        except KeyboardInterrupt:
            device.clear()
            with pytest.raises(ThinError, match="abort"):
                pool.commit()
    device.on("read").call(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.abort()
    device.clear()
    assert_recovers(device, pool, thin, content_of(sound))


class ImpatientLock:
    """A lock whose release number *number* is followed at once by an interrupt."""

    def __init__(self, lock: object, number: int) -> None:
        self._lock = lock
        self._left = number

    def acquire(self) -> bool:
        return self._lock.acquire()  # type: ignore[attr-defined,no-any-return]

    def release(self) -> None:
        self._lock.release()  # type: ignore[attr-defined]
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt

    def __enter__(self) -> bool:
        return self._lock.__enter__()  # type: ignore[attr-defined,no-any-return]

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(*exc)  # type: ignore[attr-defined]


@pytest.mark.parametrize("number", [1, 2])
def test_interrupt_between_unlocking_and_writing_forgets_no_buffer(sound: bytes, number: int) -> None:
    """It came right before the superblock was written, which then counted as being written for ever."""
    device, pool, thin = opened(sound)
    change_much(pool, thin)
    core = pool._storage.bm.client._core
    lock = core.lock
    core.lock = ImpatientLock(lock, number)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        pool.commit()
    core.lock = lock
    assert_recovers(device, pool, thin, content_of(sound))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["commit", "abort"])
def test_interrupt_at_any_call_leaves_one_commit_or_the_other(sound: bytes, what: str) -> None:
    """Each function that a commit, or an abort, enters is once the one that is never entered."""
    allowed = content_of(sound), after_change(sound)
    number = 0
    while True:
        device, pool, thin = opened(sound)
        change_much(pool, thin)
        interrupt = InterruptAtCall(number)
        error = interrupt.during(getattr(pool, what))
        if not interrupt.where:
            assert error is None
            break
        assert isinstance(error, KeyboardInterrupt), interrupt.where
        assert content_of(device.contents()) in allowed, interrupt.where
        try:
            pool.create_thin(70)
        except ThinError:
            assert_recovers(device, pool, thin, *allowed)
        else:
            # Nothing had begun, or all was done.
            go_on(device, pool, thin)
        number += 1
    assert number > 30


def test_query_interrupted_at_any_call_can_be_repeated(many_bitmaps: bytes) -> None:
    """A block whose read was interrupted must not stay in the cache as if it had been read."""
    number = 0
    while True:
        _, pool, thin = opened(many_bitmaps, cache_bytes=1)
        interrupt = InterruptAtCall(number)
        interrupt.during(lambda pool=pool: pool.block_is_used(LAST_BITMAP + 1))  # type: ignore[misc]
        if not interrupt.where:
            break
        assert not pool.block_is_used(LAST_BITMAP + 1), interrupt.where
        thin.insert_block(0, pool.alloc_data_block())
        number += 1
    assert number > 30


def test_queries_after_an_interrupted_abort_show_the_last_commit(sound: bytes) -> None:
    """They must not follow roots of the transaction whose blocks were just forgotten."""
    for number in range(0, 60, 3):
        _, pool, thin = opened(sound)
        expected = list(thin.mappings())
        change_much(pool, thin)
        interrupt = InterruptAtCall(number)
        interrupt.during(pool.abort)
        if pool._failure is not None:
            assert list(thin.mappings()) == expected, interrupt.where
            assert set(pool.devices()) == {0, 1, 2, 3}, interrupt.where


# provision


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["alloc_data_block", "insert_block"])
def test_provision_that_is_interrupted_leaves_a_failed_pool_not_leaked_blocks(
    sound: bytes, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], name: str
) -> None:
    """Blocks that it had allocated and not yet mapped were committed as in use, by nobody."""
    device, pool, thin = opened(sound)
    owner = PoolMetadata if name == "alloc_data_block" else ThinDevice
    original = getattr(owner, name)
    calls = 0

    def limited(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        with pytest.raises(error):
            thin.provision(7000, 10)
    assert_recovers(device, pool, thin, content_of(sound))


def test_provision_of_more_than_there_is_fails_at_once(sound: bytes) -> None:
    """A range of 2^50 blocks was first written down block by block."""
    device, pool, thin = opened(sound)
    for begin, length in ((7000, 1 << 50), (0, 1 << 64), (0, NR_DATA_BLOCKS + 400)):
        with pytest.raises(OutOfSpace):
            thin.provision(begin, length)
    thin.provision(7000, 1)
    pool.commit()
    assert_sound(device, OWNED)
    assert len(content_of(device.contents()).mappings[0]) == len(content_of(sound).mappings[0]) + 1


def test_provision_that_takes_the_last_block_succeeds(sound: bytes) -> None:
    """What is mapped already needs no block: the shortage is counted without it."""
    device, pool, thin = opened(sound)
    free = pool.free_block_count
    thin.provision(0, 403 + free)
    assert pool.free_block_count == 0
    with pytest.raises(OutOfSpace):
        thin.provision(0, 404 + free)
    pool.commit()
    assert_sound(device, OWNED)


# Many blocks at once, closed devices, long runs


def test_insert_blocks_that_frees_a_block_it_still_needs_is_refused_whole(sound: bytes) -> None:
    """Mapping thin block 0 again gives up its first data block, which the third pair names: two pairs were mapped."""
    device, pool, thin = opened(sound)
    a, b = FRESH_DATA_BLOCK, FRESH_DATA_BLOCK + 1
    with pytest.raises(ThinError, match="free") as caught:
        thin.insert_blocks([3000, 3000, 3001], [a, b, a])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(NotMapped):
        thin.find_block(3000)
    pool.commit()
    assert content_of(device.contents()) == content_of(sound)
    thin.insert_blocks([3000, 3001, 3000, 3002], [a, b, a, a + 2])
    assert [result and result.block for result in thin.lookup_blocks([3000, 3001, 3002])] == [a, b, a + 2]


def test_lookup_of_no_blocks_on_a_closed_device_is_an_error(sound: bytes) -> None:
    _, _, thin = opened(sound)
    assert thin.lookup_blocks([]) == []
    thin.close()
    with pytest.raises(ThinError, match="closed"):
        thin.lookup_blocks([])


def test_find_mapped_range_over_a_long_run_borrows_few_buffers() -> None:
    """All leaves of a run of any length were in memory at the end, whatever the cache was allowed."""
    device = MemoryDevice(2048 * BLOCK)
    with PoolMetadata.format(device, 128, MANY_LEAVES + 10) as pool:
        pool.create_thin(0)
        with pool.open_thin_device(0) as thin:
            thin.provision(0, MANY_LEAVES)
    pool = PoolMetadata.open(device, cache_bytes=1)
    thin = pool.open_thin_device(0)
    assert thin.find_mapped_range(0, 1 << 64)[:2] == (0, MANY_LEAVES)
    assert pool.stats.cached <= 16


def test_data_map_that_grows_by_many_bitmaps_borrows_few_buffers() -> None:
    pool = PoolMetadata.format(MemoryDevice(2048 * BLOCK), 128, cache_bytes=1)
    pool.resize_data_dev(ENTRIES_PER_BITMAP * 500)
    assert pool.stats.cached <= 24


def test_free_blocks_are_never_fewer_than_none() -> None:
    """Blocks of the transaction that gives a pool its first ones are in use before the committed count knows them."""
    pool = PoolMetadata.format(MemoryDevice(64 * BLOCK), 128)
    pool.resize_data_dev(100)
    assert pool.free_block_count == 0
    pool.alloc_data_block()
    assert pool.free_block_count == 0
    pool.commit()
    assert pool.free_block_count == 99


# Iterations


def test_delta_notices_that_a_mapping_was_overwritten_meanwhile(sound: bytes) -> None:
    """Neither root nor number of mappings tells: the leaf was shadowed already, and the block mapped already."""
    _, pool, thin = opened(sound)
    for block in range(30000, 31000, 2):
        thin.provision(block, 1)
    with pool.open_thin_device(2) as other:
        differences = delta(thin, other)
        next(differences)
        thin.insert_block(30000, pool.alloc_data_block())
        with pytest.raises(ThinError, match="changed") as caught:
            list(differences)
        assert caught.value.errno == errno.EINVAL


def test_mappings_yields_what_is_before_a_bad_entry_of_the_same_leaf(sound: bytes) -> None:
    surgeon = Surgeon(sound)
    good = content_of(sound).mappings[0]
    leaf = surgeon.leaves(surgeon.device_root(0))[0]
    node = surgeon.image.node(leaf)
    at = len(node.keys) // 2
    surgeon.value(leaf, at, (NR_DATA_BLOCKS + 3) << 24)
    pool = PoolMetadata.open(surgeon.device())
    found: list[int] = []

    def collect() -> None:
        for run in pool.open_thin_device(0).mappings():
            for step in range(run.length):
                assert good[run.thin_begin + step] == (run.data_begin + step, run.time)
                found.append(run.thin_begin + step)

    with pytest.raises(Corrupt, match=f"thin block {node.keys[at]} ") as caught:
        collect()
    assert caught.value.block == leaf
    assert found == list(node.keys[:at])
