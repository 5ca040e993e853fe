"""thin_metadata_size: say how large a pool's metadata device should be.  See docs/tools/thin_metadata_size.md."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from persistent_data.layout import SECTOR_SHIFT
from thinpool.metadata_size import estimate

from ._cli import EXIT_OK, Command, Failure, Option, number, run, write_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._cli import Arguments

_SECTOR_BYTES = 1 << SECTOR_SHIFT


class _Unit:
    """A unit of sizes, in bytes, with its one-letter name and the others that are understood."""

    def __init__(self, letter: str, nr_bytes: int, name: str, symbol: str = "", shown: str = "") -> None:
        self.letter = letter
        self.nr_bytes = nr_bytes
        self.names = {letter, name, name + "s", symbol} - {""}
        self.shown = shown or name + "s"


_UNITS = (
    _Unit("b", 1, "byte"),
    _Unit("s", _SECTOR_BYTES, "sector"),
    _Unit("k", 1 << 10, "kibibyte", "KiB"),
    _Unit("m", 1 << 20, "mebibyte", "MiB"),
    _Unit("g", 1 << 30, "gibibyte", "GiB"),
    # The reference misspells this one in its output, which programs compare.
    _Unit("t", 1 << 40, "tebibyte", "TiB", shown="terabytes"),
    _Unit("p", 1 << 50, "pebibyte", "PiB"),
    _Unit("e", 1 << 60, "exbibyte", "EiB"),
    _Unit("K", 10**3, "kilobyte", "kB"),
    _Unit("M", 10**6, "megabyte", "MB"),
    _Unit("G", 10**9, "gigabyte", "GB"),
    _Unit("T", 10**12, "terabyte", "TB"),
    _Unit("P", 10**15, "petabyte", "PB"),
    _Unit("E", 10**18, "exabyte", "EB"),
)
_UNITS_BY_NAME = {name: unit for unit in _UNITS for name in unit.names}


def _unit(text: str) -> _Unit:
    try:
        return _UNITS_BY_NAME[text]
    except KeyError:
        raise ValueError("Invalid unit specifier") from None


def _split(text: str) -> tuple[int, str]:
    """Take a number and what follows it apart."""
    rest = text.lstrip("0123456789")
    digits = text[: len(text) - len(rest)]
    if not digits:
        raise ValueError("cannot parse integer from empty string")
    return number(digits), rest


def _size_bytes(text: str) -> int:
    """Convert a size; one without a unit is in sectors."""
    value, unit_name = _split(text)
    size = value * _unit(unit_name or "s").nr_bytes
    if size >= 1 << 64:
        raise ValueError("value out of bounds")
    return size


def _count(text: str) -> int:
    """Convert a number of devices; as in older releases of the tool it may be in thousands, 2k or 2K."""
    value, unit_name = _split(text)
    if not unit_name:
        return value
    if unit_name in "bs":
        raise ValueError("Invalid unit specifier")
    return value * _unit(unit_name).nr_bytes


def _numeric_style(text: str) -> str:
    if text not in ("short", "long"):
        raise ValueError("possible values: short, long")
    return text


COMMAND = Command(
    "thin_metadata_size",
    "Estimate how large the metadata device of a thin pool should be",
    (
        Option(
            "-b, --block-size",
            "Size of a data block: 64k to 1g, a multiple of 64k",
            value="SIZE",
            convert=_size_bytes,
            required=True,
        ),
        Option("-s, --pool-size", "Size of the data device", value="SIZE", convert=_size_bytes, required=True),
        Option(
            "-m, --max-thins",
            "Most thin devices and snapshots at any one time",
            value="NUM",
            convert=_count,
            required=True,
        ),
        Option("-u, --unit", "Unit of the answer; by default sectors", value="UNIT", convert=_unit),
        Option(
            "-n, --numeric-only",
            "Only the number; with 'short' or 'long' the unit's name behind it",
            value="OPT",
            convert=_numeric_style,
            value_optional=True,
        ),
        Option("--json", "Everything that goes into the answer, as one JSON object"),
    ),
    conflicts=(("--json", "--unit"), ("--json", "--numeric-only")),
    operand=False,
    text="""
A SIZE is a number with a unit, 64k or 64KiB or 64kibibytes; without a unit it is in sectors of 512 bytes.
  b  bytes      k  m  g  t  p  e   powers of 1024, KiB to EiB
  s  sectors    K  M  G  T  P  E   powers of 1000, kB to EB

The estimate lets every data block be mapped, in btree leaves that are half full, and adds a block for
each device.  A pool can use 4161600 metadata blocks, just under 16 GiB; no answer is larger.

Exit status: 0 if there is an answer, 64 if not.

Examples:
  thin_metadata_size -b 64k -s 1t -m 1000
  lvcreate --size $(thin_metadata_size -b 64k -s 1t -m 1000 -n)s --name meta vg
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_metadata_size with *argv*, ``sys.argv`` if None; return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(COMMAND, [_OLD_STYLES.get(argument, argument) for argument in arguments], _run)


_OLD_STYLES = {"-nshort": "-n=short", "-nlong": "-n=long"}
"""How releases before 1.0 wanted these written."""


def _run(arguments: Arguments) -> int:
    block_size = cast("int", arguments.last("--block-size"))
    pool_size = cast("int", arguments.last("--pool-size"))
    max_thins = cast("int", arguments.last("--max-thins"))
    try:
        size = estimate(block_size, pool_size, max_thins)
    except ValueError as error:
        raise Failure(str(error)) from None
    if arguments.has("--json"):
        import json

        answer = {
            "data_block_size_bytes": block_size,
            "pool_size_bytes": pool_size,
            "max_thins": max_thins,
            "metadata_blocks": size.nr_blocks,
            "metadata_bytes": size.nr_bytes,
            "metadata_sectors": size.nr_bytes // _SECTOR_BYTES,
            "metadata_blocks_wanted": size.nr_blocks_wanted,
            "limited": size.limited,
        }
        write_out(json.dumps(answer) + "\n")
        return EXIT_OK
    unit = cast("_Unit | None", arguments.last("--unit")) or _unit("s")
    shown = _in_unit(size.nr_bytes, unit)
    if not arguments.has("--numeric-only"):
        shown += " " + unit.shown
    elif arguments.last("--numeric-only") == "short":
        shown += unit.letter
    elif arguments.last("--numeric-only") == "long":
        shown += unit.shown
    write_out(shown + "\n")
    return EXIT_OK


def _in_unit(size_bytes: int, unit: _Unit) -> str:
    """Show a size: two decimals; none for a whole number; as many as a float has for less than one.

    >>> _in_unit(4096, _unit("G"))
    '0.000004096'
    """
    whole, rest = divmod(size_bytes, unit.nr_bytes)
    if not rest:
        return str(whole)
    value = size_bytes / unit.nr_bytes
    if whole:
        return f"{value:.2f}"
    # As many decimals as tell the float from its neighbours.  The last one is rounded up where the value lies halfway,
    # as it often does with powers of two; repr() would make it even.
    mantissa, _, exponent = repr(value).partition("e-")
    decimals = len(mantissa.partition(".")[2]) + int(exponent or 0)
    last = (2 * size_bytes * 10**decimals + unit.nr_bytes) // (2 * unit.nr_bytes)
    return f"0.{last:0{decimals}}"


if __name__ == "__main__":
    sys.exit(main())
