"""The words of a command line: parsers of the commands, and one message for what they cannot read."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

_KINDS = {"int": "an int", "float": "a float"}


class CommandParser(ArgumentParser):
    """A parser that raises what argparse would end the process with, and says which value would work."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{_better(self, ' '.join(message.split()))}\ntry {self.prog} --help")


def command_parser(command: str, usage: str, description: str, epilog: str | None = None) -> CommandParser:
    """Parser of `xbraid-py COMMAND USAGE`."""
    prog = f"xbraid-py {command}"
    return CommandParser(prog, f"%(prog)s {usage}", description=description, epilog=epilog, allow_abbrev=False)


def parse(parser: CommandParser, words: Sequence[str]) -> Namespace:
    """The values of a command line.

    Raises
    ------
    ValueError
        For whatever is wrong with the words, in one line.
    SystemExit
        With status 0 after `--help`.
    """
    return parser.parse_args(list(words))


def _usage(parser: CommandParser) -> str:
    return parser.format_usage().strip().replace("usage:", "usage is")


def _better(parser: CommandParser, said: str) -> str:
    if match := re.fullmatch(r"unrecognized arguments: (\S+).*", said):
        word = match[1].split("=")[0]
        if not word.startswith("-"):
            return f"{match[1]!r} is one folder or file too many; the {_usage(parser)}"
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        close = difflib.get_close_matches(word, known, n=1)
        return f"unknown option {word}" + (f"; did you mean {close[0]}?" if close else "")
    if match := re.fullmatch(r"the following arguments are required: (.*)", said):
        return f"{match[1]} must be given; the {_usage(parser)}"
    if match := re.fullmatch(r"argument --(\w+): invalid (\w+) value: '(.*)'", said):
        name, kind, value = match.groups()
        default = parser.get_default(name)
        good = default if default is not None else {"int": 4, "float": 1.0}.get(kind, "TEXT")
        return f"{name}={value} is not {_KINDS.get(kind, f'a {kind}')}; use --{name}={good}"
    return said
