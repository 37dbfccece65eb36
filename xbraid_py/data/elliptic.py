"""Elliptic problems on the unit square: finite elements, finite volumes, and the Poisson problem of paper 002.

Shape letters: `n` points or cells in each direction, `B` samples. An array (n, n) holds rows of equal y, the first one
lowest, and x runs fastest. Leading axes, where allowed, are samples; each is solved by itself, so that its bits do not
depend on its neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from scipy.linalg import LinAlgError, solveh_banded
from scipy.sparse import csr_array, dia_array

from xbraid_py.data.dataset import whole_number

# Integrals of grad(phi_i) . grad(phi_j) of the bilinear functions of a square of any size; corners as in `_corners`.
_STIFFNESS = np.array([[4, -1, -1, -2], [-1, 4, -2, -1], [-1, -2, 4, -1], [-2, -1, -1, 4]]) / 6
_UNSOLVED = "the coefficients differ too much, or are too large, for a solve"


@dataclass(frozen=True, eq=False)
class BandPattern:
    """Symmetric matrices on one pattern whose entries are linear in a vector of coefficients.

    Attributes
    ----------
    size : int
        Unknowns.
    lower : scipy.sparse.csr_array
        Takes the coefficients to the lower triangle in LAPACK's band storage, row after row: entry (i, j) of the
        matrix stands at (i - j) * size + j.
    """

    size: int
    lower: csr_array

    @classmethod
    def build(cls, size: int, rows, columns, coefficients, values, num_coefficients: int) -> BandPattern:
        """From triplets: `values[t]` times coefficient number `coefficients[t]` is added at (rows[t], columns[t]).

        All arguments but the two numbers have the same shape. Of each pair (i, j), (j, i) both are given; those above
        the diagonal are left out here.
        """
        kept = np.asarray(rows) >= np.asarray(columns)
        rows, columns, coefficients, values = (np.asarray(part)[kept] for part in (rows, columns, coefficients, values))
        places = (rows - columns) * size + columns
        bands = int((rows - columns).max()) + 1
        return cls(size, csr_array((values, (places, coefficients)), shape=(bands * size, num_coefficients)))

    def band(self, coefficients: np.ndarray) -> np.ndarray:
        """The lower triangle in band storage, (bandwidth + 1, size)."""
        return (self.lower @ coefficients).reshape(-1, self.size)

    def matrix(self, coefficients: np.ndarray) -> csr_array:
        """The whole matrix, (size, size)."""
        band = self.band(coefficients)
        lower = dia_array((band, -np.arange(len(band))), shape=(self.size, self.size)).tocsr()
        strict = dia_array((band[1:], -np.arange(1, len(band))), shape=(self.size, self.size)).tocsr()
        return lower + strict.T.tocsr()

    def solve(self, coefficients: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Solution for the right side `right`, both (size,), by a banded Cholesky factorization.

        Raises
        ------
        ValueError
            If the matrix is not positive definite in the numbers of this machine.
        """
        try:
            found = solveh_banded(self.band(coefficients), right, overwrite_ab=True, lower=True, check_finite=False)
        except LinAlgError as error:
            raise ValueError(f"{_UNSOLVED} ({error}); use ratios below 1e12") from error
        if not np.isfinite(found).all():
            raise ValueError(f"{_UNSOLVED} (overflow); use values near 1")
        return found


def solve_poisson(kappa, source, boundary=0.0) -> np.ndarray:
    """u of -div(kappa grad u) = f with given values on the boundary, by bilinear finite elements.

    The n x n nodes include those on the boundary, at the multiples of 1/(n - 1). On an element, kappa is the mean of
    its four nodal values and f is interpolated; u is of second order.

    Parameters
    ----------
    kappa : (..., n, n) array_like
        At the nodes, positive; n is at least 3.
    source, boundary : array_like
        f, and values of which only those at boundary nodes count; of shapes that broadcast against `kappa`.

    Returns
    -------
    (..., n, n) numpy.ndarray
        u at the nodes, float64, with the boundary values in place.

    Raises
    ------
    ValueError
        For values that are not finite, kappa that is not positive or not square, or shapes that do not fit.
    """
    kappa = _positive("kappa", kappa, 3)
    source, boundary = (
        _like(name, value, kappa.shape, "kappa") for name, value in (("source", source), ("boundary", boundary))
    )
    n = kappa.shape[-1]
    solution = boundary.copy()
    solution[..., 1:-1, 1:-1] = 0
    cells = np.mean(_corners(kappa), axis=-1)
    right = _mass(source) / (n - 1) ** 2 - apply_stiffness(cells, solution)[..., 1:-1, 1:-1]
    pattern = element_pattern(n)
    for sample in np.ndindex(kappa.shape[:-2]):
        inner = pattern.solve(cells[sample].ravel(), right[sample].ravel())
        solution[sample][1:-1, 1:-1] = inner.reshape(n - 2, n - 2)
    return solution


