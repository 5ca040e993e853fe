"""Blocks: their kinds, who may touch them when, and what is put into them when they are written."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import pytest

from bufio import HoldError
from bufio.testing import Call
from persistent_data.block_manager import BITMAP, METADATA_INDEX, BlockManager, Validator
from persistent_data.errors import CorruptMetadata, InvalidArgument, ReadOnlyMetadata, WouldBlock
from tests.support.devices import FaultyMemory
from tests.support.image import SALTS, Image, raw_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

SIZE = 4096
DEADLINE = 20  # seconds
KIND = Validator("test block", 0xABCD)


def sealed(block: int, fill: int, salt: int = KIND.salt) -> bytes:
    """A block as it is on the device: full of one byte, with its number and a checksum."""
    data = bytearray([fill]) * SIZE
    data[8:16] = block.to_bytes(8, "little")
    data[0:4] = (raw_checksum(bytes(data)) ^ salt).to_bytes(4, "little")
    return bytes(data)


@pytest.fixture
def device() -> FaultyMemory:
    return FaultyMemory(b"".join(sealed(block, block) for block in range(32)))


@pytest.fixture
def bm(device: FaultyMemory) -> Iterator[BlockManager]:
    bm = BlockManager(device)
    yield bm
    bm.close(write=False)


@pytest.fixture
def other() -> Iterator[ThreadPoolExecutor]:
    """One other thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def result_of(future: Future[T]) -> T:
    return future.result(DEADLINE)


# Kinds


def test_block_is_checked_when_it_is_first_read_and_not_again(device: FaultyMemory, bm: BlockManager) -> None:
    view = bm.read_lock(3, KIND)
    assert (view.block, view.data[100]) == (3, 3)
    view.data[200] ^= 1  # a checksum that is looked at again would be wrong now
    bm.unlock(view)
    again = bm.read_lock(3, KIND)
    assert again is view
    bm.unlock(again)
    assert device.ops("read") == [(3 * SIZE, SIZE)]


def test_block_with_a_bad_checksum_is_eilseq(device: FaultyMemory, bm: BlockManager) -> None:
    device.pwrite(b"\0", 3 * SIZE + 2000)
    for _ in range(2):
        with pytest.raises(CorruptMetadata, match="bad checksum in test block") as caught:
            bm.read_lock(3, KIND)
        assert caught.value.errno == errno.EILSEQ
        assert caught.value.block == 3
    assert bm.client.stats.held == 0


def test_block_of_another_place_is_enotblk(device: FaultyMemory, bm: BlockManager) -> None:
    device.pwrite(sealed(4, 4, SALTS["node"]), 3 * SIZE)
    with pytest.raises(CorruptMetadata, match="belongs to block 4") as caught:
        bm.borrow(3, KIND)
    assert caught.value.errno == errno.ENOTBLK
    assert caught.value.block == 3


def test_block_that_is_of_another_kind_on_the_device_is_named_as_that(device: FaultyMemory, bm: BlockManager) -> None:
    device.pwrite(sealed(3, 3, SALTS["node"]), 3 * SIZE)
    with pytest.raises(CorruptMetadata, match="expected a test block, found a btree node") as caught:
        bm.borrow(3, KIND)
    assert caught.value.errno == errno.EILSEQ


def test_block_known_as_one_kind_is_not_another(bm: BlockManager) -> None:
    bm.borrow(3, KIND)
    for call in (bm.borrow, bm.read_lock, bm.write_lock, bm.try_read_lock, bm.borrow_for_write):
        with pytest.raises(CorruptMetadata, match="expected a space map bitmap, found a test block") as caught:
            call(3, BITMAP)
        assert caught.value.errno == errno.EINVAL
    assert bm.client.stats.held == 0
    assert bm.client.stats.dirty == 0


def test_zeroing_a_block_changes_its_kind(device: FaultyMemory, bm: BlockManager) -> None:
    bm.borrow(3, KIND)
    view = bm.write_lock_zero(3, BITMAP)
    assert bytes(view.data) == bytes(SIZE)
    bm.unlock(view)
    with pytest.raises(CorruptMetadata):
        bm.borrow(3, KIND)
    bm.borrow_zeroed(5, METADATA_INDEX)
    assert device.ops("read") == [(3 * SIZE, SIZE)]
    bm.flush()
    image = Image.from_bytes(device.contents())
    assert (image.kind(3), image.kind(5)) == ("bitmap", "index")


