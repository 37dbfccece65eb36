"""Files and texts from elsewhere, which may hold anything: only regular files, only so many bytes, nothing that grows.

A pipe would be waited for, a device has no end, and a few lines of YAML may stand for millions of values.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MOST_BYTES = 1_000_000  # of a file that is read as a whole
_MOST_YAML = 100_000  # characters; all options of a driver are a few thousand
_MOST_LEVELS, _MOST_GROUPS = 50, 10_000
_MOST_DIGITS = 100
_NUMBER = frozenset("0123456789abcdefABCDEFxo_:.+-")
# Of the library in C where there is one: the same results, ten times as fast.
_LOADERS = {
    False: getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    True: getattr(yaml, "CBaseLoader", yaml.BaseLoader),
}


def open_regular(path: str | os.PathLike, follow: bool = True) -> BinaryIO:
    """Open a file for reading, at once and only if it is a regular one; `OSError` otherwise.

    Without `follow` a symbolic link is none.
    """
    # Without O_NONBLOCK the opening of a pipe waits for somebody who writes; to regular files it does nothing.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "no regular file", os.fspath(path))
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """Content of a regular file of at most so many bytes; `OSError` if it is another one, or longer."""
    with open_regular(path, follow) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", os.fspath(path))
    return content


def tail(path: Path, most: int) -> bytes:
    """The last bytes of a regular file that is no link, at most so many; `OSError` if it is none."""
    with open_regular(path, follow=False) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - most))
        return stream.read(most)


def complete_lines(stream: BinaryIO, most: int) -> Iterator[tuple[bytes, int]]:
    """Lines that have an end, from where the stream is, with their lengths; empty is one of `most` bytes or more.

    What comes after the last end of a line is left out.
    """
    while line := stream.readline(most):
        size = len(line)
        if size == most and not line.endswith(b"\n"):
            while (rest := stream.readline(most)) and not rest.endswith(b"\n"):
                size += len(rest)
            line, size = rest and b"\n", size + len(rest)
        if not line.endswith(b"\n"):
            return
        yield line, size


def load_yaml(content: str, words: bool = False) -> Any:
    """What a YAML text says; with `words` all values are left as they are written.

    Raises `yaml.YAMLError` or `ValueError` if it is none, or longer, deeper or with longer numbers than options have,
    and for anchors and aliases, which options have no use for and which expand to any size.
    """
    if len(content) > _MOST_YAML:
        raise ValueError(f"it has {len(content):,} characters, more than {_MOST_YAML:,}")
    level = 0
    for event in yaml.parse(content, Loader=_LOADERS[words]):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"line {line} has an anchor or an alias ({event.anchor}), which are not taken")
        level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if level > _MOST_LEVELS:
            raise ValueError(f"line {line} is nested more than {_MOST_LEVELS} levels deep")
        value = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if len(value) > _MOST_DIGITS and _NUMBER.issuperset(value):
            raise ValueError(f"line {line} has a number of {len(value)} digits")
    return yaml.load(content, Loader=_LOADERS[words])


def load_json(content: bytes | str) -> Any:
    """What a JSON text says; `ValueError` if it is none, or nested deeper or into more than is ever written here."""
    text: Any = content  # of either kind
    brackets = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    if sum(map(text.count, brackets)) > _MOST_GROUPS:  # each is an object: a short text would fill the memory
        raise ValueError(f"more than {_MOST_GROUPS:,} groups")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not _is_shallow(value, _MOST_LEVELS):
        raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
    return value


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in inner if isinstance(item, dict | list))


def shortened(words: str) -> str:
    """What somebody has given, for a message: whole unless it is very long."""
    return words if len(words) <= 200 else f"{words[:80]}..."