@lru_cache(maxsize=4)
def element_pattern(n: int) -> BandPattern:
    """The stiffness matrix of the (n - 2)^2 inner nodes; its coefficients are kappa on the (n - 1)^2 elements."""
    inner = np.full((n, n), -1)
    inner[1:-1, 1:-1] = np.arange((n - 2) ** 2).reshape(n - 2, n - 2)
    numbers = _corners(inner).reshape(-1, 4)
    shape = (len(numbers), 4, 4)
    rows, columns = np.broadcast_to(numbers[:, :, None], shape), np.broadcast_to(numbers[:, None, :], shape)
    elements = np.broadcast_to(np.arange(len(numbers))[:, None, None], shape)
    kept = (rows >= 0) & (columns >= 0)
    values = np.broadcast_to(_STIFFNESS, shape)
    return BandPattern.build(
        (n - 2) ** 2, rows[kept], columns[kept], elements[kept], values[kept], num_coefficients=len(numbers)
    )


def apply_stiffness(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The stiffness matrix of all nodes times `values` (..., n, n), without a matrix; `cells` (..., n - 1, n - 1)
    are kappa.
    """
    local = cells[..., None] * (_corners(values) @ _STIFFNESS)
    out = np.zeros(values.shape)
    out[..., :-1, :-1] += local[..., 0]
    out[..., :-1, 1:] += local[..., 1]
    out[..., 1:, :-1] += local[..., 2]
    out[..., 1:, 1:] += local[..., 3]
    return out


def solve_darcy(k, left=1.0, right=0.0, source=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pressure and outflow of -div(k grad p) = f: p given at x = 0 and x = 1, no flow through y = 0 and y = 1.

    Cell-centered finite volumes on n x n square cells: the flux through a face has the harmonic mean of k on both
    sides. These are the lowest-order Raviart-Thomas mixed elements of paper 002, eq. 42, with (k^-1 q, s) integrated by
    the trapezoidal rule, and the fluxes eliminated. p at the middle of the cells is of second order.

    Parameters
    ----------
    k : (..., n, n) array_like
        Permeability of the cells, positive; n is at least 2.
    left, right : float or (n,) array_like
        Pressure at the middle of the faces on x = 0 and on x = 1.
    source : array_like
        f on the cells, of a shape that broadcasts against `k`.

    Returns
    -------
    pressure : (..., n, n) numpy.ndarray
        float64.
    outflow : (...) numpy.ndarray
        Q of paper 002, eq. 43: mean flux out of x = 1, whose length is 1.

    Raises
    ------
    ValueError
        For values that are not finite, k that is not positive or not square, or shapes that do not fit.
    """
    k = _positive("k", k, 2)
    n = k.shape[-1]
    left, right = (_like(name, value, (n,), "a row of k") for name, value in (("left", left), ("right", right)))
    load = _like("source", source, k.shape, "k") / n**2
    load[..., 0] += 2 * k[..., 0] * left
    load[..., -1] += 2 * k[..., -1] * right
    faces = transmissibilities(k)
    pattern = face_pattern(n)
    pressure = np.empty(k.shape)
    for sample in np.ndindex(k.shape[:-2]):
        pressure[sample] = pattern.solve(faces[sample], load[sample].ravel()).reshape(n, n)
    # q . n = k (p - right) / (h / 2) on each face, h = 1/n; eq. 43 is their mean.
    return pressure, np.mean(2 * n * k[..., -1] * (pressure[..., -1] - right), axis=-1)


@lru_cache(maxsize=4)
def face_pattern(n: int) -> BandPattern:
    """The matrix of the n^2 cells; its coefficients are those of `transmissibilities`."""
    cells = np.arange(n * n).reshape(n, n)
    low = np.concatenate([cells[:, :-1].ravel(), cells[:-1].ravel()])
    high = np.concatenate([cells[:, 1:].ravel(), cells[1:].ravel()])
    ends = np.concatenate([cells[:, 0], cells[:, -1]])
    faces, end_faces = np.arange(len(low)), len(low) + np.arange(len(ends))
    one = np.ones(len(low))
    return BandPattern.build(
        n * n,
        np.concatenate([low, high, low, high, ends]),
        np.concatenate([low, high, high, low, ends]),
        np.concatenate([faces, faces, faces, faces, end_faces]),
        np.concatenate([one, one, -one, -one, np.ones(len(ends))]),
        num_coefficients=len(low) + len(ends),
    )


def transmissibilities(k: np.ndarray) -> np.ndarray:
    """Flux through each face for a difference of 1 in pressure, (..., 2 n (n - 1) + 2 n).

    First the faces between neighbors in x, then in y (harmonic means), then those on x = 0 and on x = 1 (half a cell).
    """
    parts = [
        2 / (1 / k[..., :-1] + 1 / k[..., 1:]),
        2 / (1 / k[..., :-1, :] + 1 / k[..., 1:, :]),
        2 * k[..., :1],
        2 * k[..., -1:],
    ]
    return np.concatenate([part.reshape(*k.shape[:-2], -1) for part in parts], axis=-1)


def _corners(values: np.ndarray) -> np.ndarray:
    """Values at the four corners of each element, (..., n - 1, n - 1, 4), x running fastest."""
    return np.stack([values[..., :-1, :-1], values[..., :-1, 1:], values[..., 1:, :-1], values[..., 1:, 1:]], axis=-1)


def _mass(values: np.ndarray) -> np.ndarray:
    """Integrals of the interpolated values times each inner basis function, over h^2, (..., n - 2, n - 2)."""
    rows = (values[..., :-2, :] + 4 * values[..., 1:-1, :] + values[..., 2:, :]) / 6
    return (rows[..., :-2] + 4 * rows[..., 1:-1] + rows[..., 2:]) / 6


def _positive(name: str, values, least: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 2 or values.shape[-1] != values.shape[-2] or values.shape[-1] < least:
        raise ValueError(f"{name}.shape={values.shape} must end in (n, n), n at least {least}; use (32, 32)")
    return _checked(name, values, lambda found: found > 0, "positive and finite")


def _like(name: str, values, shape: tuple[int, ...], other: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    try:
        whole = np.broadcast_to(values, shape)
    except ValueError as error:
        raise ValueError(f"{name}.shape={values.shape} must fit {other}, {shape}; use {shape}") from error
    return _checked(name, whole, np.isfinite, "finite").copy()


def _checked(name: str, values: np.ndarray, rule: Callable[[np.ndarray], np.ndarray], word: str) -> np.ndarray:
    wrong = ~(rule(values) & np.isfinite(values))
    if wrong.any():
        place = tuple(int(number) for number in np.argwhere(wrong)[0])
        raise ValueError(f"{name}{list(place)}={values[place]} must be {word}; use 1.0")
    return values


# Intervals of the parameters, in the order in which a sample draws them.
RANGES = {"kx": (0.5, 4.0), "ky": (0.5, 4.0), "ax": (0.0, 0.5), "ay": (0.0, 0.5), "alpha": (0.0, np.pi / 2)}


def coefficient(x, y, kx: float, ky: float, ax: float, ay: float, alpha: float) -> np.ndarray:
    """kappa(x, y) of paper 002, section 8.1, between 0.1 and 2.1: waves with frequencies `kx`, `ky` and phase shifts
    `ax`, `ay`.

    Their coordinate system is turned by `alpha` (radians) about the middle.
    """
    turned_x = np.cos(alpha) * (x - 0.5) - np.sin(alpha) * (y - 0.5) + 0.5
    turned_y = np.sin(alpha) * (x - 0.5) + np.cos(alpha) * (y - 0.5) + 0.5
    return 1.1 + np.cos(kx * np.pi * (turned_x + ax)) * np.cos(ky * np.pi * (turned_y + ay))


def source(x, y) -> np.ndarray:
    """f(x, y) of paper 002, section 8.1, the same in all samples."""
    return 32 * np.exp(-4 * ((x - 0.25) ** 2 + (y - 0.25) ** 2))


@dataclass(frozen=True, kw_only=True)
class Poisson:
    """Samples of eq. 41 with parameters drawn uniformly from `RANGES`: from a diffusion coefficient to the solution.

    The 32 x 32 mesh of paper 002, section 8.1, is read as 32 x 32 nodes, those on the boundary included, because
    inputs (3, 32, 32) and outputs (32, 32) then lie on the same points. It names four inputs, kappa, f, x and y, but
    three channels: by default f, the same in all samples, is left out.

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
        x, y = np.meshgrid(line, line)
        return x, y

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
