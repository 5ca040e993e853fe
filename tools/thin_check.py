"""thin_check: verify the metadata of a pool.  See docs/tools/thin_check.md."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from persistent_data.damage import ADVISORY, FATAL, NON_FATAL, UNBOUNDED
from persistent_data.node_check import CHECKSUM_ERROR, IO_ERROR
from persistent_data.space_map_check import BAD_COUNT, LEAK, NONE_FREE_BEFORE, NR_ALLOCATED, NR_FREE
from thinpool.check import MAPPED_BLOCKS, MISSING_MAPPINGS, SHARED_DAMAGE, Observer, Options, check
from thinpool.needs_check import clear_needs_check
from thinpool.trees import MAPPING_TREE

from ._cli import EXIT_FAILURE, EXIT_OK, Command, Option, number, open_input, run, say, write_out
from ._progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bufio.device import Device
    from persistent_data.damage import Severity
    from thinpool.check import Counts, Finding
    from thinpool.layout import Superblock
    from thinpool.leak_repair import LeakRepair

    from ._cli import Arguments

_MOST_LINES = 50
"""Findings of one kind that are shown; the others are only counted."""
_TITLE = "Checking thin metadata"
_WRONG_TOTALS = (NR_FREE, NONE_FREE_BEFORE, NR_ALLOCATED)

COMMAND = Command(
    "thin_check",
    "Verify the metadata of a thin provisioning pool",
    (
        Option("-q, --quiet", "No output, only an exit status"),
        Option("-m, --metadata-snap", "Check the metadata snapshot; the pool may be in use"),
        Option("--super-block-only", "Check the superblock and nothing else"),
        Option("--skip-mappings", "Check the superblock and the two device trees only"),
        Option("--ignore-non-fatal-errors", "Succeed in spite of leaks and underfull nodes"),
        Option("--clear-needs-check-flag", "Repair leaks and clear the flag, if nothing else is wrong"),
        Option("--auto-repair", "The same; also correct free counts where nothing has leaked"),
        Option("--override-mapping-root", "Use another root of the mapping tree", value="BLOCKNR", convert=number),
        Option("--override-details-root", "Use another root of the details tree", value="BLOCKNR", convert=number),
        Option("--json", "One JSON object on each line of stdout instead of text"),
    ),
    conflicts=(
        ("--auto-repair", "--ignore-non-fatal-errors"),
        ("--auto-repair", "--metadata-snap"),
        ("--auto-repair", "--override-mapping-root"),
        ("--auto-repair", "--override-details-root"),
        ("--auto-repair", "--super-block-only"),
        ("--auto-repair", "--skip-mappings"),
        ("--clear-needs-check-flag", "--metadata-snap"),
        ("--clear-needs-check-flag", "--override-mapping-root"),
        ("--clear-needs-check-flag", "--override-details-root"),
        ("--json", "--quiet"),
    ),
    text="""
On stdout, as soon as the superblock is known to be sound:
  TRANSACTION_ID=<the pool's transaction id>
  METADATA_FREE_BLOCKS=<free metadata blocks>
What is wrong is on stderr, a line each: the rule, the metadata block, the thin device and the
thin blocks that are hit.  Lines that begin with 'advisory:' do not make the check fail.

The input is written to only by --clear-needs-check-flag and --auto-repair, and only if nothing is
wrong but what they put right.  A crash while they write leaves the pool as it was, or repaired.

Exit status: 0 if the metadata is sound, 64 if it is not or cannot be checked.

Example, after the metadata of an inactive pool has been swapped into the volume vg/meta:
  thin_check /dev/vg/meta
