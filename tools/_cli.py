"""What all tools share: the command line, the input file, the ways to fail.

A tool ends with 0 or with 64.  It never ends with 2, which volume managers take for "the tool is not installed".  Each
failure is one sentence on stderr; a reader that closes its pipe is no reason to say anything.

No argument parser from the library: loading one takes longer than checking a small pool.
"""

from __future__ import annotations

import errno
import gc
import os
import stat
import sys
from typing import TYPE_CHECKING

from bufio.device import FileDevice
from persistent_data.block_reader import BlockReader
from persistent_data.layout import BLOCK_SIZE
from thinpool.version import VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Sequence

    from bufio.device import ReadableBuffer

EXIT_OK = 0
EXIT_FAILURE = 64

_LINES_AT_A_TIME = 1024
_GARBAGE_FROM_OBJECTS = 50_000
_PIECE_BYTES = 1 << 17
_XML_BEGINNINGS = (b"<superblock", b"<?xml", b"?xml", b"<!DOCTYPE")


class UsageError(Exception):
    """The command line is wrong; the argument says how."""


class Failure(Exception):
    """The tool cannot do what it was asked to; the argument is a sentence for the user."""


class OutputGone(Exception):
    """Whoever read the output has closed it."""


class Option:
    """One option of a tool.

    :param names: such as ``"-o, --output"``; the last is the one that :class:`Arguments` knows it by
    :param value: how the help calls its value; empty for an option without one
    :param convert: turns the text of a value into what the tool works with; raises ValueError with the reason
    :param required: the tool does nothing without it
    :param repeated: every occurrence counts, not just the last
    :param value_optional: the value may be left out, and is otherwise attached with ``=``
    :param hidden: accepted for the sake of old scripts, and without effect
    """

    def __init__(
        self,
        names: str,
        help_text: str = "",
        *,
        value: str = "",
        convert: Callable[[str], object] = str,
        required: bool = False,
        repeated: bool = False,
        value_optional: bool = False,
        hidden: bool = False,
    ) -> None:
        self.names = names.split(", ")
        self.help_text = help_text
        self.value = value
        self.convert = convert
        self.required = required
        self.repeated = repeated
        self.value_optional = value_optional
        self.hidden = hidden

    @property
    def key(self) -> str:
        """The long name, or the only one."""
        return self.names[-1]

    def shown(self) -> str:
        """Return the long name with its value, as messages have it."""
        return f"{self.key} <{self.value}>" if self.value and not self.value_optional else self.key


COMMON_OPTIONS = (
    Option("-h, --help", "Show this and exit"),
    Option("-V, --version", "Show the version and exit"),
    Option("-v", hidden=True),
    Option("--io-engine", value="ENGINE", hidden=True),
)


class Arguments:
    """A parsed command line.

    :ivar input: the operand; empty if the tool takes none
    """

    def __init__(self, input_path: str, values: dict[str, list[object]]) -> None:
        self.input = input_path
        self._values = values

    def has(self, name: str) -> bool:
        """Tell whether an option was given."""
        return name in self._values

    def last(self, name: str) -> object:
        """Return the value that an option was given last, None if it was not given."""
        values = self._values.get(name)
        return values[-1] if values else None

    def number(self, name: str) -> int | None:
        """Return the value of an option converted by :func:`number`, None if it was not given."""
        value = self.last(name)
        assert value is None or isinstance(value, int)
        return value

    def all(self, name: str) -> list[object]:
        """Return every value of a repeated option, in order."""
        return self._values.get(name, [])


