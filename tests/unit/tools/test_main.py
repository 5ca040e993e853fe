"""``python -m tools``: which tool is meant; and what a tool does to its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.tools import OPTION_TOOLS, ROOT, TOOLS, run_tool
from tools import __main__ as dispatcher


def test_without_a_name_the_tools_are_listed() -> None:
    result = run_tool("__main__")
    assert (result.status, result.stdout) == (64, b"")
    tools = sorted(TOOLS + OPTION_TOOLS)
    assert result.stderr.splitlines() == ["Usage: <command> <args>", "commands:", *(f"  {tool}" for tool in tools)]


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["thin_hedgehog"]) == 64
    assert capsys.readouterr().err.startswith("unrecognised command\n")


@pytest.mark.parametrize(("arguments", "is_frozen"), [("", True), ("['--version']", False)])
def test_garbage_is_left_alone_only_where_the_process_is_the_tool_s(arguments: str, is_frozen: bool) -> None:
    program = (
        f"import gc, sys; sys.argv[1:] = ['--version']; from tools.thin_rmap import main; main({arguments}); "
        "print(gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == str(is_frozen)
