"""thin_dump: write the contents of a pool's metadata as text.  See docs/tools/thin_dump.md."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, cast

from thinpool.dump import Options, dump
from thinpool.layout import valid_data_block_size
from thinpool.xml_format import XmlWriter

from ._cli import (
    EXIT_OK,
    Command,
    Failure,
    Option,
    OutputGone,
    number,
    open_input,
    os_error,
    output_error,
    pieces,
    raise_output_error,
    run,
    write_bytes,
)
from ._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import FileDevice, ReadableBuffer
    from thinpool.human_format import HumanWriter
    from thinpool.json_format import JsonWriter

    from ._cli import Arguments


_TITLE = "Dumping thin metadata"
_FORMATS = ("xml", "human_readable")
_CUSTOM = "custom="


def _format(text: str) -> str:
    if text not in _FORMATS and not (text.startswith(_CUSTOM) and text != _CUSTOM):
        raise ValueError(f"\n  [possible values: {', '.join(_FORMATS)}, {_CUSTOM}FILE]")
    return text


def _data_block_size(text: str) -> int:
    sectors = number(text)
    if not valid_data_block_size(sectors):
        raise ValueError("invalid data block size: a multiple of 128 sectors is needed, 2097152 at most")
    return sectors


COMMAND = Command(
    "thin_dump",
    "Write the contents of a thin provisioning pool's metadata as text",
    (
        Option("-f, --format", "xml (default), human_readable or custom=FILE", value="TYPE", convert=_format),
        Option("--json", "One JSON object on each line"),
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
        Option("--no-shared", "Repeat what devices share in each of them: no def and ref"),
        Option("--transaction-id", "Transaction id, if the superblock's is lower", value="NUM", convert=number),
        Option(
            "--data-block-size",
            "Data block size in place of the superblock's",
            value="SECTORS",
            convert=_data_block_size,
        ),
        Option("--nr-data-blocks", "Data blocks, if the superblock says fewer", value="NUM", convert=number),
        Option(
            "--data-mapping-root",
            "Root of the mapping tree in place of the superblock's",
            value="BLOCKNR",
            convert=number,
        ),
        Option(
            "--device-details-root",
            "Root of the details tree in place of the superblock's",
            value="BLOCKNR",
            convert=number,
        ),
        Option("-r, --repair", "(not available yet)"),
        Option("-q, --quiet", "No messages, only an exit status"),
    ),
    conflicts=(("--repair", "--metadata-snap"), ("--json", "--format")),
    text="""
The first line of XML holds the whole superblock tag.  Leaves of the mapping trees that several
devices share are written once, as <def>, and referred to with <ref>; a dump of one device has none,
and JSON has none.  The FILE of custom is Python and has a function create_emitter(write).
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

    def write(self, data: ReadableBuffer) -> None:
        if self._path is None:
            write_bytes(data)
            return
        if self._fd < 0:
            self._fd = self._open(self._path)
        try:
            for piece in pieces(data):
                while piece:
                    piece = piece[os.write(self._fd, piece) :]
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
    if arguments.has("--repair"):
        raise Failure("thin_dump --repair is not available in this version; nothing was dumped")
    metadata_snap = arguments.has("--metadata-snap")
    wanted = arguments.all("--dev-id")
    options = Options(
        metadata_snap=metadata_snap,
        skip_mappings=arguments.has("--skip-mappings"),
        dev_ids=cast("set[int]", set(wanted)) if wanted else None,
        snap_block=cast("int | None", arguments.last("--metadata-snap")),
        expand_shared=arguments.has("--no-shared") or arguments.has("--json"),
        transaction=cast("int", arguments.last("--transaction-id") or 0),
        data_block_size=cast("int | None", arguments.last("--data-block-size")),
        nr_data_blocks=cast("int", arguments.last("--nr-data-blocks") or 0),
        mapping_root=cast("int | None", arguments.last("--data-mapping-root")),
        details_root=cast("int | None", arguments.last("--device-details-root")),
    )
    form = "json" if arguments.has("--json") else str(arguments.last("--format") or "xml")
    with open_input(arguments.input, exclusive=not metadata_snap) as device:
        output = _Output(arguments.last("--output"), device)
        try:
            with Progress(_TITLE, beside_output=not arguments.has("--output")) as progress:
                _dump(device, output, options, form, progress)
        finally:
            output.close()
    return EXIT_OK


def _dump(device: FileDevice, output: _Output, options: Options, form: str, progress: Progress) -> None:
    if form.startswith(_CUSTOM):
        from ._emitter import emitter_failure, load_emitter

        path = form.removeprefix(_CUSTOM)
        visitor = load_emitter(path, output.write)
        try:
            dump(device, visitor, options, progress)
        except (OSError, Failure, OutputGone):
            raise
        except Exception as error:
            raise emitter_failure(path, error) from error
        return
    writer = _writer(form, output)
    try:
        dump(device, writer, options, progress)
    finally:
        # After damage, what came before it is written, so that a reader sees how far things went well.
        writer.flush()


def _writer(form: str, output: _Output) -> HumanWriter | JsonWriter | XmlWriter:
    # Only the module that is wanted is loaded.
    if form == "json":
        from thinpool.json_format import JsonWriter

        return JsonWriter(output.write)
    if form == "human_readable":
        from thinpool.human_format import HumanWriter

        return HumanWriter(output.write)
    return XmlWriter(output.write)


if __name__ == "__main__":
    sys.exit(main())
