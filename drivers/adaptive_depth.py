"""Adaptive depth: layers cut in two only where it is worth it, against refinement of all layers.

For each seed five runs of as many updates, all but the last one with the same number on every level:

    uniform    all layers are cut at each refinement, up to num_layers
    adaptive   those with a large indicator
    even       as many as the adaptive run has cut, spread evenly: what the indicator is good for
    fewer      all layers, from a coarser network to about as many layers as the adaptive run ended with
    coarsest   none: the network that the others begin with, but "fewer"

On peaks, or on the digits of MNIST as columns of pixels. Runs that are over are not made again. Try

    python drivers/adaptive_depth.py
    mpirun -n 2 python drivers/adaptive_depth.py --data mnist --out runs/adaptive_mnist
    python drivers/adaptive_depth.py --smoke --out /tmp/adaptive
"""

from __future__ import annotations

from collections.abc import Callable

from studies import adaptive_depth
from studies.adaptive_depth.options import AdaptiveStudyOptions as Options
from studies.study import PAGE, RUNS, together

from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import AdaptiveOptions, NestedOptions
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict

PRESETS = {
    "smoke": {
        "seeds": 2,
        "num_layers": 32,
        "num_train": 200,
        "num_val": 200,
        "validate_every": 2,
        "nested": NestedOptions(updates=(8, 6, 4), adaptive=AdaptiveOptions()),
        "mgrit": MGRIT(max_levels=1),
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if options.data == "mnist":
        adaptive_depth.runs.samples(to_dict(options))  # what is wrong with the files is said now

    def run() -> None:
        with together(options.out, adaptive_depth.runs.train, comm) as make:
            rows = []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                rows += options.runs(seed, make)
            if comm.rank == 0:
                adaptive_depth.page.write(rows, options.out)
                print(f"{len(rows)} runs in {options.out / RUNS}; tables in {options.out / PAGE}", flush=True)

    return run


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
