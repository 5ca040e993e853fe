"""Processes that are killed while they commit, or meet at the same pool: see docs/reliability.md."""

from __future__ import annotations

import errno
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.crash.processes import BrokenPromise, Supervisor
from tests.crash.workloads import POOLS
from tests.support.pools import content_of
from tests.support.tools import ROOT, run_process
from thinpool import PoolMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS = 30
BUSY = "Device or resource busy (os error 16)"


def some_rounds(supervisor: Supervisor, number: int = ROUNDS) -> None:
    for _ in range(number):
        supervisor.round()


def test_killed_processes_leave_what_they_were_promised(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path / "pool")
    some_rounds(supervisor)
    tally = supervisor.tally
    assert tally.rounds == ROUNDS == tally.while_opening + tally.while_committing + tally.between_commits
    assert tally.commits > ROUNDS
    assert tally.while_committing
    assert tally.interrupts


@pytest.mark.damages
@pytest.mark.parametrize("defect", ["node changed in place", "flags over the transaction", "details not written"])
def test_defects_that_need_no_power_cut_are_found(tmp_path: Path, defect: str) -> None:
    supervisor = Supervisor(tmp_path / "pool", defect=defect)
    with pytest.raises(BrokenPromise, match="seed 1, round"):
        # By chance, most often in the first ten.
        some_rounds(supervisor, 5 * ROUNDS)


# Two processes at one pool

HOLDER = """
import sys
from thinpool import PoolMetadata

with PoolMetadata.open(sys.argv[1], read_only=sys.argv[2] == "reader") as pool:
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def opened_elsewhere(path: Path, as_what: str = "writer") -> Iterator[None]:
    """Have another process keep the pool open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, as_what], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"open\n"
            yield
        finally:
            holder.communicate(timeout=30)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    path = tmp_path / "pool"
    path.write_bytes(POOLS["held"]())
    return path


def test_a_second_writer_is_refused(pool: Path) -> None:
    before = pool.read_bytes()
    with opened_elsewhere(pool):
        for read_only in (False, True):
            with pytest.raises(OSError, match="locked by another process") as refused:
                PoolMetadata.open(pool, read_only=read_only)
            assert refused.value.errno == errno.EBUSY
            assert str(pool) in str(refused.value)
        assert pool.read_bytes() == before
    PoolMetadata.open(pool).close()


def test_readers_share_and_keep_writers_out(pool: Path) -> None:
    with opened_elsewhere(pool, "reader"):
        PoolMetadata.open(pool, read_only=True).close()
        with pytest.raises(OSError, match="locked by another process"):
            PoolMetadata.open(pool)


@pytest.mark.parametrize(
    "words",
    [
        ["thin_check", "--auto-repair", "POOL"],
        ["thin_check", "--clear-needs-check-flag", "POOL"],
        ["thin_check", "POOL"],
        ["thin_dump", "POOL"],
        ["thin_ls", "POOL"],
        ["thin_rmap", "--region", "0..10", "POOL"],
        ["thin_delta", "--thin1", "0", "--thin2", "1", "POOL"],
        ["thin_metadata_pack", "-i", "POOL", "-o", "OTHER"],
        ["thin_metadata_unpack", "-f", "-i", "PACK", "-o", "POOL"],
        ["thin_metadata_pack", "-f", "-i", "COPY", "-o", "POOL"],
    ],
    ids=" ".join,
)
def test_tools_leave_alone_a_pool_that_is_in_use(pool: Path, tmp_path: Path, words: list[str]) -> None:
    before = pool.read_bytes()
    places = {"POOL": pool, "COPY": tmp_path / "copy", "PACK": tmp_path / "pack", "OTHER": tmp_path / "other"}
    places["COPY"].write_bytes(before)
    assert run_process("thin_metadata_pack", "-i", places["COPY"], "-o", places["PACK"]).status == 0
    inode = pool.stat().st_ino
    with opened_elsewhere(pool):
        done = run_process(words[0], *(places.get(word, word) for word in words[1:]))
    assert (done.status, done.stdout) == (64, b"")
    (line,) = done.stderr.splitlines()
    assert str(pool) in line
    assert BUSY in line
    assert "in use" in line
    assert (pool.stat().st_ino, pool.read_bytes()) == (inode, before)
    assert not places["OTHER"].exists()


@pytest.mark.parametrize(
    "words",
    [
        ["thin_check", "-m"],
        ["thin_dump", "-m"],
        ["thin_ls", "-m"],
        ["thin_rmap", "-m", "--region", "0..10"],
        ["thin_delta", "-m", "--thin1", "0", "--thin2", "1"],
    ],
    ids=" ".join,
)
def test_tools_read_the_metadata_snapshot_beside_a_writer(pool: Path, words: list[str]) -> None:
    expected = run_process(*words, pool)
    assert expected.status == 0
    with opened_elsewhere(pool):
        assert run_process(*words, pool) == expected


def test_the_library_reads_the_metadata_snapshot_beside_a_writer(pool: Path) -> None:
    held = content_of(pool.read_bytes()).snap_mappings
    assert held is not None
    with opened_elsewhere(pool), PoolMetadata.open_metadata_snap(pool) as snapshot:
        assert {dev: details.mapped_blocks for dev, details in snapshot.devices().items()} == {
            dev: len(mappings) for dev, mappings in held.items()
        }
