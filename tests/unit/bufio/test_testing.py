"""The devices that fail and lose power do exactly what they were told to."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import pytest

from bufio import MemoryDevice
from bufio.testing import (
    Call,
    CrashDevice,
    CrashImage,
    Discard,
    FaultyDevice,
    Flush,
    GateTimeout,
    Grow,
    Mark,
    Write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SECTOR = 512
SIZE = 16 * 4096
CONTENT = bytes(range(256)) * (SIZE // 256)
DEADLINE = 20.0  # seconds
SOON = 0.01  # seconds, a deadline that is meant to pass


@pytest.fixture
def device() -> FaultyDevice[MemoryDevice]:
    return FaultyDevice(MemoryDevice(CONTENT))


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def read(device: Any, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    device.readinto(buffer, offset)
    return bytes(buffer)


def errno_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def written(device: FaultyDevice[MemoryDevice]) -> list[int]:
    """The sectors that are not as they were."""
    now = device.inner.contents()
    return [at for at in range(SIZE // SECTOR) if now[at * SECTOR :][:SECTOR] != CONTENT[at * SECTOR :][:SECTOR]]


# Which calls


def test_log_has_each_call_once_a_vectored_one_too(device: FaultyDevice[MemoryDevice]) -> None:
    device.pwritev([b"x" * 10, b"y" * 20], 100)
    device.preadv([bytearray(5), bytearray(6)], 7)
    read(device, 1, 2)
    device.pwrite(b"z", 3)
    device.flush()
    device.discard(4096, 512)
    assert device.log == [
        Call("write", 100, 30),
        Call("read", 7, 11),
        Call("read", 1, 2),
        Call("write", 3, 1),
        Call("flush"),
        Call("discard", 4096, 512),
    ]


def test_rule_is_for_its_kinds_alone(device: FaultyDevice[MemoryDevice]) -> None:
    rule = device.on("read", "flush").fail()
    device.pwrite(b"x", 0)
    device.discard(0, 512)
    assert errno_of(device.flush) == errno.EIO
    assert errno_of(lambda: read(device, 0, 1)) == errno.EIO
    assert rule.hits == 2


@pytest.mark.parametrize(
    ("offset", "length", "hit"),
    [(0, 4096, False), (0, 4097, True), (8191, 1, True), (8192, 4096, False), (0, 4 * 4096, True)],
)
def test_rule_is_for_calls_that_touch_its_range(
    device: FaultyDevice[MemoryDevice], offset: int, length: int, hit: bool
) -> None:
    by_bytes = device.on("write", begin=4096, end=8192).fail()
    by_blocks = device.on("read", blocks=[1, 9]).fail()
    assert errno_of(lambda: device.pwrite(bytes(length), offset)) == (errno.EIO if hit else None)
    assert errno_of(lambda: read(device, offset, length)) == (errno.EIO if hit else None)
    assert by_bytes.hits == by_blocks.hits == hit


def test_rule_can_be_for_the_second_and_third_call(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("flush", skip=1, times=2).fail()
    assert [errno_of(device.flush) for _ in range(5)] == [None, errno.EIO, errno.EIO, None, None]


def test_rules_are_removed_one_by_one_or_all(device: FaultyDevice[MemoryDevice]) -> None:
    first = device.on("flush").fail(errno.ENOSPC)
    device.on("flush").fail(errno.EIO)
    assert errno_of(device.flush) == errno.ENOSPC
    first.remove()
    first.remove()
    assert errno_of(device.flush) == errno.EIO
    device.clear()
    device.flush()


def test_chance_follows_from_the_seed() -> None:
    def failures(seed: int) -> list[int]:
        device = FaultyDevice(MemoryDevice(0), seed=seed)
        device.on("flush", chance=0.3).fail()
        return [at for at in range(200) if errno_of(device.flush) is not None]

    assert failures(1) == failures(1)
    assert failures(1) != failures(2)
    assert 30 < len(failures(1)) < 90


def test_what_makes_no_sense_is_refused(device: FaultyDevice[MemoryDevice]) -> None:
    calls: list[Callable[[], object]] = [
        device.on,
        lambda: device.on("write", blocks=[1], begin=5),
        lambda: device.on("seek"),  # type: ignore[arg-type]
        lambda: device.on("write").tear(first_bytes=1, sectors=[1]),
        lambda: device.on("flush").tear(),
        lambda: device.on("read", "write").lose(),
        lambda: device.on("flush").shorten(),
        lambda: device.on("discard").flip_bit(),
        lambda: device.on("flush").misdirect(512),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\w"):
            call()
    device.flush()


# What happens to them


def test_error_comes_before_anything_is_done_and_says_what_failed(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write", "discard").fail(errno.ENOSPC)
    with pytest.raises(OSError, match=r"write of 10 bytes at byte 5 failed as told.*'memory'") as caught:
        device.pwrite(b"x" * 10, 5)
    assert caught.value.errno == errno.ENOSPC
    assert errno_of(lambda: device.discard(0, SIZE)) == errno.ENOSPC
    assert device.inner.contents() == CONTENT


def test_error_can_come_when_everything_is_done(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").fail(afterwards=True)
    assert errno_of(lambda: device.pwrite(bytes(512), 512)) == errno.EIO
    assert written(device) == [1]


def test_torn_write_leaves_its_first_bytes(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").tear(first_bytes=700, error=errno.ENOSPC)
    assert errno_of(lambda: device.pwritev([b"x" * 600, b"y" * 600], 1000)) == errno.ENOSPC
    assert device.inner.contents() == CONTENT[:1000] + b"x" * 600 + b"y" * 100 + CONTENT[1700:]


def test_torn_write_leaves_the_sectors_chosen(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").tear(sectors=[5, 0, 99])
    assert errno_of(lambda: device.pwrite(b"\xff" * 4096, 4096)) == errno.EIO
    assert written(device) == [8, 13]


def test_torn_write_may_be_reported_as_done(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").tear(sectors=[], error=None)
    device.pwrite(b"\xff" * 4096, 4096)
    assert written(device) == []


def test_sectors_of_a_torn_write_follow_from_the_seed() -> None:
    def torn(seed: int) -> list[list[int]]:
        results = []
        device = FaultyDevice(MemoryDevice(CONTENT), seed=seed)
        device.on("write").tear()
        for _ in range(20):
            device.inner.pwrite(CONTENT, 0)
            assert errno_of(lambda: device.pwrite(b"\xff" * 4096, 0)) == errno.EIO
            results.append(written(device))
        return results

    assert torn(1) == torn(1)
    assert torn(1) != torn(2)
    assert all(len(sectors) < 8 for sectors in torn(1))
    assert set(chain(*torn(1))) == set(range(8))


def test_torn_write_of_one_sector_leaves_nothing(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").tear()
    for at in range(16):
        assert errno_of(lambda at=at: device.pwrite(b"\xff" * 512, at * 512)) == errno.EIO  # type: ignore[misc]
    assert written(device) == []


def test_torn_read_and_torn_discard_do_a_part(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read", "discard").tear(sectors=[1])
    buffers = [bytearray(700), bytearray(700)]
    assert errno_of(lambda: device.preadv(buffers, 0)) == errno.EIO
    assert b"".join(buffers) == bytes(512) + CONTENT[512:1024] + bytes(376)
    assert errno_of(lambda: device.discard(0, 700)) == errno.EIO
    assert device.inner.contents() == CONTENT[:512] + bytes(188) + CONTENT[700:]


def test_lost_calls_are_reported_as_done(device: FaultyDevice[MemoryDevice]) -> None:
    flushes: list[Call] = []
    below = FaultyDevice(device)
    device.on("flush").call(flushes.append)
    below.on("write", "discard", "flush", times=3).lose()
    below.pwrite(b"x" * 512, 0)
    below.discard(512, 512)
    below.flush()
    assert device.log == []
    below.flush()
    assert flushes == [Call("flush")]


def test_bit_is_flipped_on_the_way_in_or_out(device: FaultyDevice[MemoryDevice]) -> None:
    rule = device.on("read").flip_bit(8 * 600 + 3)
    buffers = [bytearray(512), bytearray(512)]
    device.preadv(buffers, 0)
    assert b"".join(buffers) == CONTENT[:600] + bytes([CONTENT[600] ^ 8]) + CONTENT[601:1024]
    assert read(device, 0, 600) == CONTENT[:600]
    rule.remove()
    device.on("write").flip_bit(0)
    data = bytes(512)
    device.pwrite(data, 512)
    assert read(device, 512, 512) == b"\x01" + bytes(511)
    assert data == bytes(512)


def test_flipped_bit_by_chance_is_one(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read").flip_bit()
    found = int.from_bytes(read(device, 0, 4096)) ^ int.from_bytes(CONTENT[:4096])
    assert found.bit_count() == 1


def test_misdirected_calls_go_elsewhere(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read", times=1).misdirect(7)
    device.on("write").misdirect(-512)
    device.on("read", skip=1).misdirect(SIZE)
    assert read(device, 0, 100) == CONTENT[7:107]
    device.pwrite(b"\xff" * 512, 1024)
    assert written(device) == [1]
    assert errno_of(lambda: read(device, 0, 1)) == errno.EIO


@pytest.mark.parametrize("max_bytes", [1, 512, 700, 1 << 20, None])
def test_short_transfers_are_tried_again_until_whole(max_bytes: int | None) -> None:
    below = FaultyDevice(MemoryDevice(CONTENT))
    device = FaultyDevice(below, seed=3)
    device.on("read", "write").shorten(max_bytes)
    device.pwritev([b"x" * 1000, b"", b"y" * 1000], 50)
    buffers = [bytearray(100), bytearray(0), bytearray(2000)]
    device.preadv(buffers, 0)
    expected = CONTENT[:50] + b"x" * 1000 + b"y" * 1000 + CONTENT[2050:]
    assert below.inner.contents() == expected
    assert b"".join(buffers) == expected[:2100]
    assert read(device, 5, 0) == b""
    assert sum(call.length for call in below.log) == 4100
    assert max(call.length for call in below.log) <= (max_bytes or SIZE)
    assert len(below.log) > 4 or max_bytes == 1 << 20


def test_transfer_that_stays_short_is_eio(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read", "write").shorten(0)
    with pytest.raises(OSError, match=r"short read: 100 bytes missing at byte 5.*'memory'") as caught:
        read(device, 5, 100)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="short write") as caught:
        device.pwrite(b"x", 0)
    assert caught.value.errno == errno.EIO


def test_error_in_the_middle_of_short_transfers(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("write").shorten(512)
    device.on("write", begin=1024).tear(first_bytes=0)
    device.pwrite(b"\xff" * 1024, 0)
    assert errno_of(lambda: device.pwrite(b"\xff" * 1025, 0)) == errno.EIO


def test_first_rule_has_its_way_first(device: FaultyDevice[MemoryDevice]) -> None:
    came: list[str] = []
    device.on("flush").call(lambda _call: came.append("first"))
    device.on("flush").fail()
    device.on("flush").call(lambda _call: came.append("never"))
    assert errno_of(device.flush) == errno.EIO
    assert came == ["first"]


# Time


def test_latency_is_per_call_and_per_byte(device: FaultyDevice[MemoryDevice]) -> None:
    device.on("read").delay(latency_seconds=0.01, seconds_per_byte=1e-6)
    began = time.monotonic()
    read(device, 0, 10000)
    assert time.monotonic() - began >= 0.02
    assert read(device, 0, 10) == CONTENT[:10]


def test_latencies_of_several_threads_overlap(device: FaultyDevice[MemoryDevice], threads: ThreadPoolExecutor) -> None:
    device.on("read").delay(latency_seconds=0.1)
    began = time.monotonic()
    for future in [threads.submit(read, device, 0, 10) for _ in range(8)]:
        future.result(DEADLINE)
    assert time.monotonic() - began < 0.4


def test_gate_lets_calls_go_on_in_the_order_that_the_test_wants(
    device: FaultyDevice[MemoryDevice], threads: ThreadPoolExecutor
) -> None:
    done: list[int] = []
    with device.on("write").gate(DEADLINE) as gate:

        def write(block: int) -> None:
            device.pwrite(b"x", block * 4096)
            done.append(block)

        futures = []
        for block in (5, 6, 7):
            futures.append(threads.submit(write, block))
            assert gate.wait_for(len(futures))[-1] == Call("write", block * 4096, 1)
        assert gate.release(1) == Call("write", 6 * 4096, 1)
        futures[1].result(DEADLINE)
        assert done == [6]
        assert gate.waiting == (Call("write", 5 * 4096, 1), Call("write", 7 * 4096, 1))
        gate.release(1)
        futures[2].result(DEADLINE)
        assert gate.release() == Call("write", 5 * 4096, 1)
        futures[0].result(DEADLINE)
        assert done == [6, 7, 5]
        with pytest.raises(IndexError):
            gate.release()
    write(8)
    assert gate.hits == 4


def test_clear_opens_gates(device: FaultyDevice[MemoryDevice], threads: ThreadPoolExecutor) -> None:
    gate = device.on("flush").gate(DEADLINE)
    futures = [threads.submit(device.flush) for _ in range(4)]
    gate.wait_for(4)
    device.clear()
    for future in futures:
        future.result(DEADLINE)


def test_gate_that_nobody_opens_or_reaches_ends_the_test(device: FaultyDevice[MemoryDevice]) -> None:
    gate = device.on("flush").gate(SOON)
    with pytest.raises(GateTimeout, match="0 of 1 calls"):
        gate.wait_for()
    for _ in range(2):
        with pytest.raises(GateTimeout, match="flush: the gate was not opened"):
            device.flush()
    assert gate.waiting == ()


def test_threads_lose_no_call_and_no_hit(device: FaultyDevice[MemoryDevice], threads: ThreadPoolExecutor) -> None:
    rule = device.on("write", skip=100, times=300).fail()

    def work(at: int) -> int:
        return sum(errno_of(lambda: device.pwrite(b"x", at)) is not None for _ in range(100))

    assert sum(threads.map(work, range(8), timeout=DEADLINE)) == 300
    assert rule.hits == 300
    assert len(device.log) == 800


# The trace of a device that loses power


def test_trace_has_every_change_in_order() -> None:
    device = CrashDevice(4096)
    device.pwritev([b"a" * 512, b"b" * 512], 0)
    device.flush()
    assert device.mark("done") == 4
    device.discard(512, 512)
    device.fail_flushes(1)
    device.flush()
    assert errno_of(device.flush) == errno.EIO
    device.grow(8192)
    device.pwrite(b"", 0)
    assert errno_of(lambda: device.pwrite(b"x" * 10, 8190)) == errno.EIO
    read(device, 0, 512)
    assert device.trace == (
        Write(0, b"a" * 512),
        Write(512, b"b" * 512),
        Flush(True),
        Mark("done"),
        Discard(512, 512),
        Flush(True),
        Flush(False),
        Grow(8192),
    )
    assert device.position == 8


def test_trace_of_several_threads_has_each_write_whole(threads: ThreadPoolExecutor) -> None:
    device = CrashDevice(SIZE)

    def work(block: int) -> None:
        for value in range(50):
            device.pwrite(bytes([value]) * 4096, block * 4096)

    list(threads.map(work, range(8), timeout=DEADLINE))
    for block in range(8):
        mine = [event.data[0] for event in device.trace if isinstance(event, Write) and event.offset == block * 4096]
        assert mine == list(range(50))
    assert device.replay().contents() == device.contents()


# What a power cut leaves


def brute_force(initial: bytes, events: Sequence[Write | Discard]) -> set[bytes]:
    """Every content that some sectors of *events*, written in their order upon *initial*, make.

    Written without a look at the implementation: one change for each sector of each event.
    """
    changes = []
    for event in events:
        length = len(event.data) if isinstance(event, Write) else event.length
        for at in range(event.offset // SECTOR, -(-(event.offset + length) // SECTOR)):
            begin, end = max(at * SECTOR, event.offset), min((at + 1) * SECTOR, event.offset + length)
            changes.append(
                (begin, event.data[begin - event.offset : end - event.offset])
                if isinstance(event, Write)
                else (begin, bytes(end - begin))
            )
    found = set()
    for chosen in chain.from_iterable(combinations(changes, count) for count in range(len(changes) + 1)):
        image = bytearray(initial)
        for begin, data in chosen:
            image[begin : begin + len(data)] = data
        found.add(bytes(image))
    return found


def contents_of(images: Iterator[CrashImage]) -> list[bytes]:
    return [image.contents() for image in images]


TRACES: dict[str, list[Write | Discard]] = {
    "apart": [Write(0, b"a" * 1024), Write(2048, b"b" * 1536), Write(4096, b"c" * 512)],
    "one over the other": [Write(0, b"a" * 2048), Write(512, b"b" * 1024), Write(0, b"c" * 512)],
    "parts of sectors": [Write(100, b"a" * 1000), Write(700, b"b" * 50), Write(500, b"c" * 30)],
    "discards": [Write(0, b"a" * 1024), Discard(512, 1024), Write(1024, b"b" * 512), Discard(100, 700)],
    "the same twice": [Write(0, b"a" * 1024), Write(0, b"a" * 1024), Write(512, CONTENT[512:1024])],
}


def run(device: CrashDevice, events: Sequence[Write | Discard]) -> None:
    for event in events:
        if isinstance(event, Write):
            device.pwrite(event.data, event.offset)
        else:
            device.discard(event.offset, event.length)


@pytest.mark.parametrize("name", TRACES)
def test_images_of_a_small_trace_are_all_there_are(name: str) -> None:
    initial = CONTENT[:8192]
    device = CrashDevice(initial)
    run(device, TRACES[name])
    found = contents_of(device.images())
    assert set(found) == brute_force(initial, TRACES[name])
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("first", TRACES)
@pytest.mark.parametrize("second", TRACES)
def test_flush_makes_durable_what_came_before_it(first: str, second: str) -> None:
    initial = CONTENT[:8192]
    device = CrashDevice(initial)
    run(device, TRACES[first])
    device.flush()
    flushed = device.position
    durable = device.contents()
    run(device, TRACES[second])
    after = brute_force(durable, TRACES[second])
    assert set(contents_of(device.images(begin=flushed))) == after
    found = contents_of(device.images())
    assert set(found) == brute_force(initial, TRACES[first]) | after
    assert len(set(found)) == len(found)
    assert all(image.durable_position in (0, flushed) for image in device.images())


@pytest.mark.parametrize("name", TRACES)
def test_failed_flush_promises_nothing_even_after_a_later_one_succeeds(name: str) -> None:
    initial = CONTENT[:8192]
    device = CrashDevice(initial)
    device.fail_flushes(0)
    run(device, TRACES[name])
    doubtful = brute_force(initial, TRACES[name])
    assert errno_of(device.flush) == errno.EIO
    assert set(contents_of(device.images(begin=device.position))) == doubtful
    device.pwrite(b"z" * 512, 6144)
    device.flush()
    expected = {image[:6144] + b"z" * 512 + image[6656:] for image in doubtful}
    assert set(contents_of(device.images(begin=device.position))) == expected


def test_what_is_written_again_and_flushed_is_durable_after_all() -> None:
    device = CrashDevice(4096)
    device.fail_flushes(0)
    device.pwrite(b"a" * 1024, 0)
    assert errno_of(device.flush) == errno.EIO
    device.pwrite(b"b" * 300, 100)
    device.flush()
    rest = bytes(3072)
    kept = b"a" * 100 + b"b" * 300 + b"a" * 112
    gone = bytes(100) + b"b" * 300 + bytes(112)
    assert set(contents_of(device.images(begin=device.position))) == {
        begin + end + rest for begin in (kept, gone) for end in (b"a" * 512, bytes(512))
    }
    device.pwrite(b"c" * 1024, 0)
    device.flush()
    assert contents_of(device.images(begin=device.position)) == [b"c" * 1024 + rest]


def blocks(count: int) -> list[Write | Discard]:
    return [Write(at * 4096, bytes([200 + at]) * 4096) for at in range(count)]


def test_every_subset_of_so_many_whole_writes_is_tried() -> None:
    device = CrashDevice(SIZE)
    run(device, blocks(6))
    found = set(contents_of(device.images(exhaustive=6, samples=0)))
    assert len(found) == 2**6
    assert all(set(image[at * 4096 : (at + 1) * 4096]) in ({0}, {200 + at}) for image in found for at in range(6))


def test_newest_write_is_torn_after_each_sector_with_and_without_the_others() -> None:
    device = CrashDevice(SIZE)
    run(device, blocks(3))
    found = set(contents_of(device.images(begin=3, samples=7)))
    for cut in range(1, 8):
        torn = bytes([202]) * 512 * cut + bytes(4096 - 512 * cut)
        assert bytes(8192) + torn + bytes(SIZE - 12288) in found
        assert bytes([200]) * 4096 + bytes([201]) * 4096 + torn + bytes(SIZE - 12288) in found


def test_beyond_that_a_sample_follows_from_the_seed() -> None:
    device = CrashDevice(SIZE)
    run(device, blocks(14))

    def choices(seed: int) -> list[str]:
        return [image.choice for image in device.images(exhaustive=4, samples=20, seed=seed, begin=14)]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)
    assert 20 < len(choices(1)) <= 20 + 4 + 14
    corners = {"14:", "14:13", "14:" + ",".join(map(str, range(13))), "14:" + ",".join(map(str, range(14)))}
    assert corners <= set(choices(1))


def test_same_bytes_come_again_after_a_mark_since_more_is_promised() -> None:
    device = CrashDevice(4096)
    device.pwrite(b"a" * 512, 0)
    device.mark("acknowledged without a flush")
    found = [(image.marks, image.contents()[:1]) for image in device.images()]
    assert found == [
        ((), b"\0"),
        ((), b"a"),
        (("acknowledged without a flush",), b"\0"),
        (("acknowledged without a flush",), b"a"),
    ]


def test_every_subset_comes_again_after_a_mark() -> None:
    device = CrashDevice(SIZE)
    run(device, blocks(5))
    device.mark("acknowledged without a flush")
    found = [image for image in device.images(exhaustive=5, samples=0) if image.marks]
    assert len(found) == 2**5
    assert {image.digest for image in found} == {image.digest for image in device.images(exhaustive=5, samples=0)}


def test_each_image_is_built_again_from_its_choice() -> None:
    device = CrashDevice(CONTENT)
    run(device, [*TRACES["parts of sectors"], *blocks(3)])
    device.fail_flushes(0)
    assert errno_of(device.flush) == errno.EIO
    run(device, [*TRACES["discards"], *blocks(4)])
    device.flush()
    device.mark("half way")
    device.grow(SIZE + 4096)
    run(device, [Write(SIZE, b"x" * 4096)])
    images = list(device.images(samples=20))
    assert len(images) > 100
    for image in images:
        again = device.image(image.choice)
        assert again.contents() == image.contents()
        assert (again.digest, again.position, again.marks) == (image.digest, image.position, image.marks)
        assert (again.size_bytes, again.durable_position) == (image.size_bytes, image.durable_position)
        assert image.choice in str(image)
        assert len(again.contents()) == image.size_bytes
    by_digest = {(image.size_bytes, image.digest): image.contents() for image in images}
    assert len(by_digest) == len(set(by_digest.values()))


@pytest.mark.parametrize(
    "choice", ["", "5", "1:0[", "9:0", "1:1", "1:0[1]", "0:0", "1:0,", "1:0[3-1+]", "1:0[1-0]", "-1:"]
)
def test_choice_that_cannot_be_is_refused(choice: str) -> None:
    device = CrashDevice(4096)
    device.pwrite(b"a" * 512, 0)
    with pytest.raises(ValueError, match=r"choice|no position|no such sectors"):
        device.image(choice)


def test_image_says_where_and_after_what_the_power_went() -> None:
    device = CrashDevice(SIZE)
    run(device, blocks(2))
    device.flush()
    device.mark("commit 1")
    run(device, blocks(2))
    image = device.image("6:4[0-2+5],5")
    assert str(image) == "power cut at 6, after mark 'commit 1', durable up to 3: 6:4[0-2+5],5"
    assert image.device().name == "crash@6:4[0-2+5],5"


def test_devices_of_images_are_independent() -> None:
    device = CrashDevice(4096)
    device.pwrite(b"a" * 512, 0)
    images = list(device.images())
    for image in images:
        image.device().pwrite(b"q" * 4096, 0)
    assert [image.contents()[:1] for image in images] == [b"\0", b"a"]


def test_replay_is_a_clean_stop_at_each_position() -> None:
    device = CrashDevice(CONTENT)
    states = [device.contents()]
    steps: list[Callable[[], object]] = [
        lambda: run(device, blocks(1)),
        device.flush,
        lambda: run(device, [Discard(100, 5000)]),
        lambda: device.grow(SIZE + 512),
    ]
    for step in steps:
        step()
        states.append(device.contents())
    assert [device.replay(at).contents() for at in range(device.position + 1)] == states
    assert device.replay().contents() == states[-1]
    with pytest.raises(ValueError, match="no position 5"):
        device.replay(5)


def test_image_of_a_large_device_costs_what_was_written() -> None:
    """Copy-on-write: thousands of images of 64 MiB share what is durable."""
    device = CrashDevice(64 << 20)
    run(device, blocks(11))
    images = list(device.images(samples=10))
    assert len(images) > 2000
    assert len({id(image.durable) for image in images}) == 1
