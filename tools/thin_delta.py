"""thin_delta: compare the mappings of two thin devices.  See docs/tools/thin_delta.md."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from thinpool.delta_format import delta_text
from thinpool.pool_delta import PoolDelta, Root, Thin

from ._cli import EXIT_OK, Command, Option, UsageError, number, open_input, run, write_bytes
from ._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._cli import Arguments

COMMAND = Command(
    "thin_delta",
    "Compare the mappings of two thin devices of a pool",
    (
        Option("--snap1, --thin1", "Left device (also --snap1)", value="DEV_ID", convert=number),
        Option("--snap2, --thin2", "Right device (also --snap2)", value="DEV_ID", convert=number),
        Option("--root1", "Left mapping tree by its root, in place of --thin1", value="BLOCKNR", convert=number),
        Option("--root2", "Right mapping tree by its root, in place of --thin2", value="BLOCKNR", convert=number),
        Option("--verbose", "Show data blocks too"),
        Option("--no-same", "Leave out what both have in common; what they share is not read"),
        Option("--json", "One JSON object on each line instead of XML"),
        Option(
            "-m, --metadata-snap",
            "Read the metadata snapshot; the pool may be in use",
            value="BLOCKNR",
            convert=number,
            value_optional=True,
        ),
    ),
    conflicts=(("--thin1", "--root1"), ("--thin2", "--root2")),
    text="""
Ranges are of thin blocks: same (both devices map them to the same data blocks), different (to
different ones), left_only, right_only.  What neither device maps is not shown.

Anything wrong with what must be read ends the comparison with one line on stderr.

Exit status: 0 if everything was compared, 64 if not.

Example, what was written to a device of a live pool since its snapshot:
  dmsetup message vg-pool-tpool 0 reserve_metadata_snap
  thin_delta -m --no-same --thin1 7 --thin2 1 /dev/mapper/vg-pool_tmeta
  dmsetup message vg-pool-tpool 0 release_metadata_snap
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_delta with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _tree(arguments: Arguments, side: int) -> Thin | Root:
    if arguments.has(f"--thin{side}"):
        return Thin(cast("int", arguments.last(f"--thin{side}")))
    if arguments.has(f"--root{side}"):
        return Root(cast("int", arguments.last(f"--root{side}")))
    raise UsageError(f"--thin{side} or --root{side} not specified")


def _run(arguments: Arguments) -> int:
    left, right = _tree(arguments, 1), _tree(arguments, 2)
    metadata_snap = arguments.has("--metadata-snap")
    snap_block = cast("int | None", arguments.last("--metadata-snap"))
    with open_input(arguments.input, exclusive=not metadata_snap) as device:
        delta = PoolDelta(device, left, right, metadata_snap, snap_block)
        with Progress("Comparing", beside_output=True) as progress:
            for piece in delta_text(
                delta,
                same=not arguments.has("--no-same"),
                verbose=arguments.has("--verbose"),
                json=arguments.has("--json"),
                progress=progress,
            ):
                write_bytes(piece)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
