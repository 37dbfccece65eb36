"""Peaks: a deep residual network, trained in parallel over its layers by nested iteration.

    u_0 = s(W_in y + b_in),   u_{n+1} = u_n + h s(W_n u_n + b_n),  n = 0 .. N-1,  h = T/N,
    J = mean cross entropy(W_out u_N + b_out) + regularisation,

minimised over all W and b, first with few layers, then with twice as many, and so on (paper 001). Try

    mpirun -n 4 python drivers/peaks.py
    mpirun -n 4 python drivers/peaks.py --resume auto
    python drivers/peaks.py --smoke --out /tmp/peaks
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data import peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.io.launch import launch
from xbraid_py.io.options import from_dict, to_dict
from xbraid_py.io.progress import Progress, setup_logging
from xbraid_py.io.run_checkpoint import read_resumed, resumed_configuration
from xbraid_py.io.run_folder import RunFolder, claim
from xbraid_py.io.training import Training, finished_accuracy, prepare
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import NestedIteration, NestedOptions
from xbraid_py.network import InitialScales
from xbraid_py.objective import Regularization
from xbraid_py.optim import OneShotOptions
from xbraid_py.planner import Workload, recommend
from xbraid_py.problem import Architecture, Problem

# What may differ between a run and its continuation: where it writes, and what it shows.
FREE = ("out", "resume", "convert_dtype", "smoke", "compare", "checkpoint_every", "keep", "validate_every", "plan")
MAP_SIZE = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """The peaks job.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    num_train
        Training points, as many of each class.
    num_val
        Validation points.
    data_dir
        Folder of the published files of points, to be read instead of drawing points.
    seed
        Of points and initial weights.
    dtype
        Of weights and states.
    out
        Folder of the record, the checkpoints and the pictures.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one).
    convert_dtype
        Go on from a checkpoint of the other dtype as well.
    checkpoint_every
        Updates between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    validate_every
        Updates between two validations.
    compare
        Train the deep network alone as well, with as much work, for the pictures.
    smoke
        A run of seconds: other defaults, each of which may still be given.
    network
        The network.
    initial
        Standard deviations of its initial weights.
    regularization
        Terms of the objective besides the loss.
    nested
        Schedule of the refinements.
    optim
        The one-shot optimiser.
    mgrit
        Solver of the states.
    adjoint_iter
        Iterations of the adjoint solves; as mgrit.max_iter if not given.
    adjoint_tol
        Tolerance of the adjoint solves; as mgrit.tol, or the cycle's, if not given.
    plan
        Measure this machine first, and take the solver that is predicted to be fastest (auto) instead of mgrit's.
    """

    num_layers: int = 64
    num_train: int = 5000
    num_val: int = 5000
    data_dir: Path | None = None
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float64"
    out: Path = Path("runs/peaks")
    resume: str | None = None
    convert_dtype: bool = False
    checkpoint_every: int = 20
    keep: int = 3
    validate_every: int = 5
    compare: bool = False
    smoke: bool = False
    network: Architecture = Architecture()
    initial: InitialScales = InitialScales()
    regularization: Regularization = Regularization()
    nested: NestedOptions = NestedOptions()
    optim: OneShotOptions = OneShotOptions()
    mgrit: MGRIT = MGRIT()
    adjoint_iter: int | None = None
    adjoint_tol: float | None = None
    plan: Literal["auto"] | None = None

    def __post_init__(self):
        for name in ("checkpoint_every", "keep", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")
        for name, good in (("adjoint_iter", "1"), ("adjoint_tol", "1e-6, or 0 for a fixed number of iterations")):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {good}")
        self.nested.depths(self.num_layers)

    @property
    def adjoint(self) -> MGRIT:
        """Options of the adjoint solves."""
        return self.mgrit.for_adjoint(self.adjoint_iter, self.adjoint_tol)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The peaks job in seconds."""

    __doc__ = Options.__doc__
    num_layers: int = 32
    num_train: int = 500
    num_val: int = 500
    checkpoint_every: int = 5
    validate_every: int = 1
    nested: NestedOptions = NestedOptions(refinements=1, updates=(12, 8))


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    folder = claim(options.out, comm)
    dtype = getattr(torch, options.dtype)
    if options.data_dir is None:
        data = peaks.generate(options.num_train, options.num_val, options.seed, dtype)
    else:
        data = peaks.load(options.data_dir, dtype=dtype)
    if options.plan is None:
        return training_job(options, folder, *data)
    written = resumed_configuration(options.resume, options.out)
    if written is not None and "mgrit" in written:
        # A job goes on as it was planned.
        return training_job(replace(options, mgrit=from_dict(MGRIT, written["mgrit"])), folder, *data)
    training_job(options, folder, *data)  # what else may be wrong is said before the machine is measured

    def planned() -> None:
        training_job(replace(options, mgrit=plan(options, data[0], comm)), folder, *data)()

    return planned


