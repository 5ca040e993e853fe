"""thin_dump: write the contents of a pool's metadata as XML.  See docs/tools/thin_dump.md."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

from thinpool.dump import Options, dump
from thinpool.xml_format import XmlWriter

from ._cli import (
    EXIT_OK,
    Command,
    Failure,
    Option,
    number,
    open_input,
    os_error,
    output_error,
    raise_output_error,
    run,
    write_out,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import FileDevice

    from ._cli import Arguments


def _format(text: str) -> str:
    if text != "xml":
        raise ValueError("this version writes xml only\n  [possible values: xml]")
    return text


COMMAND = Command(
    "thin_dump",
    "Write the contents of a thin provisioning pool's metadata as XML",
    (
        Option("-f, --format", "Output format: xml, which is the default", value="TYPE", convert=_format),
        Option("-o, --output", "Write to FILE instead of stdout", value="FILE"),
        Option(
            "-m, --metadata-snap",
            "Dump the metadata snapshot; the pool may be in use",
            value="BLOCKNR",
            convert=number,
            value_optional=True,
        ),
        Option("--dev-id", "Dump this device only; may be repeated", value="ID", convert=number, repeated=True),
        Option("--skip-mappings", "Dump the devices without their mappings"),
        Option("-q, --quiet", "No messages, only an exit status"),
    ),
    text="""
The first line holds the whole superblock tag.  Leaves of the mapping trees that several devices
share are written once, as <def>, and referred to with <ref>; a dump of one device has none.
Anything wrong with what must be read ends the dump with one line on stderr.

Exit status: 0 if everything was written, 64 if not.

Example, a backup of the metadata of an inactive pool:
  thin_dump /dev/vg/meta -o pool.xml
""",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_dump with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


class _Output:
    """The file named with ``-o``, or stdout; opened when there is something to write."""

    def __init__(self, path: object, device: FileDevice) -> None:
        self._path = None if path is None else str(path)
        self._device = device
        self._fd = -1

    def write(self, data: bytes) -> None:
        if self._path is None:
            write_out(data.decode("ascii"))
            return
        if self._fd < 0:
            self._fd = self._open(self._path)
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise_output_error(error)

    def _open(self, path: str) -> int:
        try:
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(self._device.fileno())):
                raise Failure(f"Output file '{path}' is the input.")
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise Failure(f"Couldn't create output file '{path}': {os_error(error)}") from None

    def close(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.close(fd)
        except OSError as error:
            raise Failure(output_error(error)) from None


def _run(arguments: Arguments) -> int:
    metadata_snap = arguments.has("--metadata-snap")
    wanted = arguments.all("--dev-id")
    snap_block = cast("int | None", arguments.last("--metadata-snap"))
    options = Options(
        metadata_snap=metadata_snap,
        skip_mappings=arguments.has("--skip-mappings"),
        dev_ids=cast("set[int]", set(wanted)) if wanted else None,
        snap_block=snap_block,
    )
    with open_input(arguments.input, exclusive=not metadata_snap) as device:
        output = _Output(arguments.last("--output"), device)
        writer = XmlWriter(output.write)
        try:
            dump(device, writer, options)
        finally:
            output.close()
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
