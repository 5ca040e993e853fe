"""Block device input and output for guest.sh (python3, standard library only).

superblock META              data block size in sectors, data blocks; nothing if no superblock
ids META                     thin devices: id, mapped blocks, sectors up to the last mapping
write DEV SEED OFF [LEN]     write the pattern
verify DEV SEED OFF [LEN]    compare with it
random DEV SEED COUNT ...    write (or --verify) at random places
blocks DEV SEED LIST ...     write (or --verify) at listed places
discard DEV LIST ...         discard listed places
zero DEV OFF [LEN]           must read as zeros
stamp DEV SECTORS FIRST N    mark data blocks with their number
map DEV SECTORS [N]          list the marks as a mapping
xml FILE DATADEV [ID...]     compare active devices with a thin_dump file
"""

import argparse
import fcntl
import mmap
import os
import random
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SECTOR = 512
CHUNK = 1 << 20
BLKGETSIZE64 = 0x80081272
BLKDISCARD = 0x1277
PATTERN = b"kr-write"
STAMP = b"kr-stamp"


def size_arg(text: str) -> int:
    m = re.fullmatch(r"(\d+)([bskmgt]?)", text.lower())
    if not m:
        sys.exit(f"not a size: {text!r}")
    unit = {"": 512, "s": 512, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}[m.group(2)]
    return int(m.group(1)) * unit


def list_arg(text: str) -> Iterator[int]:
    for part in text.split(","):
        m = re.fullmatch(r"(\d+)(?:-(\d+)(?:/(\d+))?)?", part)
        if not m:
            sys.exit(f"not a list of blocks: {part!r}")
        first = int(m.group(1))
        last = int(m.group(2)) if m.group(2) else first
        yield from range(first, last + 1, int(m.group(3) or 1))


class Device:
    """O_DIRECT access through one aligned buffer (one object per thread)."""

    def __init__(self, path: str, write: bool = False) -> None:
        self.path = path
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT
        try:
            self.fd = os.open(path, flags)
        except OSError as e:
            sys.exit(f"{path}: {e.strerror}")
        b = bytearray(8)
        try:
            fcntl.ioctl(self.fd, BLKGETSIZE64, b)
            self.size = struct.unpack("<Q", b)[0]
        except OSError:
            self.size = os.fstat(self.fd).st_size
        self.buffer = mmap.mmap(-1, CHUNK)
        self.view = memoryview(self.buffer)

    def read(self, offset: int, length: int) -> memoryview:
        done = 0
        while done < length:
            n = os.preadv(self.fd, [self.view[done:length]], offset + done)
            if n == 0:
                break
            done += n
        return self.view[:done]

    def write(self, offset: int, data: bytes) -> None:
        n = len(data)
        self.view[:n] = data
        done = 0
        while done < n:
            done += os.pwritev(self.fd, [self.view[done:n]], offset + done)

    def discard(self, offset: int, length: int) -> None:
        fcntl.ioctl(self.fd, BLKDISCARD, struct.pack("<QQ", offset, length))


