"""Checkpoint files that lie: each is a sound checkpoint with one thing changed, and the right checksums around it.

`LIES` has a function for every kind of lie, which takes the folder of `sound_files`, a random generator and the path to
write to. What is true of the file afterwards may be nothing new: a lie can be without effect.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
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
    fletcher32,
    messages,
    number,
    put,
    seal,
)

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.store.write import Shard, save

Lie = Callable[[Path, random.Random, Path], None]
LIES: dict[str, Lie] = {}
META = {"update": 1, "options": {"num_layers": 8, "tol": 1e-2}, "rows": [1, 2.5, None]}
ARRAYS = {
    "weights/a": torch.arange(8.0, dtype=torch.float64).reshape(2, 4),
    "weights/long": torch.arange(80_000.0).reshape(20_000, 4),
    "optimizer/s/flags": torch.tensor([True, False, True]),
    "optimizer/s/none": torch.zeros(0, 3),
    "counts": torch.arange(5),
    "pixels": torch.arange(8, dtype=torch.uint8).reshape(4, 2),
}
MANY = {f"weights/{number}": torch.full((3,), float(number)) for number in range(12)}
_FLETCHER = {"fletcher32": True}
_LARGE = (2**31, 2**40, 2**63, 2**64 - 1)
_NEWER = ("v110", "v110")


def sound_files(folder: Path) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Write the files that lies are made from into a folder; what each holds, by name.

    In `many.h5` the names of a group lie in tables of their own, in `old.h5` all tables of a group are of the older
    kind without checksums; the others are as the library writes them.
    """
    for name, arrays in (("few.h5", ARRAYS), ("many.h5", {**ARRAYS, **MANY}), ("old.h5", ARRAYS)):
        shards = {each: Shard(rows, 0, len(rows)) for each, rows in arrays.items()}
        save(folder / name, SerialCommunicator(), shards, META)
    with h5py.File(folder / "old.h5", "r+", libver="earliest") as file:
        file.move("weights", "newer")
        file.create_group("weights")
        for name in list(file["newer"]):
            held = file["newer"][name]
            file["weights"].create_dataset(name, data=held[...], chunks=held.chunks, fletcher32=True)
        del file["newer"]
    return {
        name: (META, arrays)
        for name, arrays in (("few.h5", ARRAYS), ("many.h5", {**ARRAYS, **MANY}), ("old.h5", ARRAYS))
    }


def base_of(kind: str) -> str:
    """The name of the sound file that a kind of lie is made from."""
    return "many.h5" if kind.startswith("many_") else "old.h5" if kind.startswith("old_") else "few.h5"


def tell(kind: str, folder: Path, seed: int, path: Path) -> None:
    """Write a file with a lie of a kind; the same one for the same seed."""
    LIES[kind](folder, random.Random(f"{kind} {seed}"), path)


def _by_library(change: Callable[[h5py.File, random.Random], None], libver=_NEWER) -> Lie:
    def lie(folder: Path, chance: random.Random, path: Path) -> None:
        shutil.copyfile(folder / "few.h5", path)
        with h5py.File(path, "r+", libver=libver) as file:
            change(file, chance)

    return lie


def _by_hand(base: str, change: Callable[[bytearray, random.Random], None]) -> Lie:
    def lie(folder: Path, chance: random.Random, path: Path) -> None:
        data = bytearray((folder / base).read_bytes())
        change(data, chance)
        path.write_bytes(data)

    return lie


# Lies that the library itself can be made to tell.


def _chunk(file: h5py.File, name: str, shape, dtype, content: bytes, mask: int = 0, chunks=None) -> None:
    """An array in place of another, of whose first chunk the bytes are given."""
    if name in file:
        del file[name]
    data = file.create_dataset(name, shape, dtype, chunks=chunks or shape, **_FLETCHER)
    data.id.write_direct_chunk((0,) * len(shape), content, filter_mask=mask)


def _with_sum(content: bytes) -> bytes:
    return content + fletcher32(content).to_bytes(4, "little")


def _short(file, chance):
    rows = chance.choice([16, 2**13, 2**15])
    _chunk(file, "weights/a", (rows,), "f8", _with_sum(bytes(chance.choice([8, 16, 64]))))


def _short_and_large(file, chance):
    _chunk(file, "weights/a", (1, chance.choice([2**20, 2**25, 2**28])), "f8", _with_sum(bytes(8)))


