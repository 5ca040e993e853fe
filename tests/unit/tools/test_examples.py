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


def examples(tool: str) -> list[tuple[str, str]]:
    """The command lines of the section "Example" of a tool's page, with what each prints."""
    page = (ROOT / "docs" / "tools" / f"{tool}.md").read_text()
    section = page.split("\n## Example\n")[1].split("\n## ")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ") or not line]
    text = "\n".join(lines).strip("\n") + "\n"
    found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    assert found
    return found


#: What meta.img is in the examples of a tool, where it is not "mixed".
IMAGES = dict.fromkeys(("thin_delta", "thin_dump", "thin_ls", "thin_rmap"), "transaction_id")


@pytest.mark.parametrize("tool", [*IMAGES, *OPTION_TOOLS])
def test_examples_print_what_the_page_says(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(image_path(IMAGES.get(tool, "mixed"), tmp_path), tmp_path / "meta.img")
    monkeypatch.chdir(tmp_path)
    for line, printed in examples(tool):
        program, *arguments = shlex.split(line)
        result = run_tool(program, *arguments)
        shown = result.stdout.decode() + result.stderr
        # The XML of some tools ends without a newline.
        assert shown.removesuffix("\n") == printed.removesuffix("\n"), line
