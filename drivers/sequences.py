"""Sequences: digits read row by row, or pixel by pixel, by a gated recurrent network parallel over its time steps.

    h_{n+1} = h_n + (1 - z_n)(candidate_n - h_n),  n = 0 .. L-1,   logits = head(h_L),

the gate z and the candidate those of a GRU; with `--kind implicit` the step is diagonally implicit. Adam. Try

    mpirun -n 2 python drivers/sequences.py
    mpirun -n 2 python drivers/sequences.py --order pixels --windows 4
    mpirun -n 2 python drivers/sequences.py --length 1024 --resume auto
    python drivers/sequences.py --network torch
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes import SequenceOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "hidden_size": 12,
        "batch_size": 20,
        "max_updates": 8,
        "num_train": 200,
        "num_test": 100,
        "record_every": 1,
        "checkpoint_every": 4,
        "mgrit": MGRIT(tol=0.1),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    prepare, job = recipes.digits.prepare_digits, recipes.sequences
    return prepare("sequences", "sequences", options, comm, job.build, job.SequenceTraining)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