def plan(options: Options, train: Dataset, comm: Communicator) -> MGRIT:
    """The solver that is predicted to be fastest on this machine."""
    workload = Workload(
        num_layers=options.num_layers,
        batch=len(train.labels),
        architecture=options.network,
        dtype=getattr(torch, options.dtype),
        num_features=len(train.features),
        num_classes=train.num_classes,
        optim=options.optim,
    )
    return recommend(workload, comm)


def training_job(options: Options, folder: RunFolder, train: Dataset, validation: Dataset) -> Callable[[], None]:
    """Check everything, without a message; returns the run."""
    comm = folder.comm
    dtype = getattr(torch, options.dtype)
    problem = Problem(
        features=train.features,
        labels=train.labels,
        num_classes=train.num_classes,
        architecture=options.network,
        regularization=options.regularization,
        forward=options.mgrit,
        adjoint=options.adjoint,
        comm=comm,
        dtype=dtype,
    )
    schedules = {"nested": options.nested}
    if options.compare:
        schedules["non-nested"] = options.nested.non_nested()
    runs = {
        name: NestedIteration(problem, options.num_layers, nested, options.optim, options.initial, options.seed)
        for name, nested in schedules.items()
    }
    configuration = to_dict(options)
    resumed = read_resumed(options.resume, options.out, runs, configuration, FREE, options.convert_dtype)

    def run() -> None:
        if resumed.keys() == runs.keys() and all(snapshot.is_final for snapshot in resumed.values()):
            if comm.rank == 0:
                print(f"the run in {options.out} is finished; to train again, start without --resume")
                print_accuracy(finished_accuracy(options.out))
            return
        prepare(options.out, comm, runs, resumed)
        updates = [sum(nested.updates) for nested in schedules.values()]
        done = sum(snapshot.next_record for snapshot in resumed.values())
        with (
            folder.open(configuration, sum(updates), max(0, done - 1), append=bool(resumed)),
            Progress(comm, sum(updates) + len(updates), done=done) as progress,  # the ends are shown as well
        ):
            training = Training(
                folder=folder,
                progress=progress,
                validation=(validation.features, validation.labels),
                configuration=configuration,
                checkpoint_every=options.checkpoint_every,
                validate_every=options.validate_every,
                keep=options.keep,
            )
            accuracy = training.run_all(runs, resumed)
            nested = runs["nested"]
            classes = nested.network.predict(nested.one_shot.x, peaks.mesh(MAP_SIZE, dtype))
            if comm.rank == 0:
                draw(options.out, classes.reshape(MAP_SIZE, MAP_SIZE))
        if comm.rank == 0:
            print_accuracy(accuracy)

    return run


def print_accuracy(accuracy: float | None) -> None:
    """The last line of a run."""
    if accuracy is not None:
        print(f"final validation accuracy: {100 * accuracy:.2f} %", flush=True)


def draw(out: Path, classes: torch.Tensor) -> None:
    """The pictures of a run."""
    from xbraid_py import report  # matplotlib takes its time to load: on one rank only

    figures = out / "figures"
    _, rows = report.read_metrics(out / "metrics.jsonl")
    report.accuracy_over_work(rows, figures / "accuracy.png")
    report.convergence(rows, figures / "convergence.png")
    true = peaks.class_of(*peaks.mesh(MAP_SIZE).numpy()).reshape(classes.shape)
    report.class_map(classes, true, peaks.class_names(), figures / "classes.png")


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
