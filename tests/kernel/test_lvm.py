"""LVM with our programs in the place of the reference's: whatever it does to a thin pool, it goes on as before.

One kernel is booted, in which one pool lives through everything; each test looks at a part of what came of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.support.lvm import is_ours, run_lvm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.lvm import Step

pytestmark = [pytest.mark.kernel, pytest.mark.lvm, pytest.mark.peer]

OPTIONS = ["-q", "--clear-needs-check-flag"]
POOL_METADATA = "/dev/mapper/vg-pool_tmeta"

# What repair makes of the devices that were hit is not for LVM to say: only the other one is used afterwards.
# LVM checks a pool that is deactivated after its volumes, and none in a group that is deactivated as a whole.
SCRIPT = r"""
metadata=/dev/mapper/metadata
with_metadata() {
    dmsetup create metadata --table "$table" || return
    "$@"
    local status=$?
    dmsetup remove metadata && return $status
}
change() {
    "$PYTHON" -c "
from thinpool.metadata import PoolMetadata
with PoolMetadata.open('$metadata') as pool:
    $1"
}
dumps() {
    "$PEER_DUMP" --dev-id "$1" $metadata >/run/dump 2>&1
}
# From byte 40960 on, where LVM's own tests do it, the first byte of a node that device 2 needs and device 1 does not.
damage() {
    local at
    for ((at = 40960; at < 4096 * 1024; at += 4096)); do
        dd if=$metadata of=/run/byte bs=1 skip=$at count=1 status=none
        dd if=/dev/zero of=$metadata bs=1 seek=$at count=1 conv=fsync status=none
        if ! dumps 2 && dumps 1; then
            echo "damaged at $at"
            return
        fi
        dd if=/run/byte of=$metadata bs=1 seek=$at conv=fsync status=none
    done
    return 1
}
write() {
    write_random "/dev/vg/$1" 1 1200 "${@:2}"
}
deactivate_volumes() {
    lvchange -an vg/other vg/thin vg/snap
}

load_modules dm-snapshot  # LVM looks for it before any snapshot, be it a thin one
step version "$BIN/thin_check" -V

step create_group vgcreate vg "$META" "$DATA"
step create_pool lvcreate -y -L 192m --poolmetadatasize 4m -c 64k -Zn -T vg/pool
step create_other lvcreate -y -V 1g -T vg/pool -n other
step write_other write other
step create_thin lvcreate -y -V 1g -T vg/pool -n thin
step write write thin
step create_snapshot lvcreate -y -k n -s vg/thin -n snap
table=$(dmsetup table vg-pool_tmeta)
step deactivate_volumes deactivate_volumes
step deactivate lvchange -an vg/pool
step activate vgchange -ay vg
step read write thin --verify
step read_snapshot write snap --verify

vgchange -an vg >/dev/null
step mark with_metadata change 'pool.set_needs_check()'
step activate_marked vgchange -ay vg --config 'global/thin_check_options=["-q"]'
step status_marked dmsetup status vg-pool-tpool
vgchange -an vg >/dev/null
step activate_cleared vgchange -ay vg
step status_cleared dmsetup status vg-pool-tpool

vgchange -an vg >/dev/null
step activate_empty_option vgchange -ay vg --config 'global/thin_check_options=["-q", "", "--clear-needs-check-flag"]'
vgchange -an vg >/dev/null
step empty_option with_metadata "$BIN/thin_check" -q '' $metadata
step activate_unknown_option vgchange -ay vg --config 'global/thin_check_options=["--no-such-option"]'
step devices_unknown_option dmsetup ls
step activate_again vgchange -ay vg

deactivate_volumes >/dev/null
step damage with_metadata damage
step deactivate_damaged lvchange -an vg/pool
step digest with_metadata sha256sum $metadata
step check_damaged with_metadata "$BIN/thin_check" $metadata
step dump_damaged with_metadata "$BIN/thin_dump" $metadata
step activate_damaged vgchange -ay vg
step devices_damaged dmsetup ls
step digest_after with_metadata sha256sum $metadata

step repair lvconvert -y --repair vg/pool
step activate_repaired lvchange -ay vg/pool
lvchange -ay vg/other
step status_repaired dmsetup status vg-pool-tpool
step read_other write other --verify
step write_repaired write_random /dev/vg/other 2 100
table=$(dmsetup table vg-pool_tmeta)
step deactivate_other lvchange -an vg/other
step deactivate_repaired lvchange -an vg/pool
step dump_repaired with_metadata "$BIN/thin_dump" $metadata

