"""Layer-parallel training of deep residual networks.

The layers of a residual network are time steps; `Solver` propagates states and adjoints through all of them at once
by multigrid in time (`MGRIT`), over the ranks of a `Communicator`. `NestedIteration` trains networks of growing depth
with it. See README.md, and `drivers/peaks.py` for a complete program.
"""

import ctypes
import os

import lazy_loader as lazy

__version__ = "0.2.0"

# The same bits from a matrix product wherever its operands lie in memory and however many go in one call: without it
# results depend on the partition of the layers. Costs nothing measurable; has to be set before MKL is first used.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

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


keep_freed_memory()

# A name is loaded when it is first asked for: what looks at a run from outside needs no torch.
__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
