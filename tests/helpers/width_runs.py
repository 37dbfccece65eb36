"""Small runs of multilevel training in width that several tests make: Poisson on 8 x 8 points, two thin layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.multilevel.width.options import WidthTrainingOptions
from xbraid_py.recipes.options.width import PoissonOptions, WidthNetwork
from xbraid_py.recipes.width import WidthRun

NETWORK = WidthNetwork(widths=(16, 12))
TINY = PoissonOptions(
    mesh=8,
    num_train=40,
    num_val=10,
    batch_size=8,
    max_work=45.0,
    count_tau=False,
    validate_every=14.0,
    network=NETWORK,
    training=WidthTrainingOptions(steps=2),
)


@cache
def samples() -> tuple[PdeDataset, PdeDataset]:
    """Forty samples for training and ten for validation, in double precision."""
    return TINY.samples.load(dtype=torch.float64)


def run_of(training: dict[str, Any] | None = None, **options: Any) -> WidthRun:
    """A run on these samples, ready to go; matched anew every fourth cycle unless told otherwise."""
    training = {"steps": 2, "learning_rate": 0.05, "rematch_every": 4} | (training or {})
    options = {"num_train": 40, "batch_size": 8, "seed": 3, "network": NETWORK} | options
    return WidthRun(PoissonOptions(training=WidthTrainingOptions(**training), **options), *samples())
