"""Run our tools: within this process, which is fast, or the way a shell does, with real files and pipes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ["thin_check", "thin_delta", "thin_dump", "thin_ls", "thin_rmap"]
#: Options without which a tool does nothing, such that it has something to do with most images.
NEEDED = {"thin_delta": ("--thin1", "0", "--thin2", "1"), "thin_rmap": ("--region", "0..16384")}
#: Tools without an operand.
OPTION_TOOLS = ["thin_metadata_pack", "thin_metadata_size", "thin_metadata_unpack"]


class Result(NamedTuple):
    """What a tool left behind."""

    status: int
    stdout: bytes
    stderr: str


def run_tool(tool: str, *arguments: str | Path) -> Result:
    """Call the main function of *tool*, with its output caught."""
    stdout, stderr = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status: int = import_module(f"tools.{tool}").main([str(argument) for argument in arguments])
    stdout.flush()
    assert isinstance(stdout.buffer, io.BytesIO)
    return Result(status, stdout.buffer.getvalue(), stderr.getvalue())


def command(tool: str, *arguments: str | Path, flags: Sequence[str] = ()) -> list[str]:
    """The command line that runs *tool* from the checkout; *flags* go to the interpreter."""
    return [sys.executable, *flags, "-m", f"tools.{tool}", *map(str, arguments)]


def run_process(tool: str, *arguments: str | Path, flags: Sequence[str] = ()) -> Result:
    """Run *tool* as a program of its own, to its end."""
    return _run(command(tool, *arguments, flags=flags))


def run_as_anybody(tool: str, *arguments: str | Path) -> Result:
    """As :func:`run_process`, without what lets root open any file (setpriv is part of util-linux)."""
    privileged = os.geteuid() == 0
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if privileged else []
    return _run([*without, *command(tool, *arguments)])


def _run(arguments: Sequence[str]) -> Result:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=60, check=False)
    return Result(done.returncode, done.stdout, done.stderr.decode())
