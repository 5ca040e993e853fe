"""No rule of the check is without a case that breaks it, and each case comes to the severity that it is listed with."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING

import pytest

from bufio.device import MemoryDevice
from bufio.testing import FaultyDevice
from persistent_data.damage import ADVISORY, FATAL
from persistent_data.node_check import IO_ERROR
from tests.support.broken_rules import CASES, NO_RULES, RULE_MODULES, Case
from tests.support.fixtures import image
from tests.support.image import Image
from tests.support.tools import run_tool
from thinpool.check import MAPPED_BLOCKS, MISSING_MAPPINGS, Options, check_report
from thinpool.trees import MAPPING_TREE

if TYPE_CHECKING:
    from pathlib import Path


TOTALS = (MAPPED_BLOCKS, MISSING_MAPPINGS)
"""These are about a device as a whole."""


def rules() -> set[str]:
    """The wording of every rule: the constants of the modules that check."""
    found = set()
    for module in RULE_MODULES:
        for statement in ast.parse(inspect.getsource(module)).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                name = statement.targets[0].id
                value = getattr(module, name)
                if isinstance(value, str) and name not in NO_RULES:
                    found.add(value)
    return found


def test_every_rule_is_broken_by_some_case() -> None:
    assert len(rules()) > 50
    assert {case.rule for case in CASES} == rules()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_rule_is_found_and_has_its_severity(case: Case, tmp_path: Path) -> None:
    surgeon = case.broken()
    report = check_report(surgeon.device(), Options(metadata_snap=case.metadata_snap))
    found = [finding for finding in report.findings if finding.rule == case.rule]
    assert found, f"no finding {case.rule!r} among:\n{report}"
    assert {finding.severity for finding in found} == {case.severity}
    assert all(finding.message and "\n" not in finding.message for finding in found)
    for finding in report.findings:
        if finding.tree.endswith(MAPPING_TREE) and finding.severity != ADVISORY and finding.rule not in TOTALS:
            assert finding.device is not None
            assert finding.keys is not None
            assert f"thin device {finding.device}" in finding.message
            assert "thin block" in finding.message
    path = tmp_path / "broken"
    path.write_bytes(surgeon.content())
    snap = ["-m"] if case.metadata_snap else []
    for option in ([], ["-q"], ["--json"]):
        assert run_tool("thin_check", *snap, *option, path).status == (0 if report.ok else 64)
    ignoring = run_tool("thin_check", *snap, "--ignore-non-fatal-errors", path)
    assert ignoring.status == (64 if report.worst == FATAL else 0)
    if case.severity == ADVISORY:
        assert f"advisory: {found[0].message}" in ignoring.stderr
    assert path.read_bytes() == surgeon.content()


def test_a_sound_image_breaks_no_rule() -> None:
    for base in {case.base for case in CASES}:
        assert check_report(MemoryDevice(image(base))).findings == []


@pytest.mark.parametrize("name", ["random", "metadata_snapshot", "snapshot_chain"])
def test_a_block_that_cannot_be_read_is_fatal_wherever_it_is(name: str) -> None:
    whole = Image.from_bytes(image(name))
    for block in whole.live_blocks()[::9]:
        device = FaultyDevice(MemoryDevice(image(name)))
        device.on("read", blocks=[block]).fail()
        found = [finding for finding in check_report(device).findings if finding.rule == IO_ERROR]
        assert [(finding.severity, finding.block) for finding in found] == [(FATAL, block)]
