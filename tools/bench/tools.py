"""Measure the reading tools beside another build of the same programs: seconds, processor time, memory.

    python -m tools.bench.tools                                   on a pool made for it, a million mappings
    python -m tools.bench.tools --pool big.bin --only thin_check  on metadata of one's own; repeat for more

The other build is the one in the directory THINPOOL_PEER_DIR, else whatever is on PATH.  Everything is started as users
start it, interpreter included; page caches are hot after the first round, which does not count.  docs/performance.md
says what each row means.  Nothing is asserted: figures are for reading.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bufio import FileDevice
from thinpool.pool_reader import PoolReader
from tools.bench.compare import MILLISECONDS, Goal, Row, report
from tools.bench.measure import Lap, environment, interleave, table
from tools.bench.pools import make_linear_pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.measure import Result

ROOT = Path(__file__).resolve().parent.parent.parent
OURS, THEIRS = "ours", "theirs"
LARGE = 10_000_000
"""Mappings from which on a pool is what the goals are about."""

_LAUNCHER = """
import json, os, sys, time
out, *command = sys.argv[1:]
fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
begin = time.perf_counter()
pid = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, fd, 1)])
_, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - begin
json.dump([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, os.waitstatus_to_exitcode(status)], sys.stdout)
"""
"""A process of its own, as small as an interpreter gets: a child's peak of memory is never below that of its parent."""


@dataclass(frozen=True)
class Pool:
    """Metadata to measure on.

    :ivar dev_ids: the first two devices, or fewer
    """

    path: Path
    nr_mappings: int
    nr_data_blocks: int
    dev_ids: tuple[int, ...]

    @classmethod
    def at(cls, path: Path) -> Pool:
        """Look at the metadata in a file."""
        with FileDevice(path, read_only=True) as device:
            pool = PoolReader(device)
            devices = pool.devices()
            nr_mappings = sum(entry.mapped_blocks for entry in devices)
            return cls(path, nr_mappings, pool.nr_data_blocks, tuple(entry.dev_id for entry in devices[:2]))


@dataclass(frozen=True)
class Command:
    """One row of the tables: a program with arguments, and the goals for a large pool, ours over theirs, by clock.

    :ivar to_file: its output goes to a file and not to /dev/null
    """

    program: str
    arguments: Callable[[Pool], list[str]]
    goals: dict[str, float]
    to_file: bool = False


def _delta(pool: Pool) -> list[str]:
    first, second = pool.dev_ids
    return ["--thin1", str(first), "--thin2", str(second)]


COMMANDS = {
    "thin_check": Command("thin_check", lambda pool: [], {"wall": 0.5, "cpu": 0.9}),
    "thin_dump": Command("thin_dump", lambda pool: [], {"wall": 0.45}),
    "thin_dump to a file": Command("thin_dump", lambda pool: [], {"wall": 0.6}, to_file=True),
    "thin_rmap": Command("thin_rmap", lambda pool: ["--region", f"0..{pool.nr_data_blocks}"], {"wall": 0.6}),
    "thin_ls": Command("thin_ls", lambda pool: [], {"wall": 0.5}),
    "thin_ls, what is shared": Command("thin_ls", lambda pool: ["-o", "DEV,EXCLUSIVE_BLOCKS,HIGHEST_BLOCK"], {}),
    "thin_delta": Command("thin_delta", _delta, {"wall": 0.7}),
}


