"""What programs answer before they begin: a help, a wrong option. Nothing that takes long to load is loaded for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from processes import PROJECT, job_environment

from xbraid_py.run import programs

SLOW = {"torch", "numpy", "scipy", "h5py", "matplotlib", "mpi4py"}
PEAKS = "drivers/peaks.py"


def answer(*words, status=0):
    """Output and messages of a command, which loads nothing of that, in no process."""
    told = job_environment({"PYTHONPROFILEIMPORTTIME": "1"})
    job = subprocess.run([sys.executable, *words], env=told, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    lines = job.stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [line for line in lines if not line.startswith("import time:")]
    assert job.returncode == status, said
    assert "xbraid_py" in loaded and not SLOW & loaded
    return job.stdout, said


@pytest.mark.parametrize("name", programs.names())
def test_a_help_is_quick(name):
    page, said = answer(f"drivers/{name}.py", "--help")
    assert said == [] and page.startswith(f"usage: {name}.py [--config FILE]")
    assert all(f"\n  --{option} " in page for option in ("print_config", "smoke", "out"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--nothing", "error: unknown option --nothing; --help lists all options"),
        ("--num_layers=x", "error: --num_layers=x is not an int; use --num_layers=64"),
        ("--nested.refinements=-1", "error: refinements=-1 must be at least 0 and at most 20; use 2"),
    ],
)
def test_so_is_what_is_wrong(word, message):
    page, said = answer(PEAKS, word, status=2)
    assert page == "" and said == [message, "try peaks.py --help"]


def test_so_are_the_options_that_a_job_would_have():
    assert yaml.safe_load(answer(PEAKS, "--smoke", "--print_config")[0])["nested"]["updates"] == [12, 8]


@pytest.mark.parametrize(
    ("words", "begin"), [(["--help"], "usage: xbraid-py COMMAND"), (["run", "peaks", "--help"], "usage: peaks.py")]
)
def test_so_are_those_of_the_command_line(words, begin):
    page, said = answer("-m", "xbraid_py", *words)
    assert page.startswith(begin) and said == []
