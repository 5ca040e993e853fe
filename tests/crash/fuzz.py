"""What is answered from images that were damaged on purpose: a result, or an error that says what is wrong.

Every reader of the library looks at each image twice: the plain way, and by arrays, as large pools are read.

- Both end within a deadline and within a bound of memory, with the same result or the same error.
- Only errors of the library come out, never another exception.
- What is read without an error is what an independent reader (:mod:`tests.support.image`) finds there.
- An image that the check calls clean holds what it held before it was damaged, or else it is a consistent pool of its
  own, by an independent recount: that is what it becomes if an older superblock comes back with all its blocks.
"""

from __future__ import annotations

import io
import json
import re
import resource
import signal
import struct
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bufio import MemoryDevice
from tests.crash.damage import BASES, Case, base, make_case
from tests.support import image as images
from tests.support import peers
from tests.support.image import BLOCK, BadImageError, Details, Image, Node, Superblock
from tests.support.tools import ROOT, command
from thinpool import (
    PoolMetadata,
    ThinError,
    check,
    dump,
    dump_batch,
    leaf_arrays,
    listing,
    pack,
    pool_delta,
    reverse_map,
    runs,
    text_format,
)
from thinpool.delta_format import delta_text
from thinpool.human_format import HumanWriter
from thinpool.json_format import JsonWriter
from thinpool.pool_delta import PoolDelta, Thin
from thinpool.xml_format import XmlWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, ModuleType

DEADLINE = 20
"""Seconds for all that is done with one case, the commands excepted; it takes some 0.02 on an idle machine."""
MEMORY = 2 << 30
"""Bytes of address space for a process of the campaign, all that Python and numpy map included."""
_COMMANDS_DEADLINE = 60
_MOST_NODES = 20_000
"""An independent reader gives up beyond as many: the trees of the pools have a hundred."""
_NEVER = 1 << 80

_THRESHOLDS: tuple[tuple[ModuleType, str, int], ...] = (
    (check, "WORTH_ARRAYS", 0),
    (dump, "WORTH_BATCHES", 0),
    (dump_batch, "WORTH_A_BATCH", 0),
    (leaf_arrays, "WORTH_ARRAYS", 0),
    (listing, "WORTH_BATCHES", 0),
    (pack, "_BATCH_FROM_NODES", 0),
    (pack, "_BATCH_FROM_BYTES", 0),
    (pool_delta, "BULK_FROM_MAPPINGS", 0),
    (pool_delta, "BULK_FROM_HEIGHT", 0),
    (reverse_map, "BULK_FROM_MAPPINGS", 0),
    (runs, "_WORTH_AN_ARRAY", 1),
    (text_format, "WORTH_ARRAYS", 0),
)
"""Where the size of a pool decides, and the least that has a meaning there."""


class WrongAnswer(AssertionError):
    """What must not come of a damaged image."""


class OutOfTime(BaseException):
    """The deadline has passed."""


class Answer(NamedTuple):
    """What a reader says of an image: a result, or an error, perhaps with what came before it."""

    result: object
    error: str | None = None
    before: bytes = b""


class _CutOff(Exception):
    """An error of the library came after some text."""

    def __init__(self, error: ThinError, before: bytes) -> None:
        self.error = error
        self.before = before


