"""What MNIST and the texts share: the reader of idx files, and the check of whole numbers.

An idx file is two zero bytes, a byte for the type, a byte for the number of axes, the length of every axis as a
big-endian 32-bit number, and then the values, big-endian, the last axis running fastest.
"""

from __future__ import annotations

import gzip
import math
import operator
import os
import zlib
from pathlib import Path

import numpy as np

# Third byte of an idx file: the type of the values.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Values of an idx file, plain or packed with gzip whatever its name.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    numpy.ndarray
        Writable, in the byte order of this machine, of the type and shape that the file states: uint8, int8, int16,
        int32, float32 or float64, with any number of axes.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        For a wrong magic number, a file that is too short or too long for its shape, damaged packing, or more axes
        or values than numpy can hold; with the name of the file.
    """
    raw = _unpacked(Path(path))
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        codes = ", ".join(f"{code:02x}" for code in _TYPES)
        raise ValueError(
            f"{path} begins with the bytes '{raw[:4].hex(' ')}', which is no magic number of an idx file (00 00, one "
            f"of {codes}, the number of axes); images of unsigned bytes begin with '00 00 08 03'"
        )
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: {raw[3]} axes need a header of {start} bytes, it has {len(raw)}")
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    kind = np.dtype(_TYPES[raw[2]])
    # In Python's integers: the product of damaged lengths may pass any fixed width.
    size = start + math.prod(shape) * kind.itemsize
    if len(raw) != size:
        fault = "is truncated" if len(raw) < size else "has surplus bytes"
        raise ValueError(f"{path} {fault}: {kind.name} of shape {shape} needs {size} bytes, it has {len(raw)}")
    values = np.frombuffer(raw, dtype=kind, offset=start)
    try:
        return values.reshape(shape).astype(kind.newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"{path} has a shape that numpy cannot hold, {raw[3]} axes: {error}") from error


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(_GZIP):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged, gzip says: {error}; get it anew") from error


def whole_number(name: str, value: int, least: int, example: int) -> int:
    """`value` as an int, if it is an integer of at least `least`.

    Parameters
    ----------
    name : str
        What the caller's argument is called, for the message.
    value : int
        The argument; numpy's integers too, no bool.
    least : int
        Smallest value allowed.
    example : int
        A value that works, for the message.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be an integer; use {example}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}; use {example}")
    return operator.index(value)
