"""What is peculiar to files and to memory; what all devices have in common is in test_device_contract.py."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from bufio import FileDevice, MemoryDevice

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


def test_memory_is_written_from_a_view_of_any_items() -> None:
    device = MemoryDevice(100)
    for items in (
        memoryview(b"12345678"),
        memoryview(b"12345678").cast("Q"),
        memoryview(b"12345678").cast("B", (2, 4)),
    ):
        device.pwrite(bytes(8), 92)
        device.pwrite(items, 92)
        assert device.contents()[92:] == b"12345678"
        with pytest.raises(OSError, match="beyond the end"):
            device.pwrite(items, 93)


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
