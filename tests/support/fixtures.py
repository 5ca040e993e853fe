"""The images in ``tests/data`` and the answers that the kernel and the reference tools gave about them.

Nothing in here uses the packages under test: images are bytes, XML is read with ElementTree, tables with ``str.split``.
What a fixture says is therefore an independent witness.
"""

from __future__ import annotations

import lzma
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

__all__ = [
    "BLOCK_SIZE",
    "DAMAGED",
    "DATA",
    "GOOD",
    "Damage",
    "Details",
    "DeviceModel",
    "Facts",
    "PoolModel",
    "PoolStatus",
    "Run",
    "ThinStatus",
    "answer",
    "base_of",
    "changed_blocks",
    "damage_of",
    "facts_of",
    "has_answer",
    "image",
    "image_path",
    "read_ls",
    "read_runs",
    "read_status",
    "read_xml",
]

DATA = Path(__file__).resolve().parent.parent / "data"
BLOCK_SIZE = 4096  #: bytes of a metadata block

_IMAGE = ".img.xz"


def _names(directory: Path) -> list[str]:
    return sorted(path.name.removesuffix(_IMAGE) for path in directory.glob("*" + _IMAGE))


#: Names of the sound images (``tests/data/MANIFEST.md``).
GOOD: list[str] = _names(DATA)
#: Names of the damaged ones (``tests/data/damaged/DAMAGED.md``).
DAMAGED: list[str] = _names(DATA / "damaged")


def _directory(name: str) -> Path:
    for directory in (DATA, DATA / "damaged"):
        if (directory / (name + _IMAGE)).exists():
            return directory
    raise FileNotFoundError(f"tests/data has no image {name!r}")


@lru_cache(maxsize=4)
def image(name: str) -> bytes:
    """The metadata device *name*, sound or damaged, byte by byte (up to 70 MiB; the last few are kept)."""
    return lzma.decompress((_directory(name) / (name + _IMAGE)).read_bytes())


def image_path(name: str, tmp_path: Path) -> Path:
    """A fresh writable copy of image *name* as a file ``NAME.img`` in *tmp_path*."""
    path = tmp_path / f"{name}.img"
    path.write_bytes(image(name))
    return path


def _answer_path(name: str, suffix: str) -> Path | None:
    plain = _directory(name) / f"{name}.{suffix}"
    for path in (plain, plain.with_name(plain.name + ".xz")):
        if path.exists():
            return path
    return None


def has_answer(name: str, suffix: str) -> bool:
    """Whether there is an answer of that kind, ``metasnap.xml`` for example, about *name*."""
    return _answer_path(name, suffix) is not None


def answer(name: str, suffix: str) -> bytes:
    """The recorded answer about *name*, unpacked.

    *suffix* is one of ``xml``, ``ls.txt``, ``lsfull.txt``, ``check.txt``, ``status.txt``, ``reopen.txt``,
    ``metasnap.xml``, ``metasnap.ls.txt`` for a sound image, and ``expected.txt`` or ``kernel.txt`` for a damaged one.
    """
    path = _answer_path(name, suffix)
    if path is None:
        raise FileNotFoundError(f"tests/data has no {name}.{suffix}")
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


# XML


class Details(NamedTuple):
    """The attributes of a device element."""

    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


class DeviceModel(NamedTuple):
    """A device as a plain dict: thin block to (data block, time)."""

    details: Details
    mappings: dict[int, tuple[int, int]]


class PoolModel(NamedTuple):
    """A pool as plain dicts.  ``superblock`` has the attributes as text, without ``flags``, which only 0.9.0 writes."""

    superblock: dict[str, str]
    devices: dict[int, DeviceModel]


