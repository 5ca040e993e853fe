"""The comparison of two devices as text: the XML of thin_delta, terse or verbose, or one JSON object a line.

Source: docs/tools/thin_delta.md, "XML".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.differences import DIFFERENT, RIGHT_ONLY
from thinpool.pool_delta import Root

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from thinpool.differences import Difference
    from thinpool.ir import Superblock
    from thinpool.pool_delta import PoolDelta, Thin


def xml_lines(delta: PoolDelta, found: Iterable[Difference], *, verbose: bool = False) -> Iterator[str]:
    """Yield the XML about *found*, what *delta* found, line by line; no newline ends the last one.

    :param verbose: with data blocks
    """
    yield _superblock_tag(delta.superblock) + "\n"
    yield f"  <diff {_name_xml('left', delta.left)} {_name_xml('right', delta.right)}>\n"
    yield from _verbose_xml(found) if verbose else _terse_xml(found)
    yield "  </diff>\n"
    yield "</superblock>"


def json_lines(delta: PoolDelta, found: Iterable[Difference], *, verbose: bool = False) -> Iterator[str]:
    """Yield JSON objects about *found*, what *delta* found: one for the pool, one for both sides, one for each range.

    :param verbose: with data blocks
    """
    sb = delta.superblock
    yield (
        f'{{"type": "superblock", "uuid": "{sb.uuid}", "time": {sb.time}, "transaction": {sb.transaction}, '
        f'"needs_check": {"true" if sb.needs_check else "false"}, "data_block_size": {sb.data_block_size}, '
        f'"nr_data_blocks": {sb.nr_data_blocks}}}\n'
    )
    yield f'{{"type": "diff", {_name_json("left", delta.left)}, {_name_json("right", delta.right)}}}\n'
    if not verbose:
        for kind, begin, length in _joined(found):
            yield f'{{"type": "{kind}", "begin": {begin}, "length": {length}}}\n'
        return
    for one in found:
        data = ", ".join(f'"{name}": {block}' for name, block in _data_begins(one))
        yield f'{{"type": "{one.kind}", "begin": {one.thin_begin}, {data}, "length": {one.length}}}\n'


def _superblock_tag(sb: Superblock) -> str:
    flags = ' flags="1"' if sb.needs_check else ""
    return (
        f'<superblock uuid="{sb.uuid}" time="{sb.time}" transaction="{sb.transaction}"{flags} '
        f'data_block_size="{sb.data_block_size}" nr_data_blocks="{sb.nr_data_blocks}">'
    )


def _name_xml(side: str, tree: Thin | Root) -> str:
    return f'{side}_root="{tree.block}"' if isinstance(tree, Root) else f'{side}="{tree.dev_id}"'


def _name_json(side: str, tree: Thin | Root) -> str:
    return f'"{side}_root": {tree.block}' if isinstance(tree, Root) else f'"{side}": {tree.dev_id}'


def _terse_xml(found: Iterable[Difference]) -> Iterator[str]:
    for kind, begin, length in _joined(found):
        yield f'    <{kind} begin="{begin}" length="{length}"/>\n'


def _verbose_xml(found: Iterable[Difference]) -> Iterator[str]:
    """Yield ranges, those of one kind in one element."""
    kind = ""
    for one in found:
        if one.kind != kind:
            if kind:
                yield f"    </{kind}>\n"
            kind = one.kind
            yield f"    <{kind}>\n"
        data = " ".join(f'{name}="{block}"' for name, block in _data_begins(one))
        yield f'      <range begin="{one.thin_begin}" {data} length="{one.length}"/>\n'
    if kind:
        yield f"    </{kind}>\n"


def _data_begins(one: Difference) -> tuple[tuple[str, int | None], ...]:
    """Return the data blocks that a range speaks of, each with its name."""
    if one.kind == DIFFERENT:
        return ("left_data_begin", one.left_data_begin), ("right_data_begin", one.right_data_begin)
    return (("data_begin", one.right_data_begin if one.kind == RIGHT_ONLY else one.left_data_begin),)


def _joined(found: Iterable[Difference]) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, thin begin, length) of stretches as long as they are without regard to data blocks."""
    kind, begin, end = "", 0, 0
    for one in found:
        if one.kind == kind and one.thin_begin == end:
            end += one.length
            continue
        if kind:
            yield kind, begin, end - begin
        kind, begin, end = one.kind, one.thin_begin, one.thin_begin + one.length
    if kind:
        yield kind, begin, end - begin
