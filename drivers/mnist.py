"""MNIST: handwritten digits by a deep residual network whose layers are trained in parallel, on minibatches.

    u_0 = opening(image),   u_{n+1} = u_n + h F(u_n, theta_n),  n = 0 .. N-1,  h = T/N,   logits = head(u_N),

F a 3x3 convolution behind GroupNorm and ReLU, or a dense layer. Adam, and a gradient error that is watched. Try

    mpirun -n 4 python drivers/mnist.py
    mpirun -n 4 python drivers/mnist.py --resume auto
    mpirun -n 4 python drivers/mnist.py --variant dense --replicas 2
    python drivers/mnist.py --smoke --exact
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes import MnistOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "num_layers": 8,
        "width": 8,
        "batch_size": 20,
        "max_updates": 8,
        "num_train": 200,
        "num_test": 100,
        "record_every": 1,
        "checkpoint_every": 4,
        "mgrit": MGRIT(cfactor=2, coarse_parts=1, min_coarse=2),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    digits = recipes.digits
    return digits.prepare_digits("digits", "mnist", options, comm, digits.build)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
