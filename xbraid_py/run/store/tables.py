"""The tables of an object in an HDF5 file, looked at before HDF5 follows them.

HDF5 believes what they say once their checksums are right, and whoever makes a file gives them those: it divides by
lengths that are zero, and goes down trees without end. So an object is refused that has other tables than the writers
of checkpoints make. After the HDF5 File Format Specification, version 3.0.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

NOWHERE = 2**64 - 1
_LINK_INFO, _LAYOUT, _CONTINUATION, _ATTRIBUTE_INFO = 2, 8, 16, 21
_LENGTHS = {_LINK_INFO: 18, _CONTINUATION: 16, _ATTRIBUTE_INFO: 18}
# Those, nothing, extents, type, fill values, a link, of a group, filters, an attribute, and a time.
_MESSAGES = {_LINK_INFO, _LAYOUT, _CONTINUATION, _ATTRIBUTE_INFO, 0, 1, 3, 5, 6, 10, 11, 12, 18}
_TIMES, _WIDTH = 32, 3  # flags of an object: it has times, and how many bytes its length has
_SHARED = 2  # a flag of a message: it lies elsewhere
_CONTIGUOUS, _CHUNKED = (b"\3\1", b"\4\1"), b"\4\2"
_INDICES = {(2, 1): 21, (0, 3): 10}  # bytes of what a layout says of its only chunk, with a checksum, or of several
_MOST_BYTES = 2**20
# A tree of names in a group: signature, version and type, bytes of a node and of an entry, levels, how full nodes are.
_TREE = struct.Struct("<6sIHHBB")
_TREE_HEAD, _NODE_BYTES, _ENTRY_BYTES, _MOST_LEVELS, _FULL = b"BTHD\0\5", 512, 11, 3, (100, 40)


def check_object(file: BinaryIO, address: int) -> None:
    """Raise `ValueError` unless the tables of the object at an address are some that a checkpoint has."""
    head = _bytes(file, address, 30)
    if not head.startswith(b"OHDR\2") or head[5] & ~(_TIMES | _WIDTH):
        raise ValueError("an object of it is of a kind that checkpoints have not")
    start, width = 6 + (16 if head[5] & _TIMES else 0), 1 << (head[5] & _WIDTH)
    waiting = [(address + start + width, int.from_bytes(head[start : start + width], "little"))]
    total = 0
    while waiting:
        first, size = waiting.pop()
        total += size
        if total > _MOST_BYTES:
            raise ValueError("an object of it has tables without end")
        data, at = _bytes(file, first, size), 0
        while at + 4 <= size:
            kind, length, flags = struct.unpack_from("<BHB", data, at)
            content = data[at + 4 : at + 4 + length]
            if kind not in _MESSAGES or flags & _SHARED or len(content) != _LENGTHS.get(kind, length):
                raise ValueError("an object of it has a table that checkpoints have not")
            if kind == _CONTINUATION:
                place, length_there = struct.unpack("<QQ", content)
                waiting.append((place + 4, max(0, length_there - 8)))  # between signature and checksum
            elif kind in (_LINK_INFO, _ATTRIBUTE_INFO):
                _, how, _, tree = struct.unpack("<BBQQ", content)
                if how or tree != NOWHERE and kind == _ATTRIBUTE_INFO:
                    raise ValueError("an object of it has a table that checkpoints have not")
                if tree != NOWHERE:
                    _check_tree(file, tree)
            elif kind == _LAYOUT and not _is_layout(content):
                raise ValueError("an array of it lies in a way that those of checkpoints do not")
            at += 4 + length


def _is_layout(content: bytes) -> bool:
    """Whether an array is said to lie in one piece, or in chunks that have a size along every axis."""
    if content[:2] != _CHUNKED or len(content) < 5:
        return content[:2] in _CONTIGUOUS
    how, axes, width = content[2:5]
    end = 5 + axes * width
    sizes = [int.from_bytes(content[at : at + width], "little") for at in range(5, end, width or 1)]
    kind = int.from_bytes(content[end : end + 1], "little")
    return 0 < width <= 8 and all(sizes) and len(content) - end == _INDICES.get((how, kind), -1)


def _check_tree(file: BinaryIO, address: int) -> None:
    head, node, entry, levels, *full = _TREE.unpack(_bytes(file, address, _TREE.size))
    if (head, node, entry, (*full,)) != (_TREE_HEAD, _NODE_BYTES, _ENTRY_BYTES, _FULL) or levels > _MOST_LEVELS:
        raise ValueError("a group of it has a table that checkpoints have not")


def _bytes(file: BinaryIO, first: int, size: int) -> bytes:
    file.seek(first)
    data = file.read(size)
    if len(data) < size:
        raise ValueError("a table of it lies beyond its end")
    return data
