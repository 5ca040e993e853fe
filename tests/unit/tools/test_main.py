"""``python -m tools``: which tool is meant."""

from __future__ import annotations

import pytest

from tests.support.tools import OPTION_TOOLS, TOOLS, run_tool
from tools import __main__ as dispatcher


def test_without_a_name_the_tools_are_listed() -> None:
    result = run_tool("__main__")
    assert (result.status, result.stdout) == (64, b"")
    tools = sorted(TOOLS + OPTION_TOOLS)
    assert result.stderr.splitlines() == ["Usage: <command> <args>", "commands:", *(f"  {tool}" for tool in tools)]


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatcher.main(["thin_hedgehog"]) == 64
    assert capsys.readouterr().err.startswith("unrecognised command\n")
