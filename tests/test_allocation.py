"""Freed memory stays with the process, unless the user has said otherwise."""

import subprocess
import sys

import pytest
from processes import job_environment

# Blocks of the size of a few states, freed and asked for again: how many pages are mapped anew by the last rounds.
BODY = """
import resource, torch, xbraid_py
from xbraid_py import keep_freed_memory
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(8 << 17, dtype=torch.float64) for _ in range(4)]
    del blocks
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(keep_freed_memory(), after - before)
"""


@pytest.mark.parametrize(("variable", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_blocks_are_used_again(variable, kept):
    done = subprocess.run(
        [sys.executable, "-c", BODY], env=job_environment(variable), capture_output=True, text=True, check=True
    )
    chosen, faults = done.stdout.split()
    if chosen == "False" and kept:
        pytest.skip("this C library has no mallopt")
    assert chosen == str(kept)
    assert (int(faults) < 50) == kept, "4 blocks of 8 MB are 8192 pages"
