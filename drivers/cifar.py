"""CIFAR-10, CIFAR-100 and STL-10 by multi-level residual networks (paper 003): shallow first, doubled in depth twice.

    Y_{j+1} = Y_j + h F(Y_j, theta_j),    F two times batch normalization, ReLU and a 3x3 convolution,

in three stages; cycles of 60, 50 and 50 epochs, in each of which the learning rate falls along a cosine. The multilevel
model begins with 2-2-2 blocks and h=1, and doubles its blocks and halves h for every further cycle; first and last have
the blocks of its first and of its last cycle all the time. Tables 3 and 4 and figure 6 are at the end. Try

    python drivers/cifar.py
    python drivers/cifar.py --data=cifar100 --wide --models=multilevel --seeds=0,1,2
    python drivers/cifar.py --device=cuda --precision=bfloat16 --channels_last
    mpirun -n 2 python drivers/cifar.py --train_images=5000 --epochs=6,5,5 --resume auto
    python drivers/cifar.py --smoke --out /tmp/cifar
"""

from __future__ import annotations

from collections.abc import Callable

from studies import multi_level

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.recipes import ImageRunOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "train_images": 100,
        "test_images": 50,
        "filters": (4, 8, 16),
        "epochs": (2, 1, 1),
        "eta_max": 0.1,
        "batch_size": 25,
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the runs, one after the other."""
    samples = options.samples()
    options.check(samples, comm.size)
    runs = [recipes.images.prepare(one, samples, comm) for one in options.runs]

    def run() -> None:
        if comm.rank == 0:
            print(samples.said, flush=True)
        for each in runs:
            each()
        multi_level.outcome.write_outcome(options, comm)

    return run


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
