"""Every error of the interface, provoked; what a refused call leaves behind (nothing), and a failed one (an abort).

"Nothing" is shown by a twin: a pool on which the call was never made has, after the same commit, the same bytes.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from bufio import FileDevice, MemoryDevice
from tests.support.devices import FaultyMemory
from tests.support.image import SALTS, UNSPECIFIED, Image, raw_checksum
from tests.support.pools import assert_sound, content_of, outcome_of
from tests.support.scenario import (
    FRESH_DATA_BLOCK,
    NR_DATA_BLOCKS,
    NR_DEVICE_BLOCKS,
    NR_METADATA_BLOCKS,
    OWNED,
    STEPS,
    STEPS_WITH_SNAP,
    build,
    build_with_snap,
)
from thinpool import (
    Corrupt,
    DeviceBusy,
    DeviceExists,
    NoSuchDevice,
    NotMapped,
    OutOfSpace,
    PoolMetadata,
    ReadOnly,
    ThinDevice,
    ThinError,
    TransactionMismatch,
    WouldBlock,
    delta,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bufio.testing import Kind
    from tests.support.pools import Content

BLOCK = 4096
KEY_LIMIT = 1 << 64

Call = "Callable[[PoolMetadata, ThinDevice], object]"


@pytest.fixture(scope="module")
def sound() -> bytes:
    return build()


@pytest.fixture(scope="module")
def with_snap() -> bytes:
    return build_with_snap()


class Opened(NamedTuple):
    device: FaultyMemory
    pool: PoolMetadata
    thin: ThinDevice


def open_pool(image: bytes, *, read_only: bool = False) -> Opened:
    """A pool on a device of its own, with its device 0."""
    device = FaultyMemory(image)
    pool = PoolMetadata.open(device, read_only=read_only)
    return Opened(device, pool, pool.open_thin_device(0))


def change_something(pool: PoolMetadata, thin: ThinDevice) -> None:
    """A transaction under way."""
    pool.create_thin(8)
    thin.provision(7000, 3)


def answers(pool: PoolMetadata, thin: ThinDevice, metadata_free: bool = True) -> list[object]:
    """What queries say."""
    return [
        dict(pool.devices()),
        pool.time,
        pool.transaction_id,
        pool.metadata_snap,
        pool.needs_check,
        pool.data_dev_size,
        pool.metadata_dev_size,
        pool.free_block_count,
        pool.free_metadata_block_count if metadata_free else None,
        pool.changed_this_transaction,
        thin.mapped_count,
        thin.highest_mapped_block,
        thin.changed_this_transaction,
        list(thin.mappings()),
        [pool.block_is_used(block) for block in range(0, NR_DATA_BLOCKS, 97)],
        [pool.block_is_shared(block) for block in range(0, NR_DATA_BLOCKS, 97)],
    ]


# Refused calls

REFUSED: dict[str, tuple[type[ThinError], int, Callable[[PoolMetadata, ThinDevice], object]]] = {
    "create_thin of an id that exists": (DeviceExists, errno.EEXIST, lambda pool, thin: pool.create_thin(1)),
    "create_thin of an id just created": (DeviceExists, errno.EEXIST, lambda pool, thin: pool.create_thin(8)),
    "create_thin of a negative id": (ThinError, errno.EINVAL, lambda pool, thin: pool.create_thin(-1)),
    "create_thin of an id beyond 24 bits": (ThinError, errno.EINVAL, lambda pool, thin: pool.create_thin(1 << 24)),
    "create_snap of an id that exists": (DeviceExists, errno.EEXIST, lambda pool, thin: pool.create_snap(2, 0)),
    "create_snap of itself": (DeviceExists, errno.EEXIST, lambda pool, thin: pool.create_snap(0, 0)),
    "create_snap without an origin": (NoSuchDevice, errno.ENODATA, lambda pool, thin: pool.create_snap(20, 99)),
    "create_snap of an id beyond 24 bits": (ThinError, errno.EINVAL, lambda pool, thin: pool.create_snap(1 << 24, 0)),
    "delete of an unknown device": (NoSuchDevice, errno.ENODATA, lambda pool, thin: pool.delete_thin_device(99)),
    "delete of an open device": (DeviceBusy, errno.EBUSY, lambda pool, thin: pool.delete_thin_device(0)),
    "open of an unknown device": (NoSuchDevice, errno.ENODATA, lambda pool, thin: pool.open_thin_device(99)),
    "open of a negative id": (NoSuchDevice, errno.ENODATA, lambda pool, thin: pool.open_thin_device(-1)),
    "open of an id beyond 64 bits": (NoSuchDevice, errno.ENODATA, lambda pool, thin: pool.open_thin_device(1 << 70)),
    "close with an open device": (DeviceBusy, errno.EBUSY, lambda pool, thin: pool.close()),
    "set_transaction_id of another": (
        TransactionMismatch,
        errno.EINVAL,
        lambda pool, thin: pool.set_transaction_id(4, 6),
    ),
    "set_transaction_id beyond 64 bits": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.set_transaction_id(5, 1 << 64),
    ),
    "set_transaction_id negative": (ThinError, errno.EINVAL, lambda pool, thin: pool.set_transaction_id(5, -1)),
    "release_metadata_snap without one": (ThinError, errno.EINVAL, lambda pool, thin: pool.release_metadata_snap()),
    "resize_data_dev to less": (ThinError, errno.EINVAL, lambda pool, thin: pool.resize_data_dev(NR_DATA_BLOCKS - 1)),
    "resize_data_dev beyond 40 bits": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.resize_data_dev((1 << 40) + 1),
    ),
    "resize_metadata_dev to less": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.resize_metadata_dev(NR_METADATA_BLOCKS - 1),
    ),
    "resize_metadata_dev beyond the device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.resize_metadata_dev(NR_DEVICE_BLOCKS + 1),
    ),
    "block_is_shared beyond the device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.block_is_shared(NR_DATA_BLOCKS),
    ),
    "block_is_used of a negative block": (ThinError, errno.EINVAL, lambda pool, thin: pool.block_is_used(-1)),
    "inc_data_range beyond the device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.inc_data_range(NR_DATA_BLOCKS - 1, NR_DATA_BLOCKS + 1),
    ),
    "inc_data_range backwards": (ThinError, errno.EINVAL, lambda pool, thin: pool.inc_data_range(5, 4)),
    "dec_data_range beyond the device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.dec_data_range(NR_DATA_BLOCKS, NR_DATA_BLOCKS + 1),
    ),
    "dec_data_range of a free block": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: pool.dec_data_range(FRESH_DATA_BLOCK, FRESH_DATA_BLOCK + 5),
    ),
    "find_block of what is not mapped": (NotMapped, errno.ENODATA, lambda pool, thin: thin.find_block(500)),
    "find_block of a negative block": (NotMapped, errno.ENODATA, lambda pool, thin: thin.find_block(-1)),
    "find_block beyond 64 bits": (NotMapped, errno.ENODATA, lambda pool, thin: thin.find_block(KEY_LIMIT)),
    "find_mapped_range of nothing": (NotMapped, errno.ENODATA, lambda pool, thin: thin.find_mapped_range(500, 900)),
    "find_mapped_range backwards": (NotMapped, errno.ENODATA, lambda pool, thin: thin.find_mapped_range(9, 8)),
    "insert_block of a negative block": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_block(-1, FRESH_DATA_BLOCK),
    ),
    "insert_block beyond 64 bits": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_block(KEY_LIMIT, FRESH_DATA_BLOCK),
    ),
    "insert_block of a free data block": (ThinError, errno.EINVAL, lambda pool, thin: thin.insert_block(0, 3999)),
    "insert_block of a negative data block": (ThinError, errno.EINVAL, lambda pool, thin: thin.insert_block(0, -1)),
    "insert_block of a data block beyond the device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_block(0, NR_DATA_BLOCKS),
    ),
    "insert_blocks of different lengths": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_blocks([1, 2], [FRESH_DATA_BLOCK]),
    ),
    "insert_blocks with a free data block last": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_blocks([1, 2], [FRESH_DATA_BLOCK, 3999]),
    ),
    "insert_range beyond the data device": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: thin.insert_range(0, NR_DATA_BLOCKS - 1, 2),
    ),
    "remove_block of what is not mapped": (NotMapped, errno.ENODATA, lambda pool, thin: thin.remove_block(500)),
    "remove_range backwards": (ThinError, errno.EINVAL, lambda pool, thin: thin.remove_range(9, 8)),
    "remove_range beyond 64 bits": (ThinError, errno.EINVAL, lambda pool, thin: thin.remove_range(0, KEY_LIMIT + 1)),
    "provision beyond 64 bits": (ThinError, errno.EINVAL, lambda pool, thin: thin.provision(KEY_LIMIT - 1, 2)),
    "provision of a negative length": (ThinError, errno.EINVAL, lambda pool, thin: thin.provision(5, -1)),
    "comparison with a device of another pool": (
        ThinError,
        errno.EINVAL,
        lambda pool, thin: list(delta(thin, open_pool(build()).thin)),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_call_has_changed_nothing(what: str, sound: bytes) -> None:
    kind, number, call = REFUSED[what]
    twin, refused = open_pool(sound), open_pool(sound)
    change_something(twin.pool, twin.thin)
    change_something(refused.pool, refused.thin)
    before = answers(refused.pool, refused.thin)
    with pytest.raises(kind) as caught:
        call(refused.pool, refused.thin)
    assert caught.value.errno == number
    assert type(caught.value) is kind
    assert len(str(caught.value)) > len("[Errno 22] ")
    assert answers(refused.pool, refused.thin) == before
    twin.pool.commit()
    refused.pool.commit()
    assert refused.device.contents() == twin.device.contents()
    assert_sound(refused.device, OWNED)


@pytest.mark.parametrize("what", [NoSuchDevice("no device 1"), NotMapped("not mapped")])
def test_absence_is_a_key_error_with_a_readable_text(what: OSError) -> None:
    assert isinstance(what, KeyError)
    assert isinstance(what, ThinError)
    assert str(what) == f"[Errno {errno.ENODATA}] {what.strerror}"


def test_out_of_data_space_maps_nothing_and_can_be_gone_on_from(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    free = pool.free_block_count
    before = answers(pool, thin, metadata_free=False)
    with pytest.raises(OutOfSpace) as caught:
        thin.provision(20000, free + 1)
    assert caught.value.errno == errno.ENOSPC
    # What it took to try stays taken: metadata blocks, until the next commit.
    assert answers(pool, thin, metadata_free=False) == before
    pool.commit()
    assert content_of(device.contents()) == content_of(sound)
    thin.provision(20000, free)
    assert pool.free_block_count == 0
    with pytest.raises(OutOfSpace) as caught:
        pool.alloc_data_block()
    assert caught.value.errno == errno.ENOSPC
    pool.commit()
    assert_sound(device, OWNED)
    assert len(content_of(device.contents()).data_counts) == NR_DATA_BLOCKS


def test_data_block_freed_in_this_transaction_is_no_free_space(sound: bytes) -> None:
    _, pool, thin = open_pool(sound)
    thin.provision(20000, pool.free_block_count)
    pool.commit()
    thin.remove_block(20000)
    assert pool.free_block_count == 1
    with pytest.raises(OutOfSpace):
        pool.alloc_data_block()
    pool.commit()
    assert pool.alloc_data_block() < NR_DATA_BLOCKS


def test_second_metadata_snapshot_is_refused(with_snap: bytes) -> None:
    twin, refused = open_pool(with_snap), open_pool(with_snap)
    with pytest.raises(DeviceBusy) as caught:
        refused.pool.reserve_metadata_snap()
    assert caught.value.errno == errno.EBUSY
    assert str(twin.pool.metadata_snap) in str(caught.value)
    for opened in (twin, refused):
        change_something(opened.pool, opened.thin)
        opened.pool.commit()
    assert refused.device.contents() == twin.device.contents()


def test_snapshot_is_refused_when_the_time_does_not_fit_any_more(sound: bytes) -> None:
    image = patched_superblock(sound, 44, "<I", (1 << 24) - 1)
    device, pool, thin = open_pool(image)
    before = answers(pool, thin)
    with pytest.raises(ThinError) as caught:
        pool.create_snap(9, 0)
    assert caught.value.errno == errno.EINVAL
    assert answers(pool, thin) == before
    pool.commit()
    assert content_of(device.contents()) == content_of(image)


def test_lookup_without_io_would_block_until_prefetched(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    device.log.clear()
    with pytest.raises(WouldBlock) as caught:
        thin.find_block(399, can_issue_io=False)
    assert caught.value.errno == errno.EWOULDBLOCK
    assert device.log == []
    pool.issue_prefetches()
    assert len(device.log) == 1
    assert thin.find_block(399, can_issue_io=False) == thin.find_block(399)


@pytest.mark.parametrize("result", [-errno.EIO, OSError(errno.EIO, "data device")], ids=["number", "exception"])
def test_commit_is_refused_by_the_pre_commit_callback(result: int | OSError, sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    change_something(pool, thin)
    results: list[int | OSError] = [result, 0]

    def callback() -> int:
        result = results.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    pool.register_pre_commit_callback(callback)
    before = answers(pool, thin)
    with pytest.raises(OSError, match=r"pre-commit callback|data device") as caught:
        pool.commit()
    assert caught.value.errno == errno.EIO
    assert device.contents() == sound
    assert answers(pool, thin) == before
    pool.commit()
    assert content_of(device.contents()).devices.keys() == {0, 1, 2, 3, 8}


def test_pre_commit_callback_is_called_before_anything_is_written(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    written: list[int] = []
    pool.register_pre_commit_callback(lambda: written.append(len(device.ops("write"))))
    pool.commit()
    assert written == []  # nothing to commit
    change_something(pool, thin)
    pool.commit()
    assert written == [0]
    pool.register_pre_commit_callback(None)
    pool.commit()
    assert written == [0]


# Read-only


CHANGES: dict[str, Callable[[PoolMetadata, ThinDevice], object]] = {
    **STEPS,
    "commit": lambda pool, thin: pool.commit(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_read_only_pool_refuses_every_change(what: str, sound: bytes) -> None:
    device, pool, thin = open_pool(sound, read_only=True)
    assert pool.is_read_only
    before = answers(pool, thin)
    with pytest.raises(ReadOnly) as caught:
        CHANGES[what](pool, thin)
    assert caught.value.errno == errno.EPERM
    assert answers(pool, thin) == before
    thin.close()
    pool.close()
    assert device.contents() == sound
    assert not device.ops("write")


@pytest.mark.parametrize("what", CHANGES)
def test_read_only_mode_refuses_every_change_and_loses_none(what: str, sound: bytes) -> None:
    twin, refused = open_pool(sound), open_pool(sound)
    for opened in (twin, refused):
        change_something(opened.pool, opened.thin)
    refused.pool.set_read_only()
    before = answers(refused.pool, refused.thin)
    with pytest.raises(ReadOnly) as caught:
        CHANGES[what](refused.pool, refused.thin)
    assert caught.value.errno == errno.EPERM
    assert answers(refused.pool, refused.thin) == before
    refused.pool.set_read_write()
    twin.pool.commit()
    refused.pool.commit()
    assert refused.device.contents() == twin.device.contents()


def test_needs_check_cannot_be_set_in_read_only_mode(sound: bytes) -> None:
    device, pool, _ = open_pool(sound)
    pool.set_read_only()
    with pytest.raises(ReadOnly) as caught:
        pool.set_needs_check()
    assert caught.value.errno == errno.EPERM
    assert not pool.needs_check
    assert device.contents() == sound


def test_pool_closed_in_read_only_mode_commits_nothing(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    change_something(pool, thin)
    pool.set_read_only()
    thin.close()
    pool.close()
    assert content_of(device.contents()) == content_of(sound)


def test_needs_check_is_on_the_device_at_once_and_nothing_else_is(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    change_something(pool, thin)
    pool.set_needs_check()
    assert pool.needs_check
    now = content_of(device.contents())
    assert now.flags == 1
    assert now._replace(flags=0) == content_of(sound)
    assert device.log[-1].kind == "flush"
    pool.commit()
    pool.clear_needs_check()
    assert not pool.needs_check
    assert content_of(device.contents()).flags == 0


# Failed calls


def read_faults() -> Iterator[tuple[str, str]]:
    for what in STEPS:
        yield what, "build"
    for what in STEPS_WITH_SNAP:
        yield what, "build_with_snap"


def assert_failed_until_abort(opened: Opened, committed: list[object], content: Content) -> None:
    """Every later change and commit says that the transaction failed, queries answer from the last commit."""
    device, pool, thin = opened
    for later, change in CHANGES.items():
        error = outcome_of(lambda change=change: change(pool, thin))  # type: ignore[misc]  # bound at once
        assert error is not None, f"{later} after a failure"
        assert type(error) is ThinError, f"{later} after a failure: {error!r}"
        assert error.errno == errno.EINVAL
        assert "abort" in str(error)
    assert answers(pool, thin) == committed
    assert content_of(device.contents()) == content
    pool.abort()
    assert answers(pool, thin) == committed
    assert thin.aborted_changes
    thin.insert_block(9000, FRESH_DATA_BLOCK)
    pool.commit()
    assert_sound(device, {**OWNED, FRESH_DATA_BLOCK: 0})


def still_owned(content: Content) -> dict[int, int]:
    """Of the data blocks that were ours those that were not mapped by a step that used them."""
    mapped = content.mapped_data_blocks()
    return {block: count for block, count in OWNED.items() if block in content.data_counts and block not in mapped}


def fail_each(kind: Kind, image: bytes, step: Callable[[PoolMetadata, ThinDevice], object], then_commit: bool) -> int:
    """Let *step* meet an I/O error at its first call of that kind, at its second, and so on; return how often."""
    opened = open_pool(image)
    committed = answers(opened.pool, opened.thin)
    for number in range(1000):
        device, pool, thin = opened = open_pool(image)
        content = content_of(image)
        change_something(pool, thin)
        # What was read so far is forgotten, what was changed is kept.
        pool._storage.bm.client.drop_buffers()
        before = answers(pool, thin)
        pool._storage.bm.client.drop_buffers()
        # A vectored write is repeated block by block, so a device that fails once only is not noticed.
        device.on(kind, skip=number, times=None if kind == "write" else 1).fail()

        def do(pool: PoolMetadata = pool, thin: ThinDevice = thin) -> None:
            step(pool, thin)
            if then_commit:
                pool.commit()

        error = outcome_of(do)
        device.clear()
        if error is None:
            return number
        assert isinstance(error, ThinError)
        assert error.errno == errno.EIO
        assert "as told" in str(error)
        if outcome_of(lambda pool=pool: pool.set_transaction_id(5, 5)) is not None:  # type: ignore[misc]
            if content_of(device.contents()) != content:
                # It had committed (before taking a metadata snapshot, or all but the last flush).
                content = content_of(device.contents())
                again = open_pool(device.contents())
                committed_now = answers(again.pool, again.thin)
                pool.abort()
                assert answers(pool, thin) == committed_now
                assert_sound(device, still_owned(content))
                continue
            assert_failed_until_abort(opened, committed, content)
        else:
            # Refused: it failed before anything was changed.
            assert answers(pool, thin) == before
            pool.commit()
            assert_sound(device, still_owned(content))
    raise AssertionError("a thousand calls, and still not done")


@pytest.mark.parametrize(("what", "base"), list(read_faults()))
def test_read_error_anywhere_in_a_change_leaves_the_last_commit(
    what: str, base: str, sound: bytes, with_snap: bytes
) -> None:
    image, step = (sound, STEPS[what]) if base == "build" else (with_snap, STEPS_WITH_SNAP[what])
    nr_reads = fail_each("read", image, step, then_commit=False)
    assert nr_reads > 0 or what in ("set_transaction_id", "resize_metadata_dev")


@pytest.mark.parametrize("kind", ["write", "flush"])
@pytest.mark.parametrize("what", ["insert_block", "create_snap", "remove_range", "reserve_metadata_snap"])
def test_write_error_anywhere_in_a_commit_leaves_a_whole_commit(what: str, kind: Kind, sound: bytes) -> None:
    assert fail_each(kind, sound, STEPS[what], then_commit=True) >= 2


@pytest.mark.damages
def test_damage_met_by_a_change_leaves_the_last_commit(sound: bytes) -> None:
    image = Image.from_bytes(sound)
    root = int.from_bytes(dict(image.items(image.superblock().mapping_root))[0], "little")
    leaf = image.node(root).children[0]
    damaged = bytearray(sound)
    damaged[leaf * BLOCK + 1000] ^= 1
    device, pool, thin = open_pool(bytes(damaged))
    undamaged = open_pool(sound)
    pool.create_thin(8)
    with pytest.raises(Corrupt) as caught:
        thin.remove_range(0, 1000)
    assert caught.value.errno == errno.EILSEQ
    assert caught.value.block == leaf
    assert "checksum" in caught.value.rule
    for change in CHANGES.values():
        with pytest.raises(ThinError, match="abort"):
            change(pool, thin)
    assert dict(pool.devices()) == dict(undamaged.pool.devices())
    assert thin.find_block(399) == undamaged.thin.find_block(399)
    pool.abort()
    pool.create_snap(30, 1)
    pool.commit()
    thin.close()
    pool.close()
    damaged[:] = device.contents()
    damaged[leaf * BLOCK + 1000] ^= 1
    assert_sound(MemoryDevice(bytes(damaged)), OWNED)


def test_block_of_another_place_is_enotblk(sound: bytes) -> None:
    image = Image.from_bytes(sound)
    root = int.from_bytes(dict(image.items(image.superblock().mapping_root))[0], "little")
    first, second = image.node(root).children[:2]
    swapped = bytearray(sound)
    swapped[first * BLOCK : (first + 1) * BLOCK] = image.block(second)
    _, _, thin = open_pool(bytes(swapped))
    with pytest.raises(Corrupt) as caught:
        thin.find_block(0)
    assert caught.value.errno == errno.ENOTBLK
    assert caught.value.block == first
    assert thin.find_block(1000).block


def test_metadata_exhausted_leaves_the_last_commit() -> None:
    device = FaultyMemory(20 * BLOCK)
    pool = PoolMetadata.format(device, 128, NR_DATA_BLOCKS)
    pool.create_thin(0)
    pool.commit()
    thin = pool.open_thin_device(0)
    committed, content = answers(pool, thin), content_of(device.contents())
    with pytest.raises(OutOfSpace) as caught:
        thin.provision(0, 2000)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ThinError, match="abort"):
        pool.commit()
    assert answers(pool, thin) == committed
    pool.abort()
    assert answers(pool, thin) == committed
    assert content_of(device.contents()) == content
    thin.provision(0, 10)
    pool.commit()
    assert_sound(device)


def test_failed_pool_can_be_marked_for_a_check(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    device.on("write").fail()
    change_something(pool, thin)
    with pytest.raises(ThinError):
        pool.commit()
    device.clear()
    pool.set_needs_check()
    assert content_of(device.contents()) == content_of(sound)._replace(flags=1)
    pool.abort()
    assert pool.needs_check


def test_failed_pool_closes_without_losing_what_was_committed(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    device.on("write").fail()
    change_something(pool, thin)
    with pytest.raises(ThinError):
        pool.commit()
    device.clear()
    thin.close()
    pool.close()
    assert content_of(device.contents()) == content_of(sound)
    assert_sound(device, OWNED)


def test_error_of_a_commit_within_close_is_raised_and_the_pool_is_closed(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    change_something(pool, thin)
    thin.close()
    device.on("write").fail()
    with pytest.raises(ThinError) as caught:
        pool.close()
    assert caught.value.errno == errno.EIO
    device.clear()
    pool.close()
    assert content_of(device.contents()) == content_of(sound)


def test_abort_that_cannot_read_leaves_only_close(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    change_something(pool, thin)
    device.on("read", blocks=[0]).fail()
    with pytest.raises(ThinError) as caught:
        pool.abort()
    assert caught.value.errno == errno.EIO
    device.clear()
    for call in (
        pool.abort,
        pool.commit,
        lambda: pool.create_thin(50),
        lambda: pool.devices(),
        lambda: thin.find_block(0),
        lambda: pool.open_thin_device(0),
    ):
        with pytest.raises(ThinError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    thin.close()
    pool.close()
    assert content_of(device.contents()) == content_of(sound)


# Closed, aborted, within a context


def test_closed_device_refuses_everything_but_close(sound: bytes) -> None:
    _, _, thin = open_pool(sound)
    thin.close()
    thin.close()
    for call in (
        lambda: thin.find_block(0),
        lambda: thin.find_mapped_range(0, 1),
        lambda: thin.insert_block(0, FRESH_DATA_BLOCK),
        lambda: thin.insert_blocks([0], [FRESH_DATA_BLOCK]),
        lambda: thin.remove_block(0),
        lambda: thin.remove_range(0, 1),
        lambda: thin.provision(0, 1),
        lambda: thin.highest_mapped_block,
        lambda: thin.mapped_count,
        lambda: list(thin.mappings()),
        lambda: thin.lookup_blocks([1]),
    ):
        with pytest.raises(ThinError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert thin.dev_id == 0


def test_closed_pool_refuses_everything_but_close(sound: bytes) -> None:
    _, pool, thin = open_pool(sound)
    thin.close()
    pool.close()
    pool.close()
    for call in (
        pool.commit,
        pool.abort,
        pool.devices,
        pool.set_needs_check,
        pool.issue_prefetches,
        pool.reserve_metadata_snap,
        lambda: pool.create_thin(50),
        lambda: pool.open_thin_device(0),
        lambda: pool.block_is_used(0),
        lambda: pool.resize_data_dev(1 << 20),
        lambda: pool.alloc_data_block(),
        lambda: pool.register_metadata_threshold(1, lambda: None),
    ):
        with pytest.raises(ThinError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EINVAL


def test_device_created_and_aborted_is_gone_for_its_handles(sound: bytes) -> None:
    _, pool, _ = open_pool(sound)
    pool.create_thin(20)
    gone = pool.open_thin_device(20)
    gone.provision(0, 5)
    pool.abort()
    assert gone.aborted_changes
    assert not gone.changed_this_transaction
    with pytest.raises(NoSuchDevice):
        gone.find_block(0)
    with pytest.raises(NoSuchDevice):
        gone.provision(0, 5)
    pool.create_thin(20)
    with pytest.raises(NoSuchDevice):
        gone.find_block(0)
    gone.close()
    pool.delete_thin_device(20)
    pool.commit()
    assert 20 not in pool.devices()


def test_device_deleted_and_made_again_is_the_committed_one_after_a_failure(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    pool.delete_thin_device(3)
    pool.create_thin(3)
    second = pool.open_thin_device(3)
    device.on("write").fail()
    with pytest.raises(ThinError):
        pool.commit()
    device.clear()
    assert pool.devices()[3].mapped_blocks == 5
    with pool.open_thin_device(3) as committed:
        assert committed.mapped_count == 5
        assert committed.find_block(10)
    with pytest.raises(NoSuchDevice):
        second.find_block(10)
    pool.abort()
    with pool.open_thin_device(3) as committed:
        assert committed.mapped_count == 5
    second.close()
    thin.close()
    pool.close()


def test_failed_commit_shows_the_counts_of_the_last_one(sound: bytes) -> None:
    device, pool, thin = open_pool(sound)
    before = thin.mapped_count
    thin.provision(20000, 10)
    device.on("write").fail()
    with pytest.raises(ThinError):
        pool.commit()
    device.clear()
    assert thin.mapped_count == before
    assert pool.devices()[0].mapped_blocks == before
    pool.abort()
    assert thin.mapped_count == before
    assert thin.aborted_changes


def test_leaving_the_block_commits_and_closes_open_devices(sound: bytes) -> None:
    device = MemoryDevice(sound)
    with PoolMetadata.open(device) as pool:
        thin = pool.open_thin_device(0)
        change_something(pool, thin)
    assert 8 in content_of(device.contents()).devices
    with pytest.raises(ThinError):
        thin.find_block(0)
    assert_sound(device, OWNED)


def test_leaving_the_block_by_an_exception_aborts(sound: bytes) -> None:
    device = MemoryDevice(sound)

    def fail_within() -> None:
        with PoolMetadata.open(device) as pool:
            pools.append(pool)
            change_something(pool, pool.open_thin_device(0))
            raise ZeroDivisionError

    pools: list[PoolMetadata] = []
    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert content_of(device.contents()) == content_of(sound)
    assert_sound(device, OWNED)
    with pytest.raises(ThinError, match="closed"):
        pools[0].create_thin(50)


def test_leaving_the_block_after_closing_within_is_fine(sound: bytes) -> None:
    with PoolMetadata.open(MemoryDevice(sound)) as pool:
        pool.close()


def test_device_changed_while_it_is_compared_is_noticed(sound: bytes) -> None:
    _, pool, thin = open_pool(sound)
    for block in range(30000, 31000, 2):
        thin.provision(block, 1)
    with pool.open_thin_device(2) as other:
        differences = delta(thin, other)
        next(differences)
        thin.provision(20000, 1)
        with pytest.raises(ThinError, match="changed") as caught:
            list(differences)
        assert caught.value.errno == errno.EINVAL


# Opening


def patched_superblock(image: bytes, offset: int, code: str, value: int) -> bytes:
    """The same with another value in the superblock, its checksum right again."""
    patched = bytearray(image)
    struct.pack_into(code, patched, offset, value)
    for begin, end in UNSPECIFIED:
        patched[begin:end] = bytes(end - begin)
    struct.pack_into("<I", patched, 0, raw_checksum(bytes(patched[:BLOCK])) ^ SALTS["superblock"])
    return bytes(patched)


def test_unformatted_device_is_formatted_only_on_request() -> None:
    device = MemoryDevice(64 * BLOCK)
    with pytest.raises(ThinError, match="not formatted") as caught:
        PoolMetadata.open(device)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(ThinError, match="data_block_size") as caught:
        PoolMetadata.open(device, format_device=True)
    assert caught.value.errno == errno.EINVAL
    assert device.contents() == bytes(64 * BLOCK)
    PoolMetadata.open(device, 128, format_device=True, nr_data_blocks=10).close()
    with PoolMetadata.open(device, 128, format_device=True) as pool:
        assert pool.data_dev_size == 10


def test_device_that_is_not_empty_is_never_formatted(sound: bytes) -> None:
    noise = bytes(range(256)) * 16 * 64
    for contents in (sound, noise):
        device = MemoryDevice(contents)
        with pytest.raises(DeviceBusy) as caught:
            PoolMetadata.format(device, 128)
        assert caught.value.errno == errno.EBUSY
        assert device.contents() == contents
    device = MemoryDevice(noise)
    with pytest.raises(Corrupt) as corrupt:
        PoolMetadata.open(device, 128, format_device=True)
    assert corrupt.value.block == 0
    assert device.contents() == noise


@pytest.mark.parametrize("size", [0, 1, 127, 129, 128 * 3 + 64, 2097152 + 128, -128])
def test_impossible_data_block_size_is_refused(size: int) -> None:
    device = MemoryDevice(64 * BLOCK)
    with pytest.raises(ThinError) as caught:
        PoolMetadata.format(device, size)
    assert caught.value.errno == errno.EINVAL
    assert device.contents() == bytes(64 * BLOCK)


def test_another_data_block_size_than_the_pools_is_refused(sound: bytes) -> None:
    device = FaultyMemory(sound)
    with pytest.raises(ThinError, match="128 sectors, not 256") as caught:
        PoolMetadata.open(device, 256)
    assert caught.value.errno == errno.EINVAL
    assert not device.ops("write")


@pytest.mark.parametrize("nr_blocks", range(1, 8))
def test_device_too_small_to_format_is_out_of_space(nr_blocks: int) -> None:
    with pytest.raises(OutOfSpace) as caught:
        PoolMetadata.format(MemoryDevice(nr_blocks * BLOCK), 128)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1])
def test_device_without_a_whole_block_is_refused(size: int) -> None:
    for call in (PoolMetadata.open, PoolMetadata.open_metadata_snap, lambda d: PoolMetadata.format(d, 128)):
        with pytest.raises(ThinError) as caught:
            call(MemoryDevice(size))
        assert caught.value.errno in (errno.EINVAL, errno.EIO)


def test_bad_superblocks_are_refused_by_name(sound: bytes) -> None:
    flipped = bytearray(sound)
    flipped[50] ^= 1
    cases = [
        (bytes(flipped), errno.EILSEQ, "checksum"),
        (patched_superblock(sound, 8, "<Q", 1), errno.ENOTBLK, "block"),
        (patched_superblock(sound, 32, "<Q", 1234), errno.EILSEQ, "magic"),
        (sound[: 20 * BLOCK], errno.EINVAL, "blocks"),
    ]
    for contents, number, word in cases:
        device = FaultyMemory(contents)
        with pytest.raises(Corrupt) as caught:
            PoolMetadata.open(device)
        assert caught.value.errno == number
        assert caught.value.block == 0
        assert word in str(caught.value)
        assert device.name in str(caught.value)
        assert not device.ops("write")


def feature_offset(name: str) -> int:
    return {"compat": 352, "compat_ro": 356, "incompat": 360}[name]


def test_unknown_features_are_respected(sound: bytes) -> None:
    with pytest.raises(ThinError, match="features") as caught:
        PoolMetadata.open(MemoryDevice(patched_superblock(sound, feature_offset("incompat"), "<I", 1)))
    assert caught.value.errno == errno.EINVAL
    reading_only = patched_superblock(sound, feature_offset("compat_ro"), "<I", 1)
    with pytest.raises(ThinError, match="features") as caught:
        PoolMetadata.open(MemoryDevice(reading_only))
    assert caught.value.errno == errno.EINVAL
    PoolMetadata.open(MemoryDevice(reading_only), read_only=True).close()
    PoolMetadata.open(MemoryDevice(patched_superblock(sound, feature_offset("compat"), "<I", 1))).close()


def test_unreadable_superblock_is_an_io_error(sound: bytes) -> None:
    device = FaultyMemory(sound)
    device.on("read").fail()
    with pytest.raises(ThinError) as caught:
        PoolMetadata.open(device)
    assert caught.value.errno == errno.EIO


# Paths and files


def test_missing_path_and_directory_and_short_file_are_refused(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"short")
    for path, number in ((tmp_path / "missing", errno.ENOENT), (tmp_path, errno.EINVAL), (short, errno.EINVAL)):
        for call in (PoolMetadata.open, PoolMetadata.open_metadata_snap, lambda p: PoolMetadata.format(p, 128)):
            with pytest.raises(OSError, match=path.name) as caught:
                call(path)
            assert caught.value.errno in (number, errno.EIO if path is short else number)


def test_path_is_locked_against_a_second_user(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "pool"
    path.write_bytes(sound)
    with PoolMetadata.open(path), pytest.raises(OSError, match="locked") as caught:
        PoolMetadata.open(os.fspath(path))
    assert caught.value.errno == errno.EBUSY
    with PoolMetadata.open(path, read_only=True), PoolMetadata.open(path, read_only=True):
        with pytest.raises(OSError, match="locked") as caught:
            PoolMetadata.open(path)
        assert caught.value.errno == errno.EBUSY
    PoolMetadata.open(path).close()


def test_file_opened_for_reading_gives_a_read_only_pool(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "pool"
    path.write_bytes(sound)
    with open(path, "rb") as file, PoolMetadata.open(file) as pool:
        assert pool.is_read_only
        with pytest.raises(ReadOnly):
            pool.create_thin(50)
        with pytest.raises(ReadOnly):
            pool.set_read_write()
    assert path.read_bytes() == sound


def test_read_only_device_of_a_read_write_pool_cannot_be_formatted(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_bytes(bytes(64 * BLOCK))
    with FileDevice(path, read_only=True) as device, pytest.raises(OSError, match=r".") as caught:
        PoolMetadata.format(device, 128)
    assert caught.value.errno in (errno.EPERM, errno.EBADF)
    assert path.read_bytes() == bytes(64 * BLOCK)


def test_metadata_snapshot_is_read_only_and_open_beside_its_pool(tmp_path: Path, with_snap: bytes) -> None:
    path = tmp_path / "pool"
    path.write_bytes(with_snap)
    with PoolMetadata.open(path) as pool, PoolMetadata.open_metadata_snap(path) as snap:
        assert snap.is_read_only
        assert snap.metadata_snap is None
        with pool.open_thin_device(0) as now, snap.open_thin_device(0) as then:
            assert now.find_block(3) != then.find_block(3)
            for what, change in CHANGES.items():
                with pytest.raises(ReadOnly) as caught:
                    change(snap, then)
                assert caught.value.errno == errno.EPERM, what
            with pytest.raises(ReadOnly):
                snap.set_read_write()
            with pytest.raises(ReadOnly):
                snap.set_needs_check()
            with pytest.raises(ThinError):
                snap.abort()
            assert then.mapped_count == 403


def test_pool_without_a_metadata_snapshot_says_so(sound: bytes) -> None:
    with pytest.raises(ThinError, match="metadata snap") as caught:
        PoolMetadata.open_metadata_snap(MemoryDevice(sound))
    assert caught.value.errno == errno.ENODATA
