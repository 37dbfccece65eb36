"""What all commands read: the folder of a run, as far as it is there, and the words of a command line."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from xbraid_py.run.documents import load_json, load_yaml, read_regular
from xbraid_py.run.record import MOST_READ, RecordReader

STATUS, RECORD, CONFIGURATION, CHECKPOINTS, FIGURES, LOG = (
    "status.json",
    "metrics.jsonl",
    "config.yaml",
    "checkpoints",
    "figures",
    "log.txt",
)
# Points (update, value) of one quantity.
Points = list[tuple[float, float]]

_LETTERS = 5000


def printable(text: Any) -> str:
    """Text in one line that a terminal shows and does not obey, some pages of it at most."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)[:_LETTERS]).strip()


def quoted(word: str) -> str:
    """A word for a shell, in letters that a terminal shows and does not obey."""
    if word.isprintable():
        return shlex.quote(word)
    letters = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(letters)}'"


class NoRun(ValueError):
    """A folder that holds no run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as far as its folder tells: it may be under way or have been killed.

    Attributes
    ----------
    path : Path
    status : dict
        `status.json`; empty if there is none.
    status_time, record_time : float or None
        When it and the record were last written, in seconds since 1970 by the clock of the file system.
    header : dict
        The first line of `metrics.jsonl`; empty if there is none.
    resumes : list of dict
        What the record says of continuations.
    rows : list of dict
        All other lines of the record.
    columns : dict of str to dict of str to dict of float to float
        The numbers of the rows, see `RecordReader`.
    configuration : dict
        Options of the run: `config.yaml`, or else those in the header.
    figures, checkpoints : list of Path
        Files, sorted by name.
    flaws : list of str
        What is missing or damaged, a short sentence each.
    """

    path: Path
    status: dict[str, Any] = field(default_factory=dict)
    status_time: float | None = None
    record_time: float | None = None
    header: dict[str, Any] = field(default_factory=dict)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, dict[str, dict[float, float]]] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)
    figures: list[Path] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)

    @property
    def about(self) -> dict[str, Any]:
        """What the newest header or continuation says of ranks, versions and host."""
        return self.resumes[-1] if self.resumes else self.header

    def curves(self, column: str) -> dict[str, Points]:
        """Points of a column for each of the runs in the record, by updates."""
        return {name: sorted(values.items()) for name, values in self.columns.get(column, {}).items()}


def read_run(folder: str | os.PathLike, most: int | None = MOST_READ) -> Run:
    """Read a folder once; `NoRun` if it does not exist, or nothing in it is of a run.

    Of a record of more than `most` bytes only the beginning and the end are read; all of any for None.
    """
    return RunReader(folder, most).read()


class RunReader:
    """Reads a folder again and again; of the record only what is new."""

    def __init__(self, folder: str | os.PathLike, most: int | None = MOST_READ):
        self.path = Path(folder)
        self._record = RecordReader(self.path / RECORD, most)

    def read(self) -> Run:
        """The folder as it is now; raises `NoRun` if it does not exist, or nothing in it is of a run."""
        use = "give the --out folder of a run, such as runs/peaks"
        if not self.path.is_dir():
            what = "is a file, not a folder" if self.path.exists() else "does not exist"
            raise NoRun(f"{self.path} {what}; {use}")
        if not any((self.path / name).exists() for name in (STATUS, RECORD, CONFIGURATION, CHECKPOINTS)):
            raise NoRun(f"{self.path} holds no run: no {STATUS}, {RECORD}, {CONFIGURATION} or {CHECKPOINTS}; {use}")
        flaws: list[str] = []
        status = self._mapping(STATUS, load_json, flaws)
        record = self._record
        flaws += _flaws(record)
        configuration = self._mapping(CONFIGURATION, load_yaml, flaws)
        written = record.header.get("configuration")
        figures = self._files(FIGURES, ".png", flaws)
        return Run(
            path=self.path,
            status=status,
            status_time=_changed(self.path / STATUS),
            record_time=_changed(self.path / RECORD),
            header=record.header,
            resumes=record.resumes,
            rows=record.rows,
            columns=record.columns,
            configuration=configuration or (written if isinstance(written, dict) else {}),
            figures=figures,
            checkpoints=self._files(CHECKPOINTS, ".h5", flaws),
            flaws=flaws,
        )

    def _mapping(self, name: str, load, flaws: list[str]) -> dict[str, Any]:
        """Content of a file that holds names and values; empty, with a flaw noted, if it is not to be had."""
        try:
            content = load(read_regular(self.path / name).decode("utf-8"))
        except FileNotFoundError:
            flaws.append(f"no {name}")
        except OSError as error:
            flaws.append(f"{name} cannot be read: {error.strerror}")
        except (ValueError, yaml.YAMLError):
            flaws.append(f"{name} is damaged or half-written")
        else:
            if isinstance(content, Mapping):
                return {str(key): value for key, value in content.items()}
            flaws.append(f"{name} is damaged or half-written")
        return {}

    def _files(self, folder: str, suffix: str, flaws: list[str]) -> list[Path]:
        found: list[Path] = []
        with contextlib.suppress(OSError):
            found = sorted(path for path in (self.path / folder).iterdir() if path.suffix == suffix and path.is_file())
        if not found:
            flaws.append(f"no {folder}")
        return found


def _flaws(record: RecordReader) -> list[str]:
    """Read on; what is missing or damaged."""
    try:
        record.read()
    except FileNotFoundError:
        return [f"no {RECORD}"]
    except OSError as error:
        return [f"{RECORD} cannot be read: {error.strerror}"]
    flaws = [] if record.header else [f"{RECORD} has no header"]
    if count := len(record.damaged):
        flaws.append(f"{RECORD}: {count} damaged {'line' if count == 1 else 'lines'} left out")
    if record.skipped:
        flaws.append(f"{RECORD} is long: {record.skipped / 1e6:,.0f} MB between its first line and its end left out")
    return flaws


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


_KINDS = {"int": "an int", "float": "a float"}


class CommandParser(ArgumentParser):
    """Raises a `ValueError` for what argparse would end the process with, and says which value would work."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{_better(self, ' '.join(message.split()))}\ntry {self.prog} --help")


def command_parser(command: str, usage: str, description: str, epilog: str | None = None) -> CommandParser:
    """Parser of `xbraid-py COMMAND USAGE`."""
    prog = f"xbraid-py {command}"
    return CommandParser(prog, f"%(prog)s {usage}", description=description, epilog=epilog, allow_abbrev=False)


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