@pytest.mark.parametrize("block", [-1, 32, 1 << 60])
def test_block_beyond_the_device_is_eio(device: FaultyMemory, bm: BlockManager, block: int) -> None:
    for call in (
        bm.borrow,
        bm.read_lock,
        bm.write_lock,
        bm.write_lock_zero,
        bm.borrow_zeroed,
        lambda block, kind: bm.is_all_zeroes(block),
    ):
        with pytest.raises(CorruptMetadata, match="beyond the end") as caught:
            call(block, KIND)
        assert caught.value.errno == errno.EIO
        assert caught.value.block == block
    assert device.log == []


def test_number_and_checksum_are_put_in_when_the_block_is_written(device: FaultyMemory, bm: BlockManager) -> None:
    view = bm.write_lock(3, KIND)
    view.data[8:] = bytes([77]) * (SIZE - 8)
    bm.unlock(view)
    assert device.contents()[3 * SIZE : 4 * SIZE] == sealed(3, 3)
    bm.flush()
    expected = bytearray(sealed(3, 77))
    assert device.contents()[3 * SIZE + 16 : 4 * SIZE] == expected[16:]
    fresh = BlockManager(device)
    assert fresh.borrow(3, KIND).data[100] == 77
    fresh.close()


def test_all_zeroes_says_nothing_about_the_kind(device: FaultyMemory, bm: BlockManager) -> None:
    device.pwrite(bytes(SIZE), 5 * SIZE)
    assert bm.is_all_zeroes(5)
    assert not bm.is_all_zeroes(3)
    assert bm.borrow(3, KIND).data[100] == 3
    with pytest.raises(CorruptMetadata):
        bm.borrow(5, KIND)
    assert bm.client.stats.held == 0


# Locks


def test_many_may_read_at_once(bm: BlockManager, other: ThreadPoolExecutor) -> None:
    views = [bm.read_lock(3, KIND), bm.read_lock(3, KIND), result_of(other.submit(bm.read_lock, 3, KIND))]
    assert bm.lock_count(views[0]) == 3
    assert bm.lock_count(bm.try_read_lock(3, KIND)) == 4
    for _ in range(4):
        bm.unlock(views[0])
    with pytest.raises(InvalidArgument, match="not locked") as caught:
        bm.unlock(views[0])
    assert caught.value.errno == errno.EINVAL


def waits_for_an_unlock(
    bm: BlockManager, other: ThreadPoolExecutor, take: Callable[[], object], unlock: Callable[[], None]
) -> None:
    """Have *take* done by the other thread, see that it does not return, and that it does after *unlock*."""
    begun = threading.Event()

    def task() -> object:
        begun.set()
        return take()

    taken = other.submit(task)
    assert begun.wait(DEADLINE)
    # It holds the buffer beside us as soon as it has come to the lock.
    while bm.client.stats.held and not taken.done() and hold_count(bm) < 2:
        pass
    assert not taken.done()
    unlock()
    result_of(taken)


def hold_count(bm: BlockManager) -> int:
    buffer = bm.peek(3)
    assert buffer is not None
    return buffer.hold_count


def test_writer_waits_for_a_reader(bm: BlockManager, other: ThreadPoolExecutor) -> None:
    view = bm.read_lock(3, KIND)
    waits_for_an_unlock(bm, other, lambda: bm.write_lock(3, KIND), lambda: bm.unlock(view))
    assert bm.lock_count(view) == -1


def test_reader_waits_for_a_writer(bm: BlockManager, other: ThreadPoolExecutor) -> None:
    view = bm.write_lock(3, KIND)
    waits_for_an_unlock(bm, other, lambda: bm.read_lock(3, KIND), lambda: bm.unlock(view))
    assert bm.lock_count(view) == 1


def test_writer_waits_for_a_writer(bm: BlockManager, other: ThreadPoolExecutor) -> None:
    view = bm.write_lock(3, KIND)
    waits_for_an_unlock(bm, other, lambda: bm.write_lock_zero(3, KIND), lambda: bm.unlock(view))
    assert bytes(view.data[16:]) == bytes(SIZE - 16)


def test_try_lock_does_not_wait_for_a_writer(bm: BlockManager, other: ThreadPoolExecutor) -> None:
    view = bm.write_lock(3, KIND)
    with pytest.raises(WouldBlock) as caught:
        result_of(other.submit(bm.try_read_lock, 3, KIND))
    assert caught.value.errno == errno.EWOULDBLOCK
    bm.unlock(view)
    assert result_of(other.submit(bm.try_read_lock, 3, KIND)) is view


