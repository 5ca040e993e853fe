"""One contract for every device: what the cache may rely on, whichever it stands on."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from bufio import FileDevice, MemoryDevice
from bufio.testing import CrashDevice, FaultyDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bufio import Device

NR_UNITS = 1600
MORE_THAN_IOV_MAX = 1500  # Linux takes 1024 buffers at once
DEADLINE = 20.0  # seconds
PAGE = 4096
ODD = 700
"""Bytes; neither a power of two nor a multiple of a sector."""

ROOT = Path(__file__).resolve().parents[3]


class Case(NamedTuple):
    """A device, and the length in bytes that offsets, lengths and addresses are multiples of in these tests."""

    device: Device
    unit: int
    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)


def content_of(size: int) -> bytes:
    """No two units are alike."""
    return array("I", range(size // 4)).tobytes()


def takes_direct_access(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return True


def direct_file(path: Path, content: bytes) -> Iterator[FileDevice]:
    """A file opened with O_DIRECT, in the checkout when the file system of *path* cannot."""
    path.write_bytes(content)
    if takes_direct_access(path):
        with FileDevice(path, direct=True) as device:
            yield device
        return
    cache = ROOT / ".pytest_cache"
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        other = Path(directory) / path.name
        other.write_bytes(content)
        if not takes_direct_access(other):
            pytest.skip(f"no O_DIRECT on the file systems of {path.parent} and {cache}")
        with FileDevice(other, direct=True) as device:
            yield device


@pytest.fixture(params=["file", "direct file", "open file", "memory", "faulty file", "faulty memory", "crash"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    kind: str = request.param
    unit = PAGE if kind == "direct file" else ODD
    content = content_of(NR_UNITS * unit)
    path = tmp_path / "device"
    if kind == "direct file":
        for direct in direct_file(path, content):
            yield Case(direct, unit, content)
        return
    path.write_bytes(content)
    device: Device
    if kind == "file":
        device = FileDevice(path)
    elif kind == "open file":
        with open(path, "r+b") as file:
            device = FileDevice.of_open_file(file)
    elif kind == "faulty file":
        device = FaultyDevice(FileDevice(path))
    elif kind == "faulty memory":
        device = FaultyDevice(MemoryDevice(content))
    else:
        device = MemoryDevice(content) if kind == "memory" else CrashDevice(content)
    yield Case(device, unit, content)
    device.close()


@pytest.fixture(params=["file", "open file", "faulty file"])
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    path = tmp_path / "device"
    path.write_bytes(content_of(PAGE))
    device: Device
    if request.param == "open file":
        with open(path, "rb") as file:
            device = FileDevice.of_open_file(file)
    else:
        device = FileDevice(path, read_only=True)
        if request.param == "faulty file":
            device = FaultyDevice(device)
    yield device
    device.close()


def buffer(length: int, data: bytes = b"") -> memoryview:
    """Memory at the beginning of a page, as direct access wants it."""
    view = memoryview(mmap.mmap(-1, max(length, 1)))[:length]
    view[: len(data)] = data
    return view


def buffers(lengths: list[int]) -> list[memoryview]:
    """Consecutive pieces of one such buffer."""
    whole = buffer(sum(lengths))
    return [whole[sum(lengths[:at]) :][:length] for at, length in enumerate(lengths)]


def read(device: Device, offset: int, length: int) -> bytes:
    view = buffer(length)
    device.readinto(view, offset)
    return bytes(view)


def readv(device: Device, offset: int, lengths: list[int]) -> list[bytes]:
    views = buffers(lengths)
    device.preadv(views, offset)
    return [bytes(view) for view in views]


def filled(length: int, value: int) -> memoryview:
    return buffer(length, bytes([value]) * length)


def errno_of(device: Device, call: Callable[[], object]) -> int | None:
    """Of the error that *call* raises, in whose message the device is named."""
    with pytest.raises(OSError, match=r"cannot|short") as caught:
        call()
    assert device.name in str(caught.value)
    return caught.value.errno


def every_transfer(device: Device, offset: int, unit: int) -> list[Callable[[], object]]:
    """Two units read and written at *offset*, vectored and not."""
    return [
        lambda: read(device, offset, 2 * unit),
        lambda: readv(device, offset, [unit, unit]),
        lambda: device.pwrite(filled(2 * unit, 9), offset),
        lambda: device.pwritev([filled(unit, 9), filled(unit, 9)], offset),
    ]


def test_size_is_that_of_the_contents(case: Case) -> None:
    assert case.device.size_bytes == case.size
    assert not case.device.read_only
    assert case.device.name


@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 3), (NR_UNITS - 1, 1), (0, NR_UNITS)])
def test_read_gives_the_bytes_at_the_offset(case: Case, first: int, count: int) -> None:
    offset, length = first * case.unit, count * case.unit
    assert read(case.device, offset, length) == case.content[offset : offset + length]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 3), (NR_UNITS - 1, 1), (0, NR_UNITS)])
def test_what_was_written_is_read_and_nothing_beside_it_changes(case: Case, first: int, count: int) -> None:
    offset, length = first * case.unit, count * case.unit
    case.device.pwrite(filled(length, 0xAA), offset)
    expected = case.content[:offset] + b"\xaa" * length + case.content[offset + length :]
    assert read(case.device, 0, case.size) == expected
    assert case.device.size_bytes == case.size


def test_vectored_transfers_are_consecutive(case: Case) -> None:
    unit = case.unit
    case.device.pwritev([filled(unit, 1), buffer(0), filled(3 * unit, 2), filled(2 * unit, 3)], 5 * unit)
    found = readv(case.device, 4 * unit, [2 * unit, unit, 0, 5 * unit])
    before, after = case.content[4 * unit :][:unit], case.content[11 * unit :][:unit]
    written = bytes([1]) * unit + bytes([2]) * 3 * unit + bytes([3]) * 2 * unit
    assert b"".join(found) == before + written + after
    assert [len(part) for part in found] == [2 * unit, unit, 0, 5 * unit]


def test_more_buffers_than_the_system_takes_at_once(case: Case) -> None:
    unit = case.unit
    views = buffers([unit] * MORE_THAN_IOV_MAX)
    for at, view in enumerate(views):
        view[:2] = at.to_bytes(2, "big")
    case.device.pwritev(views, unit)
    found = readv(case.device, unit, [unit] * MORE_THAN_IOV_MAX)
    assert found == [bytes(view) for view in views]


def test_buffers_of_items_longer_than_a_byte_are_taken_by_their_bytes(case: Case) -> None:
    view = buffer(4 * case.unit).cast("I")
    case.device.readinto(view, case.unit)
    assert view.tobytes() == case.content[case.unit :][: 4 * case.unit]
    case.device.pwrite(view, 10 * case.unit)
    assert (
        read(case.device, 10 * case.unit, 5 * case.unit) == view.tobytes() + case.content[14 * case.unit :][: case.unit]
    )


@pytest.mark.parametrize("units_beyond", [-1, 0, 1000])
def test_what_reaches_beyond_the_end_is_eio(case: Case, units_beyond: int) -> None:
    offset = case.size + units_beyond * case.unit
    for call in every_transfer(case.device, offset, case.unit):
        assert errno_of(case.device, call) == errno.EIO
    assert errno_of(case.device, lambda: case.device.discard(offset, 2 * case.unit)) == errno.EIO
    assert case.device.size_bytes == case.size
    assert read(case.device, 0, case.size) == case.content


def test_negative_offset_is_einval(case: Case) -> None:
    for call in every_transfer(case.device, -case.unit, case.unit):
        assert errno_of(case.device, call) == errno.EINVAL
    assert errno_of(case.device, lambda: case.device.discard(-case.unit, case.unit)) == errno.EINVAL
    assert read(case.device, 0, case.size) == case.content


def test_nothing_can_be_transferred_anywhere_up_to_the_end(case: Case) -> None:
    for offset in (0, case.unit, case.size):
        case.device.readinto(buffer(0), offset)
        case.device.pwrite(buffer(0), offset)
        case.device.preadv([], offset)
        case.device.pwritev([buffer(0), buffer(0)], offset)
        case.device.discard(offset, 0)
    assert read(case.device, 0, case.size) == case.content


def test_flush_follows_writes_and_reads_alike(case: Case) -> None:
    case.device.flush()
    case.device.pwrite(filled(case.unit, 7), 0)
    case.device.flush()
    case.device.flush()
    assert read(case.device, 0, case.unit) == bytes([7]) * case.unit


def test_discarded_range_reads_as_zeroes_where_it_can_be_discarded(case: Case) -> None:
    unit = case.unit
    try:
        case.device.discard(2 * unit, 5 * unit)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP  # noqa: PT017  # not every file system can
        expected = case.content
    else:
        expected = case.content[: 2 * unit] + bytes(5 * unit) + case.content[7 * unit :]
    assert read(case.device, 0, case.size) == expected
    assert case.device.size_bytes == case.size


def test_closing_twice_is_closing_once(case: Case) -> None:
    case.device.close()
    case.device.close()


def test_device_is_a_context_manager(case: Case) -> None:
    assert isinstance(case.device, FileDevice | MemoryDevice | FaultyDevice)
    with case.device as device:
        assert device is case.device
    if isinstance(device, FileDevice):
        assert errno_of(device, lambda: read(device, 0, case.unit)) == errno.EBADF


def test_threads_see_each_transfer_whole(case: Case) -> None:
    unit = case.unit

    def work(mine: int) -> bool:
        """Write and read a range of its own, and look at one that another thread writes."""
        for round_number in range(20):
            value = 1 + round_number
            if round_number % 2:
                case.device.pwritev([filled(unit, value), filled(unit, value)], 4 * mine * unit)
            else:
                case.device.pwrite(filled(2 * unit, value), 4 * mine * unit)
            if read(case.device, 4 * mine * unit, 2 * unit) != bytes([value]) * 2 * unit:
                return False
            neighbour = read(case.device, 4 * (mine + 1) % 32 * unit + 2 * unit, unit)
            if neighbour != case.content[4 * (mine + 1) % 32 * unit + 2 * unit :][:unit]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8), timeout=DEADLINE))


# Without the right to write


def test_read_only_device_refuses_what_changes_and_can_be_read(read_only: Device) -> None:
    assert read_only.read_only
    for call in (
        lambda: read_only.pwrite(b"x" * 512, 0),
        lambda: read_only.pwritev([b"x" * 512], 0),
        lambda: read_only.discard(0, 512),
    ):
        assert errno_of(read_only, call) in (errno.EBADF, errno.EPERM)
    assert read(read_only, 0, PAGE) == content_of(PAGE)
