"""Runs a script whose files must not grow past a size: `python limit.py BYTES SCRIPT WORDS...`.

A write beyond fails in the middle, as on a disk that is full. The limit comes once MPI has made its own files.
"""

import os
import resource
import runpy
import sys

from xbraid_py.comm import world

world()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
