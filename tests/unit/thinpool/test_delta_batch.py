"""Two devices compared in bulk: against plain dicts, in windows of any size, and on damage, which is left to others."""

from __future__ import annotations

from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

import pytest

from bufio import MemoryDevice
from persistent_data import block_batches, node_batches
from persistent_data.block_batches import NotClean
from tests.support.comparison import expected, pairs_of
from tests.support.fixtures import DAMAGED, GOOD, base_of, facts_of, image
from tests.support.image import Image
from tests.support.surgeon import Surgeon
from thinpool import delta_batch, delta_format, pool_delta
from thinpool.delta_batch import DeltaBatches
from thinpool.delta_format import delta_text
from thinpool.differences import SAME, Difference
from thinpool.pool_delta import PoolDelta, Root, Thin
from thinpool.pool_reader import PoolReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.delta_batch import Columns

WITH_DEVICES = [name for name in GOOD if facts_of(name).nr_devices]
STYLES = [*product((False, True), repeat=3)]
"""JSON or not, verbose or not, with what is the same or without."""


@pytest.fixture(params=[256, 3])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many leaves are read at a time."""
    nr_blocks: int = request.param
    for module in (block_batches, node_batches, delta_batch):
        monkeypatch.setattr(module, "WINDOW_BLOCKS", nr_blocks)
    return nr_blocks


def in_bulk(content: bytes, left: int, right: int, *, same: bool = True, joined: bool = False) -> list[Difference]:
    pool = PoolReader(MemoryDevice(content))
    roots = {entry.dev_id: entry.root for entry in pool.devices()}
    batches = DeltaBatches(pool, (roots[left], roots[right]), same=same, joined=joined)
    return [one for columns in batches.columns() for one in columns.differences()]


def joined(differences: list[Difference]) -> list[tuple[str, int, int]]:
    found: list[tuple[str, int, int]] = []
    for one in differences:
        if found and found[-1][0] == one.kind and found[-1][2] == one.thin_begin:
            found[-1] = (one.kind, found[-1][1], one.thin_begin + one.length)
        else:
            found.append((one.kind, one.thin_begin, one.thin_begin + one.length))
    return found


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("name", WITH_DEVICES)
def test_differences_are_those_of_the_mappings(name: str) -> None:
    devices = Image.from_bytes(image(name)).mappings()
    for left, right in pairs_of(devices):
        wanted = expected(devices[left], devices[right])
        assert in_bulk(image(name), left, right) == wanted
        differing = [one for one in wanted if one.kind != SAME]
        assert in_bulk(image(name), left, right, same=False) == differing
        for same in (True, False):
            found = in_bulk(image(name), left, right, same=same, joined=True)
            assert joined(found) == joined(wanted if same else differing)
            assert len(found) == len(joined(found)), "they are as long as can be"


def test_what_both_have_is_read_once_or_not_at_all() -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    first, second = sorted(surgeon.image.devices())[:2]
    shared = {*surgeon.leaves(surgeon.device_root(first))} & {*surgeon.leaves(surgeon.device_root(second))}
    assert shared
    wanted = in_bulk(surgeon.content(), first, second, same=False)
    for leaf in shared:
        surgeon.flip(leaf)
    assert in_bulk(surgeon.content(), first, second, same=False) == wanted
    with pytest.raises(NotClean):
        in_bulk(surgeon.content(), first, second)


# Text, and the change to the plain code


class Comparison(NamedTuple):
    content: bytes
    left: Thin | Root
    right: Thin | Root
    json: bool = False
    verbose: bool = False
    same: bool = True


def text(asked: Comparison) -> bytes:
    """The text of a comparison, with the error that ends it."""
    pieces: list[bytes] = []
    try:
        delta = PoolDelta(MemoryDevice(asked.content), asked.left, asked.right)
        pieces += map(bytes, delta_text(delta, json=asked.json, verbose=asked.verbose, same=asked.same))
    except OSError as error:
        pieces.append(f"\n{type(error).__name__}: {error}".encode())
    return b"".join(pieces)


def plain_text(asked: Comparison, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(pool_delta, "BULK_FROM_MAPPINGS", 1 << 62)
        patch.setattr(pool_delta, "BULK_FROM_HEIGHT", 1 << 62)
        return text(asked)


@pytest.fixture
def always_in_bulk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_delta, "BULK_FROM_MAPPINGS", 0)
    monkeypatch.setattr(pool_delta, "BULK_FROM_HEIGHT", 0)


@pytest.mark.usefixtures("window", "always_in_bulk")
@pytest.mark.parametrize("name", WITH_DEVICES)
def test_text_in_bulk_is_that_of_single_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for left, right in pairs_of(Image.from_bytes(image(name)).mappings())[:3]:
        for json, verbose, same in STYLES:
            asked = Comparison(image(name), Thin(left), Thin(right), json, verbose, same)
            in_lines = plain_text(asked, monkeypatch)
            assert text(asked) == in_lines
            assert b"Error" not in in_lines


@pytest.mark.usefixtures("window", "always_in_bulk")
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pools_give_the_same_text_and_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = sorted(Image.from_bytes(image(base_of(name))).devices())
    for dev_id in ids[:2]:
        for json, verbose, same in STYLES:
            asked = Comparison(image(name), Thin(ids[0]), Thin(dev_id), json, verbose, same)
            assert text(asked) == plain_text(asked, monkeypatch)


@pytest.mark.usefixtures("always_in_bulk")
@pytest.mark.parametrize(("json", "verbose"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("side", [0, 1])
def test_the_plain_code_goes_on_from_where_damage_is(
    side: int, json: bool, verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (block_batches, node_batches, delta_batch):
        monkeypatch.setattr(module, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(delta_format, "_LINES_AT_A_TIME", 3)
    content = image("dirty_3")
    ids = sorted(Image.from_bytes(content).devices())
    pair = (ids[0], ids[-1])
    written = set()
    # The first leaf is looked at before the comparison begins.
    for leaf in Surgeon(content).leaves(Surgeon(content).device_root(pair[side]))[1::3]:
        surgeon = Surgeon(content)
        surgeon.flip(leaf)
        asked = Comparison(surgeon.content(), Thin(pair[0]), Thin(pair[1]), json, verbose)
        in_lines = plain_text(asked, monkeypatch)
        assert text(asked) == in_lines
        assert b"checksum error" in in_lines
        written.add(len(in_lines))
    assert len(written) > 3, "damage in several places"


@pytest.mark.usefixtures("always_in_bulk")
def test_a_wrong_number_of_mappings_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    surgeon = Surgeon(image("snapshot_chain"))
    first, second = sorted(surgeon.image.devices())[:2]
    surgeon.details(second, mapped_blocks=1)
    asked = Comparison(surgeon.content(), Thin(first), Thin(second))
    assert b"expected 1, actual" in text(asked)
    assert text(asked) == plain_text(asked, monkeypatch)


@pytest.mark.usefixtures("always_in_bulk")
def test_trees_may_be_given_by_their_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    surgeon = Surgeon(image("dirty_3"))
    ids = sorted(surgeon.image.devices())
    left, right = (Root(surgeon.device_root(dev_id)) for dev_id in (ids[0], ids[-1]))
    taken = []
    columns = DeltaBatches.columns

    def counted(batches: DeltaBatches) -> Iterator[Columns]:
        taken.append(batches)
        return columns(batches)

    monkeypatch.setattr(DeltaBatches, "columns", counted)
    asked = Comparison(surgeon.content(), left, right)
    assert text(asked) == plain_text(asked, monkeypatch)
    assert len(taken) == 1


def test_ranges_that_touch_are_of_different_kinds_or_data_blocks() -> None:
    found = in_bulk(image("dirty_3"), *sorted(Image.from_bytes(image("dirty_3")).devices())[:2])
    assert found
    assert not any(one.goes_on_with(following) for one, following in pairwise(found))
