"""Measure the buffer caches: hits, misses, write-back, engines on a device with latency, what LVM does.

    python -m tools.bench.bufio                        everything: half a minute
    python -m tools.bench.bufio --only hit --only miss
    python -m tools.bench.bufio --dir /mnt/disk --size 256 --json bufio.json

docs/performance.md says what each row means.  Nothing is asserted: figures are for reading.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bufio import AsyncEngine, Bcache, Client, FileDevice, MemoryDevice, SyncEngine
from tools.bench.compare import BLOCKS_PER_SECOND, MIB_PER_SECOND, NANOSECONDS, Goal, Row, report, rows_of
from tools.bench.measure import Lap, Stopwatch, environment, interleave, one_core
from tools.bench.slow_device import SlowDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bufio.device import Device
    from bufio.engine import Done, Engine, Extent

    Contestant = Callable[[], dict[str, Lap]]

MIB = 1 << 20
SECTOR_BYTES = 512
BLOCK_SIZE = 4096  # bytes
BUFFER_BYTES = 2 * BLOCK_SIZE  # of a client's memory for each block that shall fit, bookkeeping included

HIT_BLOCKS = 1024
HIT_PASSES = 16
LATENCY_SECONDS = 100e-6
LATENCY_BLOCKS = 512
WINDOW = 32  # blocks read ahead
DIRECT_BLOCKS = 1024
LABEL_DEVICES = 200
LABEL_BLOCK_SECTORS = 256

HIT_GOAL = Goal(plus=1500)  # nanoseconds
MISS_GOAL = Goal(times=1.5, plus=3000)  # nanoseconds
WRITE_BACK_GOAL = Goal(times=0.8)
ASYNC_GOAL = Goal(times=8)


class SingleBlocks(SyncEngine):
    """Writes as :class:`SyncEngine` does, but each block by a call of its own: what coalescing is measured against."""

    def start_write(self, device: Device, extents: list[Extent], done: Done, *, waiting: bool = False) -> None:
        """Write the views to the device, one at a time."""
        single: list[Extent] = []
        for offset, views in extents:
            for view in views:
                single.append((offset, [view]))
                offset += view.nbytes
        super().start_write(device, single, done, waiting=waiting)


class LockedDict:
    """The least that a cache safe for threads does for a hit: take a lock and look into a dictionary."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._lock = threading.Lock()
        self._table = {block: LockedDict.Entry(self, block) for block in blocks}

    class Entry:
        """What is found."""

        def __init__(self, owner: LockedDict, block: int) -> None:
            self.owner = owner
            self.block = block

        def release(self) -> None:
            """Take the lock, and nothing more."""
            with self.owner._lock:
                pass

    def read(self, block: int) -> Entry:
        """Find a block."""
        with self._lock:
            return self._table[block]


