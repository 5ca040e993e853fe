"""What the documents promise: the tests that docs/format.md names exist, and so do the sections that the code cites."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = sorted(set(re.findall(r"`(test_\w+…?)`", (ROOT / "docs" / "format.md").read_text())))


@pytest.fixture(scope="module")
def tests() -> list[str]:
    sources = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return [name for source in sources for name in re.findall(r"def (test_\w+)\(", source)]


def test_names_are_found() -> None:
    assert len(NAMED) > 40


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_the_format_names_exists(name: str, tests: list[str]) -> None:
    if name.endswith("…"):
        assert any(test.startswith(name[:-1]) for test in tests)
    else:
        assert name in tests


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