def _long(file, chance):
    _chunk(file, "weights/a", (4,), "f8", _with_sum(bytes(32 + chance.choice([8, 4096]))))


def _mask(file, chance):
    _chunk(file, "weights/a", (8,), "f8", bytes(chance.choice([64, 68])), mask=chance.choice([1, 3, 2**32 - 1]))


def _meta(file, text: bytes, declared: int | None = None):
    _chunk(file, "meta", (1,), f"S{declared or len(text)}", _with_sum(text))


def _meta_huge(file, chance):
    _meta(file, b'{"meta": {}, "versions": {}}', chance.choice([10**3, 10**6, 2**31 - 1]))


def _meta_group(file, chance):
    del file["meta"]
    file.create_group("meta").create_group("inner")


def _meta_shape(file, chance):
    _chunk(file, "meta", chance.choice([(2,), (1, 1), (3, 2)]), "S40", _with_sum(bytes(40 * 6)))


def _meta_other_type(file, chance):
    del file["meta"]
    dtype = chance.choice(["f8", h5py.string_dtype(), h5py.vlen_dtype(np.uint8), "V40", h5py.opaque_dtype("M8[s]")])
    file.create_dataset("meta", (1,), dtype, chunks=(1,))


def _meta_unchecked(file, chance):
    text = file["meta"][...]
    del file["meta"]
    file.create_dataset("meta", data=text, chunks=chance.choice([None, (1,)]))


def _meta_missing(file, chance):
    del file["meta"]


def _json(*texts: str) -> Callable:
    def change(file, chance):
        _meta(file, chance.choice(texts).encode())

    return change


def _nested(file, chance):
    at = file
    for _ in range(chance.choice([20, 500, 1500])):
        at = at.create_group("g")


def _many_names(file, chance):
    for each in range(4100):
        file.create_group(f"n{each}")


def _self_link(file, chance):
    inner = file.require_group(chance.choice(["weights", "optimizer/s", "weights/x/y"]))
    inner["again"] = chance.choice([inner, inner.parent, file["/"]])


def _fan_of_links(file, chance):
    # Every group twice in the one above: 2 ** 14 paths to one group.
    at = file["weights"]
    for _ in range(14):
        at = at.create_group("l")
        at.parent["r"] = at


def _second_name(file, chance):
    file["weights/b"] = file[chance.choice(["weights/a", "weights/long", "optimizer"])]


def _link(file, chance):
    kinds = (h5py.SoftLink("/weights/a"), h5py.SoftLink("nowhere"), h5py.ExternalLink("few.h5", "/weights/a"))
    file[chance.choice(["b", "weights/b"])] = chance.choice([*kinds, h5py.ExternalLink("/dev/zero", "/")])


def _stored_elsewhere(file, chance):
    if chance.random() < 0.5:
        file.create_dataset("weights/b", (3, 2), "f8", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout((3, 2), "f8")
        layout[:] = h5py.VirtualSource(chance.choice([".", "few.h5"]), "weights/b", shape=(3, 2))
        file.create_virtual_dataset("weights/b", layout)


def _layout(file, chance):
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_layout(chance.choice([h5py.h5d.COMPACT, h5py.h5d.CONTIGUOUS]))
    data = h5py.h5d.create(file["weights"].id, b"b", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((3, 2)), made)
    data.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones((3, 2)))


def _filter(file, chance):
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk((3, 2))
    for each in chance.choice(
        [("gzip",), ("sum", "gzip"), ("sum", "sum"), ("shuffle", "sum"), ("own", "sum"), ("own",)]
    ):
        if each == "own":
            made.set_filter(chance.choice([307, 32000, 65535]), h5py.h5z.FLAG_OPTIONAL)
        else:
            {"gzip": lambda: made.set_deflate(9), "sum": made.set_fletcher32, "shuffle": made.set_shuffle}[each]()
    h5py.h5d.create(file["weights"].id, b"b", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create_simple((3, 2)), made)


_TYPES = (
    *(">f8", ">i8", "f2", "i4", "u8", "i1", "c16", "V8", "S8", "S1", "M8[ns]", ("f8", (2,)), [("x", "f8"), ("y", "?")]),
    *(
        h5py.string_dtype(),
        h5py.vlen_dtype("f8"),
        h5py.ref_dtype,
        h5py.regionref_dtype,
        h5py.enum_dtype({"A": 1}, "i1"),
    ),
    *(h5py.enum_dtype({"FALSE": 1, "TRUE": 0}, "i1"), h5py.enum_dtype({"FALSE": 0, "TRUE": 1, "X": 2}, "i1")),
)


