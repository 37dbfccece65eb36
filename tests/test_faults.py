"""The short version of the fault injection, so that it stays alive: `make faults` is the long one."""

import json

import pytest
from processes import PROJECT


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_few_faults(run_job):
    done = run_job([PROJECT / "tests" / "faults" / "run.py", "--quick"], timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 2 and found["truncations"] == 5 and found["bit_flips"] == 10
    assert not any(found[name] for name in ("hangs", "wrong", "lost", "crashes"))