class Command:
    """A tool's command line: what it accepts, and how it explains itself.

    :param conflicts: pairs of options that exclude each other
    :param operand: whether the tool takes its input as an operand; otherwise options name all it needs
    :param text: what the help says below the options
    """

    def __init__(
        self,
        name: str,
        summary: str,
        options: Sequence[Option],
        *,
        conflicts: Sequence[tuple[str, str]] = (),
        operand: bool = True,
        text: str = "",
    ) -> None:
        self.name = name
        self.summary = summary
        self.options = (*options, *COMMON_OPTIONS)
        self.conflicts = conflicts
        self.operand = operand
        self.text = text
        self._by_name = {name: option for option in self.options for name in option.names}

    def usage(self) -> str:
        """Return the one line that usage errors end with."""
        return " ".join([f"Usage: {self.name} [OPTIONS]", *self._needed()])

    def _needed(self, given: Container[str] = ()) -> list[str]:
        """Return what a command line must have besides the options *given*."""
        operand = ["<INPUT>"] if self.operand else []
        return [option.shown() for option in self.options if option.required and option.key not in given] + operand

    def help(self) -> str:
        """Return everything that ``--help`` shows."""
        lines = [self.summary, "", self.usage(), ""]
        if self.operand:
            lines += ["Arguments:", *_table([("<INPUT>", "Metadata: a block device or a file")]), ""]
        lines.append("Options:")
        rows = []
        for option in self.options:
            if option.hidden:
                continue
            names = ", ".join(option.names) if option.names[0][1] != "-" else "    " + option.key
            if option.value:
                names += f"[=<{option.value}>]" if option.value_optional else f" <{option.value}>"
            rows.append((names, option.help_text))
        lines += _table(rows)
        if self.text:
            lines += ["", self.text.strip()]
        return "\n".join(lines) + "\n"

    def parse(self, argv: Sequence[str]) -> Arguments | None:
        """Take a command line apart; None when it asked for help or the version, which has been shown.

        Options stand before or after the operand, values follow or are attached.  Empty arguments are passed over:
        volume managers hand down empty configuration values.
        """
        values: dict[str, list[object]] = {}
        operands: list[str] = []
        waiting = [argument for argument in argv if argument]
        only_operands = False
        while waiting:
            argument = waiting.pop(0)
            if only_operands or argument == "-" or not argument.startswith("-"):
                operands.append(argument)
            elif argument == "--":
                only_operands = True
            elif argument.startswith("--"):
                self._take_long(argument, waiting, values)
            else:
                self._take_short(argument, waiting, values)
        if "--help" in values:
            write_out(self.help())
            return None
        if "--version" in values:
            write_out(VERSION + "\n")
            return None
        for one, other in self.conflicts:
            if one in values and other in values:
                named = self._by_name[one].shown(), self._by_name[other].shown()
                raise UsageError("the argument '{}' cannot be used with '{}'".format(*named))
        unexpected = operands[self.operand :]
        if unexpected:
            raise UsageError(f"unexpected argument '{unexpected[0]}' found")
        missing = self._needed(values)
        if operands:
            missing.remove("<INPUT>")
        if missing:
            raise UsageError("\n  ".join(["the following required arguments were not provided:", *missing]))
        return Arguments(operands[0] if operands else "", values)

    def _take_long(self, argument: str, waiting: list[str], values: dict[str, list[object]]) -> None:
        name, equals, value = argument.partition("=")
        option = self._find(name)
        if not option.value:
            if equals:
                raise UsageError(f"unexpected value '{value}' for '{name}' found; no more were expected")
            self._store(option, None, values)
        elif equals or option.value_optional:
            self._store(option, value if equals else None, values)
        else:
            self._store(option, self._next_value(option, waiting), values)

    def _take_short(self, argument: str, waiting: list[str], values: dict[str, list[object]]) -> None:
        letters = argument[1:]
        while letters:
            option = self._find("-" + letters[0])
            letters = letters[1:]
            if not option.value:
                self._store(option, None, values)
                continue
            attached = letters.startswith("=")
            if option.value_optional and not attached and not letters.isdecimal():
                self._store(option, None, values)
                continue
            value = letters[1:] if attached else letters
            self._store(option, value if attached or value else self._next_value(option, waiting), values)
            return

    def _find(self, name: str) -> Option:
        option = self._by_name.get(name)
        if option is None:
            raise UsageError(f"unexpected argument '{name}' found")
        return option

    @staticmethod
    def _next_value(option: Option, waiting: list[str]) -> str:
        if not waiting:
            raise UsageError(f"a value is required for '{option.shown()}' but none was supplied")
        return waiting.pop(0)

    @staticmethod
    def _store(option: Option, value: str | None, values: dict[str, list[object]]) -> None:
        converted: object = None
        if value is not None:
            try:
                converted = option.convert(value)
            except ValueError as error:
                raise UsageError(f"invalid value '{value}' for '{option.shown()}': {error}") from None
        if option.repeated:
            values.setdefault(option.key, []).append(converted)
        else:
            values[option.key] = [converted]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"  {left:<{width}}  {right}" for left, right in rows]


def number(text: str) -> int:
    """Convert the value of an option that is a number from 0 to 2**64 - 1."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError("invalid digit found in string")
    value = int(text)
    if value >= 1 << 64:
        raise ValueError("number too large to fit in target type")
    return value


def write_out(text: str) -> None:
    """Write *text* to stdout.

    :raises OutputGone: the reader has closed its end
    :raises Failure: it cannot be written
    """
    if sys.stdout is None:
        raise Failure(output_error(OSError(errno.EBADF, os.strerror(errno.EBADF))))
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _abandon_stdout()
        raise_output_error(error)


def pieces(data: ReadableBuffer) -> Iterator[memoryview]:
    """Cut *data* into what is worth handing to the system at once: file systems are slow to take megabytes."""
    view = memoryview(data)
    for begin in range(0, len(view), _PIECE_BYTES):
        yield view[begin : begin + _PIECE_BYTES]


def write_bytes(data: ReadableBuffer) -> None:
    """Write ASCII *data* to stdout, without turning it into text in between.

    :raises OutputGone: the reader has closed its end
    :raises Failure: it cannot be written
    """
    if sys.stdout is None:
        raise Failure(output_error(OSError(errno.EBADF, os.strerror(errno.EBADF))))
    try:
        sys.stdout.flush()
        for piece in pieces(data):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except OSError as error:
        _abandon_stdout()
        raise_output_error(error)


def write_lines(lines: Iterable[str]) -> None:
    """Write *lines*, which end as they are, to stdout, many at a time.

    What came before an exception of *lines* itself is written, so that a reader sees how far things went well.

    :raises OutputGone: the reader has closed its end
    :raises Failure: they cannot be written
    """
    batch: list[str] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == _LINES_AT_A_TIME:
                text, batch = "".join(batch), []
                write_out(text)
    finally:
        if batch:
            write_out("".join(batch))


def output_error(error: OSError) -> str:
    """Word an error met in writing a tool's results."""
    return f"output error: {os_error(error)}"


