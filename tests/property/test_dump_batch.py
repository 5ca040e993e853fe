"""The dump by arrays against the dump leaf by leaf: the same bytes, and at damage the same error after them."""

from __future__ import annotations

import io
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bufio import MemoryDevice
from tests.support.devices import FaultyMemory
from tests.support.fixtures import DAMAGED, GOOD, facts_of, image, read_xml
from tests.support.mapping_pools import MAX_DATA_BLOCK, made_pool
from tests.support.surgeon import Surgeon
from thinpool import dump as dumping
from thinpool import dump_batch, leaf_arrays, text_format
from thinpool.dump import Options, dump
from thinpool.human_format import HumanWriter
from thinpool.json_format import JsonWriter
from thinpool.leaf_arrays import LeafArrays
from thinpool.leaf_lists import Leaves
from thinpool.pool_reader import PoolReader
from thinpool.xml_format import XmlWriter

if TYPE_CHECKING:
    from bufio.device import ReadableBuffer

Writer = type[XmlWriter] | type[HumanWriter] | type[JsonWriter]
WRITERS: list[Writer] = [XmlWriter, HumanWriter, JsonWriter]
FORMS: list[tuple[Writer, bool]] = [(writer, expand) for writer in WRITERS for expand in (False, True)]


class OneByOne(XmlWriter):
    """A visitor that takes runs one by one."""

    def __getattribute__(self, name: str) -> object:
        if name == "mappings":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def small_pools_are_worth_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_batch, "WORTH_A_BATCH", 1)
    monkeypatch.setattr(leaf_arrays, "WORTH_ARRAYS", 1)
    monkeypatch.setattr(text_format, "WORTH_ARRAYS", 1)


def outcome(
    content: bytes | FaultyMemory, writer_class: Writer, options: Options, worth_batches: int
) -> tuple[bytes, str]:
    """What is written, and the error."""
    out = io.BytesIO()
    writer = writer_class(out.write)
    error = ""
    before, dumping.WORTH_BATCHES = dumping.WORTH_BATCHES, worth_batches
    try:
        dump(MemoryDevice(content) if isinstance(content, bytes) else content, writer, options)
    except OSError as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        dumping.WORTH_BATCHES = before
    writer.flush()
    return out.getvalue(), error


def assert_same(content: bytes, writer_class: Writer, options: Options) -> tuple[bytes, str]:
    plain = outcome(content, writer_class, options, 1 << 62)
    assert outcome(content, writer_class, options, 0) == plain
    return plain


@pytest.mark.parametrize("name", GOOD)
def test_sound_images_give_the_same_bytes(name: str) -> None:
    snapshots = [False, True] if facts_of(name).metadata_snap is not None else [False]
    for metadata_snap in snapshots:
        for writer_class, expand in FORMS:
            options = Options(expand_shared=expand, metadata_snap=metadata_snap)
            _, error = assert_same(image(name), writer_class, options)
            assert not error


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_give_the_same_bytes_and_the_same_error(name: str) -> None:
    for expand in (False, True):
        assert_same(image(name), XmlWriter, Options(expand_shared=expand))


@given(st.integers(0, 1 << 32), st.sampled_from(FORMS))
def test_any_pool_gives_what_its_trees_hold(seed: int, form: tuple[Writer, bool]) -> None:
    dice = Random(seed)
    wide = dice.random() < 0.3
    made = made_pool(dice, nr_data_blocks=MAX_DATA_BLOCK if wide else 1 << dice.randint(4, 35))
    options = Options(expand_shared=form[1], nr_data_blocks=1 << 40 if wide else 0)
    text, error = assert_same(made.content, form[0], options)
    assert not error
    if form[0] is XmlWriter:
        found = read_xml(text).devices
        assert {dev_id: device.mappings for dev_id, device in found.items()} == made.devices


