"""A classification job: options, nested iteration on a data set, its record, checkpoints and screen.

What `drivers/peaks.py` and `drivers/indian_pines.py` have in common. A driver makes a subclass of the options, says how
its data are read, and what it does with the trained network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data.dataset import Dataset
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration, NestedOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.planner import Workload, recommend
from xbraid_py.problem.network import InitialScales
from xbraid_py.problem.problem import DenseResNetOptions, Problem
from xbraid_py.problem.regularization import Regularization
from xbraid_py.recipes.classification_training import Training, finished_accuracy, prepare
from xbraid_py.run.folder import RunFolder, claim
from xbraid_py.run.options import from_dict, to_dict
from xbraid_py.run.progress import Progress, setup_logging
from xbraid_py.run.resume import read_resumed, resumed_configuration
from xbraid_py.run.status import mark_ended
from xbraid_py.run.tensorboard import require_tensorboard, with_events

# What may differ between a run and its continuation: where it writes, and what it shows.
_FREE = ("out", "resume", "convert_dtype", "smoke", "compare", "plan")
_FREE += ("checkpoint_every", "keep", "validate_every", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions:
    """A classification job.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    seed
        Of the data and of the initial weights.
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
        The one-shot optimizer.
    mgrit
        Solver of the states.
    adjoint_iter
        Iterations of the adjoint solves; as mgrit.max_iter if not given.
    adjoint_tol
        Tolerance of the adjoint solves; as mgrit.tol, or the cycle's, if not given.
    tensorboard
        Write event files for TensorBoard as well, into the folder tensorboard of the out folder.
    plan
        Measure this machine first, and take the solver that is predicted to be fastest (auto) instead of mgrit's.
    """

    num_layers: int = 64
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float64"
    out: Path = Path("runs/classification")
    resume: str | None = None
    convert_dtype: bool = False
    checkpoint_every: int = 20
    keep: int = 3
    validate_every: int = 5
    compare: bool = False
    smoke: bool = False
    network: DenseResNetOptions = DenseResNetOptions()
    initial: InitialScales = InitialScales()
    regularization: Regularization = Regularization()
    nested: NestedOptions = NestedOptions()
    optim: OneShotOptions = OneShotOptions()
    mgrit: MGRIT = MGRIT()
    adjoint_iter: int | None = None
    adjoint_tol: float | None = None
    tensorboard: bool = False
    plan: Literal["auto"] | None = None

    def __post_init__(self):
        for name in ("checkpoint_every", "keep", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")
        for name, good in (("adjoint_iter", "1"), ("adjoint_tol", "1e-6, or 0 for a fixed number of iterations")):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {good}")
        self.nested.depths(self.num_layers)
        self.nested.splines(self.network.splines)

    @property
    def adjoint(self) -> MGRIT:
        """Options of the adjoint solves."""
        return self.mgrit.for_adjoint(self.adjoint_iter, self.adjoint_tol)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    def problem(self, train: Dataset, comm: Communicator) -> Problem:
        """The problem of training this network on these data."""
        return Problem(
            features=train.features,
            labels=train.labels,
            num_classes=train.num_classes,
            architecture=self.network,
            regularization=self.regularization,
            forward=self.mgrit,
            adjoint=self.adjoint,
            comm=comm,
            dtype=self.torch_dtype,
        )

    def run_of(self, problem: Problem, nested: NestedOptions) -> NestedIteration:
        """Nested iteration on a problem by a schedule."""
        return NestedIteration(
            problem, self.num_layers, options=nested, one_shot=self.optim, scales=self.initial, seed=self.seed
        )


def prepare_job(
    options: ClassificationOptions,
    comm: Communicator,
    load: Callable[[], tuple[Dataset, Dataset]],
    finish: Callable[[NestedIteration, RunFolder], Mapping[str, Any]],
) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : ClassificationOptions
    comm : Communicator
    load : callable
        Reads the training and the validation samples, features in the dtype of the options; sends no message.
    finish : callable
        Is called on all ranks with the trained nested iteration and the open folder: draws pictures. What it returns
        on rank 0 goes into the record, as an object of kind "summary", if there is anything.

    Raises
    ------
    ValueError, OSError
        Whatever is wrong with options, data or folder; on every rank, or on rank 0 alone.
    """
    setup_logging(comm)
    if options.tensorboard:
        require_tensorboard()
    folder = claim(options.out, comm)
    train, validation = load()
    if options.plan is None:
        return _training(options, folder, train, validation, finish)
    written = resumed_configuration(options.resume, options.out)
    if written is not None and "mgrit" in written:
        # A job goes on as it was planned.
        planned = replace(options, mgrit=from_dict(MGRIT, written["mgrit"]))
        return _training(planned, folder, train, validation, finish)
    _training(options, folder, train, validation, finish)  # what else may be wrong is said before measuring

    def planned_run() -> None:
        planned = replace(options, mgrit=_plan(options, train, comm))
        _training(planned, folder, train, validation, finish)()

    return planned_run


def _plan(options: ClassificationOptions, train: Dataset, comm: Communicator) -> MGRIT:
    """The solver that is predicted to be fastest on this machine."""
    workload = Workload(
        num_layers=options.num_layers,
        batch=train.num_samples,
        architecture=options.network,
        dtype=options.torch_dtype,
        num_features=train.num_features,
        num_classes=train.num_classes,
        optim=options.optim,
    )
    return recommend(workload, comm)


def _training(options, folder: RunFolder, train: Dataset, validation: Dataset, finish) -> Callable[[], None]:
    comm = folder.comm
    problem = options.problem(train, comm)
    schedules = {"nested": options.nested}
    if options.compare:
        schedules["non-nested"] = options.nested.non_nested()
    runs = {name: options.run_of(problem, nested) for name, nested in schedules.items()}
    configuration = to_dict(options)
    resumed = read_resumed(options.resume, options.out, runs, configuration, _FREE, options.convert_dtype)

    def run() -> None:
        if resumed.keys() == runs.keys() and all(snapshot.is_final for snapshot in resumed.values()):
            if comm.rank == 0:
                mark_ended(options.out, "finished", "")  # unless it was killed in its last moments, it has said so
                print(f"the run in {options.out} is finished; to train again, start without --resume")
                _print_accuracy(finished_accuracy(options.out))
            return
        prepare(options.out, comm, runs, resumed)
        updates = [sum(nested.updates) for nested in schedules.values()]
        done = sum(snapshot.next_record for snapshot in resumed.values())
        # TensorBoard drops what follows an update in the curves of all runs: those that are over come to an end there.
        goes_on = min((snapshot.next_record for snapshot in resumed.values()), default=0)
        with (
            folder.open(configuration, sum(updates), max(0, done - 1), append=bool(resumed)),
            with_events(folder, options.tensorboard, configuration, goes_on) as record,
            Progress(comm, sum(updates) + len(updates), done=done) as progress,  # the ends are shown as well
        ):
            training = Training(
                folder=record,
                progress=progress,
                validation=(validation.features, validation.labels),
                configuration=configuration,
                checkpoint_every=options.checkpoint_every,
                validate_every=options.validate_every,
                keep=options.keep,
            )
            accuracy = training.run_all(runs, resumed)
            summary = finish(runs["nested"], folder)
            if summary:
                record.write({"kind": "summary", **summary})
        if comm.rank == 0:
            _print_accuracy(accuracy)

    return run


def _print_accuracy(accuracy: float | None) -> None:
    """The last line of a run."""
    if accuracy is not None:
        print(f"final validation accuracy: {100 * accuracy:.2f} %", flush=True)
