"""A literal writer of MAT files of version 5, byte by byte, in both byte orders."""

import struct
import zlib

import numpy as np


def element(order, code, data):
    """A data element: up to 4 bytes stand in its head."""
    if 0 < len(data) <= 4:
        return struct.pack(f"{order}I", len(data) << 16 | code) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", code, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(order, name, array, kind, number):
    """An array: its flags, axes, name and values; the code of the values and that of the class."""
    axes = struct.pack(f"{order}{array.ndim}i", *array.shape)
    values = array.astype(array.dtype.newbyteorder(order)).tobytes("F")
    parts = ((6, struct.pack(f"{order}II", number, 0)), (5, axes), (1, name.encode()), (kind, values))
    return element(order, 14, b"".join(element(order, *part) for part in parts))


def packed(order, data):
    """The same element, compressed."""
    content = zlib.compress(data)
    return struct.pack(f"{order}II", 15, len(content)) + content


def header(order, version=0x0100):
    """The header."""
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}HH", version, 0x4D49)


def values(shape, dtype):
    """Numbers that fill all bytes of their type."""
    raw = np.random.default_rng(0).integers(1, 120, np.dtype(dtype).itemsize * int(np.prod(shape)), dtype=np.uint8)
    return raw.view(dtype).reshape(shape)
