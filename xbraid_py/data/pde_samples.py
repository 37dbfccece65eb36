"""Samples of a problem on a mesh, drawn and solved in parallel: each rank makes its rows, and all ranks get all.

Shape letters: `B` samples, `C` channels, `n` points in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.data.darcy import Darcy
from xbraid_py.data.dataset import whole_number
from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.data.poisson import Poisson

# By name, as stored files know them.
PROBLEMS = {"poisson": Poisson, "darcy": Darcy}
_SHOWN_EVERY = 20  # samples, each a millisecond or two


class PdeProblem(Protocol):
    """What is asked of a problem: a frozen dataclass of its settings, such as `Poisson` or `Darcy`.

    Attributes
    ----------
    name : str
    version : int
        Changes whenever a seed gives other samples.
    channels, default_channels : tuple of str
        What inputs may hold, and what they hold if nothing is said.
    targets : tuple of str
        Arrays that may be learned; the first one if nothing is said.
    shapes : dict of str to tuple of int
        Arrays of one sample.
    """

    name: str
    version: int
    channels: tuple[str, ...]
    default_channels: tuple[str, ...]
    targets: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]

    def sample(self, seed: int, number: int) -> dict[str, np.ndarray]:
        """Arrays of sample `number`, float64; they depend on nothing else."""

    def channel(self, name: str, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A channel, of a shape that broadcasts to (B, n, n)."""


@dataclass(frozen=True, eq=False)
class PdeSamples:
    """Samples 0 .. B - 1 of the sequence that a seed gives.

    Attributes
    ----------
    problem : PdeProblem
    seed : int
    arrays : dict of str to torch.Tensor
        float64, (B, ...) each, as `problem.shapes` says.
    """

    problem: PdeProblem
    seed: int
    arrays: dict[str, torch.Tensor]

    def dataset(
        self,
        channels: Sequence[str] | None = None,
        target: str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> PdeDataset:
        """Inputs and targets for a network.

        Parameters
        ----------
        channels : sequence of str, optional
            Of `problem.channels`, in the order of the inputs; by default `problem.default_channels`.
        target : str, optional
            One of `problem.targets`; by default the first.
        dtype : torch.dtype

        Returns
        -------
        PdeDataset
            Inputs (B, C, n, n); targets (B, n, n), or (B, 1) for a number.

        Raises
        ------
        ValueError
            If a name is none of the problem's, or is given twice.
        TypeError
            If `dtype` is no floating-point type.
        """
        known = self.problem.channels
        channels = self.problem.default_channels if channels is None else channels
        if isinstance(channels, str) or not channels or len(set(channels)) < len(channels) or set(channels) - {*known}:
            raise ValueError(
                f"channels={channels!r} must be different names of {', '.join(known)}; use "
                f"{list(self.problem.default_channels)}"
            )
        target = self.problem.targets[0] if target is None else target
        if target not in self.problem.targets:
            raise ValueError(
                f"target={target!r} must be {' or '.join(self.problem.targets)}; use {self.problem.targets[0]}"
            )
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype={dtype} is no floating-point type; use torch.float32")
        targets = self.arrays[target].to(dtype)
        shape = (len(targets), self.problem.mesh, self.problem.mesh)
        inputs = [self.problem.channel(name, self.arrays).to(dtype).expand(shape) for name in channels]
        parameters = self.arrays.get("parameters")
        return PdeDataset(
            torch.stack(inputs, dim=1),
            targets,
            tuple(channels),
            None if parameters is None else parameters.to(dtype),
        )


def generate(
    problem: PdeProblem, num_samples: int, seed: int, comm: Communicator, show_progress: bool = True
) -> PdeSamples:
    """Draw and solve samples, each rank its share; collective. All ranks get all of them.

    Sample i depends on the problem, the seed and i alone: neither on the number of ranks nor on `num_samples`.

    Parameters
    ----------
    problem : PdeProblem
    num_samples : int
        B, at least 1.
    seed : int
        Not negative.
    comm : Communicator
    show_progress : bool
        Show a bar on rank 0, if its standard error is a terminal.

    Raises
    ------
    TypeError, ValueError
        On all ranks: a number is no integer or too small, the ranks disagree, or a sample cannot be solved.
    """
    block, partition = generate_rows(problem, num_samples, seed, comm, show_progress)
    arrays = {name: comm.allgather(rows, partition.counts) for name, rows in sorted(block.items())}
    return PdeSamples(problem, seed, arrays)


def generate_rows(
    problem: PdeProblem, num_samples: int, seed: int, comm: Communicator, show_progress: bool = True
) -> tuple[dict[str, torch.Tensor], Partition]:
    """As `generate`, but each rank gets its own rows only, and who has which."""
    num_samples, seed = whole_number("num_samples", num_samples, 1, 10_000), whole_number("seed", seed, 0, 0)
    comm.same((problem, num_samples, seed), "(problem, num_samples, seed)")
    partition = Partition.balanced(num_samples, comm.size)
    first, count = partition.first(comm.rank), partition.count(comm.rank)
    block = {name: np.empty((count, *shape)) for name, shape in problem.shapes.items()}
    console = Console(stderr=True)
    shown = show_progress and comm.rank == 0 and console.is_terminal
    message = None
    with Progress(console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task(f"{problem.name} samples", total=count)
        for row in range(count):
            try:
                found = problem.sample(seed, first + row)
            except ValueError as error:
                message = f"sample {first + row} of {problem} with seed={seed}: {error}"
                break
            for name, values in found.items():
                block[name][row] = values
            if (row + 1) % _SHOWN_EVERY == 0:
                bar.update(task, completed=row + 1, refresh=True)
    # A rank that fails alone would leave the others waiting.
    wrong = comm.first_error(message)
    if wrong:
        raise ValueError(wrong[1])
    return {name: torch.from_numpy(rows) for name, rows in block.items()}, partition
