"""Arrays of numbers from MAT files of version 5, checked before scipy, which trusts the tags of a file, reads them.

A file is 128 bytes of header and then data elements: a type and a length of 4 bytes each (or, for up to 4 bytes of
data, both in one word), and the data, padded to 8 bytes. An array is an element of elements (flags, lengths of the
axes, name, values), often compressed (MAT-File Format, The MathWorks, chapter 1).
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.io import loadmat

_HEADER = 128
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
# Bytes of a value by the type of an element: integers of 1, 2, 4 bytes, float32, float64, integers of 8 bytes.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}
_NUMBERS = range(6, 16)  # classes of arrays: float64, float32, integers of 1 to 8 bytes
_COMPLEX = 0x0800
_LARGEST = 2**31


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """The array `name` of a MAT file of version 5; real numbers, any number of axes.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, damaged, or has no array of numbers of that name.
    """
    raw = Path(path).read_bytes()
    try:
        found = list(_arrays(raw))
    except (struct.error, zlib.error, _Damaged) as error:
        raise ValueError(f"{path} is no MAT file of version 5, or damaged ({error}); get it anew") from error
    if found.count(name) != 1:
        raise ValueError(f"{path} holds the arrays {found[:5]}; one must be {name}")
    return loadmat(io.BytesIO(raw), variable_names=[name])[name]


class _Damaged(Exception):
    """Not the format."""


def _arrays(raw: bytes) -> Iterator[str]:
    """Names of all arrays, each of which is sound."""
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:_HEADER])
    if order is None or raw[:4] == b"\0\0\0\0":
        raise _Damaged("no header")
    for kind, data in _elements(raw[_HEADER:], order, padded=False):
        if kind == _COMPRESSED:
            inner = zlib.decompressobj()
            data = inner.decompress(data, _LARGEST)
            if not inner.eof:
                raise _Damaged("compressed data break off")
            inside = list(_elements(data, order))
            if len(inside) != 1:
                raise _Damaged("compressed data hold other than one array")
            kind, data = inside[0]
        if kind != _MATRIX:
            raise _Damaged(f"an element of type {kind} where an array is expected")
        yield _name_of(list(_elements(data, order)), order)


def _elements(raw: bytes, order: str, padded: bool = True) -> Iterator[tuple[int, bytes]]:
    """Types and data of the elements; compressed ones, in a file, are not padded."""
    at = 0
    while at < len(raw):
        (word,) = struct.unpack_from(f"{order}I", raw, at)
        if word >> 16:  # a small element: its length in the upper half
            kind, size, start = word & 0xFFFF, word >> 16, at + 4
            if size > 4:
                raise _Damaged("a small element is too long")
            after = at + 8
        else:
            kind, (size,), start = word, struct.unpack_from(f"{order}I", raw, at + 4), at + 8
            after = start + size + (-size % 8 if padded or kind != _COMPRESSED else 0)
        if start + size > len(raw):
            raise _Damaged("an element is longer than the file")
        yield kind, raw[start : start + size]
        at = after


def _name_of(parts: list[tuple[int, bytes]], order: str) -> str:
    """Name of an array of real numbers, if its parts fit each other."""
    kinds = [kind for kind, _ in parts]
    if len(parts) != 4 or kinds[:3] != [_UINT32, _INT32, _INT8] or kinds[3] not in _SIZES:
        raise _Damaged("an array that is not of real numbers")
    (flags, _), (axes, values) = struct.unpack(f"{order}2I", parts[0][1]), (parts[1][1], parts[3])
    if flags & 0xFF not in _NUMBERS or flags & _COMPLEX:
        raise _Damaged("an array that is not of real numbers")
    if len(axes) % 4 or not 8 <= len(axes) <= 128:
        raise _Damaged("an array with a wrong number of axes")
    lengths = struct.unpack(f"{order}{len(axes) // 4}i", axes)
    if min(lengths) < 0 or math.prod(lengths) * _SIZES[values[0]] != len(values[1]):
        raise _Damaged(f"an array whose values do not fill its axes {lengths}")
    return parts[2][1].decode("ascii", errors="replace")
