"""A literal writer of MAT files of version 5, byte by byte, in both byte orders."""

import struct
import zlib

import numpy as np

# Code of the values, code of the class, type.
KINDS = [
    (1, 8, "i1"),
    (2, 9, "u1"),
    (3, 10, "i2"),
    (4, 11, "u2"),
    (5, 12, "i4"),
    (6, 13, "u4"),
    (7, 7, "f4"),
    (9, 6, "f8"),
    (12, 14, "i8"),
    (13, 15, "u8"),
]
SHAPES = [(1, 1), (1, 3), (2, 3), (3, 1), (0, 4), (2, 3, 2), (1, 2, 1, 2, 3)]


def element(order, code, data, small=True):
    """Literal writer of a data element."""
    if small and 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | code) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", code, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(order, name, array, kind, number, small=True, flags=0):
    """Literal writer of an array: its flags, axes, name and values."""
    axes = struct.pack(f"{order}{array.ndim}i", *array.shape)
    values = array.astype(array.dtype.newbyteorder(order)).tobytes("F")
    parts = [
        element(order, 6, struct.pack(f"{order}II", number | flags, 0)),
        element(order, 5, axes),
        element(order, 1, name.encode(), small),
        element(order, kind, values, small),
    ]
    return element(order, 14, b"".join(parts), small=False)


def packed(order, data):
    """The same element, compressed."""
    content = zlib.compress(data)
    return struct.pack(f"{order}II", 15, len(content)) + content


def header(order, version=0x0100):
    """Literal writer of the header."""
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}HH", version, 0x4D49)


def values(shape, dtype):
    """Numbers that fill all bytes of their type."""
    raw = np.random.default_rng(0).integers(1, 120, np.dtype(dtype).itemsize * int(np.prod(shape)), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)
