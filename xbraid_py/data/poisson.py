"""The Poisson problem of paper 002, section 8.1: from a diffusion coefficient on the unit square to the solution.

Shape letters: `n` nodes in each direction, those on the boundary included; `B` samples. The paper's 32 x 32 mesh is
read as 32 x 32 nodes, because inputs (3, 32, 32) and outputs (32, 32) then lie on the same points. It names four
inputs, kappa, f, x and y, but three channels: by default f, the same in all samples, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from xbraid_py.data.dataset import whole_number
from xbraid_py.data.elliptic import solve_poisson

# Intervals of the parameters, in the order in which a sample draws them.
RANGES = {"kx": (0.5, 4.0), "ky": (0.5, 4.0), "ax": (0.0, 0.5), "ay": (0.0, 0.5), "alpha": (0.0, np.pi / 2)}


def coefficient(x, y, kx: float, ky: float, ax: float, ay: float, alpha: float) -> np.ndarray:
    """kappa(x, y) of paper 002, section 8.1: waves in a coordinate system turned by `alpha` about the middle.

    Parameters
    ----------
    x, y : array_like
        Coordinates, of any shapes that broadcast.
    kx, ky, ax, ay : float
        Frequencies and phase shifts of the two waves.
    alpha : float
        Angle in radians.

    Returns
    -------
    numpy.ndarray
        Between 0.1 and 2.1.
    """
    turned_x = np.cos(alpha) * (x - 0.5) - np.sin(alpha) * (y - 0.5) + 0.5
    turned_y = np.sin(alpha) * (x - 0.5) + np.cos(alpha) * (y - 0.5) + 0.5
    return 1.1 + np.cos(kx * np.pi * (turned_x + ax)) * np.cos(ky * np.pi * (turned_y + ay))


def source(x, y) -> np.ndarray:
    """f(x, y) of paper 002, section 8.1, the same in all samples."""
    return 32 * np.exp(-4 * ((x - 0.25) ** 2 + (y - 0.25) ** 2))


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Samples of eq. 41 with parameters drawn uniformly from `RANGES`.

    Parameters
    ----------
    mesh : int
        Nodes n in each direction, at least 3.

    Raises
    ------
    TypeError, ValueError
        If `mesh` is no integer, or too small.
    """

    mesh: int = 32

    name: ClassVar[str] = "poisson"
    version: ClassVar[int] = 1  # of the samples that a seed gives
    channels: ClassVar[tuple[str, ...]] = ("kappa", "f", "x", "y")
    default_channels: ClassVar[tuple[str, ...]] = ("kappa", "x", "y")
    targets: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self):
        object.__setattr__(self, "mesh", whole_number("mesh", self.mesh, 3, 32))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Arrays of a sample and their shapes."""
        square = (self.mesh, self.mesh)
        return {"kappa": square, "u": square, "parameters": (len(RANGES),)}

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the nodes, both (n, n)."""
        line = np.linspace(0, 1, self.mesh)
        return tuple(np.meshgrid(line, line))

    def sample(self, seed: int, number: int) -> dict[str, np.ndarray]:
        """Sample `number` of the sequence that `seed` gives, whatever else is drawn; float64."""
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
        low, high = np.array(list(RANGES.values())).T
        parameters = random.uniform(low, high)
        x, y = self.coordinates()
        kappa = coefficient(x, y, *parameters)
        return {"kappa": kappa, "u": solve_poisson(kappa, source(x, y)), "parameters": parameters}

    def channel(self, name: str, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One of `channels`, of a shape that broadcasts to (B, n, n), float64."""
        x, y = self.coordinates()
        fixed = {"x": x, "y": y, "f": source(x, y)}
        return torch.from_numpy(fixed[name]) if name in fixed else arrays[name]
