"""The Darcy problem of paper 002, section 8.2: from a log-normal permeability to the pressure or to the outflow.

Shape letters: `n` cells in each direction, `B` samples. Permeability and pressure are constant on each cell. The paper
states neither the covariance nor the boundary conditions: here log k is a Gaussian field with Matern's covariance,
p = 1 on x = 0, p = 0 on x = 1, and no flow passes y = 0 and y = 1; the outflow boundary is x = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.special import gamma, kv

from xbraid_py.data.dataset import whole_number
from xbraid_py.data.elliptic import solve_darcy

_LARGEST = 16  # times the unit square: the widest torus that is tried
_NEGLIGIBLE = 1e-9  # of the largest eigenvalue: negative ones up to here are set to 0


def covariance(distance, correlation_length: float, variance: float, smoothness: float) -> np.ndarray:
    """Matern's covariance: s^2 2^(1-v) / Gamma(v) (sqrt(2 v) r / l)^v K_v(sqrt(2 v) r / l).

    Parameters
    ----------
    distance : array_like
        r, not negative.
    correlation_length, variance, smoothness : float
        l, s^2 and v; v = 1/2 is s^2 exp(-r / l).

    Returns
    -------
    numpy.ndarray
        Of the shape of `distance`; s^2 where that is 0.
    """
    scaled = math.sqrt(2 * smoothness) / correlation_length * np.asarray(distance, dtype=np.float64)
    away = np.where(scaled > 0, scaled, 1.0)
    found = 2 ** (1 - smoothness) / gamma(smoothness) * away**smoothness * kv(smoothness, away)
    return variance * np.where(scaled > 0, found, 1.0)


@lru_cache(maxsize=4)
def embedding(n: int, correlation_length: float, variance: float, smoothness: float) -> np.ndarray:
    """Square roots of the eigenvalues of the covariance on a torus that is wide enough, (m, m).

    The covariance matrix of all points of a periodic grid is diagonal in Fourier space; on an m x m torus with m at
    least 2 n it agrees with the one of the unit square on n x n neighboring cells. Where it has negative
    eigenvalues, the next wider torus is tried.

    Raises
    ------
    ValueError
        If the correlation length is too long for the widest torus.
    """
    m = 2 * n
    while m <= _LARGEST * n:
        steps = np.minimum(np.arange(m), m - np.arange(m)) / n
        distance = np.hypot(steps[:, None], steps)
        values = np.fft.fft2(covariance(distance, correlation_length, variance, smoothness)).real
        if values.min() >= -_NEGLIGIBLE * values.max():
            return np.sqrt(np.maximum(values, 0))
        m *= 2
    raise ValueError(
        f"correlation_length={correlation_length} with smoothness={smoothness} is too long for a unit square; use 0.2"
    )


@dataclass(frozen=True, kw_only=True)
class Darcy:
    """Samples of eq. 42 with log k drawn from a Gaussian field of mean 0.

    Parameters
    ----------
    mesh : int
        Cells n in each direction, at least 2.
    correlation_length : float
        Of log k; the side of the square is 1.
    variance : float
        Of log k on each cell.
    smoothness : float
        v of Matern's covariance: 0.5 for the exponential one, larger for smoother fields.

    Raises
    ------
    TypeError, ValueError
        If `mesh` is no integer or too small, or another argument is not positive.
    """

    mesh: int = 32
    correlation_length: float = 0.2
    variance: float = 1.0
    smoothness: float = 1.0

    name: ClassVar[str] = "darcy"
    version: ClassVar[int] = 1  # of the samples that a seed gives
    channels: ClassVar[tuple[str, ...]] = ("k", "log_k", "x", "y")
    default_channels: ClassVar[tuple[str, ...]] = ("k",)
    targets: ClassVar[tuple[str, ...]] = ("pressure", "flux")

    def __post_init__(self):
        object.__setattr__(self, "mesh", whole_number("mesh", self.mesh, 2, 32))
        for name, good in (("correlation_length", 0.2), ("variance", 1.0), ("smoothness", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}={value!r} must be a number; use {good}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite; use {good}")
            object.__setattr__(self, name, float(value))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Arrays of a sample and their shapes."""
        square = (self.mesh, self.mesh)
        return {"k": square, "pressure": square, "flux": (1,)}

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of the middle of the cells, both (n, n)."""
        line = (np.arange(self.mesh) + 0.5) / self.mesh
        return tuple(np.meshgrid(line, line))

    def log_permeability(self, seed: int, number: int) -> np.ndarray:
        """The Gaussian field of sample `number`, (n, n)."""
        roots = embedding(self.mesh, self.correlation_length, self.variance, self.smoothness)
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
        real, imaginary = random.standard_normal((2, *roots.shape))
        waves = np.fft.fft2(roots * (real + 1j * imaginary)) / len(roots)
        return waves.real[: self.mesh, : self.mesh].copy()

    def sample(self, seed: int, number: int) -> dict[str, np.ndarray]:
        """Sample `number` of the sequence that `seed` gives, whatever else is drawn; float64."""
        k = np.exp(self.log_permeability(seed, number))
        pressure, outflow = solve_darcy(k)
        return {"k": k, "pressure": pressure, "flux": outflow.reshape(1)}

    def channel(self, name: str, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One of `channels`, of a shape that broadcasts to (B, n, n), float64."""
        x, y = self.coordinates()
        fixed = {"x": x, "y": y}
        if name in fixed:
            return torch.from_numpy(fixed[name])
        return arrays["k"].log() if name == "log_k" else arrays[name]
