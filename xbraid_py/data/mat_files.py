"""Arrays of numbers from MAT files, read by scipy once the types that the file states are such as scipy survives.

scipy takes the type of the values unchecked for the place of an entry in a table: a damaged one ends the process.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

_HEADER, _MATRIX, _COMPRESSED, _COMPLEX = 128, 14, 15, 0x0800
# By code: the type of the values, and the class of the array, which may be written in a smaller type.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_LARGEST = 2**31  # bytes of an array: more is no such file
# What a damaged file raises depends on the byte that is damaged.
_DAMAGED = (
    KeyError,
    MatReadError,
    MemoryError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """The array `name` of a MAT file of version 5; real numbers, any number of axes.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, damaged, too large, or has no array of numbers of that name.
    """
    raw = Path(path).read_bytes()
    try:
        found = list(_names(raw))
        value = loadmat(io.BytesIO(raw), variable_names=[name])[name] if found.count(name) == 1 else None
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is no MAT file of version 5 with arrays of real numbers, or damaged: {error}; get it anew, or "
            f"save it with -v7 or by scipy.io.savemat"
        ) from error
    if value is None:
        raise ValueError(f"{path} holds the arrays {found[:5]}; one must be {name}")
    return value


def _names(raw: bytes) -> Iterator[str]:
    """Names of the arrays of a file, each of which is of real numbers."""
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(raw[_HEADER - 4 : _HEADER])
    if order is None or 0 in raw[:4]:
        raise ValueError("no header of version 5 (7.3 is HDF5)")
    at = _HEADER
    while at < len(raw):
        kind, data, _ = _element(raw, at, order)
        at += 8 + len(data)  # nothing is padded between arrays: within one, the parts are
        if kind == _COMPRESSED:
            inner = zlib.decompressobj()
            data = inner.decompress(data, _LARGEST)
            if not inner.eof:
                raise ValueError(f"compressed data break off, or are more than {_LARGEST} bytes")
            kind, data, _ = _element(data, 0, order)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where an array is expected")
        yield _name(data, order)


def _element(raw: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """Type and data of the element at a place, and the place behind it; up to 4 bytes of data stand in its head."""
    (word,) = struct.unpack_from(f"{order}I", raw, at)
    kind, size, start = word & 0xFFFF, word >> 16, at + 4
    if not size:
        (size,), start = struct.unpack_from(f"{order}I", raw, at + 4), at + 8
    if start + size > len(raw):
        raise ValueError("an element is longer than the file")
    return kind, raw[start : start + size], at + 8 if start < at + 8 else start + size + -size % 8


def _name(data: bytes, order: str) -> str:
    """Name of an array whose class and type of values are numbers, and fit."""
    at, parts = 0, []
    while at < len(data):
        kind, part, at = _element(data, at, order)
        parts.append((kind, part))
    flags = struct.unpack_from(f"{order}I", parts[0][1])[0] if parts else 0
    kind = parts[-1][0] if len(parts) == 4 else 0
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX or kind not in _TYPES:
        raise ValueError("an array that is not of real numbers")
    own, written = np.dtype(_CLASSES[flags & 0xFF]), np.dtype(_TYPES[kind])
    if not (written == own or (written.itemsize < own.itemsize and np.can_cast(written, own))):
        raise ValueError(f"an array of {own} written as {written}")
    return parts[2][1].decode("ascii", errors="replace")
