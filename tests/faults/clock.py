"""Runs a script under a clock that jumps: `python clock.py SEED COUNTER SCRIPT WORDS...`.

The time of day of this process jumps ten times a second, by up to a year forwards or backwards; the monotonic clocks
of the system, which nothing can set, stay as they are. Each jump that is seen appends a byte to the file COUNTER.
"""

import datetime
import os
import random
import runpy
import sys
import time

YEAR = 365 * 86400.0

seed, counter, script = int(sys.argv[1]), sys.argv[2], sys.argv[3]
real = time.time
said = -1


def now() -> float:
    """The wrong time, the same for a tenth of a second."""
    global said
    tick = int(time.monotonic() * 10)
    if tick != said:
        said = tick
        with open(counter, "ab", buffering=0) as file:
            file.write(b".")
    return real() + random.Random(seed * 1_000_003 + os.getpid() + tick).uniform(-YEAR, YEAR)


class WrongDate(datetime.datetime):
    """Dates by the wrong time."""

    @classmethod
    def now(cls, tz=None):
        """The wrong time of day."""
        return cls.fromtimestamp(now(), tz)


time.time = now
time.time_ns = lambda: int(now() * 1e9)
datetime.datetime = WrongDate
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
