"""The study of training loops over depth: its options, its runs, and how learning rates are chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from studies.study import Parts, Result, Settings, StudyOptions, key

TUNING = 100  # the seed that learning rates are chosen on
PROBLEMS = ("digits", "batches", "text")
BATCHES = {"digits": 50, "batches": 250, "text": 8}
# What a minibatch is used for: an update of all layers, or of as many as there are so far, or a V-cycle with this
# schedule; and whether it has a line search.
LOOPS = (
    ("plain", False),
    ("nested", False),
    ("[(1), 1, {2}]", False),
    ("[(1), 1, {2}]", True),
)
RATES = {
    ("digits", "adam"): (3e-3, 1e-2, 3e-2),
    ("digits", "sgd"): (0.1, 0.3, 1.0),
    ("batches", "sgd"): (0.1, 0.3, 1.0),
    ("text", "adam"): (3e-3, 1e-2, 3e-2),
    ("text", "sgd"): (0.3, 1.0, 3.0),
}
# The value of a validation, and whether more of it is better.
VALUES = {"digits": ("val_accuracy", True), "batches": ("val_accuracy", True), "text": ("val_loss", False)}


@dataclass(frozen=True, kw_only=True)
class DepthStudyOptions(StudyOptions):
    """The study.

    Parameters
    ----------
    problems
        Digits of MNIST by convolutional layers, text of Python's manual by a transformer; batches are the digits on
        minibatches five times as large, by gradient descent alone.
    optimizers
        Of all loops: adam, which is AdamW, and sgd, plain gradient descent as in the paper.
    work
        Work units of a run, one being a gradient of all layers; for all loops alike.
    num_layers
        Of the deepest networks; a multiple of 4.
    width
        Channels of the convolutions; a quarter of the features of the transformer.
    num_train
        Images, and twenty times as many characters.
    data_dir
        Folder of the files of MNIST.
    """

    out: Path = Path("runs/depth_study")
    workers: int = 1
    problems: tuple[str, ...] = PROBLEMS
    optimizers: tuple[str, ...] = ("adam", "sgd")
    work: float = 240.0
    num_layers: int = 16
    width: int = 8
    num_train: int = 10_000
    data_dir: Path | None = None

    def __post_init__(self):
        super().__post_init__()
        for problem in self.problems:
            if problem not in PROBLEMS:
                raise ValueError(f"problems={problem} is none of {', '.join(PROBLEMS)}; use digits")
        for name in self.optimizers:
            if name not in ("adam", "sgd"):
                raise ValueError(f"optimizers={name} is neither adam nor sgd; use adam")
        if not 10.0 <= self.work < float("inf"):
            raise ValueError(f"work={self.work} must be at least 10 and finite; use 240")
        if self.num_layers < 4 or self.num_layers % 4:
            raise ValueError(f"num_layers={self.num_layers} must be a multiple of 4, from 4 on; use 16")
        if self.width < 1 or self.num_train < 100:
            raise ValueError(
                f"width={self.width} and num_train={self.num_train} must be at least 1 and 100; use 8, 10000"
            )

    def cases(self) -> Iterator[Settings]:
        """What is compared, on each problem."""
        common = {name: getattr(self, name) for name in ("work", "num_layers", "width", "num_train")}
        common["data_dir"] = self.data_dir and str(self.data_dir)
        for problem, optimizer, (loop, search) in product(self.problems, self.optimizers, LOOPS):
            if (problem, optimizer) in RATES:
                yield {**common, "problem": problem, "optimizer": optimizer, "loop": loop, "line_search": search}

    def tuning(self, rows: Mapping[str, Result]) -> Parts:
        """Every case with every rate, on a seed of its own, for a third of the work."""
        return {"tuning": [each for case in self.cases() for each in _with_rates(case)]}

    def compared(self, rows: Mapping[str, Result]) -> Parts:
        """Every case with the best rate, on all seeds."""
        found = []
        for seed, case in product(range(self.seeds), self.cases()):
            best = max((rows[key(each)] for each in _with_rates(case)), key=merit)
            found.append({**case, "learning_rate": best["settings"]["learning_rate"], "seed": seed})
        return {"compared": found}


def _with_rates(case: Settings) -> list[Settings]:
    rates = RATES[case["problem"], case["optimizer"]]
    return [{**case, "work": case["work"] / 3, "learning_rate": rate, "seed": TUNING} for rate in rates]


def merit(row: Result) -> float:
    """How good a run ends: the greater the better; failed ones are worst."""
    name, is_more = VALUES[row["settings"]["problem"]]
    value = row["result"][name] if "result" in row else math.nan
    return -math.inf if math.isnan(value) else value if is_more else -value
