"""One run of the study of multi-level residual networks as plain numbers and words, for other processes and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies.multi_level.tables import result_of
from xbraid_py.recipes.images import MultiLevelOptions
from xbraid_py.run.engine import rows_of
from xbraid_py.run.options import from_dict


@dataclass(frozen=True, kw_only=True)
class Case(MultiLevelOptions):
    """One run of the study; by default the paper's ResNet-50-i on CIFAR-10.

    Parameters
    ----------
    model
        First, last or multilevel, see `plan`.
    seed
        Of weights, order and augmentation of the images.
    """

    model: str = "multilevel"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.levels(self.model)


def train(settings: Mapping[str, Any]) -> dict:
    """Run a `Case`, given as a mapping.

    Returns
    -------
    dict
        See `result_of`.

    Raises
    ------
    RunError
        If the loss is not finite.
    """
    case = from_dict(Case, settings)
    return result_of(list(rows_of(case.training(case.model, case.seed, case.samples()))))
