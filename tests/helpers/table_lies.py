"""Lies told in the tables of an HDF5 file, with the right checksums around them."""

from __future__ import annotations

import random
from collections.abc import Callable

from hdf5_tables import (
    ATTRIBUTE,
    CONTINUATION,
    DATASPACE,
    DATATYPE,
    FILL,
    FILTERS,
    LAYOUT,
    LINK,
    Block,
    Message,
    blocks,
    messages,
    number,
    put,
    seal,
)

Change = Callable[[bytearray, random.Random], None]
_LARGE = (2**31, 2**40, 2**63, 2**64 - 1)


def _one(data: bytes, chance: random.Random, *kinds: int) -> Message:
    return chance.choice(messages(data, *kinds))


def _set(data: bytearray, block: Block, at: int, size: int, value: int) -> None:
    put(data, at, size, value)
    seal(data, block)


def superblock(at: int, size: int, *values: int) -> Callable:
    def change(data, chance):
        _set(data, Block("superblock", 0, 44, 44), at, size, chance.choice(values))

    return change


def _extents(data, chance):
    message = _one(data, chance, DATASPACE)
    axis = chance.randrange(data[message.at + 1] or 1)
    limits = data[message.at + 1] * 8 * chance.randrange(2)  # the extent itself, or how far it may grow
    _set(data, message.block, message.at + 4 + 8 * axis + limits, 8, chance.choice((*_LARGE, 2**32, 0)))


def _rank_of_space(data, chance):
    message = _one(data, chance, DATASPACE)
    _set(data, message.block, message.at + 1, 1, chance.choice([0, 1, 2, 3, 5, 33, 255]))


def _size_of_type(data, chance):
    message = _one(data, chance, DATATYPE)
    _set(data, message.block, message.at + 4, 4, chance.choice([0, 1, 2, 7, 9, 2**16, 2**31, 2**32 - 1]))


def _class_of_type(data, chance):
    message = _one(data, chance, DATATYPE)
    _set(data, message.block, message.at, 1, chance.randrange(1, 6) << 4 | chance.randrange(13))


def _bits_of_type(data, chance):
    message = _one(data, chance, DATATYPE)
    _set(
        data,
        message.block,
        message.at + chance.choice([1, 2, 3, *range(8, max(9, message.size))]),
        1,
        chance.randrange(256),
    )


def _layouts(data: bytes) -> list[tuple[Message, int]]:
    """Layouts of chunks, and where in each what follows the chunk's sizes begins."""
    found = [message for message in messages(data, LAYOUT) if data[message.at : message.at + 2] == b"\4\2"]
    return [(message, message.at + 5 + data[message.at + 3] * data[message.at + 4]) for message in found]


def _layout_flags(data, chance):
    message, _ = chance.choice(_layouts(data))
    _set(data, message.block, message.at + chance.choice([0, 1, 2]), 1, chance.randrange(8))


def _layout_axes(data, chance):
    message, _ = chance.choice(_layouts(data))
    _set(data, message.block, message.at + chance.choice([3, 4]), 1, chance.choice([0, 1, 2, 3, 4, 8, 33, 255]))


