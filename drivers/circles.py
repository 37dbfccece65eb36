"""Co-centric circles: a very deep and very thin residual network, trained by MG/OPT in depth (paper 000).

    y_0 = Q x,   y_{k+1} = y_k + h s(W_k y_k + b_k),  k = 0 .. K-1,  h = T/K,  s the ReLU,
    L = mean cross entropy(W_K y_K + b_K) + beta 2^(L-l) (|W|^2 + |b|^2 + |Q|^2),

minimized over W, b and Q by cycles over networks of K, K/2, K/4, ... layers, until every validation point is
classified rightly. Try

    python drivers/circles.py
    python drivers/circles.py --mgopt.schedule="[{1}]"
    python drivers/circles.py --mgopt.full_multigrid=1
    mpirun -n 2 python drivers/circles.py --resume auto
    python drivers/circles.py --smoke --out /tmp/circles
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import MGOptOptions
from xbraid_py.recipes import CirclesOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "num_layers": 64,
        "num_train": 200,
        "num_val": 100,
        "max_cycles": 20,
        "mgrit": MGRIT(max_levels=1),
        "mgopt": MGOptOptions(levels=4),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    return recipes.mgopt.prepare(options, comm, "circles")


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
