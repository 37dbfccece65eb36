"""The programs that come with the library, by name: NAME is `drivers/NAME.py` of the checkout that the library is in.

An installed library has them in its own folder: the build puts `drivers/` into the package.

A run leaves the name of its program, and it is by that name that it goes on: a path in a file may lead anywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_LIBRARY, _CHECKOUT = Path(__file__).resolve().parents[1:3]


def folder() -> Path:
    """Where the programs are."""
    # A folder "drivers" beside an installed library is somebody else's.
    return (_CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else _LIBRARY) / "drivers"


def names() -> list[str]:
    """All names."""
    return sorted(path.stem for path in folder().glob("*.py"))


def path_of(name: str) -> Path | None:
    """The program of that name; None if there is none."""
    return folder() / f"{name}.py" if re.fullmatch(r"\w+", name) and name in names() else None


def name_of(program: str | os.PathLike) -> str:
    """The name of a program, or the absolute path of one that is none of ours."""
    path = Path(os.path.abspath(program))
    own = path_of(path.stem)
    return path.stem if own is not None and path.resolve() == own.resolve() else str(path)
