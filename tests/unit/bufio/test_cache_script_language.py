"""The language of the cache scripts: what it refuses, what it finds, and that it says where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bufio import Bcache, Client, MemoryDevice
from bufio.core import BUFFER_OVERHEAD_BYTES
from bufio.testing import FaultyDevice
from tests.support.bcache_script import BcacheMachine
from tests.support.cache_disks import CrashDisk, Disk
from tests.support.cache_model import pattern
from tests.support.cache_script import Machine, ScriptError, ScriptFailure, instruction, parse
from tests.support.client_script import ClientMachine

if TYPE_CHECKING:
    from bufio import Device
    from bufio.bcache import Block
    from bufio.device import ReadableBuffer

SIZE = 512
NR_BLOCKS = 32
NR_BUFFERS = 8
IMAGE = pattern("language", NR_BLOCKS * SIZE)


def run(text: str, client_class: type[Client] = Client, disk: Disk | None = None, device: Device | None = None) -> None:
    """Run the lines of one script, the first of which is line 3, on a client of a device in memory."""
    disk = Disk(IMAGE) if disk is None else disk
    (script,) = parse(f"[test]\n# A rule.\n{text}", ClientMachine, "test.txt")
    cache_bytes = NR_BUFFERS * (SIZE + BUFFER_OVERHEAD_BYTES)
    client = client_class(disk.device if device is None else device, SIZE, cache_bytes=cache_bytes)
    ClientMachine(client, disk, NR_BUFFERS).run(script)


class Misreading(Bcache):
    """A cache that writes ranges of bytes one byte too far."""

    def write_bytes(self, device: Device, offset: int, data: ReadableBuffer) -> None:
        super().write_bytes(device, offset + 1, data)

    def zero_bytes(self, device: Device, offset: int, length: int) -> None:
        super().zero_bytes(device, offset + 1, length)


class Silent(Bcache):
    """A cache that does not say what it skips."""

    def flush(self) -> list[Block]:
        super().flush()
        return []


def run_bcache(text: str, bcache_class: type[Bcache] = Bcache) -> None:
    """Run the lines of one script, the first of which is line 3, on a cache of two devices in memory."""
    disks = {"a": Disk(IMAGE), "b": Disk(pattern("other", NR_BLOCKS * SIZE))}
    (script,) = parse(f"[test]\n# A rule.\n{text}", BcacheMachine, "test.txt")
    bcache = bcache_class(SIZE // 512, NR_BUFFERS)
    BcacheMachine(bcache, SIZE, {name: (disk, disk.device) for name, disk in disks.items()}).run(script)


# A machine of its own shows the language without a cache


class Recorder(Machine):
    """Writes down what it is told."""

    VARIABLES = ("ten",)
    ERRORS = {"value": lambda error: isinstance(error, ValueError)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__({"ten": 10})
        self.log: list[object] = []

    @instruction("say <number>")
    def say(self, number: int) -> None:
        self.log.append(number)

    @instruction("pair <first> .. <last> [as <name:word> [of <owner>]] [loudly]")
    def pair(self, first: int, last: int, name: str | None, owner: int | None, loudly: bool) -> None:
        self.log.append((first, last, name, owner, loudly))

    @instruction("fail with <number>")
    def fail(self, number: int) -> None:
        raise ValueError(f"failed with {number}")

    @instruction("type")
    def type(self) -> None:
        raise TypeError("as told")


def record(text: str) -> list[object]:
    recorder = Recorder()
    for script in parse(f"[test]\n# A rule.\n{text}", Recorder, "test.txt"):
        recorder.run(script)
    return recorder.log


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3", 3),
        ("ten", 10),
        ("ten + 1", 11),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("7 // 2", 3),
        ("ten % 4", 2),
        ("3 - 5", -2),
        ("-ten", -10),
    ],
)
def test_expression_has_its_value(expression: str, value: int) -> None:
    assert record(f"say {expression}") == [value]


@pytest.mark.parametrize("expression", ["3 +", "x", "1.5", "'a'", "2 ** 3", "f(3)", "1 if 2 else 3", "(1, 2)", "True"])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(ScriptError, match=r"^test\.txt:3: say "):
        record(f"say {expression}")


def test_division_by_zero_is_the_scripts_fault() -> None:
    with pytest.raises(ScriptError, match=r"^test\.txt:3: \[test\]: say 1 // \(ten - 10\): a division by zero"):
        record("say 1 // (ten - 10)")


def test_parts_of_a_form_may_be_missing() -> None:
    assert record("pair 1 .. 2") == [(1, 2, None, None, False)]
    assert record("pair 1 .. 2 as x") == [(1, 2, "x", None, False)]
    assert record("pair 1 .. ten + 2 as x of 4 + 4") == [(1, 12, "x", 8, False)]
    assert record("pair 1 .. 2 loudly") == [(1, 2, None, None, True)]


def test_comments_and_indentation_mean_nothing() -> None:
    assert record("\n   say   1 # one\n# say 2\n\n\tsay 3\n") == [1, 3]


def test_loops_nest_and_their_variables_can_be_used() -> None:
    text = "for a in 0 .. 2\nfor b in a .. 3\nsay a * 10 + b\nend\nend\nfor a in 3 .. 0 step 0 - 1\nsay a\nend"
    assert record(text) == [0, 1, 2, 11, 12, 3, 2, 1]


def test_empty_loop_does_nothing() -> None:
    assert record("for a in 3 .. 3\nsay a\nend\nfor a in 5 .. 1\nsay a\nend") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shout 3", r"^test\.txt:3: shout 3: there is no instruction shout"),
        ("say", r"^test\.txt:3: say: expected: say <number>"),
        ("say 1\nsay 2 as x", r"^test\.txt:4: say 2 as x: "),
        ("say 1\nfor a in 0 .. 3\nsay a", r"^test\.txt:4: for a in 0 \.\. 3: a loop without end"),
        ("for a in 0 .. 3\nfor b in 0 .. 3\nsay c\nend\nend", r"^test\.txt:5: say c: there is no variable c"),
        ("for a in 0 .. 3\nfor a in 0 .. 3\nend\nend", r"^test\.txt:4: .*: there is a variable a already"),
        ("for ten in 0 .. 3\nend", r"^test\.txt:3: .*: there is a variable ten already"),
        ("for a in 0 .. 3\nend\nsay a", r"^test\.txt:5: say a: there is no variable a"),
        ("for a from 0 to 3\nend", r"^test\.txt:3: .*: expected: for VARIABLE"),
        ("end", r"^test\.txt:3: end: end without a loop"),
        ("error 3", r"^test\.txt:3: error 3: expected: error KIND"),
        ("error strange: say 3", r"^test\.txt:3: .*: there is no kind of error strange: value"),
        ("error value: shout 3", r"^test\.txt:3: .*: there is no instruction shout"),
        ("[test]\n# Again.", r"^test\.txt:3: \[test\]: there is a script of that name already"),
        ("[Other one]\n# Other.", r"^test\.txt:3: \[Other one\]: a name has small letters"),
        ("[other]\nsay 3", r"^test\.txt:3: \[other\]: a comment must say which rule it shows"),
    ],
)
def test_line_that_cannot_be_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        record(text)


def test_instruction_before_the_first_script_is_refused() -> None:
    with pytest.raises(ScriptError, match=r"^test\.txt:1: say 3: "):
        parse("say 3\n[test]\n# A rule.\n", Recorder, "test.txt")


def test_step_of_zero_is_refused() -> None:
    with pytest.raises(ScriptError, match=r"^test\.txt:3: \[test\]: .*the step is zero"):
        record("for a in 0 .. 3 step ten - 10\nsay a\nend")


def test_file_has_several_scripts_with_their_rules() -> None:
    text = "# A file.\n[first]\n# One rule,\n# on two lines.\nsay 1\n# no rule\n[second]\n# Another.\nfail with 2\n"
    first, second = parse(text, Recorder)
    assert (first.name, first.rule) == ("first", "One rule, on two lines.")
    assert (second.name, second.rule) == ("second", "Another.")
    assert first.uses("say", "pair")
    assert not second.uses("say")


def test_instruction_within_loops_is_found() -> None:
    (script,) = parse("[test]\n# A rule.\nfor a in 0 .. 2\nfor b in 0 .. 2\nsay a\nend\nend\n", Recorder)
    assert script.uses("say")
    assert not script.uses("fail")


def test_script_says_how_much_room_it_needs() -> None:
    large, small = parse("[large]\n# A rule.\nneeds 6\nsay 1\n[small]\n# A rule.\nsay 1", Recorder)
    assert (large.needs, small.needs) == (6, 0)
    with pytest.raises(ScriptError, match=r"^test\.txt:4: needs 6: there is no instruction needs"):
        record("say 1\nneeds 6")


def test_expected_error_is_no_failure() -> None:
    assert record("error value: fail with 3\nerror value naming 3: fail with 3\nsay 1") == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "say 1\nfail with 3",
            r"^test\.txt:4: \[test\]: fail with 3: raised ValueError: failed with 3 \(with ten = 10\)",
        ),
        ("error value: say 3", r"^test\.txt:3: .*no value error was raised"),
        ("error value: type", r"^test\.txt:3: .*raised TypeError: as told"),
        ("error value naming 4: fail with 3", r"^test\.txt:3: .*does not name \[4\]: failed with 3"),
        ("error value naming 3, 1: fail with 13", r"^test\.txt:3: .*does not name \[3, 1\]"),
        ("for a in 5 .. 7\nfail with a\nend", r"^test\.txt:4: .*failed with 5 \(with ten = 10, a = 5\)"),
    ],
)
def test_failure_names_the_line_and_the_variables(text: str, message: str) -> None:
    with pytest.raises(ScriptFailure, match=message):
        record(text)


# What the client machine finds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fill 3 as first\ncheck 3 holds initial", r"^test\.txt:4: .*block 3: its buffer has first where initial"),
        ("fill 3 as first\nfill 4 as second\ncheck 3 holds second", r"^test\.txt:5: .*first where second is expected"),
        ("check 3 holds initial of 4", r"^test\.txt:3: .*block 3: its buffer has initial where"),
        ("fill 3 as first\nverify_device 3", r"^test\.txt:4: .*the device has initial where first is expected"),
        ("fill 3\nwrite\nverify_device 3 holds initial", r"^test\.txt:5: .*the device has "),
        ("read 3\nexpect held = 2\nput 3", r"^test\.txt:4: .*held is 1, not = 2"),
        ("check 3\nexpect cached >= 2", r"^test\.txt:4: .*cached is 1, not >= 2"),
        ("check 3\nexpect reads = 1, misses <= 0", r"^test\.txt:4: .*misses is 1, not <= 0"),
        ("check 3\nrecount\ncheck 3\nexpect hits = 2", r"^test\.txt:6: .*hits is 1, not = 2"),
        ("get 3", r"^test\.txt:3: .*it is not cached"),
        ("check 3\nget 3 absent", r"^test\.txt:4: .*it is cached"),
        ("error hold: check 3", r"^test\.txt:3: .*no hold error was raised"),
        ("read 3\nput 3\nput 3", r"^test\.txt:5: .*raised HoldError"),
        ("read blocks", r"^test\.txt:3: .*raised OSError"),
        ("error value: read blocks", r"^test\.txt:3: .*raised OSError"),
        ("fill 3\nbreak_writes 3\nwrite", r"^test\.txt:5: .*failed as told"),
        ("break_reads 3\ncheck 3", r"^test\.txt:4: .*failed as told"),
    ],
)
def test_script_that_must_fail_fails(text: str, message: str) -> None:
    disk = Disk(IMAGE)
    with pytest.raises(ScriptFailure, match=message):
        run(text, disk=disk, device=disk.faulty)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stamp 3", "block 3 is not held"),
        ("put 3", "block 3 was never held"),
        ("read 3\nstamp 3\nput 3", "released with changes that are not marked dirty"),
        ("read 3\nstamp 3\ndirty 3\nstamp 3 bytes 0 .. 5\nwrite", "written while it has changes that are not marked"),
        ("read 3\nread 3\nstamp 3\nmove 3 to 5", "moved with changes that are not marked dirty"),
        ("new 3\nverify 3", "the content of the block is not known"),
        ("new 3\ndirty 3", "the content of the block is not known"),
        ("new 3\nstamp 3 bytes 0 .. 5", "the content of the block is not known"),
        ("read 3\nstamp 3 bytes 5 .. 5", "no range of bytes"),
        ("read 3\nstamp 3 bytes 5 .. size + 1", "no range of bytes"),
        ("check 3 holds first", "there is no stamp first"),
        ("expect speed = 3", "there is no statistic speed"),
        ("expect held > 3", "is no condition"),
        ("read 3", r"^test\.txt: \[test\]: at its end: blocks \[3\] are still held"),
    ],
)
def test_script_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        run(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fill a 3 as first\ncheck a 3 holds initial", r"^test\.txt:4: .*block 3: its buffer has first where initial"),
        ("fill a 3 as first\nfill b 3 as first\nverify_device a 3", r"^test\.txt:5: .*the device has initial where"),
        ("check a 3\ncheck b 3\nexpect read_misses = 1", r"^test\.txt:5: .*read_misses is 2, not = 1"),
        ("check a 3\nexpect dirty >= 1", r"^test\.txt:4: .*dirty is 0, not >= 1"),
        ("error hold: check a 3", r"^test\.txt:3: .*no hold error was raised"),
        ("get a 3\nget a 3 dirty", r"^test\.txt:4: .*raised HoldError"),
        ("get a 3 zero\nflush skipping 0\nput a 3", r"^test\.txt:4: .*1 blocks were skipped, not 0"),
        ("get a 3\ninvalidate a 3\nput a 3", r"^test\.txt:4: .*it returned False"),
        ("check a 3\ninvalidate_device a refused", r"^test\.txt:4: .*it returned True"),
        ("put a 3", r"^test\.txt:3: .*was never held"),
        ("check c 3", r"^test\.txt:3: .*there is no device c: a, b"),
        ("get a 3\nstamp a 3\nput a 3", r"^test\.txt:4: .*not held for writing"),
        ("verify a 3", r"^test\.txt:3: .*is not held"),
        ("get b 3", r"at its end: blocks \[3\] of b are still held"),
    ],
)
def test_bcache_script_that_must_fail_fails(text: str, message: str) -> None:
    with pytest.raises((ScriptFailure, ScriptError), match=message):
        run_bcache(text)


def test_bytes_that_bcache_gets_wrong_are_found() -> None:
    with pytest.raises(ScriptFailure, match=r"^test\.txt:4: .*bytes \[1500\.\.2000\] are not what they have to be"):
        run_bcache("write_bytes a 1500 .. 1600\nread_bytes a 1500 .. 2000", Misreading)
    with pytest.raises(ScriptFailure, match=r"^test\.txt:4: .*block 3: its buffer has"):
        run_bcache("zero_bytes a 1500 .. 1600\ncheck a 3", Misreading)


def test_bcache_that_skips_without_saying_so_is_found() -> None:
    with pytest.raises(ScriptFailure, match=r"^test\.txt:5: .*blocks \[\] are said to be skipped"):
        run_bcache("fill a 4\nget a 3 zero\nflush\nput a 3", Silent)


def test_change_marked_in_pieces_is_marked() -> None:
    run("read 3\nstamp 3 bytes 10 .. 50\ndirty 3 bytes 5 .. 20\ndirty 3 bytes 30 .. 60\ndirty 3 bytes 20 .. 30\nput 3")
    with pytest.raises(ScriptError, match="not marked dirty"):
        run("read 3\nstamp 3 bytes 10 .. 50\ndirty 3 bytes 5 .. 20\ndirty 3 bytes 30 .. 60\nput 3")


def test_machine_gives_everything_back_after_a_failure() -> None:
    disk = Disk(IMAGE)
    with pytest.raises(ScriptFailure):
        run("fill 2\nread 3\nread 3\nget 4", disk=disk)
    assert disk.look(0, len(IMAGE)) == IMAGE


# Devices that lie, caches that are wrong


def test_lost_write_is_found() -> None:
    disk = Disk(IMAGE)
    disk.faulty.on("write", blocks=[6], block_size=SIZE).lose()
    text = "fill 3\nfill 6\nwrite\nverify_device 3\nverify_device 6"
    with pytest.raises(ScriptFailure, match=r"^test\.txt:7: .*block 6: the device has initial"):
        run(text, disk=disk, device=disk.faulty)


def test_lost_write_is_found_at_the_end_without_being_asked_for() -> None:
    disk = Disk(IMAGE)
    disk.faulty.on("write").lose()
    with pytest.raises(ScriptFailure, match=r"^test\.txt: \[test\]: at its end: block 3: the device has initial"):
        run("fill 3 as first", disk=disk, device=disk.faulty)


def test_write_to_a_wrong_place_is_found_at_the_end() -> None:
    disk = Disk(IMAGE)
    disk.device.pwrite(bytes(1), 17 * SIZE)
    with pytest.raises(ScriptFailure, match=r"at its end: bytes \[2048\.\.16384\] of the device have changed"):
        run("fill 3", disk=disk)


def test_wrong_bit_is_found_by_any_read() -> None:
    disk = Disk(IMAGE)
    disk.faulty.on("read").flip_bit(100)
    with pytest.raises(ScriptFailure, match=r"^test\.txt:3: .*block 3: its buffer has .* from byte 12 on"):
        run("read 3\nput 3", disk=disk, device=disk.faulty)


def test_write_without_a_flush_is_found_where_the_device_can_tell() -> None:
    disk = CrashDisk(IMAGE)
    forgetful = FaultyDevice(disk.device)
    forgetful.on("flush").lose()
    with pytest.raises(ScriptFailure, match=r"^test\.txt:4: .*what was written was not flushed"):
        run("fill 3\nwrite", disk=disk, device=forgetful)


class Writing(Client):
    """A client whose reset writes what it drops."""

    def reset(self) -> None:
        self.write_dirty_buffers()
        super().reset()


class Moving(Client):
    """A client that reads whatever block is asked for from one place further on."""

    def read(self, block: int):  # type: ignore[no-untyped-def]  # as that of Client
        return super().read(block + 1)


class Remembering(Client):
    """A client that forgets nothing."""

    def forget(self, block: int) -> None:
        pass


@pytest.mark.parametrize(
    ("client_class", "text", "message"),
    [
        (Writing, "fill 3 as first\nreset\ncheck 3 holds initial", "its buffer has first where initial is expected"),
        (Moving, "read 3", "this is the buffer of block 4"),
        (Remembering, "fill 3 as first\nforget 3\ncheck 3 holds initial", "its buffer has first where initial"),
        (Remembering, "check 3\nforget 3\nget 3 absent", "it is cached"),
    ],
)
def test_wrong_cache_is_found(client_class: type[Client], text: str, message: str) -> None:
    with pytest.raises(ScriptFailure, match=message):
        run(text, client_class)


def test_what_the_cache_may_do_is_no_failure() -> None:
    """Dirty blocks may be written early: a reset loses what was not written, and the script need not know what."""
    walk = "for i in 0 .. 2\nfor b in 0 .. blocks\nfill b\nend\nend\nreset\nfor b in 0 .. blocks\ncheck b\nend"
    run(walk)
    with pytest.raises(ScriptFailure, match="where initial is expected"):
        run(walk.replace("check b", "check b holds initial"))


def test_devices_are_what_they_were_after_being_put_back() -> None:
    disk = Disk(IMAGE)
    run("fill 3", disk=disk)
    assert disk.look(0, len(IMAGE)) != IMAGE
    disk.put_back()
    assert disk.look(0, len(IMAGE)) == IMAGE
    assert isinstance(disk.device, MemoryDevice)
