"""Options of the jobs of MG/OPT in depth, and their problems; torch is not loaded for the options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import LevelOptions, MGOptOptions
from xbraid_py.problem.options import DenseResNetOptions
from xbraid_py.problem.regularization import Regularization
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    import torch

    from xbraid_py.data.dataset import Dataset
    from xbraid_py.data.mnist import Mnist
    from xbraid_py.multilevel.depth.mgopt import MGOpt
    from xbraid_py.problem.portions import Samples
    from xbraid_py.problem.problem import PerceptronProblem


@dataclass(frozen=True, kw_only=True)
class MGOptRunOptions(RunOptions):
    """A job of MG/OPT in depth.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    seed
        Of samples, their order and initial weights.
    dtype
        Of weights and states.
    beta
        Tikhonov regularization of the finest network.
    goal
        Validation accuracy at which the run ends.
    max_cycles
        End after so many cycles, whatever the accuracy.
    max_work
        End after as many cycles as so many work units suffice for, if these are fewer.
    validate_every
        Cycles between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    data_dir
        Folder of the files of a data set.
    network
        The network.
    mgopt
        Levels, transfers and optimizers.
    mgrit
        Solver of the states; that of the plan if nothing of it is given.
    replicas
        Copies of the network that share the samples, each on as many ranks; those of the plan if not given.
    plan
        Choose solver and replicas by rule, or measure this machine first (measured).
    """

    num_layers: int = 2048
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float64"
    beta: float = 1e-4
    goal: float = free(1.0)
    max_cycles: int = free(300)
    max_work: float | None = free(None)
    validate_every: int = free(1)
    data_dir: Path | None = free(None)
    network: DenseResNetOptions = DenseResNetOptions(width=3, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions()
    mgrit: MGRIT | None = None
    replicas: int | None = free(None)
    plan: Literal["rule", "measured"] = free("rule")

    def __post_init__(self):
        super().__post_init__()
        self.require_least(100, max_cycles=1, validate_every=1)
        if self.max_work is not None and not 0.0 < self.max_work < float("inf"):
            raise ValueError(f"max_work={self.max_work} must be positive and finite; use 400")
        if not 0.0 < self.goal <= 1.0:
            raise ValueError(f"goal={self.goal} must be above 0 and at most 1; use 0.93")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-4")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        return getattr(torch, self.dtype)

    @abstractmethod
    def start(self, comm: Communicator) -> tuple[MGOpt, Samples, dict[str, Any]]:
        """The method at its beginning, the samples of the validation, and what else `DepthTraining` is told.

        Reads files, sends no message.
        """

    def problem(self, samples: Samples, num_classes: int, comm: Communicator) -> PerceptronProblem:
        """A problem as in paper 000: Tikhonov beta |.|^2 on all weights, in the type of the features."""
        from xbraid_py.problem.problem import PerceptronProblem

        features, labels = samples
        return PerceptronProblem(
            features=features,
            labels=labels,
            num_classes=num_classes,
            architecture=self.network,
            # beta |.|^2 is gamma/2 |.|^2 with gamma = 2 beta.
            regularization=Regularization(2 * self.beta, 0.0, 2 * self.beta, "sum"),
            forward=self.solver,
            adjoint=self.solver.for_adjoint(),
            comm=comm,
            dtype=features.dtype,
            replicas=self.replicas or 1,
        )

    @property
    def solver(self) -> MGRIT:
        """Options of the solves; layer after layer where there is neither an option nor a plan."""
        return self.mgrit or MGRIT(max_levels=1)

    @property
    @abstractmethod
    def batch(self) -> int:
        """Samples that are propagated together."""

    @abstractmethod
    def hold(self, comm: Communicator) -> None:
        """Read the data and note what they are (`comm.agreement.hold`); sends no message."""


@dataclass(frozen=True, kw_only=True)
class CirclesOptions(MGOptRunOptions):
    """The circles job.

    Parameters
    ----------
    num_train
        Training points.
    num_val
        Validation points.
    sampling
        Of the points: balanced classes with a gap between them, or uniform in the square.
    """

    num_train: int = 2000
    num_val: int = 1000
    sampling: Literal["balanced", "square"] = "balanced"
    out: Path = free(Path("runs/circles"))

    @property
    def batch(self) -> int:
        """See `MGOptRunOptions`."""
        return self.num_train

    def hold(self, comm: Communicator) -> None:
        """See `MGOptRunOptions`."""
        for name, points in zip(("training points", "validation points"), self._points(), strict=True):
            hold(comm, name, points.features, points.labels)

    def _points(self) -> tuple[Dataset, Dataset]:
        from xbraid_py.data import circles

        return circles.generate(self.num_train, self.num_val, self.seed, self.sampling, self.torch_dtype)

    def start(self, comm: Communicator) -> tuple[MGOpt, Samples, dict[str, Any]]:
        """See `MGOptRunOptions`."""
        from xbraid_py.data import circles
        from xbraid_py.multilevel.depth.mgopt import MGOpt

        train, validation = self._points()
        problem = self.problem((train.features, train.labels), train.num_classes, comm)
        method = MGOpt(problem, self.num_layers, self.mgopt)
        return method, (validation.features, validation.labels), {"plane": circles.class_of}


@dataclass(frozen=True, kw_only=True)
class MnistColumnsOptions(MGOptRunOptions):
    """The job of MNIST by MG/OPT.

    Parameters
    ----------
    batch_size
        Images of a minibatch, one for each cycle; 0 takes all images in every cycle.
    portion
        With batch_size=0, images that are propagated together.
    scaling
        Of the pixels: in [0, 1] less the mean of each (centered), in [0, 1] (unit), or of mean 0 and standard
        deviation 1 (standard).
    num_train
        Take only the first so many training images.
    num_test
        Take only the first so many test images, for the validation.
    """

    batch_size: int = 1000
    portion: int = 2000
    scaling: Literal["centered", "unit", "standard"] = "centered"
    num_train: int | None = None
    num_test: int | None = None
    dtype: Literal["float64", "float32"] = "float32"
    beta: float = 1e-5
    goal: float = free(0.93)
    max_cycles: int = free(2000)
    validate_every: int = free(5)
    checkpoint_every: int = free(100)
    out: Path = free(Path("runs/mgopt_mnist"))
    network: DenseResNetOptions = DenseResNetOptions(width=10, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions(optim=LevelOptions(learning_rate=(0.01,)))

    @property
    def batch(self) -> int:
        """See `MGOptRunOptions`."""
        return self.batch_size or self.portion

    def __post_init__(self):
        super().__post_init__()
        self.require_least(2000, portion=1)
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 0; use 1000, or 0 for all images")
        if self.scaling not in ("centered", "unit", "standard"):
            raise ValueError(f"scaling={self.scaling!r} must be centered or unit or standard; use centered")

    def hold(self, comm: Communicator) -> None:
        """See `MGOptRunOptions`."""
        data = _mnist(self.data_dir)
        hold(comm, "training images", data.train_images, data.train_labels)
        hold(comm, "test images", data.test_images, data.test_labels)

    def start(self, comm: Communicator) -> tuple[MGOpt, Samples, dict[str, Any]]:
        """See `MGOptRunOptions`."""
        from xbraid_py.data import mnist
        from xbraid_py.data.dataset import Batches
        from xbraid_py.multilevel.depth.mgopt import MGOpt

        data = _mnist(self.data_dir)
        train, test = mnist.columns(data, self.scaling, self.torch_dtype, self.num_train, self.num_test)
        portions = None
        batches: Callable[[int], Samples] | None = None
        if self.batch_size:
            order = Batches(len(train), self.batch_size, self.seed)
            epoch = lru_cache(1)(order.epoch)

            def drawn(cycle: int) -> Samples:
                return train.samples(epoch(cycle // len(order))[cycle % len(order)])

            batches, first = drawn, drawn(0)
        else:
            portions = train.portions(self.portion)
            first = portions[0]
        method = MGOpt(self.problem(first, mnist.NUM_CLASSES, comm), self.num_layers, self.mgopt, portions)
        return method, test.samples(), {"batches": batches}


@lru_cache(1)  # a process of a study makes many runs
def _mnist(folder: Path | None) -> Mnist:
    from xbraid_py.data import mnist

    return mnist.load(folder)