step renumber with_metadata change 'pool.set_transaction_id(3, 77)'
step repair_renumbered lvconvert -y --repair vg/pool
"""

FAILING = {"activate_unknown_option", "check_damaged", "dump_damaged", "activate_damaged"}


@pytest.fixture(scope="module")
def steps() -> Mapping[str, Step]:
    return run_lvm(SCRIPT, disk_bytes=512 << 20)


def checked(step: Step) -> bool:
    """Whether LVM had the metadata checked, once and with success."""
    return [(call.arguments, call.status) for call in step.calls] == [([*OPTIONS, POOL_METADATA], 0)]


def test_the_checks_and_dumps_are_ours() -> None:
    assert is_ours("thin_check")
    assert is_ours("thin_dump")


def test_everything_that_should_succeed_does(steps: Mapping[str, Step]) -> None:
    assert list(steps) == re.findall(r"^step (\w+)", SCRIPT, re.MULTILINE)
    failed = {name: step for name, step in steps.items() if step.status != 0}
    assert failed.keys() == FAILING


def test_no_check_ends_as_if_the_program_were_missing(steps: Mapping[str, Step]) -> None:
    """LVM takes status 2 for that, and activates the pool without a check."""
    calls = [call for step in steps.values() for call in step.calls_of("thin_check")]
    assert {call.status for call in calls} == {0, 64}
    assert not [step for step in steps.values() if "Check is skipped" in step.output]


def test_the_version_is_three_numbers_at_the_start_of_the_output(steps: Mapping[str, Step]) -> None:
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", steps["version"].output)
    assert version is not None
    assert tuple(map(int, version.groups())) > (0, 7, 0), "LVM uses no option that later versions brought"


def test_a_pool_is_checked_when_it_is_activated_and_when_it_is_deactivated(steps: Mapping[str, Step]) -> None:
    assert checked(steps["deactivate"])
    assert checked(steps["activate"])


def test_a_quiet_check_says_nothing(steps: Mapping[str, Step]) -> None:
    assert steps["deactivate"].output == ""
    quiet = [call for step in steps.values() for call in step.calls_of("thin_check") if "-q" in call.arguments]
    assert {call.stderr for call in quiet} == {""}


def test_activation_clears_needs_check(steps: Mapping[str, Step]) -> None:
    marked, cleared = steps["status_marked"].output.split(), steps["status_cleared"].output.split()
    assert "needs_check" in marked
    assert "ro" in marked, "what the kernel makes of it"
    assert "needs_check" not in cleared
    assert "rw" in cleared
    assert checked(steps["activate_cleared"])


def test_a_check_without_the_option_lets_needs_check_stand(steps: Mapping[str, Step]) -> None:
    assert [(call.arguments, call.status) for call in steps["activate_marked"].calls] == [(["-q", POOL_METADATA], 0)]


def test_an_empty_option_is_nothing(steps: Mapping[str, Step]) -> None:
    """Some releases of LVM hand it on, others leave it out."""
    (call,) = steps["activate_empty_option"].calls
    assert [argument for argument in call.arguments if argument] == [*OPTIONS, POOL_METADATA]
    (call,) = steps["empty_option"].calls
    assert call.arguments == ["-q", "", "/dev/mapper/metadata"]


def test_an_option_that_does_not_exist_keeps_the_pool_down(steps: Mapping[str, Step]) -> None:
    step = steps["activate_unknown_option"]
    assert step.status != 0
    assert "Check of pool vg/pool failed (status:64). Manual repair required!" in step.output
    assert "tpool" not in steps["devices_unknown_option"].output


def test_damage_is_reported_when_the_pool_is_deactivated(steps: Mapping[str, Step]) -> None:
    assert "Integrity check of metadata for pool vg/pool failed." in steps["deactivate_damaged"].output


def test_a_damaged_pool_is_not_activated(steps: Mapping[str, Step]) -> None:
    step = steps["activate_damaged"]
    assert step.status != 0
    assert "Check of pool vg/pool failed (status:64). Manual repair required!" in step.output
    assert "tpool" not in steps["devices_damaged"].output
    assert steps["digest"].output == steps["digest_after"].output, "the checks have changed it"


def test_check_and_dump_name_the_damaged_block(steps: Mapping[str, Step]) -> None:
    block = int(steps["damage"].output.split()[-1]) // 4096
    for name in ("check_damaged", "dump_damaged"):
        assert steps[name].status == 64
        assert f"checksum error: block {block} " in steps[name].output
        assert "thin device 2" in steps[name].output


def test_lvm_reads_the_transaction_id_from_our_dump_of_the_repaired_metadata(steps: Mapping[str, Step]) -> None:
    assert "Transaction id" not in steps["repair"].output
    assert (
        'Transaction id 3 from pool "vg/pool" does not match repaired transaction id 77'
        in steps["repair_renumbered"].output
    )


def test_a_dump_of_which_lvm_reads_only_the_first_line_is_no_message(steps: Mapping[str, Step]) -> None:
    assert len(steps["dump_repaired"].output) > 65536, "a pipe holds it all"
    for name in ("repair", "repair_renumbered"):
        repair, dump = steps[name].calls
        assert (repair.program, repair.status) == ("thin_repair", 0)
        assert (dump.program, dump.stderr) == ("thin_dump", "")


def test_a_repaired_pool_passes_our_check_and_works(steps: Mapping[str, Step]) -> None:
    assert checked(steps["activate_repaired"])
    assert "rw" in steps["status_repaired"].output.split()
    assert checked(steps["deactivate_repaired"])