def _type(file, chance):
    dtype = chance.choice(_TYPES)
    dtype = np.dtype(dtype) if isinstance(dtype, str | tuple | list) else dtype
    dtype = h5py.opaque_dtype(dtype) if dtype.kind == "M" else dtype
    file.create_dataset("weights/b", (2,), dtype, chunks=(2,), fletcher32=chance.random() < 0.7)


def _named_type(file, chance):
    file["weights/b"] = np.dtype(chance.choice(["f8", "i4", "S9"]))


def _resizable(file, chance):
    most = chance.choice([(None, 4), (None, None), (5, 4)])
    data = file.create_dataset("weights/b", (2, 4), "f8", chunks=(2, 4), maxshape=most, **_FLETCHER)
    data[...] = 1


def _not_all_stored(file, chance):
    rows = chance.choice([10**5, 10**9, 10**13, 2**62])
    data = file.create_dataset("weights/b", (rows, 2), "f8", chunks=(2**14, 2), **_FLETCHER)
    if rows == 10**5:
        data[: 2**14] = 1


def _odd_chunks(file, chance):
    shape, chunks = chance.choice([((8, 4), (1, 4)), ((8, 4), (8, 2)), ((2**17, 4), (2**16, 4)), ((8, 4), (3, 3))])
    file.create_dataset("weights/b", shape, "f8", chunks=chunks, data=np.ones(shape), **_FLETCHER)


def _space(file, chance):
    kind = chance.choice([h5py.h5s.NULL, h5py.h5s.SCALAR])
    h5py.h5d.create(file["weights"].id, b"b", h5py.h5t.NATIVE_DOUBLE, h5py.h5s.create(kind))


def _not_a_truth(file, chance):
    _chunk(file, "optimizer/s/flags", (3,), "?", _with_sum(bytes([1, chance.choice([2, 128, 255]), 0])))


def _attribute(file, chance):
    name = chance.choice(["format", "format_number"])
    values = ["xbraid_py checkpoint", 1.0, np.arange(3), h5py.Empty("f8"), np.bytes_("x" * 60_000), np.ones((100, 50))]
    refs = [file["weights"].ref, np.array([b"xbraid_py checkpoint"]), np.void(b"xbraid_py checkpoint"), np.uint8(1)]
    del file.attrs[name]
    value = chance.choice([*values, *refs, None])
    if value is not None:
        file.attrs[name] = value


def _attributes(file, chance):
    for each in range(chance.choice([20, 2000])):
        file.attrs[f"a{each}"] = each


def _name(file, chance):
    name = chance.choice([b"\x1b]0;x\x07", b"a\nb", b"\xff\xfe", b"x" * 60_000, "\u202e".encode(), b"a" * 501])
    h5py.h5g.create(file.id, name)


for _change in (
    *(_short, _short_and_large, _long, _mask, _meta_huge, _meta_group, _meta_shape, _meta_other_type, _meta_unchecked),
    *(_meta_missing, _nested, _many_names, _self_link, _fan_of_links, _second_name, _link, _stored_elsewhere, _layout),
    *(_filter, _type, _named_type, _resizable, _not_all_stored, _odd_chunks, _space, _not_a_truth, _attribute),
    *(_attributes, _name),
):
    LIES[_change.__name__[1:]] = _by_library(_change)
LIES |= {
    "json_deep": _by_library(
        _json("[" * 100_000, '{"versions": {}, "meta": {"a": ' + "[" * 400 + "]" * 400 + "}}", '{"a":' * 50_000)
    ),
    "json_other": _by_library(
        _json("[]", "7", '{"meta": [], "versions": {}}', '{"meta": {}}', "{", "", '{"meta": {}, "versions": 1}', "null")
    ),
    "json_letters": _by_library(
        _json('{"meta": {"\u00e9": 1}, "versions": {}}', "\ufeff{}", '{"meta": {"a": ' + "9" * 9000)
    ),
    "old_resizable": _by_library(_resizable, "earliest"),
    "old_not_all_stored": _by_library(_not_all_stored, "earliest"),
}


# Lies told in the tables.


def _one(data: bytes, chance: random.Random, *kinds: int) -> Message:
    return chance.choice(messages(data, *kinds))