@given(st.integers(0, 1 << 32), st.booleans())
def test_arrays_make_the_same_lists_of_leaves(seed: int, cut: bool) -> None:
    made = made_pool(Random(seed))
    pool = PoolReader(MemoryDevice(made.content))
    both = Leaves(pool), LeafArrays(pool)
    devices = pool.devices()
    for leaves in both:
        for entry in devices:
            leaves.add_device(entry)
        leaves.finish()
        if cut:
            leaves.cut()
    plain, arrays = both
    for name in ("blocks", "lowest", "highest", "is_root", "geometry", "_numbers", "_chunks", "_next", "_previous"):
        assert getattr(plain, name) == getattr(arrays, name), name
    assert plain._occurrences == arrays._occurrences
    assert plain.nr_to_read() == arrays.nr_to_read()
    assert plain.shared_heads() == arrays.shared_heads()
    for number in range(len(devices)):
        assert list(plain.pieces(number)) == list(arrays.pieces(number))


@given(st.integers(0, 1 << 32))
def test_damage_in_any_leaf_is_told_alike(seed: int) -> None:
    dice = Random(seed)
    made = made_pool(dice)
    surgeon = Surgeon(made.content)
    for block in dice.sample(made.leaves, min(len(made.leaves), dice.randint(1, 2))):
        what = dice.randrange(5)
        if what == 0:
            surgeon.flip(block, dice.randrange(4096))
        elif what == 1:
            field = dice.choice(["flags", "nr_entries", "max_entries", "value_size", "padding", "blocknr"])
            surgeon.node(block, **{field: dice.choice([0, 1, 2, 84, 126, 252, 253, 4096])})
        elif what == 2:
            surgeon.key(block, dice.randrange(252), dice.choice([0, 5, 1 << 63, (1 << 64) - 1]))
        elif what == 3:
            surgeon.value(block, dice.randrange(252), dice.choice([0, (1 << 64) - 1, 1 << 54, (1 << 54) - 1]))
        else:
            surgeon.node(block, nr_entries=dice.randrange(253))
    options = Options(expand_shared=dice.random() < 0.5)
    assert_same(surgeon.content(), XmlWriter, options)


@given(st.integers(0, 1 << 32))
def test_a_visitor_without_arrays_is_told_the_same(seed: int) -> None:
    made = made_pool(Random(seed))
    assert outcome(made.content, OneByOne, Options(), 0) == outcome(made.content, XmlWriter, Options(), 1 << 62)


def test_what_is_sound_but_unusual_is_left_to_the_plain_code_for_a_window_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Leaf 300 of many has padding that is not zero: its window is taken leaf by leaf, and no other."""
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    leaves = surgeon.leaves(surgeon.device_root(dev_id))
    assert len(leaves) > 2 * 256
    surgeon.node(leaves[300], padding=1)
    checked: list[int] = []
    check = dumping.Emitter._check

    def note(self: dumping.Emitter, leaf: int, *others: object) -> object:
        checked.append(leaf)
        return check(self, leaf, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(dumping.Emitter, "_check", note)
    found = outcome(surgeon.content(), XmlWriter, Options(), 0)
    assert checked == list(range(256, 512))
    monkeypatch.undo()
    assert found == outcome(image("deep"), XmlWriter, Options(), 1 << 62)


@pytest.mark.parametrize("place", [0, 255, 256, 400, -1])
def test_a_leaf_that_cannot_be_read_is_told_alike(place: int) -> None:
    surgeon = Surgeon(image("deep"))
    (dev_id,) = surgeon.image.devices()
    block = surgeon.leaves(surgeon.device_root(dev_id))[place]
    found = []
    for worth_batches in (1 << 62, 0):
        device = FaultyMemory(image("deep"))
        device.on("read", blocks=[block]).fail()
        found.append(outcome(device, XmlWriter, Options(), worth_batches))
    assert found[0] == found[1]
    assert "OSError" in found[0][1]


def test_what_is_passed_on_is_not_touched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumping, "WORTH_BATCHES", 0)
    parts: list[ReadableBuffer] = []
    dump(MemoryDevice(image("deep")), XmlWriter(parts.append))
    assert len(parts) > 3
    assert b"".join(parts) == outcome(image("deep"), XmlWriter, Options(), 1 << 62)[0]
