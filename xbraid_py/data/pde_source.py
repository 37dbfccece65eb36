"""Samples for training and validation: Poisson's, Darcy's or the public Darcy set, made here or read from files."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.data import darcy_public
from xbraid_py.data.pde_dataset import PdeDataset, split
from xbraid_py.data.pde_files import obtain
from xbraid_py.data.pde_samples import PROBLEMS as GENERATED
from xbraid_py.data.pde_samples import Problem, Samples, generate

PROBLEMS = (*GENERATED, "darcy_public")


@dataclass(frozen=True, kw_only=True)
class SampleSource:
    """Where samples come from.

    Parameters
    ----------
    problem : Problem or None
        Such as `Poisson(mesh=32)`; None for the public Darcy set.
    num_train, num_val : int
        Of the public set the first ones, at most as many as there are.
    seed : int
        Of the samples, and of which of them are for validation.
    target : str, optional
        What is to be learned; by default the solution.
    data_dir : path-like, optional
        Folder where the samples of a problem are stored, and read if they are there; by default they stay in memory.
        For the public set the folder of its files, by default the usual one.
    """

    problem: Problem | None
    num_train: int
    num_val: int
    seed: int = 0
    target: str | None = None
    data_dir: str | os.PathLike | None = None

    def __post_init__(self):
        for name, use in (("num_train", 2000), ("num_val", 500)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use {use}")

    def samples(self, comm: Communicator) -> Samples:
        """Samples of the problem, on all ranks; collective."""
        total = self.num_train + self.num_val
        if self.data_dir is None:
            return generate(self.problem, total, self.seed, comm)
        return obtain(self.problem, total, self.seed, self.data_dir, comm)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the inputs; of the public set its files say so."""
        mesh = None if self.problem is None else self.problem.mesh
        return None if mesh is None else (len(self.problem.default_channels), mesh, mesh)

    def load(
        self, comm: Communicator | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[PdeDataset, PdeDataset]:
        """Samples for training and for validation, the same on all ranks; collective.

        Raises
        ------
        ValueError, OSError
            On all ranks: files are missing or damaged, or there are too few samples.
        """
        comm = as_communicator(None) if comm is None else comm
        if self.problem is None:
            public = darcy_public.load(self.data_dir, dtype)
            return public.train.rows(slice(self.num_train)), public.test.rows(slice(self.num_val))
        return split(self.samples(comm).dataset(target=self.target, dtype=dtype), self.num_val, self.seed)
