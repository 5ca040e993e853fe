"""thin_metadata_pack: pack a pool's metadata into a compressed file.  See docs/tools/thin_metadata_pack.md."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from thinpool.pack import pack

from ._cli import EXIT_OK, Command, Option, open_input, raise_output_error, run, say
from ._overwrite import confirm, refuse_same_file, status_of
from ._progress import Progress
from ._replacement import Replacement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import FileDevice
    from thinpool.pack import PackSummary

    from ._cli import Arguments

_BUFFER_BYTES = 1 << 20

COMMAND = Command(
    "thin_metadata_pack",
    "Pack the metadata of a thin pool into a compressed file, to keep it or to send it to somebody",
    (
        Option("-i, --input", "Metadata: a block device or a file", value="DEV", required=True),
        Option("-o, --output", "Pack file, created or replaced", value="FILE", required=True),
        Option("-f, --force", "Do not ask before metadata is overwritten"),
        Option("--all", "Pack damaged blocks too, and whatever else is not zero"),
    ),
    operand=False,
    text="""
The pack holds every block whose checksum is that of metadata, in use or not, and no data of the pool.
thin_metadata_unpack makes a metadata device of it again.

With --all nothing that is not zero is left out.  The unpacker of thin-provisioning-tools does not
take such a pack if there was anything to add.

The metadata must not be in use.  Deactivate the pool first.

Exit status: 0 if everything was packed, 64 if not.

Example:
  thin_metadata_pack -i /dev/vg/meta -o meta.pack
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_metadata_pack with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    output = str(arguments.last("--output"))
    with open_input(str(arguments.last("--input"))) as device:
        status = status_of(output)
        refuse_same_file(device.fileno(), status, output)
        if not arguments.has("--force"):
            confirm(output, status)
        if status is None or stat.S_ISREG(status.st_mode):
            with Replacement(output, status) as replacement:
                summary = _pack_to(replacement.path, device, arguments.has("--all"))
        else:
            in_use = os.O_EXCL if stat.S_ISBLK(status.st_mode) else 0
            summary = _pack_to(output, device, arguments.has("--all"), in_use)
    if summary.nr_damaged:
        say(f"{summary.nr_damaged} damaged metadata blocks are not in the pack; --all packs them too")
    return EXIT_OK


def _pack_to(path: str, device: FileDevice, everything: bool, flags: int = 0) -> PackSummary:
    """Write the pack of *device* to *path*, which is there, and opened with *flags* too."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags)
    pieces: list[bytes] = []
    waiting = 0

    def flush() -> None:
        nonlocal waiting
        try:
            data = memoryview(b"".join(pieces))
            while data:
                data = data[os.write(fd, data) :]
        except OSError as error:
            raise_output_error(error)
        pieces.clear()
        waiting = 0

    def write(piece: bytes) -> None:
        nonlocal waiting
        pieces.append(piece)
        waiting += len(piece)
        if waiting >= _BUFFER_BYTES:
            flush()

    try:
        with Progress("Packing") as progress:
            summary = pack(device, write, everything=everything, progress=progress)
            flush()
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            try:
                os.fsync(fd)
            except OSError as error:
                raise_output_error(error)
        return summary
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
