"""Lies that the HDF5 library itself can be made to tell: what it writes, but checkpoints do not have."""

from __future__ import annotations

import random
from collections.abc import Callable

import h5py
import numpy as np
from hdf5_tables import fletcher32

Change = Callable[[h5py.File, random.Random], None]
_FLETCHER = {"fletcher32": True}


def put_chunk(file: h5py.File, name: str, shape, dtype, content: bytes, mask: int = 0, chunks=None) -> None:
    """An array in place of another, of whose first chunk the bytes are given."""
    if name in file:
        del file[name]
    data = file.create_dataset(name, shape, dtype, chunks=chunks or shape, **_FLETCHER)
    data.id.write_direct_chunk((0,) * len(shape), content, filter_mask=mask)


def _with_sum(content: bytes) -> bytes:
    return content + fletcher32(content).to_bytes(4, "little")


def _short(file, chance):
    rows = chance.choice([16, 2**13, 2**15])
    put_chunk(file, "weights/a", (rows,), "f8", _with_sum(bytes(chance.choice([8, 16, 64]))))


def _short_and_large(file, chance):
    put_chunk(file, "weights/a", (1, chance.choice([2**20, 2**25, 2**28])), "f8", _with_sum(bytes(8)))


def _long(file, chance):
    put_chunk(file, "weights/a", (4,), "f8", _with_sum(bytes(32 + chance.choice([8, 4096]))))


def _mask(file, chance):
    put_chunk(file, "weights/a", (8,), "f8", bytes(chance.choice([64, 68])), mask=chance.choice([1, 3, 2**32 - 1]))


def _meta(file, text: bytes, declared: int | None = None):
    put_chunk(file, "meta", (1,), f"S{declared or len(text)}", _with_sum(text))


def _meta_huge(file, chance):
    _meta(file, b'{"meta": {}, "versions": {}}', chance.choice([10**3, 10**6, 2**31 - 1]))


def _meta_group(file, chance):
    del file["meta"]
    file.create_group("meta").create_group("inner")


def _meta_shape(file, chance):
    put_chunk(file, "meta", chance.choice([(2,), (1, 1), (3, 2)]), "S40", _with_sum(bytes(40 * 6)))


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
    file.create_dataset("weights/b", (2,), dtype, chunks=(2,), fletcher32="vlen" not in (dtype.metadata or {}))


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
    put_chunk(file, "optimizer/s/flags", (3,), "?", _with_sum(bytes([1, chance.choice([2, 128, 255]), 0])))


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


_CHANGES = (
    *(_short, _short_and_large, _long, _mask, _meta_huge, _meta_group, _meta_shape, _meta_other_type, _meta_unchecked),
    *(_meta_missing, _nested, _many_names, _self_link, _fan_of_links, _second_name, _link, _stored_elsewhere, _layout),
    *(_filter, _type, _named_type, _resizable, _not_all_stored, _odd_chunks, _space, _not_a_truth, _attribute),
    *(_attributes, _name),
)
CHANGES: dict[str, Change] = {
    **{change.__name__[1:]: change for change in _CHANGES},
    "json_deep": _json(
        "[" * 100_000, '{"versions": {}, "meta": {"a": ' + "[" * 400 + "]" * 400 + "}}", '{"a":' * 50_000
    ),
    "json_other": _json(
        *("[]", "7", '{"meta": [], "versions": {}}', '{"meta": {}}', "{", " ", '{"meta": {}, "versions": 1}', "null")
    ),
    "json_letters": _json('{"meta": {"\u00e9": 1}, "versions": {}}', "\ufeff{}", '{"meta": {"a": ' + "9" * 9000),
}
# With tables of the older kind, which have no checksums.
OLDER: dict[str, Change] = {"older_resizable": _resizable, "older_not_all_stored": _not_all_stored}
