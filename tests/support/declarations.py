"""Derive from a construct declaration what :mod:`struct` needs to read the same bytes."""

from __future__ import annotations

from typing import Any

from construct import FormatField, Struct


def field_names(declaration: Any) -> tuple[str, ...]:
    """The names of a declaration's fields, in order."""
    return tuple(field.name for field in declaration.subcons)


def offset_of(declaration: Any, name: str) -> int:
    """The byte offset of field *name*; the fields before it have fixed sizes."""
    names = field_names(declaration)
    return sum(int(field.sizeof()) for field in declaration.subcons[: names.index(name)])


def _innermost(field: Any) -> Any:
    while hasattr(field, "subcon"):
        field = field.subcon
    return field


def struct_code(declaration: Any) -> str:
    """The format string of :mod:`struct` for a declaration; what is not an integer is taken as bytes."""
    codes = []
    for field in declaration.subcons:
        size = int(field.sizeof())
        integer = isinstance(_innermost(field), FormatField)
        codes.append({4: "I", 8: "Q"}[size] if integer else f"{size}s")
    return "<" + "".join(codes)


def without(declaration: Any, *names: str) -> Any:
    """The declaration less some of its fields."""
    return Struct(*(field for field in declaration.subcons if field.name not in names))
