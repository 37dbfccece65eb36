"""The tables of an HDF5 file of the newer layout: where they are, and their checksums, so that they can lie.

After the "HDF5 File Format Specification, version 3.0"; addresses and lengths have eight bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Types of the messages of an object header.
DATASPACE, DATATYPE, FILL, LINK, LAYOUT, FILTERS, ATTRIBUTE, CONTINUATION = 1, 3, 5, 6, 8, 11, 12, 16


@dataclass(frozen=True)
class Block:
    """A table with a checksum of its bytes from `first` to `end`, which lies at `sum_at`, within them or after."""

    name: str
    first: int
    end: int
    sum_at: int


@dataclass(frozen=True)
class Message:
    """A message of an object header; its content of `size` bytes begins at `at`, and is part of `block`."""

    kind: int
    at: int
    size: int
    block: Block


def _mixed(a: int, b: int, c: int) -> tuple[int, int, int]:
    for shift in (4, 6, 8, 16, 19, 4):
        a = (a - c ^ (c << shift | c >> 32 - shift)) & 0xFFFFFFFF
        c = c + b & 0xFFFFFFFF
        a, b, c = b, c, a
    return a, b, c


def checksum(data: bytes) -> int:
    """Bob Jenkins' lookup3 with start value 0, as HDF5 checks its tables with it."""
    a = b = c = (0xDEADBEEF + len(data)) & 0xFFFFFFFF
    words = struct.unpack(f"<{(len(data) + 11) // 12 * 3}I", data + bytes(-len(data) % 12))
    if not words:
        return c
    for first in range(0, len(words) - 3, 3):
        a, b, c = _mixed(
            (a + words[first]) & 0xFFFFFFFF, (b + words[first + 1]) & 0xFFFFFFFF, (c + words[first + 2]) & 0xFFFFFFFF
        )
    a, b, c = ((x + y) & 0xFFFFFFFF for x, y in zip((a, b, c), words[-3:], strict=True))
    for turn, shift in enumerate((14, 11, 25, 16, 4, 14, 24)):
        x, y = ((c, b), (a, c), (b, a))[turn % 3]
        x = ((x ^ y) - (y << shift | y >> 32 - shift)) & 0xFFFFFFFF
        a, b, c = ((a, b, x), (x, b, c), (a, x, c))[turn % 3]
    return c


def fletcher32(data: bytes) -> int:
    """The checksum of a chunk, as the filter of HDF5 computes it."""
    first = second = 0
    for (word,) in struct.iter_unpack(">H", data[: len(data) // 2 * 2]):
        first = (first + word) % 65535 or (65535 if first + word else 0)
        second = (second + first) % 65535 or (65535 if second + first else 0)
    if len(data) % 2:
        first = (first + (data[-1] << 8)) % 65535
        second = (second + first) % 65535
    return second << 16 | first


def number(data: bytes, at: int, size: int = 8) -> int:
    """A number of the tables."""
    return int.from_bytes(data[at : at + size], "little")


def put(data: bytearray, at: int, size: int, value: int) -> None:
    """Write a number into the tables, cut to its size."""
    data[at : at + size] = (value % 256**size).to_bytes(size, "little")


def sealed(data: bytes, block: Block) -> int:
    """The checksum that a table should have."""
    held = bytearray(data[block.first : block.end])
    if block.sum_at < block.end:
        put(held, block.sum_at - block.first, 4, 0)
    return checksum(bytes(held))


def seal(data: bytearray, block: Block) -> None:
    """Give a table its right checksum."""
    put(data, block.sum_at, 4, sealed(data, block))


def _after(name: str, first: int, size: int) -> Block:
    return Block(name, first, first + size, first + size)


def _headers(data: bytes) -> Iterator[tuple[Block, int, int]]:
    """Blocks of object headers, the first byte of their messages, and bytes of the head of a message."""
    for found in re.finditer(b"OHDR\x02", data):
        flags, at = data[found.start() + 5], found.start() + 6
        at += 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)
        width = 1 << (flags & 3)
        start, size, head = at + width, number(data, at, width), 4 + 2 * (flags >> 2 & 1)
        waiting = [(Block("OHDR", found.start(), start + size, start + size), start)]
        while waiting:
            block, start = waiting.pop()
            yield block, start, head
            for kind, at, _ in _messages(data, start, block.end, head):
                if kind == CONTINUATION:
                    first, length = number(data, at), number(data, at + 8)
                    waiting.append((Block("OCHK", first, first + length - 4, first + length - 4), first + 4))


def _messages(data: bytes, start: int, end: int, head: int) -> Iterator[tuple[int, int, int]]:
    while start + head <= end:
        size = number(data, start + 1, 2)
        yield data[start], start + head, size
        start += head + size


def messages(data: bytes, *kinds: int) -> list[Message]:
    """All messages of all objects of a sound file, by default of every kind."""
    return [
        Message(kind, at, size, block)
        for block, start, head in _headers(data)
        for kind, at, size in _messages(data, start, block.end, head)
        if not kinds or kind in kinds
    ]


def blocks(data: bytes) -> list[Block]:
    """All tables of a sound file that have a checksum, as far as `seal` can renew it."""
    found = [_after("superblock", 0, 44), *(block for block, _, _ in _headers(data))]
    found += [_after("FAHD", each.start(), 24) for each in re.finditer(b"FAHD\0", data)]
    for each in re.finditer(b"FADB\0", data):
        header = number(data, each.start() + 6)
        size, elements = data[header + 6], number(data, header + 8)
        found.append(_after("FADB", each.start(), 14 + size * elements))
    trees = {each.start(): number(data, each.start() + 10, 2) for each in re.finditer(b"BTHD\0", data)}
    found += [_after("BTHD", first, 34) for first in trees]
    for first, size in trees.items():
        leaf = number(data, first + 16)
        found.append(_after("BTLF", leaf, 6 + size * number(data, first + 24, 2)))
    for each in re.finditer(b"FRHP\0", data):
        found.append(_after("FRHP", each.start(), 142))
        root, width = number(data, each.start() + 132), number(data, each.start() + 128, 2)
        size = number(data, each.start() + 112)
        found.append(Block("FHDB", root, root + size, root + 13 + -(-width // 8)))
    return [block for block in found if sealed(data, block) == number(data, block.sum_at, 4)]
