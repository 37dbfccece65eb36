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
# Values by the type of an element, and by the class of an array, which may be written in a smaller type.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
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
        raise ValueError(
            f"{path} is no MAT file of version 5 with arrays of real numbers, or damaged: {error}; get it anew, or "
            f"save it with -v7 or by scipy.io.savemat"
        ) from error
    if found.count(name) != 1:
        raise ValueError(f"{path} holds the arrays {found[:5]}; one must be {name}")
    return loadmat(io.BytesIO(raw), variable_names=[name])[name]


class _Damaged(Exception):
    """Not the format."""


def _arrays(raw: bytes) -> Iterator[str]:
    """Names of all arrays, each of which is sound."""
    if len(raw) < 4 or 0 in raw[:4]:
        raise _Damaged("no text at the beginning, as in version 4")
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:_HEADER])
    if order is None:
        raise _Damaged("no header")
    (version,) = struct.unpack_from(f"{order}H", raw, 124)
    if version >> 8 != 1:
        raise _Damaged("version 7.3, which is HDF5" if version >> 8 == 2 else f"version {version >> 8}")
    # Nothing is padded between the arrays of a file: within one, the parts are.
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
    """Types and data of the elements."""
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
            after = start + size + (-size % 8 if padded else 0)
        if start + size > len(raw):
            raise _Damaged("an element is longer than the file")
        yield kind, raw[start : start + size]
        at = after


def _name_of(parts: list[tuple[int, bytes]], order: str) -> str:
    """Name of an array of real numbers, if its parts fit each other."""
    kinds = [kind for kind, _ in parts]
    if len(parts) != 4 or kinds[:3] != [_UINT32, _INT32, _INT8] or kinds[3] not in _TYPES:
        raise _Damaged("an array that is not of real numbers")
    (flags, _), (axes, values) = struct.unpack(f"{order}2I", parts[0][1]), (parts[1][1], parts[3][1])
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX:
        raise _Damaged("an array that is not of real numbers")
    own, written = np.dtype(_CLASSES[flags & 0xFF]), np.dtype(_TYPES[kinds[3]])
    if not (written == own or (written.itemsize < own.itemsize and np.can_cast(written, own))):
        raise _Damaged(f"an array of {own} written as {written}")
    if len(axes) % 4 or not 8 <= len(axes) <= 128:
        raise _Damaged("an array with a wrong number of axes")
    lengths = struct.unpack(f"{order}{len(axes) // 4}i", axes)
    if min(lengths) < 0 or math.prod(lengths) * written.itemsize != len(values):
        raise _Damaged(f"an array whose values do not fill its axes {lengths}")
    return parts[2][1].decode("ascii", errors="replace")