def _set(data: bytearray, block: Block, at: int, size: int, value: int) -> None:
    put(data, at, size, value)
    seal(data, block)


def _superblock(at: int, size: int, *values: int) -> Callable:
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


def _single(data: bytes) -> list[tuple[Message, int]]:
    return [(message, after) for message, after in _layouts(data) if data[after] == 1 and data[message.at + 2] & 2]


def _stored_size(data, chance):
    message, after = chance.choice(_single(data))
    right = number(data, after + 1)
    value = chance.choice([0, 1, 3, 4, 5, right - 4, right - 1, right + 1, 2 * right, 2**31, 2**32, 2**63, 2**64 - 1])
    _set(data, message.block, after + 1, 8, value)


def _stored_mask(data, chance):
    message, after = chance.choice(_single(data))
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
    """A byte of any message, with the right checksum; but for names and extents, where a lie is another truth."""
    message = chance.choice([each for each in messages(data) if each.kind not in (LINK, DATASPACE) and each.size])
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
    first, second = chance.sample(_single(data), 2)
    _set(data, first[0].block, first[0].at + first[0].size - 8, 8, number(data, second[0].at + second[0].size - 8))


for _change in (
    *(
        _extents,
        _rank_of_space,
        _size_of_type,
        _class_of_type,
        _bits_of_type,
        _layout_flags,
        _layout_axes,
        _layout_sizes,
    ),
    *(_item_bytes, _index, _address, _stored_size, _stored_mask, _filters, _fill, _attribute_sizes, _attribute_head),
    *(_link_target, _link_head, _continuation, _message_head, _header, _anywhere, _chunks_on_each_other),
):
    LIES[f"table_{_change.__name__[1:]}"] = _by_hand("few.h5", _change)
LIES |= {
    "superblock_end": _by_hand("few.h5", _superblock(28, 8, 0, 48, 1000, 2**40, 2**63, 2**64 - 1)),
    "superblock_root": _by_hand("few.h5", _superblock(36, 8, 0, 47, 212, 10**5, 2**40, 2**63, 2**64 - 1)),
    "superblock_extension": _by_hand("few.h5", _superblock(20, 8, 0, 48, 212, 10**5, 2**63)),
    "superblock_base": _by_hand("few.h5", _superblock(12, 8, 1, 48, 512, 2**63, 2**64 - 1)),
    "superblock_head": _by_hand(
        "few.h5", _superblock(8, 4, *(0x00080800 + each for each in (0, 1, 2, 4, 255)), 0x080403)
    ),
    "chunk_index": _by_hand("few.h5", _table("FAHD")),
    "chunk_index_entries": _by_hand("few.h5", _table("FADB")),
    "many_names_tree": _by_hand("many.h5", _table("BTHD", "BTLF")),
    "many_names_heap": _by_hand("many.h5", _table("FRHP", "FHDB")),
    "old_group": _by_hand("old.h5", _without_sums),
}


def _cut_and_grown(folder: Path, chance: random.Random, path: Path) -> None:
    data = (folder / "few.h5").read_bytes()
    size = chance.choice([chance.randrange(len(data)), len(data) - 1])
    path.write_bytes(data[:size] + bytes(len(data) - size))


def _behind_other_bytes(folder: Path, chance: random.Random, path: Path) -> None:
    path.write_bytes(bytes(chance.choice([512, 1024, 4096])) + (folder / "few.h5").read_bytes())


def _holes(folder: Path, chance: random.Random, path: Path) -> None:
    """An array of a gigabyte or more that nobody has written: zeros, and zero is their checksum."""
    items = chance.choice([2**27, 2**28])
    shutil.copyfile(folder / "few.h5", path)
    with h5py.File(path, "r+", libver=_NEWER) as file:
        _chunk(file, "weights/a", (1, items), "f8", bytes(12))
    data = bytearray(path.read_bytes())
    message, after = next(each for each in _single(data) if number(data, each[1] + 1) == 12)
    put(data, after + 1, 8, items * 8 + 4)
    put(data, message.at + message.size - 8, 8, len(data))
    seal(data, message.block)
    end = len(data) + items * 8 + 4
    _superblock(28, 8, end)(data, chance)
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.truncate(end)


LIES |= {"cut_and_grown": _cut_and_grown, "behind_other_bytes": _behind_other_bytes, "holes": _holes}