def _layout_sizes(data, chance):
    message, _ = chance.choice(_layouts(data))
    axes, width = data[message.at + 3], data[message.at + 4]
    at = message.at + 5 + width * chance.randrange(axes)
    _set(data, message.block, at, width, chance.choice([0, 1, 2, 3, 7, 256**width - 1, 256**width // 2]))


def _item_bytes(data, chance):
    # The last of a chunk's sizes is that of one element.
    message, after = chance.choice(_layouts(data))
    width = data[message.at + 4]
    _set(data, message.block, after - width, width, chance.choice([0, 1, 2, 4, 16, 200]))


def _index(data, chance):
    message, after = chance.choice(_layouts(data))
    _set(data, message.block, after, 1, chance.choice([0, 1, 2, 3, 4, 5, 6, 255]))


def _address(data, chance):
    message, after = chance.choice(_layouts(data))
    at = message.at + message.size - 8
    value = chance.choice([0, 48, len(data) - 1, len(data) + 1000, 2**63, 2**64 - 1, chance.randrange(len(data))])
    _set(data, message.block, at, 8, value)


def single_chunks(data: bytes) -> list[tuple[Message, int]]:
    return [(message, after) for message, after in _layouts(data) if data[after] == 1 and data[message.at + 2] & 2]


def _stored_size(data, chance):
    message, after = chance.choice(single_chunks(data))
    right = number(data, after + 1)
    value = chance.choice([0, 1, 3, 4, 5, right - 4, right - 1, right + 1, 2 * right, 2**31, 2**32, 2**63, 2**64 - 1])
    _set(data, message.block, after + 1, 8, value)


def _stored_mask(data, chance):
    message, after = chance.choice(single_chunks(data))
    _set(data, message.block, after + 9, 4, chance.choice([1, 2, 3, 2**31, 2**32 - 1]))


def _filters(data, chance):
    message = _one(data, chance, FILTERS)
    at = message.at + chance.randrange(message.size)
    _set(data, message.block, at, 1, chance.choice([0, 1, 2, 3, 4, 5, 6, 32, 255]))


def _fill(data, chance):
    message = _one(data, chance, FILL)
    _set(data, message.block, message.at + chance.randrange(message.size), 1, chance.randrange(256))


def _attribute_sizes(data, chance):
    message = _one(data, chance, ATTRIBUTE)
    _set(data, message.block, message.at + chance.choice([2, 4, 6]), 2, chance.choice([0, 1, 7, 200, 2**15, 2**16 - 1]))


def _attribute_head(data, chance):
    message = _one(data, chance, ATTRIBUTE)
    _set(data, message.block, message.at + chance.choice([0, 1, 8, *range(16, 48)]), 1, chance.randrange(256))


def _link_target(data, chance):
    message = _one(data, chance, LINK)
    at = message.at + message.size - 8
    others = [each.block.first for each in messages(data, DATASPACE)]
    value = chance.choice([0, 48, 2**64 - 1, 2**63, len(data), len(data) - 3, number(data, at) + 1, *others])
    if value != number(data, at):
        _set(data, message.block, at, 8, value)


def _link_head(data, chance):
    message = _one(data, chance, LINK)
    _set(data, message.block, message.at + chance.choice([0, 1, 2]), 1, chance.choice([0, 1, 2, 3, 4, 24, 64, 255]))


def _continuation(data, chance):
    message = _one(data, chance, CONTINUATION)
    places = [block.first for block in blocks(data)]
    at, value = chance.choice(
        [(0, chance.choice([0, 2**64 - 1, len(data), len(data) - 20, *places]))]
        + [(8, chance.choice([0, 1, 4, 8, 2**20, 2**31, 2**63, 2**64 - 1, number(data, message.at + 8) + 1]))]
    )
    _set(data, message.block, message.at + at, 8, value)


def _message_head(data, chance):
    message = _one(data, chance)
    at = message.at - 4 + chance.randrange(4)
    if message.block.first + 4 <= at:
        _set(data, message.block, at, 1, chance.randrange(256))


def _header(data, chance):
    block = chance.choice([each for each in blocks(data) if each.name == "OHDR"])
    _set(data, block, block.first + chance.choice([4, 5, 6]), 1, chance.randrange(256))


def _table(*names: str) -> Callable:
    """A byte, or some, of a table of some kinds, other than the letters that say which kind."""

    def change(data, chance):
        block = chance.choice([each for each in blocks(data) if each.name in names])
        places = [at for at in range(block.first + 4, block.end) if not block.sum_at <= at < block.sum_at + 4]
        size = chance.choice([1, 1, 2, 8])
        at = chance.choice(places[: -size or None])
        _set(data, block, at, size, chance.choice([0, 2**63, 2**64 - 1, *(chance.randrange(2**64) for _ in range(5))]))

    return change


def _anywhere(data, chance):
    """A byte of any message, with the right checksum."""
    message = chance.choice([each for each in messages(data) if each.size])
    _set(data, message.block, message.at + chance.randrange(message.size), 1, chance.randrange(256))


def _without_sums(data, chance):
    """A byte of the tables of an older group: a tree, its leaves, and the heap of its names."""
    starts = [data.index(letters) for letters in (b"TREE", b"SNOD", b"HEAP") if letters in data]
    at = chance.choice(starts) + chance.randrange(4, 60)
    size = chance.choice([1, 1, 2, 8])
    put(
        data,
        at,
        size,
        chance.choice([0, 2**64 - 1, chance.choice(starts), *(chance.randrange(2**64) for _ in range(3))]),
    )


def _chunks_on_each_other(data, chance):
    first, second = chance.sample(single_chunks(data), 2)
    _set(data, first[0].block, first[0].at + first[0].size - 8, 8, number(data, second[0].at + second[0].size - 8))


_CHANGES = (
    *(_extents, _rank_of_space, _size_of_type, _class_of_type, _bits_of_type, _layout_flags, _layout_axes),
    *(_layout_sizes, _item_bytes, _index, _address, _stored_size, _stored_mask, _filters, _fill, _attribute_sizes),
    *(_attribute_head, _link_target, _link_head, _continuation, _message_head, _header, _anywhere),
    *(_chunks_on_each_other,),
)
CHANGES: dict[str, Change] = {
    **{f"table_{change.__name__[1:]}": change for change in _CHANGES},
    "superblock_end": superblock(28, 8, 0, 48, 1000, 2**40, 2**63, 2**64 - 1),
    "superblock_root": superblock(36, 8, 0, 47, 212, 10**5, 2**40, 2**63, 2**64 - 1),
    "superblock_extension": superblock(20, 8, 0, 48, 212, 10**5, 2**63),
    "superblock_base": superblock(12, 8, 1, 48, 512, 2**63, 2**64 - 1),
    "superblock_head": superblock(8, 4, *(0x00080800 + each for each in (0, 1, 2, 4, 255)), 0x080403),
    "chunk_index": _table("FAHD"),
    "chunk_index_entries": _table("FADB"),
}
# Of a file whose groups have tables of their own, and of one whose groups have the older ones.
LARGE_GROUPS: dict[str, Change] = {
    "large_group_tree": _table("BTHD", "BTLF"),
    "large_group_heap": _table("FRHP", "FHDB"),
}
OLD_GROUPS: dict[str, Change] = {"old_group": _without_sums}
