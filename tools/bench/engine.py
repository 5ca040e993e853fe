"""Measure the engine: operations a second beside LMDB, cost of a snapshot, reads, memory, start-up of a tool.

    python -m tools.bench.engine                       everything, at full size: some minutes
    python -m tools.bench.engine --quick               a tenth of the size, to see that it runs
    python -m tools.bench.engine --only rates --json rates.json

docs/performance.md says what each figure means.  Nothing is asserted: figures are for reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bufio import FileDevice, MemoryDevice
from thinpool import PoolMetadata
from tools.bench.measure import Lap, Result, Stopwatch, environment, interleave, one_core, table
from tools.bench.pools import DATA_BLOCK_SIZE, CountingDevice, make_linear_pool, metadata_bytes, tree_depth
from tools.bench.stores import LmdbStore, PoolStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.bench.stores import Store

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20

BATCH = 1000  # operations a commit
BUILD_BATCH = 10_000
SPARSENESS = 16  # random thin blocks come from a range this many times as large as their number
SNAPSHOTS_PER_LAP = 10
SMALL_POOL = 10_000

#: Operations a second that the project aims at, against a cached pool of a million mappings on one core.
GOALS = {
    "find_block, random": 300_000,
    "insert_block, random": 90_000,
    "insert_block, sequential": 300_000,
    "remove_block, random": 70_000,
    "mappings(), random data": 3_000_000,
    "mappings(), long runs": 3_000_000,
}


class Bench:
    """The measurements, one method each; every method returns a table to print and plain data to keep."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self._linear_pools: dict[int, Path] = {}

    def linear_pool(self, nr_mappings: int) -> Path:
        """A pool file with that many mappings in order, made once."""
        if nr_mappings not in self._linear_pools:
            path = self.directory / f"linear-{nr_mappings}.img"
            begin = time.perf_counter()
            maker = make_linear_pool(path, nr_mappings)
            note(f"pool of {nr_mappings:,} mappings made by {maker} in {time.perf_counter() - begin:.1f} s")
            self._linear_pools[nr_mappings] = path
        return self._linear_pools[nr_mappings]

    def rates(self) -> tuple[str, Any]:
        """Single operations against a cached pool, in memory and in a file, and against LMDB."""
        options = self.options
        rnd = random.Random(options.seed)
        span = SPARSENESS * options.mappings
        chosen = rnd.sample(range(span), options.mappings + options.operations)
        existing, fresh = chosen[: options.mappings], chosen[options.mappings :]
        wanted = rnd.sample(existing, options.operations)
        leaving = rnd.sample(fresh, len(fresh))
        tail = range(span, span + options.operations)

        size = metadata_bytes(2 * options.mappings)
        nr_data_blocks = 2 * (options.mappings + options.operations)
        path = self.directory / "random.img"
        with open(path, "wb") as file:
            file.truncate(size)
        lmdb_directory = self.directory / "lmdb"
        lmdb_directory.mkdir()
        stores: dict[str, Store] = {
            "memory": PoolStore(MemoryDevice(size), nr_data_blocks, size),
            "file": PoolStore(path, nr_data_blocks, size),
            "LMDB": LmdbStore(lmdb_directory, 4 * size),
        }
        for name, store in stores.items():
            lap = store.provision(existing, BUILD_BATCH)
            note(f"{name}: {options.mappings:,} random records in {lap.wall:.1f} s")

        def lap_of(store: Store) -> Callable[[], dict[str, Lap]]:
            def run() -> dict[str, Lap]:
                laps = {
                    "find_block, random": store.lookup(wanted),
                    "insert_block, random": store.insert(fresh, BATCH),
                    "remove_block, random": store.remove(leaving, BATCH),
                    "insert_block, sequential": store.insert(tail, BATCH),
                    "remove_block, sequential": store.remove(tail, BATCH),
                }
                laps["alloc_data_block + insert_block, random"] = store.provision(fresh, BATCH)
                store.remove(leaving, BATCH)
                return laps

            return run

        results = interleave({name: lap_of(store) for name, store in stores.items()}, options.rounds)
        for store in stores.values():
            store.close()

        rows = []
        for operation, by_store in results.items():
            reference = by_store["LMDB"].rates(options.clock)[1]
            for name, result in by_store.items():
                slowest, median, fastest = result.rates(options.clock)
                rows.append(
                    [
                        operation if name == "memory" else "",
                        name,
                        thousands(median),
                        f"{thousands(slowest)} .. {thousands(fastest)}",
                        f"{median / reference:.2f}" if name != "LMDB" else "",
                        thousands(GOALS[operation]) if operation in GOALS and name != "LMDB" else "",
                    ]
                )
        text = table(["thousand operations a second", "on", "median", "range", "/ LMDB", "goal"], rows)
        return text, raw(results)

    def iteration(self) -> tuple[str, Any]:
        """Mappings a second through ``mappings()``: where every run is one block long, and where runs are long."""
        options = self.options
        rnd = random.Random(options.seed)
        nr_long = min(options.large, options.mappings)
        size = metadata_bytes(2 * options.mappings)
        aged = PoolStore(MemoryDevice(size), 2 * options.mappings, size)
        aged.provision(rnd.sample(range(SPARSENESS * options.mappings), options.mappings), BUILD_BATCH)

        with PoolMetadata.open(self.linear_pool(nr_long), read_only=True, cache_bytes=metadata_bytes(nr_long)) as pool:
            device = pool.open_thin_device(0)

            def long_runs() -> dict[str, Lap]:
                watch = Stopwatch()
                with watch.running():
                    total = sum(run.length for run in device.mappings())
                return {"mappings(), long runs": watch.lap(total)}

            results = interleave({"pool": lambda: {"mappings(), random data": aged.iterate()}}, options.rounds)
            results |= interleave({"pool": long_runs}, options.rounds)
            device.close()
        aged.close()
        rows = []
        for operation, by_store in results.items():
            slowest, median, fastest = by_store["pool"].rates(options.clock)
            spread = f"{thousands(slowest)} .. {thousands(fastest)}"
            rows.append([operation, thousands(median), spread, thousands(GOALS[operation])])
        return table(["thousand mappings a second", "median", "range", "goal"], rows), raw(results)

    def snapshots(self) -> tuple[str, Any]:
        """Time to take a snapshot of a device with few and with many mappings."""
        options = self.options

        with contextlib.ExitStack() as stack:

            def lap_of(nr_mappings: int) -> Callable[[], dict[str, Lap]]:
                pool = stack.enter_context(PoolMetadata.open(self.linear_pool(nr_mappings)))
                ids = range(1, 1 + SNAPSHOTS_PER_LAP)

                def run() -> dict[str, Lap]:
                    create, commit = Stopwatch(), Stopwatch()
                    for snapshot in ids:
                        with create.running():
                            pool.create_snap(snapshot, 0)
                        with commit.running():
                            pool.commit()
                    for snapshot in ids:
                        pool.delete_thin_device(snapshot)
                    pool.commit()
                    return {"create_snap": create.lap(len(ids)), "commit after it": commit.lap(len(ids))}

                return run

            sizes = [SMALL_POOL, options.large]
            contestants = {f"{nr_mappings:,}": lap_of(nr_mappings) for nr_mappings in sizes}
            for warm_up in contestants.values():
                warm_up()
            results = interleave(contestants, max(options.rounds, 11))

        small, large = contestants
        rows = []
        for operation, by_size in results.items():
            times = {size: by_size[size].median_seconds(options.clock) for size in contestants}
            ratio = f"{times[large] / times[small]:.2f}"
            rows.append([operation, *(f"{times[size] * 1e6:.1f}" for size in contestants), ratio])
        heading = ["microseconds, by mappings of the origin", small, large, "ratio (goal: below 1.5)"]
        return table(heading, rows), raw(results)

    def reads(self) -> tuple[str, Any]:
        """Metadata blocks read to open a pool and to take a snapshot in it, from a cold cache."""
        data = []
        for nr_mappings in sorted({1, 1000, self.options.mappings, self.options.large}):
            path = self.linear_pool(nr_mappings)
            device = CountingDevice(FileDevice(path))
            pool = PoolMetadata.open(device)
            opening = device.blocks_read
            pool.create_snap(1, 0)
            snapshot = device.blocks_read - opening
            pool.abort()
            pool.close()
            device.close()
            data.append({"mappings": nr_mappings, "depth": tree_depth(path), "opening": opening, "snapshot": snapshot})
        heading = ["mappings", "levels from top node to leaf", "blocks read to open", "to take a snapshot"]
        return table(heading, [[f"{value:,}" for value in row.values()] for row in data]), data

    def memory(self) -> tuple[str, Any]:
        """Peak of resident memory on a pool that is much larger than its cache."""
        path = self.directory / "memory.img"
        shutil.copyfile(self.linear_pool(self.options.large), path)
        data = []
        for cache_bytes in (8 * MIB, 32 * MIB):
            command = [sys.executable, "-m", "tools.bench.memory", str(path), str(cache_bytes)]
            done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            data.append(json.loads(done.stdout))
        path.unlink()
        rows = []
        for result in data:
            peaks = [f"{result['peaks'][phase] / MIB:.0f}" for phase in ("imports", "iterate", "look up", "insert")]
            rows.append([f"{result['cache_bytes'] // MIB}", *peaks, f"{result['cache_bytes'] // MIB + 64}"])
        title = f"MiB resident at most, {data[0]['nr_mappings']:,} mappings: cache"
        return table([title, "imports", "iterate", "look up", "insert", "goal"], rows), data

    def startup(self) -> tuple[str, Any]:
        """Wall time of ``thin_check`` on the smallest pool, beside an empty interpreter and the reference tool."""
        path = self.directory / "smallest.img"
        with open(path, "wb") as file:
            file.truncate(4 * MIB)
        with PoolMetadata.format(path, DATA_BLOCK_SIZE, 1024) as pool:
            pool.create_thin(0)
            with pool.open_thin_device(0) as device:
                device.provision(0, 10)

        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -m tools.thin_check": [sys.executable, "-m", "tools.thin_check", str(path)],
        }
        installed = shutil.which("thin_check", path=str(Path(sys.executable).parent))
        if installed is not None:
            commands["thin_check, as installed"] = [installed, str(path)]
        reference = shutil.which("thin_check", path="/usr/sbin:/sbin")
        if reference is not None:
            commands["thin_check, of the distribution"] = [reference, str(path)]

        def lap_of(command: list[str]) -> Callable[[], dict[str, Lap]]:
            def run() -> dict[str, Lap]:
                before, begin = children_cpu(), time.perf_counter()
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
                wall = time.perf_counter() - begin
                return {"start-up": Lap(1, children_cpu() - before, wall)}

            return run

        results = interleave({name: lap_of(command) for name, command in commands.items()}, 21)
        rows = []
        for name, result in results["start-up"].items():
            wall, cpu = result.seconds("wall"), result.seconds("cpu")
            rows.append(
                [
                    name,
                    f"{statistics.median(wall) * 1e3:.1f}",
                    f"{min(wall) * 1e3:.1f} .. {max(wall) * 1e3:.1f}",
                    f"{statistics.median(cpu) * 1e3:.1f}",
                    "60" if "thin_check" in name and "distribution" not in name else "",
                ]
            )
        return table(["milliseconds, start to end", "wall, median of 21", "range", "cpu", "goal (wall)"], rows), raw(
            results
        )


