"""Small cases of multilevel training in width that several tests make: Poisson on 8 x 8 points, two thin layers."""

from __future__ import annotations

from functools import cache

import torch
from studies.width.case import Case
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions

from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.data.pde_files import PdeSource
from xbraid_py.data.poisson import Poisson
from xbraid_py.recipes.width import Job
from xbraid_py.recipes.width_networks import WidthNetwork

TINY = Case(
    mesh=8, num_train=40, num_val=10, widths=(16, 12), batch_size=8, max_work=45.0, validate_every=14.0, steps=2
)
NETWORK = WidthNetwork(widths=(16, 12))


@cache
def samples() -> tuple[PdeDataset, PdeDataset]:
    """Forty samples for training and ten for validation, in double precision."""
    return PdeSource(problem=Poisson(mesh=8), num_train=40, num_val=10).load(dtype=torch.float64)


def job(grid=None, network=NETWORK, standardize=False, batch_size=8, **options) -> Job:
    """A run, ready to go; matched anew every fourth cycle unless told otherwise."""
    options = {"steps": 2, "learning_rate": 0.05, "rematch_every": 4} | options
    return Job.of(
        *samples(),
        network,
        WidthTrainingOptions(**options),
        batch_size=batch_size,
        seed=3,
        standardize=standardize,
        grid=grid,
    )
