"""How this process gives memory back: seldom, since it will ask for as much again."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 32 << 20  # bytes; glibc accepts no more for its mapping threshold


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MB for the next request.

    A solve frees and asks for the same states again and again. Handed back to the system in between, every one of
    their pages has to be cleared and mapped anew: as much work as a layer. Larger blocks still go back at once. Does
    nothing where the user has chosen by `MALLOC_...` variables, and on other C libraries.

    Returns
    -------
    bool
        Whether it was done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_M_TRIM_THRESHOLD, 8 * _LARGE))
