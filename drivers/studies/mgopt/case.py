"""A run of the study of MG/OPT in depth: its settings are those of a recipe's options, and the name of its problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from studies.study import Settings, of_seeds
from xbraid_py.comm import Communicator
from xbraid_py.problem.options import DenseResNetOptions
from xbraid_py.recipes.options.mgopt import CirclesOptions, MGOptRunOptions, MnistColumnsOptions
from xbraid_py.run.options import from_dict, to_dict
from xbraid_py.run.run_options import free

if TYPE_CHECKING:
    from xbraid_py.multilevel.depth.mgopt import MGOpt
    from xbraid_py.problem.portions import Samples

Case = TypeVar("Case", bound=MGOptRunOptions)


@dataclass(frozen=True, kw_only=True)
class PeaksOptions(MGOptRunOptions):
    """The job on peaks, where the residual weights must be learnt.

    Parameters
    ----------
    num_train
        Training points.
    num_val
        Validation points.
    """

    num_train: int = 1000
    num_val: int = 1000
    beta: float = 1e-5
    out: Path = free(Path("runs/mgopt_peaks"))
    network: DenseResNetOptions = DenseResNetOptions(width=8, T=5.0, activation="relu")

    def start(self, comm: Communicator) -> tuple[MGOpt, Samples, dict[str, Any]]:
        """See `MGOptRunOptions`."""
        from xbraid_py.data import peaks
        from xbraid_py.multilevel.depth.mgopt import MGOpt

        # One draw for both, so that the classes are as frequent in the one as in the other.
        points = peaks.generate(self.num_train + self.num_val, 1, self.seed, self.torch_dtype)[0]
        features, labels = points.features, points.labels
        train = features[:, : self.num_train].contiguous(), labels[: self.num_train]
        unseen = features[:, self.num_train :].contiguous(), labels[self.num_train :]
        method = MGOpt(self.problem(train, points.num_classes, comm), self.num_layers, self.mgopt)
        # A ReLU network with weights N(0, 1) and T=5 multiplies its input by hundreds: they are smaller here.
        return method, unseen, {"scale": 0.1}


PROBLEMS: dict[str, type[MGOptRunOptions]] = {
    "circles": CirclesOptions,
    "mnist": MnistColumnsOptions,
    "peaks": PeaksOptions,
}


def changed(case: Case, changes: Mapping[str, Any]) -> Case:
    """The same run with other options, under names such as "mgopt.levels"."""
    return from_dict(type(case), {**to_dict(case), **changes})


def runs(cases: Iterable[MGOptRunOptions], seeds: Iterable[int], apart: float = 5.0) -> list[Settings]:
    """Settings of runs of one problem: every case with every seed.

    On MNIST a validation costs more than a cycle: they are `apart` work units apart, or a cycle.
    """
    # A study is of one rank, and says of its runs how they are solved.
    cases = [replace(case, mgrit=case.solver) for case in cases]
    (problem,) = (name for name, each in PROBLEMS.items() if type(cases[0]) is each)
    if problem == "mnist":
        cases = [replace(case, validate_every=max(1, round(apart / case.mgopt.steps().work()))) for case in cases]
    return of_seeds(cases, seeds, problem=problem)


def options_of(settings: Mapping[str, Any]) -> MGOptRunOptions:
    """The options that the settings of a run are of."""
    return from_dict(PROBLEMS[settings["problem"]], {k: v for k, v in settings.items() if k != "problem"})
