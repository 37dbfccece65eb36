"""Options of a classification job; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from xbraid_py.comm import Communicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.optim.options import OneShotOptions
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.regularization import Regularization
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    import torch

    from xbraid_py.data.dataset import Dataset
    from xbraid_py.multilevel.depth.nested import NestedIteration
    from xbraid_py.problem.problem import Problem


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(RunOptions):
    """A classification job.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    seed
        Of the data and of the initial weights.
    dtype
        Of weights and states.
    convert_dtype
        Go on from a checkpoint of the other dtype as well.
    validate_every
        Updates between two validations.
    compare
        Train the deep network alone as well, with as much work: a run of its own in the folder non-nested of the out
        folder, with pictures of both.
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
        Solver of the states; that of the plan if nothing of it is given.
    adjoint_iter
        Iterations of the adjoint solves; as mgrit.max_iter if not given.
    adjoint_tol
        Tolerance of the adjoint solves; as mgrit.tol, or the cycle's, if not given.
    replicas
        Copies of the network that share the samples, each on as many ranks; those of the plan if not given.
    plan
        Choose the solver and the replicas by rule, from the sizes of the problem and the number of ranks, so that the
        same command gives the same numbers on any machine; or measure this machine first (measured).
    """

    num_layers: int = 64
    seed: int = 0
    dtype: Literal["float64", "float32"] = field(default="float64", metadata={"instead": "--convert_dtype"})
    convert_dtype: bool = free(False)
    validate_every: int = free(5)
    compare: bool = free(False)
    network: DenseResNetOptions = DenseResNetOptions()
    initial: InitialScales = InitialScales()
    regularization: Regularization = Regularization()
    nested: NestedOptions = NestedOptions()
    optim: OneShotOptions = OneShotOptions()
    mgrit: MGRIT | None = None
    adjoint_iter: int | None = None
    adjoint_tol: float | None = None
    replicas: int | None = free(None)
    plan: Literal["rule", "measured"] = free("rule")

    def __post_init__(self):
        super().__post_init__()
        self.require_least(5, validate_every=1)
        self.require_least(1, replicas=1)
        for name, good in (("adjoint_iter", "1"), ("adjoint_tol", "1e-6, or 0 for a fixed number of iterations")):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {good}")
        self.nested.depths(self.num_layers)
        self.nested.splines(self.network.splines)

    @property
    def free(self) -> set[str]:
        """See `RunOptions`; the dtype is free if numbers of the other one are converted."""
        return super().free | ({"dtype"} if self.convert_dtype else set())

    @property
    def solver(self) -> MGRIT:
        """Options of the state solves; the lagged cycle where there is neither an option nor a plan."""
        return self.mgrit or MGRIT()

    @property
    def adjoint(self) -> MGRIT:
        """Options of the adjoint solves; `ValueError` if the cycle needs more iterations than asked for."""
        if self.adjoint_iter == 0 and self.solver.cycle == "lagged":
            raise ValueError("adjoint_iter=0 must be at least 1 in a lagged cycle; use 1")
        return self.solver.for_adjoint(self.adjoint_iter, self.adjoint_tol)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        return getattr(torch, self.dtype)

    def problem(self, train: Dataset, comm: Communicator) -> Problem:
        """The problem of training this network on these data."""
        from xbraid_py.problem.problem import Problem

        return Problem(
            features=train.features,
            labels=train.labels,
            num_classes=train.num_classes,
            architecture=self.network,
            regularization=self.regularization,
            forward=self.solver,
            adjoint=self.adjoint,
            comm=comm,
            dtype=self.torch_dtype,
            replicas=self.replicas or 1,
        )

    def run_of(self, problem: Problem, nested: NestedOptions) -> NestedIteration:
        """Nested iteration on a problem by a schedule."""
        from xbraid_py.multilevel.depth.nested import NestedIteration

        return NestedIteration(
            problem, self.num_layers, options=nested, one_shot=self.optim, scales=self.initial, seed=self.seed
        )
