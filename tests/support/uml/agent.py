"""Runs in the guest kernel: a list of pool operations, one after the other, as fast as ioctls go.

    agent.py STEPS OUT

STEPS is a JSON list of ``[name, {argument: value}]``; each name is a method of `Agent` below.  OUT is a directory:
``results.json`` gets one entry per step (``{"value": ...}`` or ``{"errno": n}``), and ``trace`` the metadata blocks
that changed from one `checkpoint` to the next.

A shell script would do the same with dmsetup, but a process start costs 30 ms in User-Mode Linux: creating 300
devices would take a minute, and a transaction of a hundred writes would outlast the second after which the kernel
commits by itself.  Standard library only: the interpreter runs with -E -S -s.
"""

import errno
import fcntl
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

SECTOR = 512
METADATA_BLOCK = 4096
BLKDISCARD = 0x1277

# dm-ioctl.h: the command numbers, the flags, and struct dm_ioctl.
DEV_CREATE, DEV_REMOVE, DEV_SUSPEND, TABLE_LOAD, TABLE_STATUS, TARGET_MSG = 3, 4, 6, 9, 12, 14
READONLY_FLAG, SUSPEND_FLAG, NOFLUSH_FLAG = 1 << 0, 1 << 1, 1 << 11
HEADER = struct.Struct("<3I I I I i I I I Q 128s 129s 7s")
TARGET_SPEC = struct.Struct("<QQiI16s")

#: What this program writes into a data block: magic, then three numbers (seed, device, virtual block).
MARK = struct.Struct("<8sQQQ")
WRITTEN = b"kr-wrote"
#: What the data image holds before: the number of the data block, three times.
STAMPED = b"kr-stamp"


#: Targets: (start, length, type, parameters), in sectors.
Table: TypeAlias = list[tuple[int, int, str, str]]


class Dm:
    """Device-mapper ioctls."""

    def __init__(self) -> None:
        self.control = os.open("/dev/mapper/control", os.O_RDWR)

    def call(
        self, command: int, name: str, payload: bytes = b"", flags: int = 0, targets: int = 0
    ) -> tuple[int, bytes]:
        """One ioctl: returns the device number and what follows the header."""
        size = max(HEADER.size + len(payload), 16384)
        buffer = bytearray(size)
        HEADER.pack_into(buffer, 0, 4, 0, 0, size, HEADER.size, targets, 0, flags, 0, 0, 0, name.encode(), b"", b"")
        buffer[HEADER.size : HEADER.size + len(payload)] = payload
        fcntl.ioctl(self.control, 0xC000FD00 | HEADER.size << 16 | command, buffer)
        fields = HEADER.unpack_from(buffer)
        return fields[10], bytes(buffer[fields[4] : fields[3]])

    def load(self, name: str, targets: Table, read_only: bool = False) -> None:
        """Load a table of (start, length, target, parameters)."""
        payload = b""
        for start, length, target, parameters in targets:
            text = parameters.encode() + b"\0"
            text += bytes(-len(text) % 8)
            payload += TARGET_SPEC.pack(start, length, 0, TARGET_SPEC.size + len(text), target.encode()) + text
        self.call(TABLE_LOAD, name, payload, READONLY_FLAG if read_only else 0, len(targets))

    def create(self, name: str, targets: Table, read_only: bool = False) -> str:
        """Make, load and resume a device; returns its MAJOR:MINOR."""
        device, _ = self.call(DEV_CREATE, name)
        try:
            self.load(name, targets, read_only)
            self.call(DEV_SUSPEND, name)
        except OSError:
            self.call(DEV_REMOVE, name)
            raise
        return f"{os.major(device)}:{os.minor(device)}"

    def suspend(self, name: str) -> None:
        self.call(DEV_SUSPEND, name, flags=SUSPEND_FLAG)

    def resume(self, name: str) -> None:
        self.call(DEV_SUSPEND, name)

    def remove(self, name: str) -> None:
        self.call(DEV_REMOVE, name)

    def message(self, name: str, text: str) -> None:
        self.call(TARGET_MSG, name, struct.pack("<Q", 0) + text.encode() + b"\0")

    def status(self, name: str, flush: bool = True) -> str:
        """The status line of a device of one target, as ``dmsetup status`` prints it.  A pool commits on *flush*."""
        _, data = self.call(TABLE_STATUS, name, flags=0 if flush else NOFLUSH_FLAG)
        start, length, _, _, target = TARGET_SPEC.unpack_from(data)
        text = data[TARGET_SPEC.size :].split(b"\0", 1)[0].decode()
        return f"{name}: {start} {length} {target.rstrip(bytes(1)).decode()} {text}"


class Disk:
    """O_DIRECT access through one aligned buffer."""

    def __init__(self, path: str, flags: int = os.O_RDWR) -> None:
        self.fd = os.open(path, flags | os.O_DIRECT)
        self.view = memoryview(mmap.mmap(-1, 1 << 20))

    def read(self, offset: int, length: int) -> memoryview:
        got = os.preadv(self.fd, [self.view[:length]], offset)
        return self.view[:got]

    def write(self, offset: int, data: bytes) -> None:
        self.view[: len(data)] = data
        written = os.pwritev(self.fd, [self.view[: len(data)]], offset)
        if written != len(data):
            raise OSError(errno.EIO, "short write")

    def close(self) -> None:
        os.close(self.fd)


