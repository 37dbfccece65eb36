"""What ranks that are killed would leave on a node: shared memory of MPICH, and files of its launcher.

MPICH and its launcher remove these at the end of a job, which a killed one does not come to. Of other MPI libraries
nothing is known here, and nothing touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from xbraid_py.comm.agreement import launcher_rank

_SHARED, _SEGMENT = Path("/dev/shm"), re.compile(r"mpich_shm_[0-9a-f]+_\d+")
_TEMPORARY, _MAP = Path("/tmp"), re.compile(r"hydra_hwloc_xmlfile_[0-9A-Za-z]{6}")
_LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
# A job makes its files and is seen to have them within so many seconds, even from another container.
_YOUNG = 10.0


def forget_own(process: str = "self") -> None:
    """Take the names of the shared memory that this process has mapped; it is gone with the last process that has it.

    For all ranks, once each knows that the others have been through the start of MPI: nobody opens it by name any more.
    """
    for path in _mapped(process):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_dead(now: float | None = None) -> list[Path]:
    """Remove what dead jobs of this user have left on this node; the files. One rank of a node does it, at the start.

    Shared memory that no process has mapped, and files of the launcher that are older than every launcher there is.
    """
    name = next((name for name in _LOCAL_RANKS if name in os.environ), None)
    if int(os.environ[name]) if name else launcher_rank():
        return []
    old = (time.time() if now is None else now) - _YOUNG
    segments, maps = _ours(_SHARED, _SEGMENT, old), _ours(_TEMPORARY, _MAP, old)
    if not segments and not maps:
        return []
    processes = [path.name for path in Path("/proc").iterdir() if path.name.isdecimal()]
    used = {path for process in processes if segments for path in _mapped(process)}
    starts = [start for process in processes if maps for start in _launcher_start(process)]
    dead = [path for path in segments if path not in used]
    dead += [path for path, written in maps.items() if written < min(starts, default=float("inf")) - 1.0]
    for path in dead:
        with contextlib.suppress(OSError):
            path.unlink()
    return dead


def _ours(folder: Path, name: re.Pattern, old: float) -> dict[Path, float]:
    """Regular files of this user with such a name that were written before a time, and when."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                about = entry.stat(follow_symlinks=False)
                is_ours = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()
                if name.fullmatch(entry.name) and is_ours and about.st_mtime < old:
                    found[Path(entry.path)] = about.st_mtime
    return found


def _mapped(process: str) -> set[Path]:
    """Shared memory of MPICH that a process has mapped, or has open and is about to map."""
    found: set[str] = set()
    with contextlib.suppress(OSError), open(f"/proc/{process}/maps", errors="replace") as lines:
        found.update(line.rstrip("\n").partition("/dev/shm/")[2] for line in lines)
    with contextlib.suppress(OSError):
        for handle in os.scandir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                found.add(os.readlink(handle.path).partition("/dev/shm/")[2])
    return {_SHARED / name for name in found if _SEGMENT.fullmatch(name)}


def _launcher_start(process: str) -> Iterator[float]:
    """When a process of MPICH's launcher was started; nothing for another process."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
        name, _, rest = text.partition("(")[2].rpartition(")")
        if name.startswith(("hydra", "mpiexec", "mpirun")):
            since_boot = int(rest.split()[19]) / os.sysconf("SC_CLK_TCK")
            yield time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