""",
)


class _Reporter(Observer):
    """Keeps what the findings come to, and shows nothing but a bar to those who wait."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self.tally: dict[Severity, int] = {ADVISORY: 0, NON_FATAL: 0, FATAL: 0}
        self.nr_other_non_fatal = 0
        """Findings that are not fatal, and no leaks either."""
        self.leaks: dict[str, int] = {}
        """Leaked blocks, by space map."""
        self.has_wrong_totals = False
        self.counts: Counts | None = None

    def stage(self, title: str) -> None:
        if self._progress is not None:
            self._progress.stage = title

    def progress(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    def counted(self, counts: Counts) -> None:
        self.counts = counts

    def finding(self, finding: Finding) -> None:
        """Take a finding."""
        self.tally[finding.severity] += 1
        if finding.rule == LEAK and finding.keys is not None:
            begin, end = finding.keys
            self.leaks[finding.tree] = self.leaks.get(finding.tree, 0) + end - begin
        elif finding.severity == NON_FATAL:
            self.nr_other_non_fatal += 1
        elif finding.rule in _WRONG_TOTALS:
            self.has_wrong_totals = True

    def checked(self, *, leaks_fail: bool) -> None:
        """Take note that there are no more findings, and whether leaks are what makes the check fail."""
        if self._progress is not None:
            self._progress.clear()

    def repairing(self) -> None:
        """Take note that the space maps are about to be corrected."""

    def end(self, status: int, repair: LeakRepair | None, *, cleared: bool) -> None:
        """Take note of all that was done."""


class _Text(_Reporter):
    """For people: findings on stderr, a line each."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self._lines: dict[str, int] = {}
        self._io_errors = 0
        self._checksum_errors = 0
        self._bad_nodes: set[int | None] = set()
        self._mappings_failed = False
        self._bad_maps: list[str] = []
        # Redrawn progress needs a terminal; lines are for logs.
        self._titles = sys.stderr is not None and not sys.stderr.isatty()
        if self._titles:
            say(_TITLE)

    def accepted(self, superblock: Superblock) -> None:
        write_out(f"TRANSACTION_ID={superblock.trans_id}\nMETADATA_FREE_BLOCKS={_nr_free(superblock)}\n")

    def stage(self, title: str) -> None:
        super().stage(title)
        if self._titles:
            say(title)

    def finding(self, finding: Finding) -> None:
        """Show a finding, or count it if there have been many like it."""
        super().finding(finding)
        shown = self._lines[finding.rule] = self._lines.get(finding.rule, 0) + 1
        if shown <= _MOST_LINES:
            if self._progress is not None:
                self._progress.clear()
            say(f"advisory: {finding.message}" if finding.severity == ADVISORY else finding.message)
        if finding.rule == BAD_COUNT:
            if finding.tree not in self._bad_maps:
                self._bad_maps.append(finding.tree)
        elif finding.severity == FATAL and finding.tree.endswith(MAPPING_TREE):
            self._mapping_error(finding)

    def _mapping_error(self, finding: Finding) -> None:
        self._mappings_failed = True
        if finding.rule in (MISSING_MAPPINGS, MAPPED_BLOCKS, SHARED_DAMAGE):
            return
        self._bad_nodes.add(finding.block)
        self._io_errors += finding.rule == IO_ERROR
        self._checksum_errors += finding.rule == CHECKSUM_ERROR

    def checked(self, *, leaks_fail: bool) -> None:
        """Show what the findings come to."""
        super().checked(leaks_fail=leaks_fail)
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
        for tree, count in self.leaks.items():
            say(f"{count} {tree.split()[0]} blocks have leaked.")
        if leaks_fail:
            for tree in self.leaks:
                say(f"{tree} contains leaks")
            say("perhaps you wanted to run with --auto-repair")

    def repairing(self) -> None:
        """Say what is to be repaired."""
        for tree in self.leaks:
            say(f"Repairing {tree.split()[0]} leaks.")
        if self.has_wrong_totals:
            say("Correcting free counts.")

    def end(self, status: int, repair: LeakRepair | None, *, cleared: bool) -> None:
        if cleared:
            say("Cleared needs_check flag")


class _Json(_Reporter):
    """For programs: an object on each line of stdout."""

    def accepted(self, superblock: Superblock) -> None:
        self._write(type="superblock", transaction_id=superblock.trans_id, metadata_free_blocks=_nr_free(superblock))

    def finding(self, finding: Finding) -> None:
        """Show a finding."""
        super().finding(finding)
        begin, end = finding.keys or (None, None)
        if end == UNBOUNDED:
            end = None
        is_thin = finding.device is not None and finding.tree.endswith(MAPPING_TREE)
        self._write(
            type="finding",
            severity=finding.severity,
            rule=finding.rule,
            tree=finding.tree,
            device=finding.device,
            **({"thin_begin": begin, "thin_end": end} if is_thin else {"key_begin": begin, "key_end": end}),
            block=finding.block,
            path=finding.path,
            expected=finding.expected,
            actual=finding.actual,
            message=finding.message,
        )

    def end(self, status: int, repair: LeakRepair | None, *, cleared: bool) -> None:
        self._write(
            type="summary",
            status=status,
            fatal=self.tally[FATAL],
            non_fatal=self.tally[NON_FATAL],
            advisory=self.tally[ADVISORY],
            repaired=repair is not None and repair.has_written,
            data_leaks_repaired=repair.data_leaks if repair is not None else 0,
            metadata_leaks_repaired=repair.metadata_leaks if repair is not None else 0,
            needs_check_cleared=cleared,
        )

    def _write(self, **fields: object) -> None:
        from json import dumps  # here, because it takes as long to load as a small pool to check

        if self._progress is not None:
            self._progress.clear()
        write_out(dumps(fields) + "\n")


def _nr_free(superblock: Superblock) -> int:
    root = superblock.metadata_root
    return max(root.nr_blocks - root.nr_allocated, 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run thin_check with *argv*, ``sys.argv`` if None; return its exit status."""
    return run(COMMAND, argv, _run)


def _run(arguments: Arguments) -> int:
    metadata_snap = arguments.has("--metadata-snap")
    options = Options(
        super_block_only=arguments.has("--super-block-only"),
        skip_mappings=arguments.has("--skip-mappings"),
        metadata_snap=metadata_snap,
        mapping_root=arguments.number("--override-mapping-root"),
        details_root=arguments.number("--override-details-root"),
    )
    writes = arguments.has("--clear-needs-check-flag") or arguments.has("--auto-repair")
    with (
        open_input(arguments.input, exclusive=not metadata_snap, read_only=not writes) as device,
        Progress(_TITLE) as progress,
    ):
        if arguments.has("--quiet"):
            reporter = _Reporter()
        else:
            reporter = _Json(progress) if arguments.has("--json") else _Text(progress)
        return _check(device, options, arguments, reporter)


def _check(device: Device, options: Options, arguments: Arguments, reporter: _Reporter) -> int:
    auto_repair = arguments.has("--auto-repair")
    writes = auto_repair or arguments.has("--clear-needs-check-flag")
    tolerant = arguments.has("--ignore-non-fatal-errors")
    for finding in check(device, options, reporter):
        reporter.finding(finding)
    is_hopeless = bool(reporter.tally[FATAL] or (reporter.nr_other_non_fatal and not tolerant))
    leaks_fail = bool(reporter.leaks) and not writes and not tolerant
    reporter.checked(leaks_fail=leaks_fail)
    repair, cleared = None, False
    status = EXIT_FAILURE if is_hopeless or leaks_fail else EXIT_OK
    if status == EXIT_OK and writes:
        if reporter.leaks or (auto_repair and reporter.has_wrong_totals):
            from thinpool.leak_repair import repair_leaks  # here, because it is seldom needed

            reporter.repairing()
            repair = repair_leaks(device, reporter.counts)
        cleared = clear_needs_check(device)
    reporter.end(status, repair, cleared=cleared)
    return status


if __name__ == "__main__":
    sys.exit(main())
