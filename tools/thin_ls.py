"""thin_ls: list the devices of a pool.  See docs/tools/thin_ls.md."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from thinpool.listing import DEFAULT_FIELDS, FIELDS, format_table, json_lines, list_devices

from ._cli import EXIT_OK, Command, Option, open_input, run, write_lines, write_out
from ._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._cli import Arguments

_TITLE = "Scanning data mappings"


def _fields(text: str) -> list[str]:
    fields = text.split(",")
    for field in fields:
        if field not in FIELDS:
            raise ValueError("Unknown field" if len(fields) == 1 else f"Unknown field '{field}'")
    return fields


COMMAND = Command(
    "thin_ls",
    "List the thin devices of a pool",
    (
        Option("-o, --format", "Fields to show, with commas between them (see below)", value="FIELDS", convert=_fields),
        Option("--no-headers", "No line with the names of the fields"),
        Option("--json", "One JSON object on each line"),
        Option("-m, --metadata-snap", "List the metadata snapshot; the pool may be in use"),
    ),
    text=f"""
Fields; shown by default: {",".join(DEFAULT_FIELDS)}
  DEV           device id
  MAPPED        space that has been written, as the device's details say
  EXCLUSIVE     of that, what no other device shares: what deleting the device would free
  SHARED        of that, what other devices share
      each also as _BLOCKS, _SECTORS and _BYTES
  HIGHEST_BLOCK, HIGHEST_SECTOR, HIGHEST_BYTE, HIGHEST_MAPPED
                end of the space that has been written; '-' if none has
  TRANSACTION   the pool's transaction id when the device was created
  CREATE_TIME, SNAP_TIME
                number of snapshots that had been taken in the pool when the device was created,
                and when it was last snapshotted

EXCLUSIVE, SHARED and HIGHEST take a walk of the mapping trees, which is verified and takes a while
for a large pool; the others do not.

Exit status: 0 if everything was listed, 64 if not.

Example, what deleting each device of a live pool would free:
  dmsetup message vg-pool-tpool 0 reserve_metadata_snap
  thin_ls -m -o DEV,EXCLUSIVE /dev/mapper/vg-pool_tmeta
  dmsetup message vg-pool-tpool 0 release_metadata_snap
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_ls with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    metadata_snap = arguments.has("--metadata-snap")
    fields = cast("list[str]", arguments.last("--format") or list(DEFAULT_FIELDS))
    with open_input(arguments.input, exclusive=not metadata_snap) as device, Progress(_TITLE) as progress:
        rows = list_devices(device, fields, metadata_snap, progress)
    if arguments.has("--json"):
        write_lines(json_lines(fields, rows))
    else:
        write_out(format_table(fields, rows, headers=not arguments.has("--no-headers")))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