def read_xml(content: bytes) -> PoolModel:
    """What a dump says, however it is written: ``def`` and ``ref`` are expanded and runs are taken apart.

    Two dumps of the same metadata compare equal.  A thin block that occurs twice in a device is an error of the dump.
    """
    top = ElementTree.fromstring(content)
    superblock = {key: value for key, value in top.attrib.items() if key != "flags"}
    parts: dict[str, dict[int, tuple[int, int]]] = {}
    devices: dict[int, DeviceModel] = {}
    for element in top:
        if element.tag == "def":
            parts[element.attrib["name"]] = _read_mappings(element, parts)
        else:
            attributes = element.attrib
            device = int(attributes["dev_id"])
            if device in devices:
                raise ValueError(f"device {device} occurs twice")
            details = Details(
                int(attributes["mapped_blocks"]),
                int(attributes["transaction"]),
                int(attributes["creation_time"]),
                int(attributes["snap_time"]),
            )
            devices[device] = DeviceModel(details, _read_mappings(element, parts))
    return PoolModel(superblock, devices)


def _read_mappings(
    parent: ElementTree.Element, parts: dict[str, dict[int, tuple[int, int]]]
) -> dict[int, tuple[int, int]]:
    mappings: dict[int, tuple[int, int]] = {}
    nr_read = 0
    for element in parent:
        attributes = element.attrib
        if element.tag == "ref":
            run = parts[attributes["name"]]
        elif element.tag == "single_mapping":
            run = {int(attributes["origin_block"]): (int(attributes["data_block"]), int(attributes["time"]))}
        else:
            thin, data = int(attributes["origin_begin"]), int(attributes["data_begin"])
            time = int(attributes["time"])
            run = {thin + i: (data + i, time) for i in range(int(attributes["length"]))}
        nr_read += len(run)
        mappings.update(run)
    if nr_read != len(mappings):
        raise ValueError(f"{nr_read - len(mappings)} thin blocks occur more than once in {parent.attrib}")
    return mappings


# Tables and reports


def read_ls(content: bytes) -> list[dict[str, str]]:
    """The rows of a ``thin_ls`` table, each a dict from column heading to the text in that column."""
    heading, *rows = content.decode().splitlines()
    columns = heading.split()
    return [dict(zip(columns, row.split(), strict=True)) for row in rows]


class Run(NamedTuple):
    """One recorded run of a reference tool."""

    status: int
    stdout: str
    stderr: str


_RUN = re.compile(r"== (?P<command>[^:]+): exit status (?P<status>\d+)")


def read_runs(content: bytes) -> dict[str, Run]:
    """The runs in a ``check.txt`` or ``expected.txt``, by command line: ``"thin_check 1.1.0 --skip-mappings"``.

    What the files say beyond plain runs (what was changed, what a repair gave) is left out; see :func:`damage_of`.
    """
    runs: dict[str, Run] = {}
    for section in re.split(r"^(?=== )", content.decode(), flags=re.MULTILINE):
        match = _RUN.match(section)
        if match is None:
            continue
        stdout, stderr = (
            found[1]
            if (found := re.search(rf"^-- {stream}\n(.*?)(?=^-- |\Z)", section, re.MULTILINE | re.DOTALL))
            else ""
            for stream in ("stdout", "stderr")
        )
        runs[match["command"]] = Run(int(match["status"]), stdout, stderr.removesuffix("\n"))
    return runs


class PoolStatus(NamedTuple):
    """What ``dmsetup status`` says of a pool.  ``used_metadata_blocks`` includes the kernel's reserve."""

    transaction_id: int
    used_metadata_blocks: int
    nr_metadata_blocks: int
    used_data_blocks: int
    nr_data_blocks: int
    metadata_snap: int | None
    mode: str
    needs_check: bool


class ThinStatus(NamedTuple):
    """What ``dmsetup status`` says of a thin device, in sectors of 512 bytes."""

    size: int
    mapped: int
    highest_mapped: int | None


def read_status(content: bytes) -> tuple[PoolStatus | None, dict[int, ThinStatus]]:
    """A ``status.txt`` or ``reopen.txt``: the pool, None where it says ``Fail``, and the active devices that do not."""
    pool = None
    thins: dict[int, ThinStatus] = {}
    for line in content.decode().splitlines():
        name, _, rest = line.partition(": ")
        _, size, target, *fields = rest.split()
        if fields[:1] == ["Fail"]:
            continue
        if target == "thin-pool":
            used_metadata, nr_metadata = map(int, fields[1].split("/"))
            used_data, nr_data = map(int, fields[2].split("/"))
            pool = PoolStatus(
                int(fields[0]),
                used_metadata,
                nr_metadata,
                used_data,
                nr_data,
                None if fields[3] == "-" else int(fields[3]),
                fields[4],
                "needs_check" in fields,
            )
        elif target == "thin":
            highest = None if fields[1] == "-" else int(fields[1])
            thins[int(name.removeprefix("thin-"))] = ThinStatus(int(size), int(fields[0]), highest)
    return pool, thins


