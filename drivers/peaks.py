"""Peaks: a deep residual network, trained in parallel over its layers by nested iteration.

    u_0 = s(W_in y + b_in),   u_{n+1} = u_n + h s(W_n u_n + b_n),  n = 0 .. N-1,  h = T/N,
    J = mean cross entropy(W_out u_N + b_out) + regularization,

minimized over all W and b, first with few layers, then with twice as many, and so on (paper 001). Try

    mpirun -n 4 python drivers/peaks.py
    mpirun -n 4 python drivers/peaks.py --resume auto
    python drivers/peaks.py --smoke --out /tmp/peaks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xbraid_py import data, recipes  # what is in them is loaded when it is used: a help needs no torch
from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import NestedOptions
from xbraid_py.recipes import ClassificationOptions
from xbraid_py.run.launch import launch
from xbraid_py.run.run_options import free

MAP_SIZE = 200
PRESETS = {
    "smoke": {
        "num_layers": 32,
        "num_train": 500,
        "num_val": 500,
        "checkpoint_every": 5,
        "validate_every": 1,
        "nested": NestedOptions(refinements=1, updates=(12, 8)),
        "mgrit": MGRIT(),  # a small job is to pass through the solver too; the plan for one rank has no coarse level
    }
}


@dataclass(frozen=True, kw_only=True)
class Options(ClassificationOptions):
    """The peaks job.

    Parameters
    ----------
    num_train
        Training points, as many of each class.
    num_val
        Validation points.
    data_dir
        Folder of the published files of points, to be read instead of drawing points.
    """

    num_train: int = 5000
    num_val: int = 5000
    data_dir: Path | None = free(None)
    out: Path = free(Path("runs/peaks"))


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""

    def load() -> tuple[data.Dataset, data.Dataset]:
        if options.data_dir is not None:
            return data.peaks.load(options.data_dir, dtype=options.torch_dtype)
        return data.peaks.generate(options.num_train, options.num_val, options.seed, options.torch_dtype)

    return recipes.classification.prepare_job(options, comm, load, draw, recipe="peaks")


def draw(training: recipes.classification.NestedTraining, rows: list[dict], figures: Path) -> None:
    """The pictures of a run."""
    network, weights = training.method.network, training.method.weights
    classes = network.predict(weights, data.peaks.mesh(MAP_SIZE, network.dtype)).reshape(MAP_SIZE, MAP_SIZE)
    if rows:  # on one rank only
        recipes.classification.curves(rows, figures)
        true = data.peaks.class_of(*data.peaks.mesh(MAP_SIZE).numpy()).reshape(classes.shape)
        recipes.pictures.class_map(classes, true, data.peaks.class_names(), figures / "classes.png")


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
