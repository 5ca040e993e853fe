"""thin_metadata_unpack: make a metadata device of a pack file.  See docs/tools/thin_metadata_unpack.md."""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import TYPE_CHECKING, BinaryIO

from bufio.device import FileDevice
from thinpool.pack import PackReader, unpack, verify_complete, verify_pack

from ._cli import EXIT_OK, Command, Failure, Option, os_error, run
from ._overwrite import confirm, refuse_same_file, status_of
from ._progress import Progress
from ._replacement import Replacement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._cli import Arguments

COMMAND = Command(
    "thin_metadata_unpack",
    "Make a metadata device, or a file like one, of what thin_metadata_pack has packed",
    (
        Option("-i, --input", "Pack file", value="FILE", required=True),
        Option("-o, --output", "Block device, or a file, created or replaced", value="DEV", required=True),
        Option("-f, --force", "Do not ask before metadata is overwritten"),
        Option("--incomplete", "Unpack even if blocks that the pool uses are not in the pack"),
    ),
    operand=False,
    text="""
The pack is read to its end before anything is written: one that is damaged, cut off, or lacks blocks
that the pool uses, leaves the output as it was.  Packs of damaged metadata lack what was damaged, and
are unpacked with --incomplete.

Blocks that are not in the pack become zeros.  A block device must be large enough and not in use; what
it has behind the unpacked metadata stays.

Exit status: 0 if everything was unpacked, 64 if not.

Example:
  thin_metadata_unpack -i meta.pack -o meta.img
  thin_check meta.img
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_metadata_unpack with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    output = str(arguments.last("--output"))
    with _open_pack(str(arguments.last("--input"))) as file:
        reader = PackReader(file)
        status = status_of(output)
        refuse_same_file(file.fileno(), status, output)
        if status is None:
            _unpack_to_new(reader, output, arguments)
            return EXIT_OK
        with _open_output(output) as device:
            is_device = stat.S_ISBLK(status.st_mode)
            if is_device and device.size_bytes < reader.size_bytes:
                raise Failure(
                    f"Output file too small.  The metadata takes {reader.size_bytes} bytes, "
                    f"'{output}' has {device.size_bytes}"
                )
            if not arguments.has("--force"):
                confirm(output, status)
            _verify(reader, arguments)
            if not is_device:
                os.ftruncate(device.fileno(), 0)
                os.ftruncate(device.fileno(), reader.size_bytes)
            _unpack(reader, device, zeroed=not is_device)
    return EXIT_OK


def _verify(reader: PackReader, arguments: Arguments) -> None:
    with Progress("Verifying") as progress:
        verify_pack(reader, incomplete=arguments.has("--incomplete"), progress=progress)


def _unpack(reader: PackReader, device: FileDevice, *, zeroed: bool) -> None:
    with Progress("Unpacking") as progress:
        unpack(reader, device, zeroed=zeroed, progress=progress)


def _unpack_to_new(reader: PackReader, path: str, arguments: Arguments) -> None:
    """Make the file *path*, which is there only once it is complete and verified: one pass does."""
    with Replacement(path, None) as replacement:
        os.truncate(replacement.path, reader.size_bytes)
        with FileDevice(replacement.path, exclusive=True) as device:
            _unpack(reader, device, zeroed=True)
            if not arguments.has("--incomplete"):
                verify_complete(reader)


def _open_pack(path: str) -> BinaryIO:
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Failure(f"Couldn't find input file '{path}'") from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise Failure(f"Not a block device or regular file '{path}'.")
    try:
        return open(path, "rb")
    except OSError as error:
        raise Failure(f"Couldn't open input file '{path}': {os_error(error)}") from None


def _open_output(path: str) -> FileDevice:
    try:
        return FileDevice(path, exclusive=True)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Failure("Invalid output file: Not a block device or regular file") from None
        busy = ": it is in use" if error.errno == errno.EBUSY else ""
        reason = os_error(OSError(error.errno, os.strerror(error.errno or 0)))
        raise Failure(f"Couldn't open output file '{path}': {reason}{busy}") from None


if __name__ == "__main__":
    sys.exit(main())
