"""The Darcy problem of paper 002, section 8.2, from permeability to pressure or outflow: own samples, and a public set.

Shape letters: `n` cells or points in each direction, `B` samples. Permeability and pressure are constant on each cell.
The paper states neither the covariance nor the boundary conditions: here log k is a Gaussian field with Matern's
covariance, p = 1 on x = 0, p = 0 on x = 1, and no flow passes y = 0 and y = 1; the outflow boundary is x = 1.
"""

from __future__ import annotations

import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from scipy.special import gamma, kv

from xbraid_py.data.dataset import check_dtype, check_packing, find_files, whole_number
from xbraid_py.data.elliptic import solve_darcy
from xbraid_py.data.pde_dataset import PdeDataset

_WIDEST = 16  # times the unit square: the widest torus that is tried
_NEGLIGIBLE = 1e-9  # of the largest eigenvalue: negative ones up to here are set to 0


def covariance(distance, correlation_length: float, variance: float, smoothness: float) -> np.ndarray:
    """Matern's covariance: s^2 2^(1-v) / Gamma(v) (sqrt(2 v) r / l)^v K_v(sqrt(2 v) r / l); s^2 where the distance r is
    0.

    Correlation length, variance and smoothness are l, s^2 and v; v = 1/2 is s^2 exp(-r / l).
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
    while m <= _WIDEST * n:
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
        x, y = np.meshgrid(line, line)
        return x, y

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


FILES = {
    "darcy_train_16.npz": "9d2807c436e838ace0207e3e6c7e3e98a1b1c7a991069031167a1c2f422724d8",
    "darcy_test_16.npz": "27ab4805a5bb52fbb58613fcfd35d73835a6980b2f9cbd04e3bea6bff25972e1",
    "darcy_test_32.npz": "8367d675cfc7cab2d092639685086fd3cf6054ea5b3c41fca7cf743c448ca81b",
}
ORIGIN = "https://doi.org/10.5281/zenodo.10994262"
_HEADER = 2**16  # bytes within which that of an array ends
# What a damaged archive raises depends on the byte that is damaged.
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, EOFError, OSError)
_DAMAGED += (ValueError, TypeError, SyntaxError, RuntimeError, OverflowError, MemoryError)


@dataclass(frozen=True, eq=False)
class PublicDarcy:
    """The public set: permeability of two values, and the pressure that it gives.

    Inputs are (B, 1, n, n), 0 or 1 by the phase of the permeability, targets (B, n, n). In the files these are `x`,
    boolean, (B, n, n), and `y`, float32.

    Attributes
    ----------
    train, test, test_fine : PdeDataset
        On n, n and N > n points: 1000 and 50 on 16 x 16, and 50 on 32 x 32 in the published files.
    """

    train: PdeDataset
    test: PdeDataset
    test_fine: PdeDataset


def load_public(folder: str | os.PathLike | None = None, dtype: torch.dtype = torch.float64) -> PublicDarcy:
    """Read the public files, or own ones of the same names and format, reported by a warning in the log.

    Parameters
    ----------
    folder : path-like, optional
        Folder of the three files; by default `darcy` in the folder that the variable XBRAID_DATA names; without
        it, see `data_folder`.
    dtype : torch.dtype
        Floating-point type of inputs and targets.

    Raises
    ------
    FileNotFoundError
        If a file is missing, with where it comes from and how to name its folder.
    OSError
        If a file cannot be read.
    ValueError
        For a file that is no such archive or damaged, for arrays of other shapes or types, and for values that are
        not finite.
    TypeError
        If `dtype` is no floating-point type.
    """
    check_dtype(dtype)
    paths = find_files("darcy", FILES, ORIGIN, folder)
    parts = [_part(path, dtype) for path in paths]
    sizes = [part.inputs.shape[-1] for part in parts]
    if not sizes[0] == sizes[1] < sizes[2]:
        raise ValueError(
            f"{paths[0].parent}: the meshes {sizes} must be two of one size and a finer one; use 16, 16, 32"
        )
    return PublicDarcy(*parts)


def _part(path: Path, dtype: torch.dtype) -> PdeDataset:
    x, y = _arrays(path)
    if x.dtype.kind not in "buif" or y.dtype.kind not in "uif":
        raise ValueError(f"{path} holds {x.dtype} and {y.dtype}; x is boolean or numbers, y is numbers")
    if x.ndim != 3 or 0 in x.shape or x.shape[1] != x.shape[2] or x.shape != y.shape:
        raise ValueError(f"{path} holds x {x.shape} and y {y.shape}; both must be (B, n, n), as in (1000, 16, 16)")
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.float64)).to(dtype) for part in (x, y))
    try:
        return PdeDataset(inputs[:, None], targets, ("phase",))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get it anew") from error


def _arrays(path: Path) -> list[np.ndarray]:
    """x and y of an npz archive, neither of which is unpickled."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = [archive.getinfo(f"{name}.npy") for name in ("x", "y")]
                check_packing(path, sum(member.file_size for member in members), os.fstat(file.fileno()).st_size)
                return [_array(archive, member) for member in members]
        except KeyError as error:
            raise ValueError(f"{path} lacks an array: {error.args[0]}; it must hold x, y") from error
        except _DAMAGED as error:
            raise ValueError(f"{path} is no npz archive of numbers, or damaged: {error}; get it anew") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array, once it is clear that its values fill the shape which its header states."""
    name, size = member.filename, member.file_size
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Others are unpacked at once, whatever they are asked for.
        raise ValueError(f"{name} is packed by method {member.compress_type}, which numpy does not write")
    with archive.open(member) as file:
        head = io.BytesIO(file.read(_HEADER))
    major, _ = np.lib.format.read_magic(head)
    if major not in (1, 2):
        raise ValueError(f"{name} is of version {major} of its format")
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, kind = header(head)
    if kind.itemsize * int(np.prod(shape, dtype=object)) != size - head.tell():
        raise ValueError(f"{name} states {kind} of shape {shape}, which its {size} bytes do not hold")
    with archive.open(member) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # to the end, where the checksum is compared
    return values