# The tables in MANIFEST.md and DAMAGED.md


def _read_table(path: Path) -> list[list[str]]:
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("| `") and not line.startswith("| `NAME")
    ]
    return [[row[0].strip("`"), *row[1:]] for row in rows]


class Facts(NamedTuple):
    """What ``MANIFEST.md`` says of a sound image.  Tree levels: 1 is a single leaf, 0 no tree at all."""

    data_block_size: int  #: in sectors of 512 bytes
    nr_devices: int
    nr_mappings: int
    mapping_tree_levels: int
    top_tree_levels: int
    details_tree_levels: int
    used_data_blocks: int
    nr_data_blocks: int
    used_metadata_blocks: int
    nr_metadata_blocks: int
    check_status: dict[str, int]  #: exit status of thin_check by version, "1.1.0" and "0.9.0"
    transaction_id: int
    metadata_snap: int | None
    needs_check: bool


_SECTORS = {"KiB": 2, "MiB": 1 << 11, "GiB": 1 << 21}


@cache
def _facts() -> dict[str, Facts]:
    facts = {}
    for name, _, block, devices, mappings, levels, data, metadata, check, _, more in _read_table(DATA / "MANIFEST.md"):
        size, unit = block.split()
        mapping_levels, top_levels, details_levels = map(int, levels.split("/"))
        used_data, nr_data = map(int, data.split(" of "))
        used_metadata, nr_metadata = map(int, metadata.split(" of "))
        transaction = re.search(r"transaction (\d+)", more)
        snap = re.search(r"metadata snapshot at block (\d+)", more)
        facts[name] = Facts(
            int(size) * _SECTORS[unit],
            int(devices),
            int(mappings),
            mapping_levels,
            top_levels,
            details_levels,
            used_data,
            nr_data,
            used_metadata,
            nr_metadata,
            {version: int(status) for version, status in re.findall(r"([\d.]+): (\d+)", check)},
            int(transaction[1]) if transaction else 0,
            int(snap[1]) if snap else None,
            "flags 1" in more,
        )
    return facts


def facts_of(name: str) -> Facts:
    """The row of ``MANIFEST.md`` about the sound image *name*."""
    return _facts()[name]


class Damage(NamedTuple):
    """What ``DAMAGED.md`` and ``NAME.expected.txt`` say of a damaged image."""

    base: str  #: the sound image it was made from
    description: str
    changed: str  #: exactly what was changed: block, byte, old and new value
    check_status: dict[str, int]  #: exit status of thin_check by version, "1.1.0" and "0.9.0"
    kernel: str  #: what Linux 6.1 does with the pool and its devices


@cache
def _damages() -> dict[str, Damage]:
    damages = {}
    for name, base, description, new, old, _, _, kernel in _read_table(DATA / "damaged" / "DAMAGED.md"):
        changed = re.search(r"^changed: (.*)$", answer(name, "expected.txt").decode(), re.MULTILINE)
        assert changed is not None
        status = {"1.1.0": int(new), "0.9.0": int(old)}
        damages[name] = Damage(base.strip("`"), description, changed[1], status, kernel)
    return damages


def damage_of(name: str) -> Damage:
    """What was done to make the damaged image *name*, and what others make of it."""
    return _damages()[name]


def base_of(damaged_name: str) -> str:
    """The sound image from which *damaged_name* was made."""
    return damage_of(damaged_name).base


def changed_blocks(damaged_name: str) -> frozenset[int]:
    """The metadata blocks in which *damaged_name* differs from its base, those cut off not among them."""
    before, after = image(base_of(damaged_name)), image(damaged_name)
    return frozenset(
        begin // BLOCK_SIZE
        for begin in range(0, len(after), BLOCK_SIZE)
        if before[begin : begin + BLOCK_SIZE] != after[begin : begin + BLOCK_SIZE]
    )
