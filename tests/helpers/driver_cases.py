"""Runs drivers/peaks.py several times in one job: python driver_cases.py CASES.json, a list of [name, words].

Each case leaves NAME_SIZE_RANK.status, .out and .err: the exit status, and what was printed on that rank. The job
ends with the status of the last case. Most of a short job's time is the import of torch: this way it is paid once.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

from processes import PROJECT

from xbraid_py.comm import world

DRIVER = PROJECT / "drivers" / "peaks.py"


def run(words: list[str], printed: Path) -> int:
    """Exit status of the driver; its standard output and error go to two files."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    for number, suffix in ((1, ".out"), (2, ".err")):
        target = os.open(printed.with_suffix(suffix), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    sys.argv = [str(DRIVER), *words]
    try:
        runpy.run_path(str(DRIVER), run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code
    finally:
        signal.alarm(0)  # of a driver that expects its process to end
        sys.stdout.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def main(cases: Path) -> int:
    comm, status = world(), 0
    for name, words in json.loads(cases.read_text()):
        printed = cases.parent / f"{name}_{comm.size}_{comm.rank}"
        status = run(words, printed)
        printed.with_suffix(".status").write_text(str(status))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