def test_try_lock_does_no_io(device: FaultyMemory, bm: BlockManager) -> None:
    with pytest.raises(WouldBlock):
        bm.try_read_lock(3, KIND)
    assert device.log == []
    bm.prefetch(3, 2)
    assert device.log == [Call("read", 3 * SIZE, 2 * SIZE)]
    bm.unlock(bm.try_read_lock(3, KIND))
    bm.unlock(bm.try_read_lock(4, KIND))


def test_try_lock_does_not_wait_for_a_read(device: FaultyMemory, bm: BlockManager, other: ThreadPoolExecutor) -> None:
    gate = device.on("read").gate(DEADLINE)
    reader = other.submit(bm.read_lock, 3, KIND)
    gate.wait_for()
    with pytest.raises(WouldBlock):
        bm.try_read_lock(3, KIND)
    gate.open()
    assert bm.lock_count(result_of(reader)) == 1


@pytest.mark.parametrize("first", ["read_lock", "write_lock"])
@pytest.mark.parametrize("second", ["read_lock", "write_lock", "write_lock_zero", "try_read_lock"])
def test_lock_that_the_same_thread_has_is_refused_and_not_waited_for(bm: BlockManager, first: str, second: str) -> None:
    view = getattr(bm, first)(3, KIND)
    if first == "read_lock" and second in ("read_lock", "try_read_lock"):
        bm.unlock(getattr(bm, second)(3, KIND))
    else:
        with pytest.raises(InvalidArgument, match="already locked") as caught:
            getattr(bm, second)(3, KIND)
        assert caught.value.errno == errno.EINVAL
    assert view.buffer.hold_count == 1
    bm.unlock(view)
    assert bytes(view.data[16:]) == bytes([3]) * (SIZE - 16)


# Read-only mode, flush, close


def test_read_only_mode_refuses_what_changes(device: FaultyMemory, bm: BlockManager) -> None:
    view = bm.borrow(3, KIND)
    bm.read_only = True
    for call in (
        lambda: bm.write_lock(3, KIND),
        lambda: bm.write_lock_zero(3, KIND),
        lambda: bm.borrow_for_write(3, KIND),
        lambda: bm.borrow_zeroed(3, KIND),
        lambda: bm.borrow_copy(view, 4),
        lambda: bm.move(view, 4),
        bm.flush,
    ):
        with pytest.raises(ReadOnlyMetadata) as caught:
            call()
        assert caught.value.errno == errno.EPERM
    bm.unlock(bm.read_lock(3, KIND))
    assert not device.ops("write")
    bm.read_only = False
    bm.unlock(bm.write_lock(3, KIND))
    bm.flush()
    assert device.ops("write")


def test_write_error_is_raised_by_the_flush(device: FaultyMemory, bm: BlockManager) -> None:
    bm.unlock(bm.write_lock(3, KIND))
    device.on("write").fail()
    with pytest.raises(OSError, match="as told") as caught:
        bm.flush()
    assert caught.value.errno == errno.EIO
    device.clear()
    bm.flush()


def test_reset_returns_to_what_is_on_the_device(bm: BlockManager) -> None:
    bm.borrow_for_write(3, KIND).data[100] = 99
    bm.reset()
    assert bm.borrow(3, KIND).data[100] == 3


def test_close_writes_what_is_dirty_unless_told_otherwise(device: FaultyMemory) -> None:
    for write, expected in ((False, 3), (True, 99)):
        bm = BlockManager(device)
        bm.borrow_for_write(3, KIND).data[100] = 99
        bm.close(write=write)
        assert device.contents()[3 * SIZE + 100] == expected


def test_close_with_a_lock_names_the_block(bm: BlockManager) -> None:
    view = bm.read_lock(3, KIND)
    with pytest.raises(HoldError, match="3"):
        bm.close()
    bm.unlock(view)


def test_size_is_the_devices_at_this_moment(device: FaultyMemory, bm: BlockManager) -> None:
    assert bm.nr_blocks == 32
    device.grow(33 * SIZE + 100)
    assert bm.nr_blocks == 33


def test_forgotten_block_is_read_again(bm: BlockManager) -> None:
    bm.borrow_for_write(3, KIND).data[100] = 99
    bm.forget(3)
    assert bm.borrow(3, KIND).data[100] == 3
