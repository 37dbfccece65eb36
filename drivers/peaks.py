"""Peaks: a deep residual network, trained in parallel over its layers by nested iteration.

    u_0 = s(W_in y + b_in),   u_{n+1} = u_n + h s(W_n u_n + b_n),  n = 0 .. N-1,  h = T/N,
    J = mean cross entropy(W_out u_N + b_out) + regularization,

minimized over all W and b, first with few layers, then with twice as many, and so on (paper 001). Try

    mpirun -n 4 python drivers/peaks.py
    mpirun -n 4 python drivers/peaks.py --resume auto
    python drivers/peaks.py --smoke --out /tmp/peaks
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xbraid_py.comm import Communicator
from xbraid_py.data import peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.multilevel.depth.nested import NestedIteration, NestedOptions
from xbraid_py.recipes.classification import ClassificationOptions, prepare_job
from xbraid_py.run.folder import RunFolder
from xbraid_py.run.launch import launch

MAP_SIZE = 200


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
    data_dir: Path | None = None
    out: Path = Path("runs/peaks")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The peaks job in seconds."""

    num_layers: int = 32
    num_train: int = 500
    num_val: int = 500
    checkpoint_every: int = 5
    validate_every: int = 1
    nested: NestedOptions = NestedOptions(refinements=1, updates=(12, 8))


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""

    def load() -> tuple[Dataset, Dataset]:
        if options.data_dir is not None:
            return peaks.load(options.data_dir, dtype=options.torch_dtype)
        return peaks.generate(options.num_train, options.num_val, options.seed, options.torch_dtype)

    return prepare_job(options, comm, load, draw)


def draw(run: NestedIteration, folder: RunFolder) -> dict:
    """The pictures of a run."""
    classes = run.network.predict(run.weights, peaks.mesh(MAP_SIZE, run.problem.dtype)).reshape(MAP_SIZE, MAP_SIZE)
    if folder.comm.rank == 0:
        from xbraid_py.recipes import pictures as report  # matplotlib takes its time to load: on one rank only

        _, rows = report.read_metrics(folder.metrics)
        report.accuracy_over_work(rows, folder.figures / "accuracy.png")
        report.convergence(rows, folder.figures / "convergence.png")
        true = peaks.class_of(*peaks.mesh(MAP_SIZE).numpy()).reshape(classes.shape)
        report.class_map(classes, true, peaks.class_names(), folder.figures / "classes.png")
    return {}


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