class Contestant:
    """One build of the programs, run on one pool.

    :ivar peaks: for each row the peaks of resident memory, in MiB
    """

    def __init__(self, is_ours: bool, directory: str | None, pool: Pool, rows: list[str], scratch: Path) -> None:
        self._is_ours = is_ours
        self._directory = directory
        self._pool = pool
        self._rows = rows
        self._scratch = scratch
        self.peaks: dict[str, list[float]] = {row: [] for row in rows}

    def _argv(self, program: str) -> list[str]:
        if self._is_ours:
            # What the script that pip makes for an entry point does.
            code = f"import sys; from tools.{program} import main; sys.exit(main())"
            return [sys.executable, "-c", code]
        found = shutil.which(program, path=self._directory)
        if found is None:
            raise SystemExit(f"{program} is not in {self._directory}")
        return [found]

    def lap(self) -> dict[str, Lap]:
        """Run everything once."""
        laps = {}
        for row in self._rows:
            command = COMMANDS[row]
            out = self._scratch / "output" if command.to_file else Path(os.devnull)
            argv = [*self._argv(command.program), *command.arguments(self._pool), str(self._pool.path)]
            laps[row] = self._run(row, argv, out)
        return laps

    def _run(self, row: str, argv: list[str], out: Path) -> Lap:
        # Users have byte code at hand, whatever this process has been told.
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(out), *argv],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        wall, cpu, peak, status = json.loads(done.stdout)
        if status:
            raise SystemExit(f"{' '.join(argv)}: exit status {status}: {done.stderr.strip()[-500:]}")
        self.peaks[row].append(peak / 1024)
        return Lap(1, cpu, wall)


def measure(pool: Pool, rows: list[str], directory: str | None, rounds: int, scratch: Path) -> tuple[str, Any]:
    """Run both builds on one pool; return tables, and plain data."""
    contestants = {
        OURS: Contestant(True, None, pool, rows, scratch),
        THEIRS: Contestant(False, directory, pool, rows, scratch),
    }
    for contestant in contestants.values():
        contestant.lap()
        for kept in contestant.peaks.values():
            kept.clear()
    results = interleave({name: contestant.lap for name, contestant in contestants.items()}, rounds)
    lines = [_row(pool, row, clock, results[row]) for row in rows for clock in ("wall", "cpu")]
    medians = {
        name: [statistics.median(contestant.peaks[row]) for row in rows] for name, contestant in contestants.items()
    }
    memory = [
        [row, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"]
        for row, ours, theirs in zip(rows, medians[OURS], medians[THEIRS], strict=True)
    ]
    title = f"{pool.path}: {pool.nr_mappings:,} mappings"
    text = "\n\n".join([title, report(lines), table(["peak of memory, MiB", OURS, THEIRS, "ratio"], memory)])
    peaks_mib = {name: contestant.peaks for name, contestant in contestants.items()}
    return text, {"rows": [line.as_dict() for line in lines], "peaks_mib": peaks_mib}


def _row(pool: Pool, row: str, clock: str, results: dict[str, Result]) -> Row:
    times = COMMANDS[row].goals.get(clock)
    goal = Goal(times=times) if times is not None and pool.nr_mappings >= LARGE else None
    return Row(row, MILLISECONDS, clock, results[OURS], results[THEIRS], goal)


def peer_directory() -> str:
    """Where the other build is."""
    given = os.environ.get("THINPOOL_PEER_DIR")
    found = shutil.which("thin_check", path=given or f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise SystemExit("no thin_check to compare with: name the directory of one in THINPOOL_PEER_DIR")
    return os.path.dirname(found)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, action="append", metavar="FILE", help="metadata; repeat for more")
    parser.add_argument("--only", action="append", choices=list(COMMANDS), help="one row; repeat for more")
    parser.add_argument("--rounds", type=int, default=7, help="laps of each (default %(default)s)")
    parser.add_argument(
        "--mappings", type=int, default=1_000_000, help="of the pool that is made without --pool (default %(default)s)"
    )
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="for files (default /dev/shm)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every lap there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    options = parse(argv)
    directory = peer_directory()
    version = subprocess.run([f"{directory}/thin_check", "--version"], capture_output=True, text=True, check=True)
    facts = environment(["numpy", "fastcrc"]) | {THEIRS: f"{directory}, {version.stdout.strip()}"}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    print(f"median of {options.rounds} interleaved rounds\n")
    collected: dict[str, Any] = {"environment": facts}
    with tempfile.TemporaryDirectory(prefix="thinpool-bench-", dir=options.directory) as name:
        scratch = Path(name)
        paths = options.pool
        if not paths:
            paths = [scratch / "pool"]
            make_linear_pool(paths[0], options.mappings)
        for path in paths:
            pool = Pool.at(path.resolve())
            rows = [row for row in options.only or COMMANDS if row != "thin_delta" or len(pool.dev_ids) == 2]
            text, collected[str(path)] = measure(pool, rows, directory, options.rounds, scratch)
            print(text + "\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(collected, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
