"""Our programs on every recorded image beside the reference's, versions 1.1.0 and 0.9.0, and docs/compatibility.md.

Where ours and theirs differ the document has a row, and it has none where they do not.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.support.answers import DIFFERENCES, NEW, VERSIONS, Case, Difference, as_printed_by, cases_of
from tests.support.fixtures import DAMAGED, GOOD, answer, read_runs
from tests.support.tools import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, a list for each row; what is code there is no code here."""
    section = re.split(r"^## ", DOCUMENT.split(f"\n## {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [line.replace("`", "").strip("|").split("|") for line in section.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def rows_about(name: str, heading: str) -> list[list[str]]:
    """The rows with *name* in the first cell, without that cell and the reason in the last one."""
    rows = [row for row in rows_of(heading) if name in row[0].split(", ")]
    assert all(row[-1] for row in rows), "a reason is missing"
    return sorted(row[1:-1] for row in rows)


# What is recorded


def test_enough_is_recorded() -> None:
    assert len(GOOD) == 29
    assert len(DAMAGED) == 75
    assert all(len(cases_of(name)) >= 10 for name in GOOD + DAMAGED)


@pytest.mark.parametrize("name", GOOD)
def test_the_hashes_are_those_of_the_recorded_outputs(name: str) -> None:
    cases = {case.command: case for case in cases_of(name)}
    outputs = {"thin_dump": "xml", "thin_ls": "ls.txt", "thin_dump -m": "metasnap.xml", "thin_ls -m": "metasnap.ls.txt"}
    for command in outputs.keys() & cases.keys():
        assert cases[command].answers[NEW].is_of(answer(name, outputs[command]))
    for version, recorded in cases["thin_check"].answers.items():
        assert recorded.status == read_runs(answer(name, "check.txt"))[f"thin_check {version}"].status


# Output


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_what_is_said_of_a_sound_pool_is_the_same_but_for_the_listed_differences(name: str, tmp_path: Path) -> None:
    for case in cases_of(name):
        ours = case.run(tmp_path)
        for version, recorded in case.answers.items():
            if case.program != "thin_check":  # whose verdicts are compared below
                assert (ours.status == 0) == (recorded.status == 0), (case, version)
            if ours.status == recorded.status == 0:
                assert recorded.is_of(as_printed_by(version, case, ours.stdout, tmp_path)), (case, version)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
def test_a_listed_difference_exists(difference: Difference, tmp_path: Path) -> None:
    name, command = difference.example
    (case,) = (case for case in cases_of(name) if case.command == command)
    ours = case.run(tmp_path).stdout
    for version in difference.versions:
        recorded = case.answers[version]
        assert recorded.is_of(as_printed_by(version, case, ours, tmp_path))
        assert not recorded.is_of(as_printed_by(version, case, ours, tmp_path, without=difference.name))


def test_the_differences_in_output_are_those_of_the_document() -> None:
    listed = rows_of("Output")
    assert [row[:3] for row in listed] == [
        [difference.name, ", ".join(difference.programs), ", ".join(difference.versions)] for difference in DIFFERENCES
    ]
    assert all(row[3] and row[4] for row in listed)


# Damaged pools


def severity(statuses: dict[str, int]) -> str:
    """What the exit statuses with and without an option say."""
    if statuses["thin_check"] == 0:
        return "sound"
    return "non-fatal" if statuses["thin_check --ignore-non-fatal-errors"] == 0 else "fatal"


def verdicts_on(name: str, tmp_path: Path) -> list[list[str]]:
    """Where not all agree: an option, if not the whole is checked, and what ours, 1.1.0 and 0.9.0 say."""
    cases = [case for case in cases_of(name) if case.program == "thin_check"]
    statuses = [{case.command: case.run(tmp_path).status for case in cases}]
    statuses += [{case.command: case.answers[version].status for case in cases} for version in VERSIONS]
    rows = {"": [severity(each) for each in statuses]}
    for option in ("--skip-mappings", "--super-block-only"):
        rows[option] = ["sound" if each[f"thin_check {option}"] == 0 else "damaged" for each in statuses]
    return [[option, *verdicts] for option, verdicts in rows.items() if len(set(verdicts)) > 1]


@pytest.mark.parametrize("name", GOOD + DAMAGED)
def test_the_verdicts_that_differ_are_those_of_the_document(name: str, tmp_path: Path) -> None:
    assert rows_about(name, "Verdicts of thin_check") == sorted(verdicts_on(name, tmp_path))


def reading_of(version: str, case: Case, ours: bytes | None, tmp_path: Path) -> str:
    """Whether a version reads an image, and if ours does too, whether it is the same."""
    recorded = case.answers.get(version)
    if recorded is None:
        return "-"
    if recorded.status != 0:
        return "no"
    if ours is None or recorded.is_of(as_printed_by(version, case, ours, tmp_path)):
        return "yes"
    return "otherwise"


def readings_of(name: str, tmp_path: Path) -> list[list[str]]:
    """Where not all agree: programs that fare alike, and how they do, ours, those of 1.1.0 and those of 0.9.0."""
    programs: dict[tuple[str, ...], list[str]] = {}
    for case in cases_of(name):
        if case.program == "thin_check":
            continue
        result = case.run(tmp_path)
        output = result.stdout if result.status == 0 else None
        ours = "no" if output is None else "yes"
        theirs = [reading_of(version, case, output, tmp_path) for version in VERSIONS]
        if {ours, *theirs} - {"-"} != {ours}:
            programs.setdefault((ours, *theirs), []).append(without_numbers(case))
    return [[", ".join(names), *readings] for readings, names in programs.items()]


def without_numbers(case: Case) -> str:
    """The program and the option that matters."""
    options = [word for word in case.command.split() if word in ("--skip-mappings", "--dev-id", "-m")]
    if "_BLOCKS" in case.command:
        options = ["-o"]
    return " ".join([case.program.removeprefix("thin_"), *options])


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_the_readings_that_differ_are_those_of_the_document(name: str, tmp_path: Path) -> None:
    assert rows_about(name, "Readers on damaged pools") == sorted(readings_of(name, tmp_path))
