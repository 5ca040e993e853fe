"""thin_check: verify the metadata of a pool.  See docs/tools/thin_check.md."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from persistent_data.damage import ADVISORY, FATAL, NON_FATAL
from persistent_data.node_check import CHECKSUM_ERROR, IO_ERROR
from persistent_data.space_map_check import BAD_COUNT, LEAK
from thinpool.check import MAPPED_BLOCKS, MISSING_MAPPINGS, Observer, Options, check
from thinpool.needs_check import clear_needs_check
from thinpool.trees import MAPPING_TREE

from ._cli import EXIT_FAILURE, EXIT_OK, Command, Option, UsageError, open_input, run, say, write_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from thinpool.check import Finding
    from thinpool.layout import Superblock

    from ._cli import Arguments

_MOST_LINES = 50
"""Findings of one kind that are shown; the others are only counted."""

COMMAND = Command(
    "thin_check",
    "Verify the metadata of a thin provisioning pool",
    (
        Option("-q, --quiet", "No output, only an exit status"),
        Option("-m, --metadata-snap", "Check the metadata snapshot; the pool may be in use"),
        Option("--super-block-only", "Check the superblock and nothing else"),
        Option("--skip-mappings", "Check the superblock and the two device trees only"),
        Option("--ignore-non-fatal-errors", "Succeed in spite of leaks and underfull nodes"),
        Option("--clear-needs-check-flag", "Clear the flag in the superblock if the check succeeds"),
        Option("--auto-repair", "(not available yet)"),
    ),
    conflicts=(("--clear-needs-check-flag", "--metadata-snap"),),
    text="""
On stdout, as soon as the superblock is known to be sound:
  TRANSACTION_ID=<the pool's transaction id>
  METADATA_FREE_BLOCKS=<free metadata blocks>
What is wrong is on stderr, a line each: the rule, the metadata block, the thin device and the
thin blocks that are hit.  Lines that begin with 'advisory:' do not make the check fail.

Exit status: 0 if the metadata is sound, 64 if it is not or cannot be checked.

Example, after the metadata of an inactive pool has been swapped into the volume vg/meta:
  thin_check /dev/vg/meta
""",
)


class _Printer(Observer):
    """Shows the course of a check and what it finds."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._lines: dict[str, int] = {}
        self._io_errors = 0
        self._checksum_errors = 0
        self._bad_nodes: set[int | None] = set()
        self._mappings_failed = False
        self._leaks: dict[str, int] = {}
        self._bad_maps: list[str] = []
        self.gravest = ""
        # Redrawn progress would need a terminal; lines are for logs.
        self._titles = not quiet and sys.stderr is not None and not sys.stderr.isatty()

    def accepted(self, superblock: Superblock) -> None:
        if not self._quiet:
            root = superblock.metadata_root
            free = max(root.nr_blocks - root.nr_allocated, 0)
            write_out(f"TRANSACTION_ID={superblock.trans_id}\nMETADATA_FREE_BLOCKS={free}\n")

    def stage(self, title: str) -> None:
        if self._titles:
            say(title)

    def finding(self, finding: Finding) -> None:
        """Show a finding, or count it if there have been many like it."""
        if finding.severity == FATAL or not self.gravest or self.gravest == ADVISORY:
            self.gravest = finding.severity
        if self._quiet:
            return
        shown = self._lines[finding.rule] = self._lines.get(finding.rule, 0) + 1
        if shown <= _MOST_LINES:
            say(f"advisory: {finding.message}" if finding.severity == ADVISORY else finding.message)
        if finding.rule == LEAK and finding.keys is not None:
            begin, end = finding.keys
            self._leaks[finding.tree] = self._leaks.get(finding.tree, 0) + end - begin
        elif finding.rule == BAD_COUNT:
            if finding.tree not in self._bad_maps:
                self._bad_maps.append(finding.tree)
        elif finding.severity == FATAL and finding.tree.endswith(MAPPING_TREE):
            self._mapping_error(finding)

    def _mapping_error(self, finding: Finding) -> None:
        self._mappings_failed = True
        if finding.rule in (MISSING_MAPPINGS, MAPPED_BLOCKS):
            return
        self._bad_nodes.add(finding.block)
        self._io_errors += finding.rule == IO_ERROR
        self._checksum_errors += finding.rule == CHECKSUM_ERROR

    def summary(self) -> None:
        """Show what the findings come to."""
        if self._quiet:
            return
        for rule, count in self._lines.items():
            if count > _MOST_LINES:
                say(f"... and {count - _MOST_LINES} more of: {rule}")
        if self._bad_nodes:
            say(f"{len(self._bad_nodes)} nodes in data mapping tree contain errors")
            say(f"{self._io_errors} io errors, {self._checksum_errors} checksum errors")
        if self._mappings_failed:
            say("Check of mappings failed")
        for tree in self._bad_maps:
            say(f"{tree}: Fatal errors in {tree}")
        for tree, count in self._leaks.items():
            say(f"{count} {tree.split()[0]} blocks have leaked.")
        for tree in self._leaks:
            say(f"{tree} contains leaks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_check with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    if arguments.has("--auto-repair"):
        raise UsageError("the argument '--auto-repair' is not available in this version")
    metadata_snap = arguments.has("--metadata-snap")
    clear = arguments.has("--clear-needs-check-flag")
    printer = _Printer(arguments.has("--quiet"))
    options = Options(
        super_block_only=arguments.has("--super-block-only"),
        skip_mappings=arguments.has("--skip-mappings"),
        metadata_snap=metadata_snap,
    )
    with open_input(arguments.input, exclusive=not metadata_snap, read_only=not clear) as device:
        printer.stage("Checking thin metadata")
        for finding in check(device, options, printer):
            printer.finding(finding)
        printer.summary()
        if printer.gravest == FATAL:
            return EXIT_FAILURE
        if printer.gravest == NON_FATAL and not arguments.has("--ignore-non-fatal-errors"):
            return EXIT_FAILURE
        if clear and clear_needs_check(device) and not arguments.has("--quiet"):
            say("Cleared needs_check flag")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