MEASUREMENTS: dict[str, Callable[[Bench], tuple[str, Any]]] = {
    "rates": Bench.rates,
    "iteration": Bench.iteration,
    "snapshots": Bench.snapshots,
    "reads": Bench.reads,
    "memory": Bench.memory,
    "startup": Bench.startup,
}


def children_cpu() -> float:
    """Processor time, in seconds, of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def thousands(rate: float) -> str:
    """A rate in thousands a second."""
    return f"{rate / 1000:,.0f}"


def raw(results: dict[str, dict[str, Result]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """All laps as plain data."""
    return {
        operation: {name: [vars(lap) for lap in result.laps] for name, result in by_name.items()}
        for operation, by_name in results.items()
    }


def note(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mappings", type=int, default=1_000_000, help="records in the stores (default %(default)s)")
    parser.add_argument("--operations", type=int, default=100_000, help="operations in a lap (default %(default)s)")
    parser.add_argument(
        "--large", type=int, default=10_000_000, help="mappings of the large pool (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="laps of each contestant (default %(default)s)")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="clock of the tables (default cpu)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the mappings, a hundredth of the large pool")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="one measurement; repeat for more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--directory", type=Path, default=Path("/dev/shm"), help="for pools and LMDB (default /dev/shm)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every lap there")
    options = parser.parse_args(argv)
    if options.quick:
        options.mappings //= 10
        options.large //= 100
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    options = parse(argv)
    with one_core() as core, tempfile.TemporaryDirectory(prefix="thinpool-bench-", dir=options.directory) as directory:
        facts = environment(["numpy", "fastcrc", "lmdb"]) | {"core": str(core)}
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        print(f"median of {options.rounds} interleaved rounds, {options.clock} time, {options.mappings:,} mappings\n")
        collected: dict[str, Any] = {"environment": facts, "options": {k: str(v) for k, v in vars(options).items()}}
        bench = Bench(options, Path(directory))
        for name in options.only or MEASUREMENTS:
            text, collected[name] = MEASUREMENTS[name](bench)
            print(text + "\n", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(collected, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