def pattern(seed: int, offset: int, length: int) -> bytes:
    """Each sector holds the seed and its own number, so that a sector that
    ended up in the wrong place shows."""
    pack = struct.Struct("<8sQQQ").pack
    first = offset // SECTOR
    return b"".join(
        pack(PATTERN, seed, n, (n * 0x9E3779B97F4A7C15 + seed) & (2**64 - 1)) * 16
        for n in range(first, first + length // SECTOR)
    )


def explain(data: bytes) -> str:
    word = bytes(data[:8])
    if word == PATTERN:
        return "the pattern of seed {}, sector {}".format(*struct.unpack("<QQ", data[8:24]))
    if word == STAMP:
        return "the mark of data block {}".format(*struct.unpack("<Q", data[8:16]))
    if not any(data[:SECTOR]):
        return "zeros"
    return "other data"


def compare(path: str, got: memoryview, want: bytes, offset: int) -> bool:
    if bytes(got) == want:
        return True
    for i in range(0, len(want), SECTOR):
        if bytes(got[i : i + SECTOR]) != want[i : i + SECTOR]:
            print(
                f"{path}: at byte {offset + i}: expected {explain(want[i : i + SECTOR])}, "
                f"found {explain(bytes(got[i : i + SECTOR]))}"
            )
            break
    return False


def extents(dev: Device, start: str, length: str) -> Iterator[tuple[int, int]]:
    off = size_arg(start)
    end = off + size_arg(length) if length else dev.size
    while off < end:
        n = min(CHUNK, end - off)
        yield off, n
        off += n


def do_write(dev: str, seed: str, off: str, length: str = "") -> None:
    d = Device(dev, True)
    for o, n in extents(d, off, length):
        d.write(o, pattern(int(seed), o, n))


def do_verify(dev: str, seed: str, off: str, length: str = "") -> int | None:
    d = Device(dev)
    for o, n in extents(d, off, length):
        if not compare(dev, d.read(o, n), pattern(int(seed), o, n), o):
            return 1
    return None


def do_zero(dev: str, off: str, length: str = "") -> int | None:
    d = Device(dev)
    for o, n in extents(d, off, length):
        if not compare(dev, d.read(o, n), bytes(n), o):
            return 1
    return None


def spread(dev: str, seed: int, offsets: Iterable[int], nbytes: int, check: bool, threads: int) -> int:
    """Write or verify at each offset, from several threads if asked to."""
    failed: list[int] = []
    lock = threading.Lock()
    source = iter(offsets)

    def work() -> None:
        d = Device(dev, not check)
        while not failed:
            with lock:
                o = next(source, None)
            if o is None:
                return
            try:
                if not check:
                    d.write(o, pattern(seed, o, nbytes))
                elif not compare(dev, d.read(o, nbytes), pattern(seed, o, nbytes), o):
                    failed.append(1)
            except OSError as e:
                print(f"{dev}: at byte {o}: {e.strerror}", file=sys.stderr)
                failed.append(1)

    if threads == 1:
        work()
    else:
        pool = [threading.Thread(target=work) for _ in range(threads)]
        for t in pool:
            t.start()
        for t in pool:
            t.join()
    return 1 if failed else 0


def do_random(*argv: str) -> int:
    ap = argparse.ArgumentParser(prog="write_random")
    ap.add_argument("dev")
    ap.add_argument("seed", type=int)
    ap.add_argument("count", type=int)
    ap.add_argument("--unit", type=size_arg, default=65536)
    ap.add_argument("--bytes", type=size_arg, default=4096)
    ap.add_argument("--span", type=size_arg, default=0)
    ap.add_argument("--base", type=size_arg, default=0)
    ap.add_argument("--again", action="store_true")
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--verify", action="store_true")
    a = ap.parse_args(argv)
    span = a.span or Device(a.dev).size - a.base
    units = span // a.unit
    rnd = random.Random(a.seed)
    picks = (rnd.randrange(units) for _ in range(a.count)) if a.again else rnd.sample(range(units), a.count)
    return spread(a.dev, a.seed, (a.base + p * a.unit for p in picks), a.bytes, a.verify, a.threads)


def do_blocks(*argv: str) -> int:
    ap = argparse.ArgumentParser(prog="write_blocks")
    ap.add_argument("dev")
    ap.add_argument("seed", type=int)
    ap.add_argument("list")
    ap.add_argument("--unit", type=size_arg, default=65536)
    ap.add_argument("--bytes", type=size_arg, default=4096)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--verify", action="store_true")
    a = ap.parse_args(argv)
    return spread(a.dev, a.seed, (b * a.unit for b in list_arg(a.list)), a.bytes, a.verify, a.threads)


def do_discard(*argv: str) -> None:
    ap = argparse.ArgumentParser(prog="discard_blocks")
    ap.add_argument("dev")
    ap.add_argument("list")
    ap.add_argument("--unit", type=size_arg, default=65536)
    a = ap.parse_args(argv)
    d = Device(a.dev, True)
    for b in list_arg(a.list):
        d.discard(b * a.unit, a.unit)


def do_stamp(dev: str, block_sectors: str, first: str, count: str) -> None:
    d = Device(dev, True)
    block = int(block_sectors) * SECTOR
    rest = bytes(SECTOR - 32)
    for n in range(int(first), int(first) + int(count)):
        d.write(n * block, struct.pack("<8sQQQ", STAMP, n, n, n) + rest)


def stamp_of(data: memoryview) -> int | None:
    if bytes(data[:8]) == STAMP:
        a, b, c = struct.unpack("<QQQ", data[8:32])
        if a == b == c:
            return int(a)
    return None


def do_map(dev: str, block_sectors: str, count_text: str = "") -> None:
    d = Device(dev)
    block = int(block_sectors) * SECTOR
    count = int(count_text) if count_text else (d.size + block - 1) // block
    run = None
    for v in range(count):
        n = stamp_of(d.read(v * block, SECTOR))
        if n is not None and run and run[0] + run[2] == v and run[1] + run[2] == n:
            run[2] += 1
            continue
        if run:
            print(*run)
        run = None if n is None else [v, n, 1]
    if run:
        print(*run)


# ---- what the metadata says ----------------------------------------------------


class Metadata:
    def __init__(self, path: str) -> None:
        self.dev = Device(path)
        b = self.block(0)
        self.valid = len(b) == 4096 and struct.unpack_from("<Q", b, 32)[0] == 27022010
        if self.valid:
            (self.data_blocks,) = struct.unpack_from("<Q", b, 64)
            self.mapping_root, self.details_root = struct.unpack_from("<QQ", b, 320)
            (self.block_sectors,) = struct.unpack_from("<I", b, 336)

    def block(self, n: int) -> bytes:
        return bytes(self.dev.read(n * 4096, 4096))

    def node(self, n: int) -> tuple[bool, tuple[int, ...], list[bytes]]:
        b = self.block(n)
        flags, _, count, room, size = struct.unpack_from("<IQIII", b, 4)
        keys = struct.unpack_from(f"<{count}Q", b, 32)
        base = 32 + 8 * room
        values = [b[base + i * size : base + (i + 1) * size] for i in range(count)]
        return bool(flags & 1), keys, values

    def leaves(self, root: int) -> Iterator[tuple[int, bytes]]:
        internal, keys, values = self.node(root)
        for k, v in zip(keys, values, strict=False):
            if internal:
                yield from self.leaves(struct.unpack("<Q", v)[0])
            else:
                yield k, v

    def last_key(self, root: int) -> int | None:
        internal, keys, values = self.node(root)
        if not keys:
            return None
        if internal:
            return self.last_key(struct.unpack("<Q", values[-1])[0])
        return int(keys[-1])


def do_superblock(meta: str) -> None:
    m = Metadata(meta)
    if m.valid:
        print(m.block_sectors, m.data_blocks)


def do_ids(meta: str) -> None:
    m = Metadata(meta)
    if not m.valid:
        sys.exit(f"{meta}: no thin-pool superblock")
    roots = {k: struct.unpack("<Q", v)[0] for k, v in m.leaves(m.mapping_root)}
    for dev, v in m.leaves(m.details_root):
        last = m.last_key(roots[dev]) if dev in roots else None
        print(dev, struct.unpack("<Q", v[:8])[0], m.block_sectors * (1 if last is None else last + 1))


def do_xml(path: str, data: str, *only_ids: str) -> int:
    from xml.etree import ElementTree

    only = set(only_ids)
    backing = Device(data)
    failed = False
    block = 0
    defs: dict[Any, list[tuple[int, int, int]]] = {}  # shared parts: name -> runs
    runs: list[tuple[int, int, int]] = []  # of the device or shared part that is being read
    for event, e in ElementTree.iterparse(path, events=("start", "end")):
        if event == "start":
            if e.tag == "superblock":
                block = int(e.get("data_block_size")) * SECTOR
            elif e.tag in ("def", "device"):
                runs = []
        elif e.tag == "single_mapping":
            runs.append((int(e.get("origin_block")), int(e.get("data_block")), 1))
        elif e.tag == "range_mapping":
            runs.append((int(e.get("origin_begin")), int(e.get("data_begin")), int(e.get("length"))))
        elif e.tag == "ref":
            runs += defs[e.get("name")]
        elif e.tag == "def":
            defs[e.get("name")] = runs
            e.clear()
        elif e.tag == "device":
            if not only or e.get("dev_id") in only:
                failed |= not check_device(e, runs, backing, block)
            e.clear()
    return 1 if failed else 0


def check_device(e: Any, runs: list[tuple[int, int, int]], backing: Device, block: int) -> bool:
    name = e.get("dev_id")
    thin = Device("/dev/mapper/thin-" + name)
    total = sum(r[2] for r in runs)
    agree = differ = unreadable = 0
    for v, d, length in runs:
        for i in range(length):
            try:
                got = thin.read((v + i) * block, 4096)
            except OSError as err:
                if not unreadable:
                    print(f"{thin.path}: at byte {(v + i) * block}: {err.strerror}")
                unreadable += 1
                continue
            want = bytes(backing.read((d + i) * block, 4096))
            if bytes(got) == want:
                agree += 1
                continue
            if not differ:
                compare(thin.path, got, want, (v + i) * block)
            differ += 1
    os.close(thin.fd)
    if agree == total:
        print(f"device {name}: {total} mapped blocks agree")
    else:
        print(f"device {name}: of {total} mapped blocks {agree} agree, {differ} differ, {unreadable} cannot be read")
    if total != int(e.get("mapped_blocks")):
        print(f"device {name}: {total} mappings, but mapped_blocks is {e.get('mapped_blocks')}")
        return False
    return agree == total


def main() -> int:
    commands: dict[str, Callable[..., int | None]] = {
        "superblock": do_superblock,
        "ids": do_ids,
        "write": do_write,
        "verify": do_verify,
        "random": do_random,
        "blocks": do_blocks,
        "discard": do_discard,
        "zero": do_zero,
        "stamp": do_stamp,
        "map": do_map,
        "xml": do_xml,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    try:
        return commands[sys.argv[1]](*sys.argv[2:]) or 0
    except OSError as e:
        sys.exit(f"{sys.argv[1]}: {e.strerror}")


if __name__ == "__main__":
    sys.exit(main())
