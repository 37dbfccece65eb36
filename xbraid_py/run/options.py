"""Options of a driver: one frozen dataclass from its defaults, presets, configuration files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, cast

import yaml

from xbraid_py.comm import launcher_rank
from xbraid_py.run.documents import load_yaml, read_regular, shortened

__all__ = ["OptionError", "Presets", "from_dict", "parse", "text", "to_dict", "to_yaml"]

T = TypeVar("T")
Presets = Mapping[str, Mapping[str, Any]]

_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = (None, "null", "~")
_OWN = ("config", "help", "print_config")
# How large numbers may be: seeds are multiplied by a million, and are to fit into 64 bits then; single precision has
# 1e-38 to 3e38, and rates and times meet numbers that are not 1 there.
INTS, FLOATS = 10**12, (1e-30, 1e30)
_KINDS = {int: "an int", float: "a float", bool: "a bool (true or false)", str: "a str", type(None): "null"}
_SMALL = "A job of seconds: other defaults, each of which may still be given."
_EPILOG = (
    "Defaults < presets < --config FILE < command line. Hyphens and underscores are alike in option names. "
    "A flag is switched by --smoke or --no_smoke; a list is written 200,125,75."
)


class OptionError(ValueError):
    """An option or configuration key that cannot be used; the message says what would work."""


class _RangeError(ValueError):
    """A number that is of the right type, and too large or too small."""


@dataclasses.dataclass(frozen=True)
class _Option:
    """One name of the command line: a value, or a group (a nested dataclass) of them."""

    hint: Any
    default: Any
    group: type | None = None
    help: str = ""


@dataclasses.dataclass(frozen=True)
class _Given:
    """A value as the user gave it; `shown` and `where` are for messages."""

    name: str
    value: Any
    shown: str
    where: str = ""


_Table = Mapping[str, _Option]


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    presets: Presets | None = None,
    prog: str | None = None,
    description: str = "",
) -> T:
    """Make the options of a driver: defaults < presets < `--config FILE` < command line.

    Every field of `cls` is an option `--field`; the fields of a nested dataclass are `--group.field`, and
    `--group=FILE` or `--group={name: value}` gives several of them. Also understood: `--help`, `--config FILE` (YAML;
    repeatable, the last one wins) and `--print_config`, which prints every option in the form that `--config` reads.
    Sends no message and needs no MPI.

    Parameters
    ----------
    cls : type
        Frozen dataclass with numpydoc parameters, which become the help. Types of its fields: bool, int,
        float, str, Path, Literal, tuples of these, another such dataclass, and unions of these with None.
    argv : sequence of str, optional
        The words of the command line, without the program's name; those of this process by default.
    presets : mapping, optional
        Small jobs by name: other defaults of some options, by their names (`mgrit.cfactor`) or for a whole group. A
        preset is a flag like those of `cls`, on the command line and in files, but it is no field: of `--smoke` there
        remain the values that it stands for.
    prog, description : str, optional
        Name and purpose of the program for the help.

    Returns
    -------
    object
        An instance of `cls`.

    Raises
    ------
    OptionError
        For an unknown name, a value of the wrong type, an unreadable file (its cause is the OSError), and
        for whatever ValueError or TypeError the dataclasses raise. The message is complete.
    ValueError
        For a preset that has the name of an option, or holds what is none.
    SystemExit
        With status 0 after `--help` and `--print_config`, which print on the launcher's rank 0 only.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = prog or os.path.basename(sys.argv[0])
    table = dict(_options(cls))
    defaults = {name: _preset(name, values, table) for name, values in (presets or {}).items()}
    if "-h" in words or "--help" in words:
        _show(_help(cls, table, defaults, prog, description))
    table |= {name: _Option(bool, False) for name in defaults}
    from_files: list[_Given] = []
    from_words: list[_Given] = []
    print_config = False
    for word, name, value in _split(words, table):
        if name == "config":
            from_files += _flatten(_read(value, word), "", table, f" in {value}")
        elif name == "print_config":
            print_config = True
        elif not table[name].group:
            from_words.append(_Given(name, value, shortened(f"{word}={value}")))
        elif isinstance(content := _load(value, f"{word}={value}"), str | dict):
            content = _read(content, word) if isinstance(content, str) else content
            from_words += _flatten(content, f"{name}.", table, f" in {shortened(f'{word}={value}')}")
        else:
            from_words.append(_Given(name, content, shortened(f"{word}={value}")))
    given = from_files + from_words
    switched = {each.name: _converted(each, table) for each in given if each.name in defaults}
    values: dict[str, Any] = {}
    for name, others in defaults.items():
        if switched.get(name):
            for each, value in others.items():
                _put(values, each, value)
    table |= {name: dataclasses.replace(table[name], default=value) for name, value in values.items()}
    for each in given:
        if each.name not in defaults:
            _put(values, each.name, _converted(each, table))
    try:
        options = _build(cls, table, "", values)
    except OptionError:
        raise
    except (ValueError, TypeError) as error:
        raise OptionError(str(error)) from error
    if print_config:
        _show(to_yaml(options))
    return options