class Thin:
    """An active thin device."""

    def __init__(self, name: str, path: str, read_only: bool = False) -> None:
        self.name = name
        self.disk = Disk(path, os.O_RDONLY if read_only else os.O_RDWR)


class Agent:
    """The steps.  Blocks are data blocks unless said otherwise; device sizes are in data blocks, too."""

    def __init__(self, out: str) -> None:
        self.dm = Dm()
        self.meta_path = os.environ["META"]
        self.meta = Disk(self.meta_path, os.O_RDONLY)
        self.meta_target = self.meta_path
        self.data_target = os.environ["DATA"]
        self.thins: dict[int, Thin] = {}
        self.block_bytes = 0
        self.pool_device = ""
        self.trace = open(os.path.join(out, "trace"), "wb")  # noqa: SIM115 -- closed with the process
        self.known: dict[int, bytes] = {}
        self.superblock = b""
        self.settled = True

    # ---- the pool

    def _pool_table(self, block: int, blocks: int, features: Iterable[str], low_water: int) -> Table:
        words = list(features)
        self.block_bytes = block * SECTOR
        text = f"{self.meta_target} {self.data_target} {block} {low_water} {len(words)} {' '.join(words)}"
        return [(0, block * blocks, "thin-pool", text)]

    def pool_create(self, block: int, blocks: int, features: Iterable[str] = (), low_water: int = 0) -> None:
        """Activate the pool: *block* sectors in each of *blocks* data blocks."""
        self.pool_device = self.dm.create("pool", self._pool_table(block, blocks, features, low_water))

    def pool_reload(self, block: int, blocks: int, features: Iterable[str] = (), low_water: int = 0) -> None:
        """Suspend the pool, load a table of another size or other features, resume."""
        self.dm.suspend("pool")
        try:
            self.dm.load("pool", self._pool_table(block, blocks, features, low_water))
        finally:
            self.dm.resume("pool")

    def pool_remove(self) -> None:
        for dev in list(self.thins):
            self.deactivate(dev)
        self.dm.remove("pool")

    def message(self, text: str) -> None:
        self.dm.message("pool", text)

    def snap(self, dev: int, origin: int) -> None:
        """Take a snapshot; an active origin is suspended meanwhile, as lvm does it."""
        active = self.thins.get(origin)
        if active is not None:
            self.dm.suspend(active.name)
        try:
            self.dm.message("pool", f"create_snap {dev} {origin}")
        finally:
            if active is not None:
                self.dm.resume(active.name)

    def status(self, flush: bool = True) -> str:
        """The status lines of the pool and the thin devices; with *flush* the pool commits before."""
        names = [thin.name for thin in self.thins.values()]
        return "\n".join([self.dm.status("pool", flush), *(self.dm.status(name) for name in names)])

    # ---- the metadata device as a window of the image that can grow, or lose a part to errors

    def meta_window(self, sectors: int, good: int | None = None) -> None:
        """Let the pool use the first *sectors* of the metadata image; behind *good* of them all I/O fails."""
        good = sectors if good is None else good
        table = [(0, good, "linear", f"{self.meta_path} 0")]
        if good < sectors:
            table.append((good, sectors - good, "error", ""))
        if self.meta_target == self.meta_path:
            self.meta_target = self.dm.create("meta", table)
            return
        self.dm.suspend("meta")
        try:
            self.dm.load("meta", table)
        finally:
            self.dm.resume("meta")

    # ---- thin devices

    def activate(self, dev: int, blocks: int, read_only: bool = False) -> None:
        name = f"thin-{dev}"
        table = [(0, blocks * self.block_bytes // SECTOR, "thin", f"{self.pool_device} {dev}")]
        number = self.dm.create(name, table, read_only)
        self.thins[dev] = Thin(name, f"/dev/dm-{number.split(':')[1]}", read_only)

    def deactivate(self, dev: int) -> None:
        thin = self.thins.pop(dev)
        thin.disk.close()
        self.dm.remove(thin.name)

    def write(self, dev: int, blocks: list[list[int]], seed: int, size: int = 4096, whole: bool = False) -> None:
        """Write the start of each block of each [begin, end), one bio at a time; *whole* writes all of it."""
        disk = self.thins[dev].disk
        size = self.block_bytes if whole else size
        for begin, end in blocks:
            for block in range(begin, end):
                mark = MARK.pack(WRITTEN, seed, dev, block)
                disk.write(block * self.block_bytes, mark + bytes(size - len(mark)))
                if not self.settled:
                    self._settle(disk)

    def flush(self, dev: int) -> None:
        """A flush: commits if the device changed."""
        os.fsync(self.thins[dev].disk.fd)

    def discard(self, dev: int, begin: int, end: int) -> None:
        """One discard, of at most 4 GiB (the kernel splits larger ones)."""
        argument = struct.pack("<QQ", begin * self.block_bytes, (end - begin) * self.block_bytes)
        disk = self.thins[dev].disk
        fcntl.ioctl(disk.fd, BLKDISCARD, argument)
        if not self.settled:
            self._settle(disk)

    def marks(self, dev: int, blocks: list[list[int]]) -> list[list[Any]]:
        """What the first sector of each block reads as: runs [kind, block, length, number, seed].

        Kind 0: zeros.  1: stamp of data block *number*.  2: written by `write` as block *number* with *seed*.
        3: anything else.  In a run the block and, in kinds 1 and 2, the number rise together.
        """
        disk = self.thins[dev].disk
        runs: list[list[Any]] = []
        for begin, end in blocks:
            for block in range(begin, end):
                kind, number, seed = classify(disk.read(block * self.block_bytes, SECTOR))
                last = runs[-1] if runs else None
                if last is not None and last[0] == kind and last[4] == seed and last[1] + last[2] == block:
                    step = last[2] if kind in (1, 2) else 0
                    if last[3] + step == number:
                        last[2] += 1
                        continue
                runs.append([kind, block, 1, number, seed])
        return runs

    def rest_is_zero(self, dev: int, blocks: list[list[int]]) -> bool:
        """Whether everything behind the first sector of each of the blocks reads as zeros."""
        disk = self.thins[dev].disk
        length = self.block_bytes - SECTOR
        return all(
            disk.read(block * self.block_bytes + SECTOR, length) == bytes(length)
            for begin, end in blocks
            for block in range(begin, end)
        )

    # ---- what is on the disk

    def checkpoint(self) -> None:
        """Add the metadata blocks that changed since the last checkpoint to the trace."""
        changed: list[tuple[int, bytes]] = []
        size = os.lseek(self.meta.fd, 0, os.SEEK_END)
        for offset in range(0, size, 1 << 20):
            data = bytes(self.meta.read(offset, min(1 << 20, size - offset)))
            if data == bytes(len(data)) and not self.known:
                continue
            first = offset // METADATA_BLOCK
            for i in range(len(data) // METADATA_BLOCK):
                block = data[i * METADATA_BLOCK : (i + 1) * METADATA_BLOCK]
                if self.known.get(first + i, bytes(METADATA_BLOCK)) != block:
                    self.known[first + i] = block
                    changed.append((first + i, block))
        self.trace.write(struct.pack("<QQ", size // METADATA_BLOCK, len(changed)))
        for number, block in changed:
            self.trace.write(struct.pack("<Q", number) + block)
        self.trace.flush()

    def begin_transaction(self, settle: bool) -> None:
        """Before the first write or discard of a transaction.

        With *settle* the first change of it is committed on its own.  If a second has gone by since the last timed
        commit or flush, the kernel would do that anyway; done always, it does not depend on the time, and then a
        second begins in which the kernel leaves the transaction alone.
        """
        self.superblock = bytes(self.meta.read(0, SECTOR))
        self.settled = not settle

    def _settle(self, disk: Disk) -> None:
        # The flush is handled by the thread that also makes the timed commits, so both are over when it returns.
        os.fsync(disk.fd)
        superblock = bytes(self.meta.read(0, SECTOR))
        if superblock != self.superblock:
            self.superblock = superblock
            self.settled = True

    def same_transaction(self) -> bool:
        """Whether nothing was committed since `begin_transaction`, or since the commit that it asked for."""
        return bytes(self.meta.read(0, SECTOR)) == self.superblock

    def power_cut(self) -> None:
        """The kernel's process is killed on the spot."""
        with open("/run/kr/killme", "w") as f:
            f.write("0\n")
        while True:
            time.sleep(60)


def classify(sector: memoryview) -> tuple[int, int, int]:
    """(kind, number, seed) of a data block, as in `Agent.marks`."""
    magic, a, b, c = MARK.unpack_from(sector)
    if magic == STAMPED and a == b == c:
        return 1, a, 0
    if magic == WRITTEN:
        return 2, c, a << 24 | b
    return (0, 0, 0) if not any(sector) else (3, 0, 0)


def run(agent: Agent, steps: list[list[Any]]) -> Iterator[dict[str, Any]]:
    """Execute; a step whose failure was not announced (``"may_fail"``) is the last one."""
    for name, arguments in steps:
        may_fail = arguments.pop("may_fail", False)
        try:
            yield {"value": getattr(agent, name)(**arguments)}
        except OSError as e:
            yield {"errno": e.errno, "step": [name, arguments]}
            if not may_fail:
                return


def main() -> int:
    steps_path, out = sys.argv[1:]
    with open(steps_path) as f:
        steps = json.load(f)
    results: list[dict[str, Any]] = []
    agent = Agent(out)
    for result in run(agent, steps):
        results.append(result)
        if "errno" in result:
            print(result, file=sys.stderr)
    with open(os.path.join(out, "results.json"), "w") as f:
        json.dump(results, f)
    return 0 if len(results) == len(steps) else 1


if __name__ == "__main__":
    sys.exit(main())