class Bench:
    """The measurements, one method each; every method returns rows that make up one table."""

    def __init__(self, rounds: int, size_bytes: int, directory: Path, seed: int) -> None:
        self.rounds = rounds
        self.size_bytes = size_bytes
        self.nr_blocks = size_bytes // BLOCK_SIZE
        self.directory = directory
        self.seed = seed

    def file(self, directory: Path | None = None) -> Path:
        """A file of ``size_bytes`` that are not zeros, all of it on the device and in the page cache; made once."""
        path = (directory or self.directory) / "blocks.img"
        if not path.exists():
            with open(path, "wb") as file:
                for _ in range(self.size_bytes // MIB):
                    file.write(os.urandom(MIB))
                file.flush()
                os.fsync(file.fileno())
        return path

    def apart(self, count: int) -> list[int]:
        """That many blocks (or as many as there are) in random order, of which no two are neighbours."""
        even = range(0, self.nr_blocks, 2)
        return random.Random(self.seed).sample(even, min(count, len(even)))

    def hit(self) -> list[Row]:
        """Cached blocks, got and given back, and got alone."""
        blocks = random.Random(self.seed).sample(range(HIT_BLOCKS), HIT_BLOCKS)
        device = MemoryDevice(HIT_BLOCKS * BLOCK_SIZE)
        with (
            Client(device, BLOCK_SIZE, cache_bytes=HIT_BLOCKS * BUFFER_BYTES) as client,
            Bcache(BLOCK_SIZE // SECTOR_BYTES, HIT_BLOCKS) as bcache,
        ):

            def by_client() -> dict[str, Lap]:
                pair, alone = Stopwatch(), Stopwatch()
                read = client.read
                for _ in range(HIT_PASSES):
                    with pair.running():
                        for block in blocks:
                            read(block).release()
                    with alone.running():
                        held = [read(block) for block in blocks]
                    for buffer in held:
                        buffer.release()
                return _hits(pair, alone)

            def by_bcache() -> dict[str, Lap]:
                pair, alone = Stopwatch(), Stopwatch()
                get = bcache.get
                for _ in range(HIT_PASSES):
                    with pair.running():
                        for index in blocks:
                            get(device, index).put()
                    with alone.running():
                        held = [get(device, index) for index in blocks]
                    for block in held:
                        block.put()
                return _hits(pair, alone)

            floor = LockedDict(blocks)

            def by_dict() -> dict[str, Lap]:
                pair, alone = Stopwatch(), Stopwatch()
                read = floor.read
                for _ in range(HIT_PASSES):
                    with pair.running():
                        for block in blocks:
                            read(block).release()
                    with alone.running():
                        _ = [read(block) for block in blocks]
                return _hits(pair, alone)

            for block in blocks:
                client.read(block).release()
                bcache.get(device, block).put()
            contestants = {"Client": by_client, "Bcache": by_bcache, "locked dict": by_dict}
            results = interleave(contestants, self.rounds)
        goals = {("hit: get", "Client"): HIT_GOAL, ("hit: get, give back", "Client"): HIT_GOAL}
        return rows_of(results, "locked dict", NANOSECONDS, ["cpu"], goals)

    def miss(self) -> list[Row]:
        """Blocks that are not cached, of a file in the page cache, by a small cache and by a large one."""
        orders = {
            "miss, sequential": list(range(self.nr_blocks)),
            "miss, random": random.Random(self.seed).sample(range(self.nr_blocks), self.nr_blocks),
        }
        with FileDevice(self.file(), read_only=True) as device, ExitStack() as stack:

            def by_client(cache_bytes: int) -> Contestant:
                client = stack.enter_context(Client(device, BLOCK_SIZE, cache_bytes=cache_bytes))

                def run() -> dict[str, Lap]:
                    laps = {}
                    for name, blocks in orders.items():
                        read = client.read
                        watch = Stopwatch()
                        with watch.running():
                            for block in blocks:
                                read(block).release()
                        laps[name] = watch.lap(len(blocks))
                    return laps

                return run

            def by_pread() -> dict[str, Lap]:
                return {name: _preads(device.fileno(), blocks) for name, blocks in orders.items()}

            caches = {"Client, 1 MiB": by_client(MIB), "Client, size / 4": by_client(self.size_bytes // 4)}
            results = interleave(caches | {"os.pread": by_pread}, self.rounds)
        goals = {(order, cache): MISS_GOAL for order in orders for cache in caches}
        return rows_of(results, "os.pread", NANOSECONDS, ["cpu", "wall"], goals)

    def write(self) -> list[Row]:
        """Dirty blocks one after the other, all at once, to the last flush."""
        rows = self._write_to("write-back, --dir", self.directory, WRITE_BACK_GOAL)
        with tempfile.TemporaryDirectory(prefix="bufio-bench-", dir="/dev/shm") as directory:
            return rows + self._write_to("write-back, tmpfs", Path(directory), None)

    def _write_to(self, operation: str, directory: Path, goal: Goal | None) -> list[Row]:
        """Write-back to a file there; *goal* is for the caches that coalesce."""
        nr_mib = self.size_bytes // MIB
        with ExitStack() as stack:
            device = stack.enter_context(FileDevice(self.file(directory)))

            def by_client(engine: Engine) -> Contestant:
                client = stack.enter_context(
                    Client(device, BLOCK_SIZE, engine=engine, cache_bytes=self.nr_blocks * BUFFER_BYTES)
                )
                for block in range(self.nr_blocks):
                    client.read(block).release()

                def run() -> dict[str, Lap]:
                    for block in range(self.nr_blocks):
                        buffer = client.read(block)
                        buffer.mark_dirty()
                        buffer.release()
                    watch = Stopwatch()
                    with watch.running():
                        client.write_dirty_buffers()
                    return {operation: watch.lap(nr_mib)}

                return run

            source = memoryview(stack.enter_context(mmap.mmap(-1, self.size_bytes)))
            stack.callback(source.release)
            device.readinto(source, 0)

            def plain() -> dict[str, Lap]:
                fd = device.fileno()
                watch = Stopwatch()
                with watch.running():
                    for at in range(0, self.size_bytes, MIB):
                        os.pwrite(fd, source[at : at + MIB], at)
                    os.fdatasync(fd)
                return {operation: watch.lap(nr_mib)}

            contestants = {
                "SyncEngine": by_client(SyncEngine()),
                "AsyncEngine": by_client(stack.enter_context(AsyncEngine())),
                "not coalesced": by_client(SingleBlocks()),
                "1 MiB pwrites": plain,
            }
            results = interleave(contestants, self.rounds)
        goals = {} if goal is None else {(operation, name): goal for name in ("SyncEngine", "AsyncEngine")}
        return rows_of(results, "1 MiB pwrites", MIB_PER_SECOND, ["wall"], goals)

    def latency(self) -> list[Row]:
        """Both engines on a device each of whose calls takes 100 microseconds longer."""
        device = SlowDevice(MemoryDevice(self.size_bytes), LATENCY_SECONDS)
        scattered = self.apart(LATENCY_BLOCKS)
        in_order = range(len(scattered))
        ahead = f"random reads, {WINDOW} ahead"
        with ExitStack() as stack:

            def by_client(engine: Engine) -> Contestant:
                # Half of what a lap reads fits in, so that it finds none of it, and evicts a block for each.
                reader = stack.enter_context(
                    Client(device, BLOCK_SIZE, engine=engine, cache_bytes=len(scattered) * BUFFER_BYTES // 4)
                )
                writer = stack.enter_context(
                    Client(device, BLOCK_SIZE, engine=engine, cache_bytes=len(scattered) * BUFFER_BYTES)
                )

                def run() -> dict[str, Lap]:
                    return {
                        ahead: _read_ahead(reader, scattered),
                        f"sequential reads, {WINDOW} ahead": _read_ahead(reader, in_order),
                        f"sequential reads, {WINDOW} at once": _read_batches(reader, in_order),
                        "write-back of scattered blocks": _write_back(writer, scattered),
                    }

                return run

            contestants = {
                "AsyncEngine": by_client(stack.enter_context(AsyncEngine())),
                f"AsyncEngine({WINDOW})": by_client(stack.enter_context(AsyncEngine(WINDOW))),
                "SyncEngine": by_client(SyncEngine()),
            }
            results = interleave(contestants, self.rounds)
        return rows_of(results, "SyncEngine", BLOCKS_PER_SECOND, ["wall"], {(ahead, "AsyncEngine"): ASYNC_GOAL})

    def direct(self) -> list[Row]:
        """Both engines on a file opened with O_DIRECT; no rows where the file system does not have it."""
        scattered = self.apart(DIRECT_BLOCKS)
        with ExitStack() as stack:
            try:
                device = stack.enter_context(FileDevice(self.file(), direct=True))
            except OSError as error:
                print(f"no rows for O_DIRECT: {error}", file=sys.stderr)
                return []

            def by_client(engine: Engine) -> Contestant:
                reader = stack.enter_context(
                    Client(device, BLOCK_SIZE, engine=engine, cache_bytes=len(scattered) * BUFFER_BYTES // 4)
                )
                writer = stack.enter_context(
                    Client(device, BLOCK_SIZE, engine=engine, cache_bytes=len(scattered) * BUFFER_BYTES)
                )

                def run() -> dict[str, Lap]:
                    return {
                        f"O_DIRECT, random reads, {WINDOW} ahead": _read_ahead(reader, scattered),
                        "O_DIRECT, write-back of scattered blocks": _write_back(writer, scattered),
                    }

                return run

            contestants = {
                "AsyncEngine": by_client(stack.enter_context(AsyncEngine())),
                "SyncEngine": by_client(SyncEngine()),
            }
            results = interleave(contestants, self.rounds)
        return rows_of(results, "SyncEngine", BLOCKS_PER_SECOND, ["wall"], {})

    def lvm(self) -> list[Row]:
        """What LVM does with its cache: look for labels on many devices, and read here and there on one."""
        return self._label_scan() + self._random_reads()

    def _label_scan(self) -> list[Row]:
        """The first block of each of many devices with latency, all of them asked for before the first is looked at."""
        with ExitStack() as stack:
            devices = []
            for number in range(LABEL_DEVICES):
                path = self.directory / f"label-{number}.img"
                path.write_bytes(os.urandom(LABEL_BLOCK_SECTORS * SECTOR_BYTES))
                stack.callback(path.unlink)
                devices.append(SlowDevice(stack.enter_context(FileDevice(path, read_only=True)), LATENCY_SECONDS))

            def by_bcache(engine: Engine) -> Contestant:
                bcache = stack.enter_context(Bcache(LABEL_BLOCK_SECTORS, LABEL_DEVICES, engine))

                def run() -> dict[str, Lap]:
                    watch = Stopwatch()
                    with watch.running():
                        for device in devices:
                            bcache.prefetch(device, 0)
                        for device in devices:
                            bcache.get(device, 0).put()
                    for device in devices:
                        bcache.invalidate_device(device)
                    return {"label scan": watch.lap(LABEL_DEVICES)}

                return run

            def plain() -> dict[str, Lap]:
                watch = Stopwatch()
                with watch.running():
                    for device in devices:
                        device.readinto(bytearray(LABEL_BLOCK_SECTORS * SECTOR_BYTES), 0)
                return {"label scan": watch.lap(LABEL_DEVICES)}

            contestants = {
                "AsyncEngine": by_bcache(stack.enter_context(AsyncEngine())),
                "SyncEngine": by_bcache(SyncEngine()),
                "plain reads": plain,
            }
            results = interleave(contestants, self.rounds)
        return rows_of(results, "plain reads", BLOCKS_PER_SECOND, ["wall"], {})

    def _random_reads(self) -> list[Row]:
        """Blocks anywhere on a file four times as large as the cache."""
        rnd = random.Random(self.seed)
        blocks = [rnd.randrange(self.nr_blocks) for _ in range(self.nr_blocks)]
        with (
            FileDevice(self.file(), read_only=True) as device,
            Bcache(BLOCK_SIZE // SECTOR_BYTES, self.nr_blocks // 4) as bcache,
        ):

            def by_bcache() -> dict[str, Lap]:
                get = bcache.get
                watch = Stopwatch()
                with watch.running():
                    for index in blocks:
                        get(device, index).put()
                return {"random 4 KiB": watch.lap(len(blocks))}

            def plain() -> dict[str, Lap]:
                return {"random 4 KiB": _preads(device.fileno(), blocks)}

            results = interleave({"SyncEngine": by_bcache, "plain reads": plain}, self.rounds)
        return rows_of(results, "plain reads", BLOCKS_PER_SECOND, ["cpu"], {})


MEASUREMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    "hit": Bench.hit,
    "miss": Bench.miss,
    "write": Bench.write,
    "latency": Bench.latency,
    "direct": Bench.direct,
    "lvm": Bench.lvm,
}


def _hits(pair: Stopwatch, alone: Stopwatch) -> dict[str, Lap]:
    operations = HIT_PASSES * HIT_BLOCKS
    return {"hit: get, give back": pair.lap(operations), "hit: get": alone.lap(operations)}


def _preads(fd: int, blocks: Sequence[int]) -> Lap:
    """Read *blocks* as plainly as Python can."""
    offsets = [block * BLOCK_SIZE for block in blocks]
    pread = os.pread
    watch = Stopwatch()
    with watch.running():
        for offset in offsets:
            pread(fd, BLOCK_SIZE, offset)
    return watch.lap(len(blocks))


def _read_ahead(client: Client, blocks: Sequence[int]) -> Lap:
    """Read *blocks*, none of which is cached, and at each of them begin to read the one ``WINDOW`` further on."""
    watch = Stopwatch()
    with watch.running():
        for block in blocks[:WINDOW]:
            client.prefetch(block)
        for number, block in enumerate(blocks):
            if number + WINDOW < len(blocks):
                client.prefetch(blocks[number + WINDOW])
            client.read(block).release()
    return watch.lap(len(blocks))


def _read_batches(client: Client, blocks: range) -> Lap:
    """Read *blocks*, none of which is cached, and at the first of every batch begin to read the next batch."""
    watch = Stopwatch()
    with watch.running():
        client.prefetch(blocks.start, WINDOW)
        for block in blocks:
            if block % WINDOW == 0:
                client.prefetch(block + WINDOW, min(WINDOW, max(0, blocks.stop - block - WINDOW)))
            client.read(block).release()
    return watch.lap(len(blocks))


def _write_back(client: Client, blocks: Sequence[int]) -> Lap:
    """Change *blocks* outside the clock, and write them."""
    for block in blocks:
        buffer = client.new(block)
        buffer.mark_dirty()
        buffer.release()
    watch = Stopwatch()
    with watch.running():
        client.write_dirty_buffers()
    return watch.lap(len(blocks))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.bufio", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="laps of each contestant (default %(default)s)")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="one measurement; repeat for more")
    parser.add_argument(
        "--size", type=int, default=64, metavar="MIB", help="of files and devices (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="for files (default: that of the system for temporary ones)")
    parser.add_argument("--all-cores", action="store_true", help="let threads run on any core, not all on the same")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there, an object and line per row")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the JSON."""
    options = _parse(argv)
    facts = environment([])
    lines = []
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bufio-bench-", dir=options.dir))
        if not options.all_cores:
            stack.enter_context(one_core())
        print("\n".join(f"{key}: {value}" for key, value in facts.items()))
        print(f"median of {options.rounds} interleaved rounds, {options.size} MiB, in {Path(directory).parent}\n")
        bench = Bench(options.rounds, options.size * MIB, Path(directory), options.seed)
        for name in options.only or MEASUREMENTS:
            if sys.stderr.isatty():
                print(f"measuring: {name}", file=sys.stderr, flush=True)
            rows = MEASUREMENTS[name](bench)
            lines += [json.dumps({"measurement": name} | row.as_dict() | {"environment": facts}) for row in rows]
            if rows:
                print(report(rows) + "\n", flush=True)
    if options.json is not None:
        options.json.write_text("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
