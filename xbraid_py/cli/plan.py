"""`xbraid-py plan`: how long a weight update takes on how many ranks; the only command that uses MPI itself."""

from __future__ import annotations

from collections.abc import Sequence


def main(words: Sequence[str]) -> int:
    """Make the plan on the ranks of this job, and end with what `launch` says of it."""
    from xbraid_py.planner.job import DESCRIPTION, Options, setup
    from xbraid_py.run.launch import launch

    launch(Options, setup, words, prog="xbraid-py plan", description=DESCRIPTION)
    return 0
