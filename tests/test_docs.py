"""What the documents promise: the tests that they name exist, and so do the sections that the code cites."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUFIO = (ROOT / "docs" / "bufio.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+…?)`", (ROOT / "docs" / "format.md").read_text() + BUFIO)))
SCRIPTS = sorted(set(re.findall(r"`((?:client|bcache)/[\w-]+)`", BUFIO)))


@pytest.fixture(scope="module")
def tests() -> list[str]:
    sources = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return [name for source in sources for name in re.findall(r"def (test_\w+)\(", source)]


def test_names_are_found() -> None:
    assert len(NAMED) > 100
    assert len(SCRIPTS) > 60


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_is_named_exists(name: str, tests: list[str]) -> None:
    if name.endswith("…"):
        assert any(test.startswith(name[:-1]) for test in tests)
    else:
        assert name in tests


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_that_is_named_exists(script: str) -> None:
    interface, name = script.split("/")
    sources = (ROOT / "tests" / "unit" / "bufio" / "cache_scripts" / interface).glob("*.txt")
    assert any(f"\n[{name}]\n" in "\n" + source.read_text() for source in sources)


def rows_of(document: str, heading: str) -> list[str]:
    """The rows of all tables from a heading to the next one of the same kind or higher."""
    level = heading.split()[0]
    section = document.split(f"\n{heading}\n")[1]
    section = re.split(rf"\n#{{1,{len(level)}}} ", section)[0]
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    headers = {number - 1 for number, row in enumerate(rows) if set(row) <= set("|- ")}
    return [row for number, row in enumerate(rows) if number not in headers and not set(row) <= set("|- ")]


@pytest.mark.parametrize("row", rows_of(BUFIO, "## Where each function went"))
def test_no_row_of_the_table_is_without_a_test(row: str) -> None:
    assert re.search(r"`test_\w+`|`(client|bcache)/|tests/\S+\.py", row.split("|")[-2])


CITED = sorted(
    {
        (document, section.replace("\n", " "))
        for package in ("bufio", "persistent_data", "thinpool", "tools")
        for source in (ROOT / package).rglob("*.py")
        for document, section in re.findall(r'(docs/[\w/]+\.md)(?:,\s+"([^"]+)")?', source.read_text())
    }
)


@pytest.mark.parametrize(("document", "section"), CITED, ids=lambda part: part or "whole")
def test_every_section_that_the_code_cites_exists(document: str, section: str) -> None:
    text = (ROOT / document).read_text()
    if section:
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert re.sub(r"\s+", " ", section) in headings
