"""The examples of the tools' pages: each command prints what the page says."""

from __future__ import annotations

import re
import shlex
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.fixtures import image_path
from tests.support.tools import OPTION_TOOLS, ROOT, run_tool

if TYPE_CHECKING:
    from pathlib import Path


def examples(tool: str, heading: str = "Example") -> list[tuple[str, str]]:
    """The command lines of a section of a tool's page, with what each prints."""
    page = (ROOT / "docs" / "tools" / f"{tool}.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    text = "\n".join(lines).strip("\n") + "\n"
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    assert found
    return found


#: What meta.img is in the examples of a tool, where it is not "mixed".
IMAGES = dict.fromkeys(("thin_delta", "thin_dump", "thin_ls", "thin_rmap"), "transaction_id")
IMAGES["thin_check"] = "leaf_flipped"


def run_examples(found: list[tuple[str, str]], name: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold the programs to what they are said to print about image *name*."""
    shutil.move(image_path(name, directory), directory / "meta.img")
    monkeypatch.chdir(directory)
    for line, printed in found:
        program, *arguments = shlex.split(line)
        result = run_tool(program, *arguments)
        shown = result.stdout.decode() + result.stderr
        # The XML of some tools ends without a newline; between two commands the page has an empty line.
        assert shown.rstrip("\n") == printed.rstrip("\n"), line


@pytest.mark.parametrize("tool", [*IMAGES, *OPTION_TOOLS])
def test_examples_print_what_the_page_says(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(examples(tool), IMAGES.get(tool, "mixed"), tmp_path, monkeypatch)


def test_the_example_of_a_repair_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(examples("thin_check", "Example of a repair"), "data_leak", tmp_path, monkeypatch)
