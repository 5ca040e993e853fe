"""thin_rmap: say which thin devices map a range of data blocks.  See docs/tools/thin_rmap.md."""

from __future__ import annotations

import sys
from itertools import chain, islice
from typing import TYPE_CHECKING, cast

from thinpool.reverse_map import reverse_map_text

from ._cli import EXIT_OK, Command, Option, number, open_input, run, write_bytes
from ._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._cli import Arguments


def _region(text: str) -> tuple[int, int]:
    """Convert a range such as 5..45, the end exclusive."""
    begin_text, dots, end_text = text.partition("..")
    if not dots or not begin_text or not end_text:
        raise ValueError("badly formed region")
    begin, end = number(begin_text), number(end_text)
    if end <= begin:
        raise ValueError("end <= begin")
    return begin, end


COMMAND = Command(
    "thin_rmap",
    "Show which thin devices map a range of a pool's data blocks",
    (
        Option(
            "--region",
            "Data blocks BEGIN..END, without END itself; may be repeated",
            value="BLOCK_RANGE",
            convert=_region,
            required=True,
            repeated=True,
        ),
        Option("--json", "One JSON object on each line"),
        Option("-m, --metadata-snap", "Read the metadata snapshot; the pool may be in use"),
    ),
    text="""
A line is a range of data blocks, the device that maps it, and the thin blocks that it is mapped to;
ends are not part of ranges.  Lines ascend by data block.  A block that several devices share is
shown for each of them.

Anything wrong with the device trees or the mapping trees is told in one line on stderr, and nothing
is shown.

Exit status: 0 if everything was shown, 64 if not.

Example, who is hit by a bad sector of the data device, 128 sectors a block:
  sector=123456789; block=$((sector / 128))
  thin_rmap --region $block..$((block + 1)) /dev/mapper/vg-pool_tmeta
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_rmap with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    metadata_snap = arguments.has("--metadata-snap")
    regions = cast("list[tuple[int, int]]", arguments.all("--region"))
    with open_input(arguments.input, exclusive=not metadata_snap) as device:
        with Progress("Reading") as progress:
            pieces = reverse_map_text(device, regions, metadata_snap, json=arguments.has("--json"), progress=progress)
            # Everything has been read when there is a first one.
            first = list(islice(pieces, 1))
        for piece in chain(first, pieces):
            write_bytes(piece)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
