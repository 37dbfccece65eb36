"""Options of a driver: one frozen dataclass from defaults, configuration files and the command line."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser

from xbraid_py.comm import launcher_rank
from xbraid_py.run.option_table import (
    Given,
    Option,
    OptionError,
    build,
    convert,
    example,
    from_dict,
    members,
    option_table,
    text,
    to_dict,
)

__all__ = ["OptionError", "from_dict", "parse", "to_dict", "to_yaml"]

T = TypeVar("T")

_BOOL = ("true", "false", "yes", "no")
_EPILOG = (
    "Defaults < --config FILE < command line. Hyphens and underscores are alike in option names. "
    "A flag is switched by --smoke or --no_smoke; a list is written 200,125,75."
)


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = "") -> T:
    """Make the options of a driver: defaults < `--config FILE` < command line.

    Every field of `cls` is an option `--field`; the fields of a nested dataclass are `--group.field`. Also
    understood: `--help`, `--config FILE` (YAML; repeatable, the last one wins) and `--print_config`, which
    prints every option in the form that `--config` reads. Sends no message and needs no MPI.

    Parameters
    ----------
    cls : type
        Frozen dataclass with numpydoc parameters, which become the help. Types of its fields: bool, int,
        float, str, Path, Literal, tuples of these, another such dataclass, and unions of these with None.
    argv : sequence of str, optional
        The words of the command line, without the program's name; those of this process by default.
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
    SystemExit
        With status 0 after `--help` and `--print_config`, which print on the launcher's rank 0 only.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = prog or os.path.basename(sys.argv[0])
    if "-h" in words or "--help" in words:
        _show(_parser(cls, prog, description).format_help())
    table = dict(option_table(cls))
    from_files: list[Given] = []
    from_words: list[Given] = []
    print_config = False
    for word, name, value in _split(words, table):
        if name == "config":
            from_files += _flatten(_read(value, word), "", table, f" in {value}")
        elif name == "print_config":
            print_config = True
        elif not table[name].group:
            from_words.append(Given(name, value, f"{word}={value}"))
        elif isinstance(content := _load(value, f"{word}={value}"), str | dict):
            content = _read(content, word) if isinstance(content, str) else content
            from_words += _flatten(content, f"{name}.", table, f" in {word}={value}")
        else:
            from_words.append(Given(name, content, f"{word}={value}"))
    values: dict[str, Any] = {}
    for given in from_files + from_words:
        _assign(values, given, table)
    try:
        options = build(cls, dataclasses.MISSING, "", values)
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


def _show(page: str) -> NoReturn:
    """Print on the launcher's rank 0 and end with status 0, also where the reader has gone (`| head`)."""
    if launcher_rank() == 0:
        try:
            print(page, end="", flush=True)
        except BrokenPipeError:
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), sys.stdout.fileno())
    raise SystemExit(0)


def _parser(cls: type, prog: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=description or None,
        epilog=_EPILOG,
        usage="%(prog)s [--config FILE] [--OPTION=VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options.")
    parser.add_argument("--print_config", action="store_true", help="Print all options as YAML and exit.")
    parser.add_class_arguments(cls, None)
    return parser


def _split(words: Sequence[str], table: Mapping[str, Option]) -> Iterator[tuple[str, str, str]]:
    """Split the command line into (option as typed, its name, its value)."""
    flags = {name for name, option in table.items() if bool in members(option.hint)} | {"print_config"}
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
            raise OptionError(f"unknown option {word}{_did_you_mean(name, table, '--')}")
        if not equals and name in flags and not (rest and rest[0].lower() in _BOOL):
            value = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise OptionError(f"{word} needs a value; use {word}={_example_word(name, table)}")
            value = rest.pop(0)
        yield word, name, value


def _did_you_mean(name: str, table: Mapping[str, Option], dashes: str) -> str:
    known = [*table, *(("config", "help", "print_config") if dashes else ())]
    # The right name in the wrong group is closer than any misspelling.
    close = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    close = difflib.get_close_matches(name, close or known, n=1, cutoff=0.0 if close else 0.6)
    return f"; did you mean {dashes}{close[0]}?" if close else "; --help lists all options"


def _example_word(name: str, table: Mapping[str, Option]) -> str:
    return example(table[name]) if name in table and not table[name].group else "run.yaml"


def _read(path: str, word: str) -> dict[str, Any]:
    """Content of the YAML file that the option `word` names."""
    use = "use a YAML file as --print_config prints it"
    try:
        content = _load(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise OptionError(f"{word}={path} cannot be read: {reason}; {use}") from error
    if content is None or isinstance(content, dict):
        return content or {}
    raise OptionError(f"{word}={path} holds no `name: value` lines; {use}")


def _load(content: str, source: str) -> Any:
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Beside its own errors YAML raises these for dates and numbers that are none, and for deep nesting.
        reason = " ".join(str(error).split())
        raise OptionError(f"{source} is not YAML: {reason}; use `name: value` lines") from error


def _flatten(content: Mapping, prefix: str, table: Mapping[str, Option], where: str) -> Iterator[Given]:
    """Nested mappings as `group.field` names, all of them known ones."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in table:
            raise OptionError(f"unknown option {name}{where}{_did_you_mean(name, table, '')}")
        if table[name].group and isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.", table, where)
        else:
            yield Given(name, value, f"{name}={text(value)}", where)


def _assign(values: dict[str, Any], given: Given, table: Mapping[str, Option]) -> None:
    """Set one value, converted to its type; what contradicts it and came earlier is dropped."""
    option = table[given.name]
    if option.group and (given.value is not None or type(None) not in members(option.hint)):
        member = next(name for name in table if name.startswith(f"{given.name}."))
        use = f"use {given.dashes}{member}={example(table[member])}"
        raise OptionError(f"{given.shown}{given.where} is a group of options; {use}")
    value = None if option.group else convert(option, given)
    for name in list(values):
        if name.startswith(f"{given.name}.") or given.name.startswith(f"{name}."):
            del values[name]
    values[given.name] = value
