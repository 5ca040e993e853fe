"""LVM in the guest kernel, with programs of our choice for what it does to the metadata of thin pools.

A script (bash) is made of steps: ``step NAME COMMAND...`` runs a command and keeps its exit status and what it said,
and each call of a metadata program that came of it: arguments, exit status, messages.  :func:`run_lvm` hands all of it
back, to be looked at when the guest is gone.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.kernel import make_sparse, run_kernel
from tests.support.oracles import find_program, give_up
from tests.support.tools import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

PROGRAMS = ("thin_check", "thin_dump", "thin_repair")

_CONFIGURATION = """\
devices {
    scan = ["/dev"]
    use_devicesfile = 0
    external_device_info_source = "none"
    obtain_device_list_from_udev = 0
}
activation {
    udev_sync = 0
    udev_rules = 0
    monitoring = 0
}
backup {
    backup = 0
    archive = 0
}
global {
    use_lvmpolld = 0
    event_activation = 0
    thin_check_options = ["-q", "--clear-needs-check-flag"]
"""

# A call is a directory, numbered, in that of the running step.  The program is told nothing of it: what LVM hands down,
# standard output first of all, is handed on.
_WRAPPER = """\
#!/bin/bash
shopt -s nullglob
calls=("$STEP"/*/)
call=$STEP/$((${#calls[@]} + 1)).%(name)s
mkdir "$call"
printf '%%s\\0' "$@" >"$call/arguments"
%(command)s "$@" 2>"$call/stderr"
status=$?
cat "$call/stderr" >&2
echo $status >"$call/status"
exit $status
"""

_PRELUDE = """\
shopt -s nullglob
export LVM_SYSTEM_DIR=$OUT/etc LVM_SUPPRESS_FD_WARNINGS=1 PYTHONPATH=%(root)s
BIN=$OUT/bin
PYTHON=%(python)s
PEER_DUMP=%(peer_dump)s
mkdir -p /run/lock/lvm "$OUT/steps"

step() {
    export STEP=$OUT/steps/$1
    shift
    mkdir "$STEP"
    "$@" >"$STEP/output" 2>&1
    echo $? >"$STEP/status"
}
"""


class Call(NamedTuple):
    """A metadata program that was run, by LVM or by the step itself."""

    program: str
    arguments: list[str]
    status: int
    stderr: str


class Step(NamedTuple):
    """What came of a command; ``output`` has both streams."""

    status: int
    output: str
    calls: list[Call]

    def calls_of(self, program: str) -> list[Call]:
        """The calls of one program, in order."""
        return [call for call in self.calls if call.program == program]


def is_ours(program: str) -> bool:
    """Whether we have a program of that name; the reference's takes the place of one that we have not."""
    return (ROOT / "tools" / f"{program}.py").exists()


def _peer(program: str) -> str:
    found = find_program(program, os.environ.get("THINPOOL_PEER_DIR"))
    if found is None:
        give_up(f"{program} is not installed")
    return found


def run_lvm(script: str, *, disk_bytes: int) -> Mapping[str, Step]:
    """Run *script* in a kernel with two empty disks, ``$META`` and ``$DATA``, and return its steps by name, in order.

    ``$BIN`` has the metadata programs that LVM is set to use (:func:`is_ours`), ``$PEER_DUMP`` is the
    reference's thin_dump.  ``$PYTHON`` can import this checkout.
    """
    with tempfile.TemporaryDirectory(prefix="lvm.") as name:
        directory = Path(name)
        out = directory / "out"
        (out / "bin").mkdir(parents=True)
        (out / "etc").mkdir()
        configuration = _CONFIGURATION
        for program in PROGRAMS:
            words = [sys.executable, "-m", f"tools.{program}"] if is_ours(program) else [_peer(program)]
            _install(out / "bin" / program, program, words)
            configuration += f'    {program}_executable = "/run/out/bin/{program}"\n'
        (out / "etc" / "lvm.conf").write_text(configuration + "}\n")
        prelude = _PRELUDE % {
            "root": shlex.quote(str(ROOT)),
            "python": shlex.quote(sys.executable),
            "peer_dump": shlex.quote(_peer("thin_dump")),
        }
        run_kernel(
            prelude + script,
            meta=make_sparse(directory / "a", disk_bytes),
            data=make_sparse(directory / "b", disk_bytes),
            out=out,
        )
        steps = sorted((out / "steps").iterdir(), key=lambda step: (step / "status").stat().st_mtime_ns)
        return {step.name: _read_step(step) for step in steps}


def _install(path: Path, program: str, words: list[str]) -> None:
    path.write_text(_WRAPPER % {"name": program, "command": shlex.join(words)})
    path.chmod(0o755)


def _read_step(directory: Path) -> Step:
    calls = sorted((path for path in directory.iterdir() if path.is_dir()), key=lambda path: int(path.stem))
    return Step(
        int((directory / "status").read_text()),
        (directory / "output").read_text(),
        [
            Call(
                path.suffix[1:],
                (path / "arguments").read_text().split("\0")[:-1],
                int((path / "status").read_text()),
                (path / "stderr").read_text(),
            )
            for path in calls
        ],
    )