def to_yaml(options: Any) -> str:
    """`options` as the text of a file for `--config`."""
    return yaml.safe_dump(to_dict(options), sort_keys=False)


def to_dict(options: Any) -> dict[str, Any]:
    """`options` as a dict that JSON and YAML can hold: tuples become lists, paths become str."""
    return {field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """The options that `to_dict` has made such a dict of; what is not in it has its default.

    Raises `OptionError` for an unknown name and for a value of the wrong type, and whatever the dataclasses raise.
    """
    table = dict(_options(cls))
    return _build(cls, table, "", _values(values, table, f" of {cls.__name__}"))


def text(value: Any) -> str:
    """A plain value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(map(text, value))
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


# ---- the table of all options, read from the dataclasses


def _options(cls: type, default: Any = dataclasses.MISSING, prefix: str = "") -> Iterator[tuple[str, _Option]]:
    """Names and kinds of all options, groups before their members."""
    hints = typing.get_type_hints(cls)
    described = _descriptions(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(default):
            value = getattr(default, field.name)
        else:
            value = field.default_factory() if callable(field.default_factory) else field.default
        hint = hints[field.name]
        group: Any = next((member for member in _members(hint) if dataclasses.is_dataclass(member)), None)
        yield prefix + field.name, _Option(hint, value, group, described.get(field.name, ""))
        if group:
            # Of a group that is not there by default, what its members are if one of them is given.
            yield from _options(group, field.metadata.get("members", value), f"{prefix}{field.name}.")


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the one type that `hint` is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _descriptions(cls: type) -> dict[str, str]:
    """What the numpydoc sections Parameters of a class and its bases say of each name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").splitlines()
        names: list[str] = []
        inside = False
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if below.startswith("---"):
                inside, names = line == "Parameters", []
            elif inside and line[:1].strip(" -"):
                names = [name.strip() for name in line.partition(":")[0].split(",")]
                found |= dict.fromkeys(names, "")
            else:
                found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def _preset(preset: str, values: Mapping[str, Any], table: _Table) -> dict[str, Any]:
    """The defaults of a preset, by their full names."""
    if preset in table or preset in _OWN:
        raise ValueError(f"preset {preset!r} has the name of an option; remove the field, or use another name")
    try:
        return _values(values, table, f" in the preset {preset}")
    except OptionError as error:
        raise ValueError(str(error)) from error  # a mistake of the program, not of who calls it


# ---- what is given: words, files, mappings


def _split(words: Sequence[str], table: _Table) -> Iterator[tuple[str, str, str]]:
    """Split the command line into (option as typed, its name, its value)."""
    flags = {name for name, option in table.items() if bool in _members(option.hint)} | {"print_config"}
    negated = {f"no_{name}": name for name in flags if f"no_{name}" not in table}
    rest = list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if not word.startswith("-"):
            hint = "write a list as 200,125,75" if word.isdigit() else "options begin with --, as in --help"
            raise OptionError(f"{word!r} belongs to no option; {hint}")
        name = word.lstrip("-").replace("-", "_")
        if name in negated and not equals:
            yield word, negated[name], "false"
            continue
        if name not in table and name not in ("config", "print_config") or not word.startswith("--"):
            raise OptionError(f"unknown option {word}{_did_you_mean(name, [*table, *_OWN], '--')}")
        if not equals and name in flags and not (rest and rest[0].lower() in _BOOL):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                use = _example(table[name]) if name in table and not table[name].group else "run.yaml"
                raise OptionError(f"{word} needs a value; use {word}={use}")
            value = rest.pop(0)
        yield word, name, value


def _did_you_mean(name: str, known: Sequence[str], dashes: str = "") -> str:
    # The right name in the wrong group is closer than any misspelling.
    close = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    close = difflib.get_close_matches(name, close or known, n=1, cutoff=0.0 if close else 0.6)
    return f"; did you mean {dashes}{close[0]}?" if close else "; --help lists all options"


def _read(path: str, word: str) -> dict[str, Any]:
    """Content of the YAML file that the option `word` names."""
    use = "use a YAML file as --print_config prints it"
    try:
        content = _load(read_regular(path).decode("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise OptionError(f"{word}={shortened(path)} cannot be read: {reason}; {use}") from error
    if content is None or isinstance(content, dict):
        return content or {}
    raise OptionError(f"{word}={path} holds no `name: value` lines; {use}")


def _load(content: str, source: str) -> Any:
    try:
        return load_yaml(content)
    except (yaml.YAMLError, ValueError) as error:  # the latter for dates that are none as well
        reason = " ".join(str(error).split())
        raise OptionError(f"{shortened(source)} is not YAML: {reason}; use `name: value` lines") from error


def _flatten(content: Mapping, prefix: str, table: _Table, where: str) -> Iterator[_Given]:
    """Nested mappings, and instances of groups, as `group.field` names, all of them known ones."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in table:
            raise OptionError(f"unknown option {name}{where}{_did_you_mean(name, [*table])}")
        group = table[name].group
        if group and isinstance(value, group):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(group)}
        if group and isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.", table, where)
        else:
            yield _Given(name, value, shortened(f"{name}={text(value)}"), where)


# ---- from what is given to an instance


def _values(content: Mapping[str, Any], table: _Table, where: str) -> dict[str, Any]:
    """All values of a mapping by their full names, converted."""
    found: dict[str, Any] = {}
    for each in _flatten(content, "", table, where):
        _put(found, each.name, _converted(each, table))
    return found


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one value; what contradicts it and came earlier is dropped."""
    for other in list(values):
        if other.startswith(f"{name}.") or name.startswith(f"{other}."):
            del values[other]
    values[name] = value


def _converted(given: _Given, table: _Table) -> Any:
    """A given value in the type of its option; None for a group that is not to be there."""
    option = table[given.name]
    use = "use " if given.where else "use --"  # as it is written there: without dashes in a file
    if option.group and (given.value is not None or type(None) not in _members(option.hint)):
        member = next(name for name in table if name.startswith(f"{given.name}."))
        use += f"{member}={_example(table[member])}"
        raise OptionError(f"{given.shown}{given.where} is a group of options; {use}")
    try:
        return None if option.group else _convert(option.hint, given.value)
    except _RangeError as error:
        raise OptionError(f"{given.shown}{given.where} {error}; {use}{given.name}={_example(option)}") from error
    except ValueError as error:
        use += f"{given.name}={_example(option)}"
        raise OptionError(f"{given.shown}{given.where} is not {_kind(option.hint)}; {use}") from error


def _convert(hint: Any, value: Any) -> Any:
    """A word, or a value from YAML, as a value of the type `hint`; ValueError if it is none."""
    if type(None) in _members(hint) and value in _NULL:
        return None
    lists = [kind for kind in _members(hint) if typing.get_origin(kind) is tuple]
    others = [kind for kind in _members(hint) if kind not in (*lists, type(None))]
    if isinstance(value, str) and not value.startswith("[") and "," not in value:
        lists = [] if others else lists  # one word is a list only where it can be nothing else
    for kind in lists + others:
        try:
            return _in_range(_convert_one(kind, value))
        except _RangeError:
            raise
        except (ValueError, OverflowError, yaml.YAMLError):
            continue
    raise ValueError(f"{value!r} is not {_kind(hint)}")


def _in_range(value: Any) -> Any:
    """`value`; a number that no computation can work with is refused here, for all options of all programs."""
    if isinstance(value, int) and abs(value) > INTS:
        raise _RangeError(f"must be at most {INTS} in size")
    low, high = FLOATS
    if isinstance(value, float) and value and math.isfinite(value) and not low <= abs(value) <= high:
        raise _RangeError(f"must be 0, or {low:g} to {high:g} in size")
    return value


def _convert_one(kind: Any, value: Any) -> Any:
    """The same for one type that is no union."""
    word, kinds = isinstance(value, str), typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        for choice in kinds:
            if value in (choice, str(choice)) and not isinstance(value, bool):
                return choice
    elif typing.get_origin(kind) is tuple:
        if word:  # a list of words, with or without brackets, which are patterns to a shell
            value = load_yaml(value if value.startswith("[") else f"[{value}]", words=True)
        if isinstance(value, list | tuple):
            kinds = kinds[:1] * len(value) if kinds[-1] is ... else kinds
            return tuple(_convert(each, item) for each, item in zip(kinds, value, strict=True))
    elif kind is bool and word and value.lower() in _BOOL:
        return _BOOL[value.lower()]
    elif kind is not bool and word and (kind is not float or math.isfinite(float(value))):
        return kind(value)
    elif isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool):
        return kind(value)
    raise ValueError(f"{value!r} is not {_kind(kind)}")


def _build(cls: type[T], table: _Table, prefix: str, values: Mapping[str, Any]) -> T:
    """An instance of `cls` with the given values, by their full names, and the defaults of the table."""
    found = {}
    for field in dataclasses.fields(cast(Any, cls)):
        name = f"{prefix}{field.name}"
        if name not in values and any(given.startswith(f"{name}.") for given in values):
            found[field.name] = _build(cast(type, table[name].group), table, f"{name}.", values)
        else:
            found[field.name] = values.get(name, table[name].default)
        if found[field.name] is dataclasses.MISSING:
            raise OptionError(f"--{name} must be given; --help says more")
    return cls(**found)


# ---- what is said: kinds and examples in messages, and the help


def _kind(hint: Any) -> str:
    """A type in words, as in "an int or null"."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        items = {getattr(arg, "__name__", str(arg)) for arg in typing.get_args(hint) if arg is not ...}
        return "a list of " + " or ".join(sorted(items))
    if len(_members(hint)) > 1:
        return " or ".join(_kind(member) for member in _members(hint))
    return _KINDS.get(hint, f"a {getattr(hint, '__name__', hint)}")


def _example(option: _Option) -> str:
    """A value that works, as it is written on the command line: the default where there is one."""
    if option.default is not dataclasses.MISSING:
        return text(_plain(option.default))
    first = _members(option.hint)[0]
    if typing.get_origin(first) is Literal:
        return str(typing.get_args(first)[0])
    return {bool: "true", int: "1", float: "1.0"}.get(first, "1,2" if typing.get_origin(first) is tuple else "TEXT")


def _help(cls: type, table: _Table, presets: Presets, prog: str, description: str) -> str:
    """All options with descriptions, kinds and defaults, as wide as the terminal."""
    import argparse  # lays the page out; whoever asks for no help needs none of it

    usage = "%(prog)s [--config FILE] [--OPTION=VALUE ...]"
    page = argparse.ArgumentParser(prog, usage, description or None, _EPILOG, add_help=False)

    def add(section: Any, name: str, words: str) -> None:
        section.add_argument(f"--{name}", action="store_true", help=words.replace("%", "%%"))

    own = page.add_argument_group("options")
    add(own, "help", "Show this page and exit.")
    add(own, "config FILE", "YAML file of options; of several the last one wins.")
    add(own, "print_config", "Print all options as YAML and exit.")
    for preset, values in presets.items():
        changed = {name: value for name, value in values.items() if value != table[name].default}
        add(own, preset, f"{_SMALL} [{', '.join(f'{name}={text(_plain(changed[name]))}' for name in changed)}]")
    sections = {"": page.add_argument_group(_title(cls))}
    for name, option in table.items():
        default = "must be given" if option.default is dataclasses.MISSING else f"default: {_example(option)}"
        if option.group:
            sections[name] = page.add_argument_group(name, option.help or _title(option.group))
            is_optional = f", or null [{default}]" if type(None) in _members(option.hint) else ""
            add(sections[name], name, f"A YAML file of these, or {{name: value, ...}}{is_optional}.")
        else:
            add(sections[name.rpartition(".")[0]], name, f"{option.help} [{_kind(option.hint)}; {default}]".strip())
    return page.format_help()


def _title(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or cls.__name__).splitlines()[0].rstrip(".")


def _show(page: str) -> NoReturn:
    """Print on the launcher's rank 0 and end with status 0, also where the reader has gone (`| head`)."""
    if launcher_rank() == 0:
        try:
            print(page, end="", flush=True)
        except BrokenPipeError:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), sys.stdout.fileno())
    raise SystemExit(0)


def flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of all groups under names such as "mgrit.cfactor"."""
    found: dict[str, Any] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
