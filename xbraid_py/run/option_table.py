"""The table of a driver's options: their names, types and defaults, read from its dataclasses."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from jsonargparse import ArgumentParser

_NULL = ("null", "none")
_KINDS = {int: "an int", float: "a float", bool: "a bool (true or false)", str: "a str", type(None): "null"}


class OptionError(ValueError):
    """An option or configuration key that cannot be used; the message says what would work."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One name of the command line: a value, or a group (a nested dataclass) of them."""

    hint: Any
    default: Any
    group: type | None


@dataclasses.dataclass(frozen=True)
class Given:
    """A value as the user gave it; `shown` and `where` are for messages."""

    name: str
    value: Any
    shown: str
    where: str = ""

    @property
    def dashes(self) -> str:
        """What stands before an option's name there: nothing in a file."""
        return "" if self.where else "--"


def option_table(cls: type, default: Any = dataclasses.MISSING, prefix: str = "") -> Iterator[tuple[str, Option]]:
    """Names and kinds of all options, groups before their members."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        value = _default(field, default)
        group = next((member for member in members(hints[field.name]) if dataclasses.is_dataclass(member)), None)
        yield prefix + field.name, Option(hints[field.name], value, group)
        if group:
            yield from option_table(group, value, f"{prefix}{field.name}.")


def _default(field: dataclasses.Field, owner: Any) -> Any:
    """Default of a field: that of its owner, if there is one; MISSING for an option that must be given."""
    if dataclasses.is_dataclass(owner):
        return getattr(owner, field.name)
    return field.default_factory() if callable(field.default_factory) else field.default


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that `hint` is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def convert(option: Option, given: Given) -> Any:
    """The value in the type of its option, by the rules of jsonargparse."""
    value = given.value
    kinds = [member for member in members(option.hint) if member is not type(None)]
    if isinstance(value, str) and any(typing.get_origin(kind) is tuple for kind in kinds):
        # Brackets are patterns to a shell, so lists come without them.
        if not value.startswith("[") and ("," in value or len(kinds) == 1 and value.lower() not in _NULL):
            value = f"[{value}]"
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--value", type=option.hint)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        use = f"use {given.dashes}{given.name}={example(option)}"
        raise OptionError(f"{given.shown}{given.where} is not {_kind(option.hint)}; {use}") from error


def build(cls: type, base: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    """An instance of `cls`: `base`, where there is one, with the given values in place of its own."""
    changes = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if name in values:
            changes[field.name] = values[name]
        elif any(given.startswith(f"{name}.") for given in values):
            group = next(m for m in members(typing.get_type_hints(cls)[field.name]) if dataclasses.is_dataclass(m))
            changes[field.name] = build(group, _default(field, base), f"{name}.", values)
        elif _default(field, base) is dataclasses.MISSING:
            raise OptionError(f"--{name} must be given; --help says more")
    return dataclasses.replace(base, **changes) if dataclasses.is_dataclass(base) else cls(**changes)


def _kind(hint: Any) -> str:
    """A type in words, as in "an int or null"."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of " + " or ".join(
            sorted({getattr(arg, "__name__", str(arg)) for arg in typing.get_args(hint) if arg is not ...})
        )
    if len(members(hint)) > 1:
        return " or ".join(_kind(member) for member in members(hint))
    return _KINDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


def example(option: Option) -> str:
    """A value that works, as it is written on the command line: the default where there is one."""
    if option.default is not dataclasses.MISSING:
        return text(plain(option.default))
    first = members(option.hint)[0]
    if typing.get_origin(first) is Literal:
        return str(typing.get_args(first)[0])
    return {bool: "true", int: "1", float: "1.0"}.get(first, "1,2" if typing.get_origin(first) is tuple else "TEXT")


def text(value: Any) -> str:
    """A plain value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(map(text, value))
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def to_dict(options: Any) -> dict[str, Any]:
    """`options` as a dict that JSON and YAML can hold: tuples become lists, paths become str."""
    return {field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def plain(value: Any) -> Any:
    """One value of `to_dict`."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The options that `to_dict` has made such a dict of, for a class without groups of options."""
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
