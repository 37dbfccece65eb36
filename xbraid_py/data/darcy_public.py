"""The public Darcy set: a permeability of two values on 16 x 16 and 32 x 32 points, and the pressure that it gives.

Each file holds `x`, boolean, (B, n, n), and `y`, float32, (B, n, n). Shape letters: `B` samples, `n` points in each
direction.
"""

from __future__ import annotations

import io
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.files import find_files
from xbraid_py.data.pde_dataset import PdeDataset

FILES = {
    "darcy_train_16.npz": "9d2807c436e838ace0207e3e6c7e3e98a1b1c7a991069031167a1c2f422724d8",
    "darcy_test_16.npz": "27ab4805a5bb52fbb58613fcfd35d73835a6980b2f9cbd04e3bea6bff25972e1",
    "darcy_test_32.npz": "8367d675cfc7cab2d092639685086fd3cf6054ea5b3c41fca7cf743c448ca81b",
}
ORIGIN = "https://doi.org/10.5281/zenodo.10994262"
_LARGEST = 2**31  # bytes of an array: more is no such file
# What a damaged archive raises depends on the byte that is damaged.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    RuntimeError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True, eq=False)
class PublicDarcy:
    """The three parts; inputs are (B, 1, n, n), 0 or 1 by the phase of the permeability, targets (B, n, n).

    Attributes
    ----------
    train, test, test_fine : PdeDataset
        On n, n and N > n points: 1000 and 50 on 16 x 16, and 50 on 32 x 32 in the published files.
    """

    train: PdeDataset
    test: PdeDataset
    test_fine: PdeDataset


def load(folder: str | os.PathLike | None = None, dtype: torch.dtype = torch.float64) -> PublicDarcy:
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
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype} is no floating-point type; use torch.float32")
    paths = find_files("darcy", FILES, ORIGIN, folder)
    parts = [_part(path, dtype) for path in paths]
    sizes = [part.inputs.shape[-1] for part in parts]
    if not sizes[0] == sizes[1] < sizes[2]:
        raise ValueError(
            f"{paths[0].parent}: the meshes {sizes} must be two of one size and a finer one; use 16, 16, 32"
        )
    return PublicDarcy(*parts)


def _part(path: Path, dtype: torch.dtype) -> PdeDataset:
    x, y = read_arrays(path, ("x", "y"))
    if x.dtype.kind not in "buif" or y.dtype.kind not in "uif":
        raise ValueError(f"{path} holds {x.dtype} and {y.dtype}; x is boolean or numbers, y is numbers")
    if x.ndim != 3 or 0 in x.shape or x.shape[1] != x.shape[2] or x.shape != y.shape:
        raise ValueError(f"{path} holds x {x.shape} and y {y.shape}; both must be (B, n, n), as in (1000, 16, 16)")
    inputs, targets = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.float64)).to(dtype) for part in (x, y))
    try:
        return PdeDataset(inputs[:, None], targets, ("phase",))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get it anew") from error


def read_arrays(path: str | os.PathLike, names: tuple[str, ...]) -> list[np.ndarray]:
    """Arrays of an npz archive, none of which is unpickled.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such archive, damaged, without one of the arrays, or with arrays of objects.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            return [_array(archive, f"{name}.npy") for name in names]
    except KeyError as error:
        raise ValueError(f"{path} lacks an array: {error.args[0]}; it must hold {', '.join(names)}") from error
    except _DAMAGED as error:
        raise ValueError(f"{path} is no npz archive of numbers, or damaged: {error}; get it anew") from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, once it is clear that its values fill the shape which its header states."""
    size = archive.getinfo(name).file_size
    if size > _LARGEST:
        raise ValueError(f"{name} claims {size} bytes")
    stream = io.BytesIO(archive.read(name))
    major, _ = np.lib.format.read_magic(stream)
    if major not in (1, 2):
        raise ValueError(f"{name} is of version {major} of its format")
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, kind = header(stream)
    if kind.itemsize * int(np.prod(shape, dtype=object)) != size - stream.tell():
        raise ValueError(f"{name} states {kind} of shape {shape}, which its {size} bytes do not hold")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)
