"""What is peculiar to files and to memory; what all devices have in common is in test_device_contract.py."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from bufio import FileDevice, MemoryDevice, SyncEngine
from bufio.memory import Parameters, Slab
from bufio.testing import Call
from tests.support.devices import FaultyMemory

if TYPE_CHECKING:
    from pathlib import Path


SIZE = 16 * 4096
CONTENT = bytes(range(256)) * (SIZE // 256)


def test_memory_beyond_the_end_cannot_be_written() -> None:
    device = MemoryDevice(100)
    with pytest.raises(OSError, match="beyond the end") as caught:
        device.pwrite(b"12345", 98)
    assert caught.value.errno == errno.EIO
    device.grow(200)
    device.pwrite(b"12345", 98)
    assert device.contents()[98:103] == b"12345"


# Files


def test_file_that_grows_is_larger_at_once(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(CONTENT)
    with FileDevice(path) as device:
        os.truncate(path, 2 * SIZE)
        assert device.size_bytes == 2 * SIZE


def test_file_that_grows_can_be_written_further_at_once(tmp_path: Path) -> None:
    """The end that a write may not pass is not that of the moment when the file was opened."""
    path = tmp_path / "device"
    path.write_bytes(CONTENT)
    with FileDevice(path) as device:
        with pytest.raises(OSError, match="beyond the end"):
            device.pwrite(b"x", SIZE)
        os.truncate(path, 2 * SIZE)
        device.pwrite(b"x" * SIZE, SIZE)
    assert path.read_bytes() == CONTENT + b"x" * SIZE


def test_neither_file_nor_block_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(OSError, match="Not a block device") as caught:
            FileDevice(path)
        assert caught.value.errno == errno.EINVAL
    with open("/dev/null", "rb") as file, pytest.raises(OSError, match="Not a block device"):
        FileDevice.of_open_file(file)
    with pytest.raises(FileNotFoundError):
        FileDevice(tmp_path / "missing")


@pytest.mark.parametrize(("first", "second", "can_meet"), [(0, 0, False), (0, 1, False), (1, 0, False), (1, 1, True)])
def test_exclusive_users_meet_only_if_both_read(tmp_path: Path, first: int, second: int, can_meet: bool) -> None:
    path = tmp_path / "device"
    path.write_bytes(CONTENT)
    with FileDevice(path, read_only=bool(first), exclusive=True):
        if can_meet:
            FileDevice(path, read_only=bool(second), exclusive=True).close()
        else:
            with pytest.raises(OSError, match="locked") as caught:
                FileDevice(path, read_only=bool(second), exclusive=True)
            assert caught.value.errno == errno.EBUSY
        FileDevice(path).close()  # who does not ask for it is not kept out
    FileDevice(path, exclusive=True).close()


def test_closing_twice_is_fine_and_the_given_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.write_bytes(CONTENT)
    with open(path, "r+b") as file:
        device = FileDevice.of_open_file(file)
        device.close()
        device.close()
        assert file.read(4) == CONTENT[:4]


# The engine


def scripted() -> FaultyMemory:
    return FaultyMemory(CONTENT)


def requests(*blocks: int) -> list[tuple[int, memoryview]]:
    return [(block * 4096, memoryview(bytearray(4096))) for block in blocks]


def test_neighbours_become_one_call() -> None:
    device = scripted()
    engine = SyncEngine()
    wanted = requests(1, 2, 3, 5, 7, 8)
    assert engine.read(device, wanted) == [None] * 6
    assert device.log == [Call("read", 4096, 3 * 4096), Call("read", 5 * 4096, 4096), Call("read", 7 * 4096, 2 * 4096)]
    assert engine.calls == 3
    assert [bytes(view) for _, view in wanted] == [CONTENT[at : at + 4096] for at, _ in wanted]


def test_a_call_is_bounded() -> None:
    device = FaultyMemory(4 << 20)
    SyncEngine().write(device, requests(*range(1000)))
    assert max(length for _, length in device.ops("write")) <= 1 << 20
    assert sum(length for _, length in device.ops("write")) == 1000 * 4096


def test_bad_block_does_not_take_its_neighbours_with_it() -> None:
    device = scripted()
    device.on("write", blocks=[2]).fail()
    data = [(block * 4096, memoryview(bytes([block]) * 4096)) for block in (1, 2, 3)]
    results = SyncEngine().write(device, data)
    assert [result is None for result in results] == [True, False, True]
    assert results[1] is not None
    assert results[1].errno == errno.EIO
    written = device.contents()
    assert written[4096:8192] == bytes([1]) * 4096
    assert written[8192:12288] == CONTENT[8192:12288]
    assert written[12288:16384] == bytes([3]) * 4096


# Memory


def test_slab_gives_each_taker_memory_of_its_own() -> None:
    slab = Slab(4096)
    views = [slab.take() for _ in range(600)]
    for at, view in enumerate(views):
        view[:] = at.to_bytes(2, "little") * 2048
    assert all(view == at.to_bytes(2, "little") * 2048 for at, view in enumerate(views))
    for view in views[::2]:
        slab.give_back(view)
    again = [slab.take() for _ in range(300)]
    kept = views[1::2]
    for view in again:
        view[:] = bytes(4096)
    assert all(view == (2 * at + 1).to_bytes(2, "little") * 2048 for at, view in enumerate(kept))


def test_limit_is_divided_among_those_who_share_it() -> None:
    class Sharer:
        def __init__(self) -> None:
            self.told = 0

        def limit_changed(self) -> None:
            self.told += 1

    parameters = Parameters()
    parameters.max_cache_size_bytes = 1000
    one, two = Sharer(), Sharer()
    parameters.join(one)
    assert parameters.share_bytes() == 1000
    parameters.join(two)
    assert parameters.share_bytes() == 500
    assert one.told == 2
    parameters.max_cache_size_bytes = 600
    assert (parameters.share_bytes(), one.told, two.told) == (300, 3, 2)
    parameters.leave(two)
    assert parameters.share_bytes() == 600
    assert one.told == 4


@pytest.mark.parametrize("size", [0, -1])
def test_limit_has_to_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        Parameters().max_cache_size_bytes = size


def test_account_knows_its_peak() -> None:
    parameters = Parameters()
    parameters.account(500)
    parameters.account(-200)
    assert (parameters.current_allocated_bytes, parameters.peak_allocated_bytes) == (300, 500)
