"""Memory: sizes that no machine has, said by a sentence that names the option, and what is freed given back."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from xbraid_py.comm import Communicator
from xbraid_py.run.options import flat, text, to_dict

T = TypeVar("T")

# By these words torch says that there is too little memory, of the processor or of a device, or that a size has more
# than 64 bits.
_WORDS = re.compile("allocate memory|out of memory|overflow", re.IGNORECASE)


def give_back() -> None:
    """Hand what is free back to the system: what the allocator keeps lies in pieces of no use to others (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def require(needed: int) -> None:
    """Raise `MemoryError` if so many bytes are more than this machine has, before they are asked for piece by piece."""
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise MemoryError(f"{needed} bytes")


def within(setup: Callable[[Any, Communicator], T], options: Any, comm: Communicator) -> T:
    """What a set-up returns; a `ValueError` that names an option, if it finds too little memory."""
    try:
        return setup(options, comm)
    except (MemoryError, RuntimeError, TypeError) as error:
        problem = said(error, options)
        if problem is None:
            raise
        raise ValueError(problem) from error


def said(error: Exception, options: Any) -> str | None:
    """What to say of an error to which too little memory has led; None of any other.

    It names the number that is most above its default.
    """
    found = str(error)
    if not isinstance(error, MemoryError) and not _WORDS.search(found):
        return None
    amount = re.search(r"[\d.]+ (bytes|[KMGTPE]iB)", found)
    name, value, usual = _most(flat(to_dict(options)), flat(to_dict(type(options)())))
    needs = f"{amount[0]} of memory at once, more than there is" if amount else "more memory than there is"
    return f"{name}={text(value)} needs {needs}; use a smaller one, such as {text(usual)}"


def _most(given: dict[str, Any], usual: dict[str, Any]) -> tuple[str, Any, Any]:
    """The number that is above its default by the largest factor: name, value and default."""
    factors = {name: _size(value) / max(_size(usual.get(name)), 1.0) for name, value in given.items()}
    name = max(factors, key=factors.__getitem__)
    default = usual.get(name)
    return name, given[name], 1 if default is None else default


def _size(value: Any) -> float:
    if isinstance(value, list):
        return max(map(_size, value), default=0.0)
    return abs(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