def raise_output_error(error: OSError) -> None:
    """Turn an error met in writing into the exception that ends the tool as it should."""
    if error.errno == errno.EPIPE:
        raise OutputGone from error
    raise Failure(output_error(error)) from error


def _abandon_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes what could not be written."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass  # not a real file, as under a test's capture: nothing will be flushed


def os_error(error: OSError) -> str:
    """Word an operating system's error, with its number, as the Rust tools do."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{text} (os error {error.errno})" if error.errno is not None else text


def say(text: str) -> None:
    """Write a line to stderr, if there is somebody to read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass


def open_input(path: str, *, exclusive: bool = True, read_only: bool = True) -> FileDevice:
    """Open a tool's input, after the checks that tell a user what is wrong with it.

    Block devices are read past the page cache, which for the metadata of a live pool may be out of date.

    :param exclusive: refuse a device that is in use
    :raises Failure: it is not there, no device or file, too small, XML, not to be opened, or in use
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Failure(f"Couldn't find input file '{path}'") from None
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise Failure(f"Not a block device or regular file '{path}'.")
    try:
        device = FileDevice(path, read_only=read_only, direct=stat.S_ISBLK(mode), exclusive=exclusive)
    except OSError as error:
        raise _cannot_open(path, error) from None
    try:
        if device.size_bytes < BLOCK_SIZE:
            raise Failure("Metadata device/file too small.  Is this binary metadata?")
        if bytes(BlockReader(device).read(0)[:16]).startswith(_XML_BEGINNINGS):
            raise Failure("This looks like XML.  This tool only supports the binary metadata format.")
    except OSError as error:
        device.close()
        raise _cannot_open(path, error) from None
    except Failure:
        device.close()
        raise
    return device


def _cannot_open(path: str, error: OSError | ValueError) -> Failure:
    if not isinstance(error, OSError):
        return Failure(f"Couldn't open input file '{path}': {error}")
    if error.errno == errno.EBUSY:
        busy = f"{os.strerror(errno.EBUSY)} (os error {errno.EBUSY})"
        return Failure(
            f"Couldn't open '{path}': {busy}: it is in use; of a live pool, only a metadata snapshot can be read"
        )
    return Failure(f"Couldn't open input file '{path}': {os_error(error)}")


def run(command: Command, argv: Sequence[str] | None, body: Callable[[Arguments], int]) -> int:
    """Run a tool: parse *argv* (``sys.argv`` if None), call *body*, and see to it that any end is a proper one."""
    # Where a tool loads numpy, it needs no threads for linear algebra; starting them takes longer than the rest.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    is_program = argv is None
    if is_program:
        # Loading modules makes many objects and no garbage; looking for some takes a twentieth of the time.
        gc.set_threshold(_GARBAGE_FROM_OBJECTS)
    try:
        return _run(command, argv, body)
    finally:
        if is_program:
            # Nor does garbage have to be looked for when all memory is given back anyway.
            gc.freeze()


def _run(command: Command, argv: Sequence[str] | None, body: Callable[[Arguments], int]) -> int:
    quiet = False
    try:
        arguments = command.parse(sys.argv[1:] if argv is None else argv)
        if arguments is None:
            return EXIT_OK
        quiet = arguments.has("--quiet")
        return body(arguments)
    except UsageError as error:
        say(f"error: {error}\n\n{command.usage()}\n\nFor more information, try '--help'.")
        return EXIT_FAILURE
    except OutputGone:
        return EXIT_FAILURE
    except Failure as error:
        message = str(error)
    except OSError as error:
        # The library's own errors are sentences; what comes from the system gets its number.
        message = os_error(error) if type(error).__module__ == "builtins" else str(error.strerror)
    except MemoryError:
        message = "out of memory"
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        message = f"internal error, please report it: {type(error).__name__}: {error}"
    if not quiet:
        say(message)
    return EXIT_FAILURE
