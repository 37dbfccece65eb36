"""One run of the study of multi-level residual networks as plain numbers and words, for other processes and records."""

from __future__ import annotations

from dataclasses import dataclass

from xbraid_py.recipes.options.images import MultiLevelOptions


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
