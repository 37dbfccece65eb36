"""What the benchmarks share: one thread a rank, the peaks problem, interleaved timings, jobs, the last line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

# Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).resolve().parent.parent / "drivers"))  # where the studies are

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data import peaks
from xbraid_py.mgrit import MGRIT
from xbraid_py.problem.options import DenseResNetOptions
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization

torch.set_num_threads(1)

SERIAL = MGRIT(max_levels=1)
_MARK = "row "


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of the quotients within the rounds of one interleaved run."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def __str__(self):
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def problem(
    comm: Communicator,
    options: MGRIT,
    samples: int,
    *,
    seed: int = 0,
    width: int = 8,
    regularization: Regularization | None = None,
    replicas: int = 1,
) -> Problem:
    """The peaks job's problem (T=5, float64) with states and adjoints by the given solver."""
    train, _ = peaks.generate(samples, peaks.NUM_CLASSES, seed)
    return Problem(
        features=train.features,
        labels=train.labels,
        num_classes=train.num_classes,
        architecture=DenseResNetOptions(width=width),
        regularization=Regularization() if regularization is None else regularization,
        forward=options,
        adjoint=options.for_adjoint(),
        comm=comm,
        replicas=replicas,
    )


def interleaved(bodies: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each body in each round.

    A round calls all of them, in turns forwards and backwards: what slows the machine down for a while meets all. Each
    is called twice and the second call counts, as in a training, where each call follows one of the same.
    """
    found: dict[str, list[float]] = {name: [] for name in bodies}
    for number in range(rounds):
        for name in list(bodies)[:: -1 if number % 2 else 1]:
            bodies[name]()
            start = time.perf_counter()
            bodies[name]()
            found[name].append(time.perf_counter() - start)
    return found


def mpirun() -> str:
    """The launcher beside this Python, else the one on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("error: no mpirun beside this Python nor on the path; install the extra mpi")
    return found


def job(script: str, ranks: int, *arguments: object) -> dict:
    """Run `script` on so many ranks; what its rank 0 has handed to `report`. One rank needs no launcher."""
    launcher = [mpirun(), "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, "-m", "mpi4py", script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with status {done.returncode}")
    rows = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    return json.loads(rows[-1].removeprefix(_MARK))


def report(row: dict) -> None:
    """Hand a row to the program that has started this job."""
    print(_MARK + json.dumps(row), flush=True)


def integers(text: str) -> list[int]:
    """Of a list such as 256,1024."""
    return [int(word) for word in text.split(",")]


def finish(name: str, figures: Mapping[str, float]) -> None:
    """The last line of a benchmark."""
    print(json.dumps({"benchmark": name, "figures": dict(figures)}), flush=True)
