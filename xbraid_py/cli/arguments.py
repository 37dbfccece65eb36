"""The words of a command line: parsers of the commands, and one message for what they cannot read."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

_KINDS = {"int": "an int", "float": "a float"}


def command_parser(command: str, usage: str, description: str, epilog: str | None = None) -> ArgumentParser:
    """Parser of `xbraid-py COMMAND USAGE`."""
    return ArgumentParser(
        prog=f"xbraid-py {command}",
        usage=f"%(prog)s {usage}",
        description=description,
        epilog=epilog,
        exit_on_error=False,
        allow_abbrev=False,
    )


def parse(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """The values of a command line.

    Raises
    ------
    ValueError
        For whatever is wrong with the words, in one line.
    SystemExit
        With status 0 after `--help`.
    """
    try:
        return parser.parse_args(list(words))
    except ArgumentError as error:
        raise ValueError(f"{_message(parser, ' '.join(str(error).split()))}\ntry {parser.prog} --help") from error


def _usage(parser: ArgumentParser) -> str:
    return parser.format_usage().strip().replace("usage:", "usage is")


def _message(parser: ArgumentParser, said: str) -> str:
    if match := re.fullmatch(r"unrecognized arguments: (\S+).*", said):
        word = match[1].split("=")[0]
        if not word.startswith("-"):
            return f"{match[1]!r} is one folder or file too many; the {_usage(parser)}"
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        close = difflib.get_close_matches(word, known, n=1)
        return f"unknown option {word}" + (f"; did you mean {close[0]}?" if close else "")
    if match := re.fullmatch(r"the following arguments are required: (.*)", said):
        return f"{match[1]} must be given; the {_usage(parser)}"
    if match := re.fullmatch(r'Parser key "(\w+)": .*<class \'(\w+)\'>.*Got value: (.*)', said):
        name, kind, value = match.groups()
        default = parser.get_default(name)
        good = default if default is not None else {"int": 4, "float": 1.0}.get(kind, "TEXT")
        return f"{name}={value} is not {_KINDS.get(kind, f'a {kind}')}; use --{name}={good}"
    return said
