"""One run of the study of multilevel training in width as plain numbers and words, for other processes and records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any

import torch

from studies.width.rows import CURVE
from xbraid_py.data.darcy import Darcy
from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.data.pde_source import PROBLEMS, SampleSource
from xbraid_py.data.poisson import Poisson
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.multilevel.width.transfer import WidthOptions
from xbraid_py.recipes.width import ERRORS, Job, cycles_of
from xbraid_py.recipes.width_networks import WidthNetwork


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the study; by default the paper's two-level method on Poisson's problem, in single precision.

    Parameters
    ----------
    problem
        Poisson, darcy or darcy_public.
    target
        What is to be learned; empty for the solution.
    mesh
        Points in each direction.
    num_train, num_val
        Samples.
    network, widths, channels, kernels, strides
        Kind and sizes, see `WidthNetwork`; empty for those of the paper.
    standardize
        See `Job.of`.
    batch_size
        Samples of a minibatch.
    levels, steps, coarse_steps, method, learning_rate, momentum, weight_decay, eta, gamma, alpha_p, alpha_m
        See `WidthTrainingOptions`.
    rematch_every
        See `WidthTrainingOptions`.
    tau
        Minibatches of the tau correction: same, other, or none for no correction.
    scaling, matching
        See `WidthOptions`.
    max_work
        Work units after which it ends, those of tau not counted, so that runs can be compared in either way.
    validate_every
        Work units between two validations.
    seed
        Of samples, weights and minibatches: all methods of one seed begin alike.
    """

    problem: str = "poisson"
    target: str = ""
    mesh: int = 32
    num_train: int = 9000
    num_val: int = 1000
    network: str = "dense"
    widths: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    standardize: bool = False
    batch_size: int = 200
    levels: int = 2
    steps: int = 4
    coarse_steps: int = 0
    method: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    eta: float = sqrt(2)
    gamma: float = 0.125
    alpha_p: float = 1.0
    alpha_m: float = 0.2
    rematch_every: int = 50
    tau: str = "same"
    scaling: str = "norms"
    matching: str = "greedy"
    max_work: float = 10_000.0
    validate_every: float = 50.0
    seed: int = 0

    def __post_init__(self):
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem={self.problem!r} must be one of {', '.join(PROBLEMS)}; use poisson")
        if self.tau not in ("same", "other", "none"):
            raise ValueError(f"tau={self.tau!r} must be same, other or none; use same")
        for name in ("max_work", "validate_every"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use 50")

    @property
    def options(self) -> WidthTrainingOptions:
        """The options of the training."""
        names = "levels steps coarse_steps method learning_rate momentum weight_decay eta alpha_p alpha_m"
        return WidthTrainingOptions(
            **{name: getattr(self, name) for name in (*names.split(), "rematch_every")},
            gamma=0.0 if self.tau == "none" else self.gamma,
            tau="same" if self.tau == "none" else self.tau,
            pairs=WidthOptions(scaling=self.scaling, matching=self.matching),
        )

    @property
    def layers(self) -> WidthNetwork:
        """The network."""
        sizes = {name: getattr(self, name) or None for name in ("widths", "channels", "kernels", "strides")}
        return WidthNetwork(kind=self.network, **sizes).of(self.problem)

    def source(self, data_dir: str | os.PathLike | None = None) -> SampleSource:
        """Where its samples come from."""
        problems = {"poisson": Poisson, "darcy": Darcy}
        return SampleSource(
            problem=problems[self.problem](mesh=self.mesh) if self.problem in problems else None,
            num_train=self.num_train,
            num_val=self.num_val,
            seed=self.seed,
            target=self.target or None,
            data_dir=data_dir,
        )

    def job(self, data_dir: str | os.PathLike | None = None) -> Job:
        """The run on one rank, ready to go."""
        train, validation = _loaded(self.source(data_dir))
        return Job.of(
            train,
            validation,
            self.layers,
            self.options,
            batch_size=self.batch_size,
            seed=self.seed,
            standardize=self.standardize,
        )

    def cycles(self) -> int:
        """Cycles that it makes."""
        return cycles_of(self.options, self.max_work, count_tau=False)


@lru_cache(maxsize=2)
def _loaded(source: SampleSource) -> tuple[PdeDataset, PdeDataset]:
    """The last samples are kept: the next run of a process often has the same."""
    return source.load(dtype=torch.float32)


def train(settings: Mapping[str, Any], data_dir: str | os.PathLike | None = None) -> dict:
    """Run a `Case`, given as a mapping.

    Parameters
    ----------
    settings : mapping
    data_dir : path-like, optional
        See `SampleSource`.

    Returns
    -------
    dict
        A "curve" of lists of `CURVE` for each validation; "best", the least of each of `ERRORS` (None without an
        auxiliary network); "mean_l2", the validation error of the mean training target; "seconds" and
        "matching_seconds"; and the "widths" of the levels.

    Raises
    ------
    RunError
        If the loss is not finite.
    """
    case = Case(**settings)
    job, curve = case.job(data_dir), []
    for record, found, _ in job.run(case.cycles(), case.validate_every):
        if found is not None:
            numbers = vars(record) | found
            curve.append([_rounded(numbers[name]) for name in CURVE])
    columns = dict(zip(CURVE, zip(*curve, strict=True), strict=True))
    return {
        "best": {name: min((v for v in columns[name] if v is not None), default=None) for name in ERRORS},
        "mean_l2": _rounded(job.mean_error()),
        "seconds": round(record.seconds, 3),
        "matching_seconds": round(record.matching_seconds, 4),
        "widths": record.widths,
        "curve": curve,
    }


def _rounded(value: float | None) -> float | None:
    """Six digits are more than any table shows."""
    return None if value is None else float(f"{value:.6g}")