@dataclass
class Tally:
    """What came of some cases."""

    cases: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add those of other cases."""
        self.cases += other.cases
        self.answers += other.answers
        self.failures += other.failures


@contextmanager
def arrays(wanted: bool) -> Iterator[None]:
    """Have everything go by arrays, or nothing."""
    before = [getattr(module, name) for module, name, _ in _THRESHOLDS]
    try:
        for module, name, least in _THRESHOLDS:
            setattr(module, name, least if wanted else _NEVER)
        yield
    finally:
        for (module, name, _), old in zip(_THRESHOLDS, before, strict=True):
            setattr(module, name, old)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in what takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What the library says


def _findings(device: MemoryDevice) -> object:
    return [(finding.severity, finding.message) for finding in check.check(device)]


def _query(device: MemoryDevice) -> object:
    with PoolMetadata.open(device, read_only=True) as pool:
        found = {}
        for dev, details in pool.devices().items():
            with pool.open_thin_device(dev) as thin:
                thin.lookup_blocks(range(0, 40, 3))
                mappings = {
                    run.thin_begin + at: (run.data_begin + at, run.time)
                    for run in thin.mappings()
                    for at in range(run.length)
                }
                highest = thin.highest_mapped_block
                found[dev] = (Details(*details), mappings, thin.mapped_count, highest)
        for block in (0, 5, 100):
            pool.block_is_shared(block)
        assert pool.transaction_id >= 0
        assert pool.free_block_count >= 0
        assert pool.free_metadata_block_count >= 0
        return found


def _dump(device: MemoryDevice, writer: type[HumanWriter | JsonWriter | XmlWriter], options: dump.Options) -> object:
    pieces: list[bytes] = []
    visitor = writer(lambda piece: pieces.append(bytes(piece)))
    try:
        dump.dump(device, visitor, options)
    except ThinError as error:
        visitor.flush()  # as thin_dump does, to show how far things went well
        raise _CutOff(error, b"".join(pieces)) from error
    return b"".join(pieces)


def _delta(device: MemoryDevice, *, json_too: bool) -> object:
    found = b"".join(map(bytes, delta_text(PoolDelta(device, Thin(0), Thin(1)), verbose=True)))
    if json_too:
        found += b"".join(map(bytes, delta_text(PoolDelta(device, Thin(1), Thin(0)), same=False, json=True)))
    return found


def _pack(device: MemoryDevice) -> object:
    pieces: list[bytes] = []
    pack.pack(device, pieces.append)
    return b"".join(pieces)


def _unpack(device: MemoryDevice) -> object:
    packed = _pack(device)
    assert isinstance(packed, bytes)
    reader = pack.PackReader(io.BytesIO(packed))
    target = MemoryDevice(reader.size_bytes)
    pack.unpack(reader, target)
    return target.contents()


_REGIONS = [(0, 500), (600, 1 << 40)]

READERS: dict[str, Callable[[MemoryDevice], object]] = {
    "check": _findings,
    "query": _query,
    "dump as XML": lambda device: _dump(device, XmlWriter, dump.Options()),
    "dump as text": lambda device: _dump(device, HumanWriter, dump.Options()),
    "dump as JSON": lambda device: _dump(device, JsonWriter, dump.Options(expand_shared=True)),
    "dump of the snapshot": lambda device: _dump(
        device, JsonWriter, dump.Options(expand_shared=True, metadata_snap=True)
    ),
    "ls": lambda device: listing.list_devices(device, listing.FIELDS),
    "rmap": lambda device: b"".join(map(bytes, reverse_map.reverse_map_text(device, _REGIONS))),
    "delta": lambda device: _delta(device, json_too=True),
}
SELDOM: dict[str, Callable[[MemoryDevice], object]] = {"pack": _pack, "unpack": _unpack}
"""For one case of eight: packing looks at blocks one by one, whatever leads to them."""


def answers(content: bytes, readers: dict[str, Callable[[MemoryDevice], object]]) -> dict[str, Answer]:
    """Return what each of *readers* says of an image.

    :raises WrongAnswer: one raises what is no error of the library, or does not end, or writes to the image
    """
    found = {}
    for name, reader in readers.items():
        device = MemoryDevice(content)
        try:
            found[name] = Answer(reader(device))
        except ThinError as error:
            found[name] = Answer(None, f"{type(error).__name__}: {error}")
        except _CutOff as cut:
            found[name] = Answer(None, f"{type(cut.error).__name__}: {cut.error}", cut.before)
        except OutOfTime:
            raise WrongAnswer(f"{name} takes more than {DEADLINE} seconds") from None
        except Exception as error:
            # An unreadable device raises the operating system's error, without a subclass of it.
            if type(error) is not OSError or error.errno is None:
                raise WrongAnswer(f"{name} raises {type(error).__name__}: {error}") from error
            found[name] = Answer(None, f"OSError: {error}")
        if device.contents() != content:
            raise WrongAnswer(f"{name} has changed the image")
    return found


# What an independent reader says


class _Reader(Image):
    """An independent reader that gets to the end of damaged trees, too."""

    def __init__(self, blocks: dict[int, bytes], nr_blocks: int) -> None:
        super().__init__(blocks, nr_blocks)
        self._nr_read = 0

    def nodes(self, root: int) -> Iterator[tuple[int, Node]]:
        self._nr_read = 0
        return super().nodes(root)

    def node(self, number: int) -> Node:
        self._nr_read += 1
        if self._nr_read > _MOST_NODES:
            raise BadImageError("the trees do not end")
        nr_entries, max_entries, value_size = struct.unpack_from("<III", self.block(number), 16)
        if nr_entries > max_entries or 32 + max_entries * (8 + value_size) > BLOCK:
            raise BadImageError(f"block {number} has no room for its entries")
        return super().node(number)

    def superblock(self, number: int = 0) -> Superblock:
        """Of the copy in a metadata snapshot the kernel looks at the checksum only; all else is advice."""
        if not number:
            return super().superblock()
        block = bytearray(self.block(number))
        struct.pack_into("<Q16xQ", block, 8, number, images.MAGIC)
        return Image({number: bytes(block)}, self.nr_blocks).superblock(number)

    def counts(self, which: str) -> dict[int, int]:
        """Without what the last bitmap has beyond the end of the device, which means nothing."""
        sb = self.superblock()
        root = sb.data_map if which == "data" else sb.metadata_map
        overflow = {block: int.from_bytes(count, "little") for block, count in self.items(root.ref_count_root)}
        counts = {}
        for number, (bitmap, _, _) in enumerate(self.bitmaps(which)):
            first = number * images.ENTRIES_PER_BITMAP
            content = self.block(bitmap)
            for block in range(first, min(first + images.ENTRIES_PER_BITMAP, root.nr_blocks)):
                byte, pair = divmod(block - first, 4)
                count = content[16 + byte] >> 2 * pair & 3
                if count:
                    counts[block] = {2: 1, 1: 2}.get(count) or overflow[block]
        return counts


_UNREADABLE = (BadImageError, struct.error, LookupError, RecursionError, ValueError, OverflowError, MemoryError)


class Reading(NamedTuple):
    """The devices of a pool, or of its metadata snapshot."""

    devices: dict[int, Details]
    mappings: dict[int, dict[int, tuple[int, int]]]


def _read(image: Image, *, snapshot: bool = False, only: tuple[int, ...] | None = None) -> Reading | None:
    try:
        superblock = image.superblock()
        if snapshot:
            superblock = image.superblock(superblock.held_root)
        devices = image.devices(superblock)
        if only is None:
            return Reading(devices, image.mappings(superblock))
        roots = {dev: int.from_bytes(root, "little") for dev, root in image.items(superblock.mapping_root)}
        mappings = {}
        for dev in only:
            values = ((thin, int.from_bytes(value, "little")) for thin, value in image.items(roots[dev]))
            mappings[dev] = {thin: (value >> 24, value & 0xFFFFFF) for thin, value in values}
        return Reading(devices, mappings)
    except _UNREADABLE:
        return None


@cache
def _intact(name: str, *, snapshot: bool = False) -> Reading:
    """Return what a pool held before it was damaged; nothing for the metadata snapshot if it has none."""
    return _read(Image.from_bytes(base(name).content), snapshot=snapshot) or Reading({}, {})


def _inconsistency(image: Image, *, totals: bool) -> str | None:
    """Say what keeps an image from being a pool whose parts fit together, None if nothing does.

    :param totals: the number of blocks in use is a part, too; that it is wrong is advice
    """
    sb = image.superblock()
    kinds = {0: "superblock", sb.metadata_map.bitmap_root: "index"}
    superblocks = [sb]
    if sb.held_root:
        kinds[sb.held_root] = "superblock"
        superblocks.append(image.superblock(sb.held_root))
    trees = [sb.data_map.bitmap_root, sb.data_map.ref_count_root, sb.metadata_map.ref_count_root]
    for of in superblocks:
        trees += [of.mapping_root, of.details_root]
        trees += [int.from_bytes(root, "little") for _, root in image.items(of.mapping_root)]
    for tree in trees:
        kinds.update((node.number, "node") for _, node in image.nodes(tree))
        keys = [key for key, _ in image.items(tree)]
        if any(a >= b for a, b in pairwise(keys)):
            return f"keys of the tree at {tree} do not ascend"
    for which in ("data", "metadata"):
        kinds.update((bitmap, "bitmap") for bitmap, _, _ in image.bitmaps(which))
    for block, kind in kinds.items():
        if image.kind(block) != kind:
            return f"block {block} has not the checksum of a {kind}"
    metadata, data = image.recount()
    for root, which, recounted in ((sb.metadata_map, "metadata", metadata), (sb.data_map, "data", data)):
        if image.counts(which) != recounted:
            return f"the {which} space map has not what a recount gives"
        if max(recounted, default=0) >= root.nr_blocks:
            return f"{which} blocks are used that do not exist"
        if totals and root.nr_allocated != len(recounted):
            return f"the {which} space map has another total than a recount gives"
    for of in superblocks:
        mappings = image.mappings(of)
        if {dev: len(m) for dev, m in mappings.items()} != {
            dev: details.mapped_blocks for dev, details in image.devices(of).items()
        }:
            return "details say other numbers of mappings"
    return None


# The verdict


def judge(case: Case, *, seldom: bool = True, also_commands: bool = False) -> Counter[str]:
    """Ask everything that reads an image about *case*, and return what the verdicts were.

    :raises WrongAnswer: with what is wrong
    """
    try:
        with time_limit(DEADLINE):
            return _judge(case, seldom=seldom, also_commands=also_commands)
    except OutOfTime:
        raise WrongAnswer(f"all together takes more than {DEADLINE} seconds") from None


def _judge(case: Case, *, seldom: bool, also_commands: bool) -> Counter[str]:
    readers = {**READERS, **SELDOM} if seldom else READERS
    with arrays(False):
        plain = answers(case.content, readers)
    with arrays(True):
        bulk = answers(case.content, readers)
    for name, answer in plain.items():
        if answer != bulk[name]:
            raise WrongAnswer(f"{name}: {_shorter(answer)} the plain way, {_shorter(bulk[name])} by arrays")
    image = _Reader(dict(Image.from_bytes(case.content).blocks), len(case.content) // BLOCK)
    reading = _read(image)
    verdicts = Counter({f"{name} {'answers' if a.error is None else 'refuses'}": 1 for name, a in plain.items()})
    _require_true(plain, reading, _read(image, snapshot=True), image, case.base)
    verdicts[_judge_check(case, plain["check"], reading, image)] += 1
    if also_commands:
        signal.setitimer(signal.ITIMER_REAL, _COMMANDS_DEADLINE)
        verdicts.update(_judge_commands(case, clean=_is_clean(plain["check"])))
    return verdicts


def _shorter(answer: Answer) -> str:
    text = repr(answer.result) if answer.error is None else answer.error
    return text if len(text) < 600 else f"{text[:400]} ... {text[-150:]}"


def _is_clean(answer: Answer) -> bool:
    assert isinstance(answer.result, list)
    return all(severity == "advisory" for severity, _ in answer.result)


def _judge_check(case: Case, answer: Answer, reading: Reading | None, image: Image) -> str:
    intact = base(case.base)
    if answer.error is not None:
        raise WrongAnswer(f"check raises {answer.error}")
    untouched = len(case.content) >= len(intact.content) and all(
        case.content[block * BLOCK : (block + 1) * BLOCK] == intact.content[block * BLOCK : (block + 1) * BLOCK]
        for block in intact.live
    )
    if untouched:
        if not _is_clean(answer):
            raise WrongAnswer(f"check finds {answer.result} where nothing in use is damaged")
        return "no damage: clean"
    if not _is_clean(answer):
        return "damage: found"
    try:
        wrong = _inconsistency(image, totals=not answer.result)
    except _UNREADABLE as error:
        wrong = f"an independent reader cannot read it: {error}"
    if wrong is not None:
        raise WrongAnswer(f"check calls an image clean in which {wrong}")
    same = reading == _intact(case.base)
    advice = ", with advice" if answer.result else ""
    return f"damage: the same devices and mappings{advice}" if same else f"damage: another consistent pool{advice}"


def _require_true(
    plain: dict[str, Answer], reading: Reading | None, snapshot: Reading | None, image: Image, name_of_base: str
) -> None:
    """Compare what was read without an error with what an independent reader finds."""

    def results(name: str, truth: Reading | None) -> Iterator[tuple[object, Reading]]:
        if plain[name].error is None:
            if truth is None:
                raise WrongAnswer(f"{name} reads what an independent reader cannot: {_shorter(plain[name])}")
            yield plain[name].result, truth

    for name, truth, intact in (
        ("dump as JSON", reading, _intact(name_of_base)),
        ("dump of the snapshot", snapshot, _intact(name_of_base, snapshot=True)),
    ):
        for text, expected in results(name, truth):
            assert isinstance(text, bytes)
            if _parsed_json(text) != expected:
                raise WrongAnswer(f"{name} is not what an independent reader finds")
        before = _parsed_json(plain[name].before)
        if truth is not None and not (
            before.devices.items() <= truth.devices.items()
            and all(
                # Of two entries with one key the reader knows the last, while the dump has got to the first.
                mappings.items() <= truth.mappings[dev].items() | intact.mappings.get(dev, {}).items()
                for dev, mappings in before.mappings.items()
            )
        ):
            raise WrongAnswer(f"{name} says before its error what an independent reader does not find")
    for text, expected in results("dump as XML", reading):
        assert isinstance(text, bytes)
        if _parsed_xml(text.decode()) != expected:
            raise WrongAnswer("dump as XML is not what an independent reader finds")
    for rows, expected in results("ls", reading):
        assert isinstance(rows, list)
        if [list(map(str, row)) for row in _listing(expected, image)] != [row[:6] + row[-3:] for row in _columns(rows)]:
            raise WrongAnswer("ls is not what an independent reader finds")
    for text, expected in results("rmap", reading):
        assert isinstance(text, bytes)
        if _parsed_rmap(text.decode()) != sorted(
            (data, dev, thin)
            for dev, mappings in expected.mappings.items()
            for thin, (data, _) in mappings.items()
            if any(begin <= data < end for begin, end in _REGIONS)
        ):
            raise WrongAnswer("rmap is not what an independent reader finds")
    for text, expected in results("delta", _read(image, only=(0, 1))):
        assert isinstance(text, bytes)
        left, right = expected.mappings[0], expected.mappings[1]
        kinds = {
            thin: "left_only"
            if thin not in right
            else "right_only"
            if thin not in left
            else "same"
            if left[thin][0] == right[thin][0]
            else "different"
            for thin in left.keys() | right.keys()
        }
        if _parsed_delta(text.decode()) != kinds:
            raise WrongAnswer("delta is not what an independent reader finds")
    # The engine checks no more than it needs, so damaged trees may answer other than a reader of everything.
    if plain["query"].error is None and _is_clean(plain["check"]):
        assert reading is not None
        queried = {
            dev: (reading.devices[dev], mappings, len(mappings), max(mappings, default=None))
            for dev, mappings in reading.mappings.items()
        }
        if plain["query"].result != queried:
            raise WrongAnswer("queries are not answered with what an independent reader finds")
    contents = plain["unpack"].result if "unpack" in plain else None
    if contents is not None:
        assert isinstance(contents, bytes)
        for block in range(len(contents) // BLOCK):
            packed = contents[block * BLOCK : (block + 1) * BLOCK]
            if packed != image.block(block) and (any(packed) or image.kind(block) != "unknown"):
                raise WrongAnswer(f"block {block} is another one when it was packed and unpacked")


def _columns(rows: list[list[str]]) -> list[list[str]]:
    wanted = ["DEV", "MAPPED_BLOCKS", "EXCLUSIVE_BLOCKS", "SHARED_BLOCKS", "MAPPED_SECTORS", "HIGHEST_BLOCK"]
    wanted += ["TRANSACTION", "CREATE_TIME", "SNAP_TIME"]
    return [[row[listing.FIELDS.index(name)] for name in wanted] for row in rows]


def _listing(reading: Reading, image: Image) -> Iterator[list[object]]:
    owners: Counter[int] = Counter()
    for mappings in reading.mappings.values():
        owners.update(data for data, _ in mappings.values())
    sectors = image.superblock().data_block_size
    for dev, details in sorted(reading.devices.items()):
        mappings = reading.mappings[dev]
        exclusive = sum(owners[data] == 1 for data, _ in mappings.values())
        counted = [len(mappings), exclusive, len(mappings) - exclusive, len(mappings) * sectors]
        yield [dev, *counted, max(mappings, default="-"), *details[1:]]


def _parsed_json(text: bytes) -> Reading:
    reading = Reading({}, {})
    for line in text.splitlines():
        it = json.loads(line)
        if it["type"] == "device":
            ages = (it["transaction"], it["creation_time"], it["snap_time"])
            reading.devices[it["dev_id"]] = Details(it["mapped_blocks"], *ages)
            reading.mappings[it["dev_id"]] = {}
        elif it["type"] == "mapping":
            for at in range(it["length"]):
                reading.mappings[it["dev_id"]][it["thin_begin"] + at] = (it["data_begin"] + at, it["time"])
    return reading


_TAG = re.compile(r"<(/?\w+)(.*?)/?>")
_ATTRIBUTE = re.compile(r'(\w+)="(\d*)"')


def _parsed_xml(text: str) -> Reading:
    reading = Reading({}, {})
    parts: dict[int, dict[int, tuple[int, int]]] = {}
    into: dict[int, tuple[int, int]] = {}
    for tag, rest in _TAG.findall(text):
        it = {name: int(value or 0) for name, value in _ATTRIBUTE.findall(rest)}
        if tag == "def":
            into = parts[it["name"]] = {}
        elif tag == "device":
            into = reading.mappings[it["dev_id"]] = {}
            ages = (it["transaction"], it["creation_time"], it["snap_time"])
            reading.devices[it["dev_id"]] = Details(it["mapped_blocks"], *ages)
        elif tag == "ref":
            into.update(parts[it["name"]])
        elif tag == "single_mapping":
            into[it["origin_block"]] = (it["data_block"], it["time"])
        elif tag == "range_mapping":
            for at in range(it["length"]):
                into[it["origin_begin"] + at] = (it["data_begin"] + at, it["time"])
    return reading


def _parsed_rmap(text: str) -> list[tuple[int, int, int]]:
    runs_of_data = (map(int, re.findall(r"\d+", line)) for line in text.splitlines())
    return sorted((data + at, dev, thin + at) for data, end, dev, thin, _ in runs_of_data for at in range(end - data))


def _parsed_delta(text: str) -> dict[int, str]:
    kinds = {}
    kind = ""
    for tag, rest in _TAG.findall(text):
        if tag == "range":
            it = dict(_ATTRIBUTE.findall(rest))
            for thin in range(int(it["begin"]), int(it["begin"]) + int(it["length"])):
                kinds[thin] = kind
        else:
            kind = tag
    return kinds


# The real commands

_COMMANDS: dict[str, tuple[str, ...]] = {
    "thin_check": (),
    "thin_dump": (),
    "thin_ls": ("--format", "DEV,EXCLUSIVE_BLOCKS,HIGHEST_BLOCK"),
    "thin_rmap": ("--region", "0..3000"),
    "thin_delta": ("--thin1", "0", "--thin2", "1"),
}


def _judge_commands(case: Case, *, clean: bool) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(case.content)
        packing = ("-i", str(path), "-o", str(Path(directory) / "pack"))
        for tool, options in {**_COMMANDS, "thin_metadata_pack": packing}.items():
            arguments = command(tool, *options, *(() if options == packing else (path,)))
            done = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=30, check=False)
            messages = done.stderr.decode()
            if path.read_bytes() != case.content:
                raise WrongAnswer(f"{tool} has changed its input")
            if "Traceback" in messages or done.returncode not in (0, 1, 64):
                raise WrongAnswer(f"{tool} ends with {done.returncode}: {messages}")
            if tool == "thin_check":
                if (done.returncode == 0) != clean:
                    raise WrongAnswer(f"thin_check ends with {done.returncode}, clean is {clean}")
            elif tool == "thin_metadata_pack" and done.returncode == 0:
                if len(messages.splitlines()) > 1:  # how many damaged blocks are not in the pack
                    raise WrongAnswer(f"{tool} says: {messages}")
            elif len(messages.splitlines()) != (done.returncode != 0):
                raise WrongAnswer(f"{tool} ends with {done.returncode} and says: {messages}")
            yield f"{tool} ends with {done.returncode}"
        if peers.is_available():
            theirs = peers.run_thin_check(path).status == 0
            yield f"thin_check: {_word(clean)}, the reference's: {_word(theirs)}"


def _word(clean: bool) -> str:
    return "clean" if clean else "damaged"


# The campaign

COMMANDS_EVERY = 100


class Job(NamedTuple):
    """Some cases, one after the other."""

    seed: int
    begin: int
    end: int


def prepare() -> None:
    """Make the pools, and bound the memory of this process and its children."""
    for name in BASES:
        base(name)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))


def run(job: Job) -> Tally:
    """Judge some cases."""
    tally = Tally()
    for number in range(job.begin, job.end):
        case = make_case(job.seed, number)
        tally.cases += 1
        try:
            tally.answers += judge(
                case, seldom=number % 8 == 0, also_commands=number % COMMANDS_EVERY == COMMANDS_EVERY - 1
            )
        except WrongAnswer as wrong:
            tally.failures.append(
                f"case {number} ({case.base}: {case.story})\n  {wrong}\n"
                f"  again: python -m tests.crash fuzz --seed {job.seed} --case {number}"
            )
    images._CHECKSUMS.clear()  # what it remembers grows with every case
    return tally
