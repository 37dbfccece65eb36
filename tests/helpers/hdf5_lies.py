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
import library_lies
import table_lies
import torch
from hdf5_tables import number, put, seal
from library_lies import put_chunk
from table_lies import single_chunks, superblock

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
MANY = {**ARRAYS, **{f"weights/{each}": torch.full((3,), float(each)) for each in range(12)}}
CONTENTS = {"few.h5": ARRAYS, "many.h5": MANY, "old.h5": ARRAYS}
_NEWER = ("v110", "v110")


def sound_files(folder: Path) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Write the files that lies are made from into a folder; what each holds, by name.

    In `many.h5` the names of a group lie in tables of their own. In `old.h5` the tables of a group are of the older
    kind without checksums, which is a lie already; the others are as the library writes them.
    """
    for name, arrays in CONTENTS.items():
        shards = {each: Shard(rows, 0, len(rows)) for each, rows in arrays.items()}
        save(folder / name, SerialCommunicator(), shards, META)
    with h5py.File(folder / "old.h5", "r+", libver="earliest") as file:
        file.move("weights", "newer")
        file.create_group("weights")
        for name in list(file["newer"]):
            held = file["newer"][name]
            file["weights"].create_dataset(name, data=held[...], chunks=held.chunks, fletcher32=True)
        del file["newer"]
    return {name: (META, arrays) for name, arrays in CONTENTS.items()}


def base_of(kind: str) -> str:
    """The name of the sound file that a kind of lie is made from."""
    return "many.h5" if kind in table_lies.LARGE_GROUPS else "old.h5" if kind in table_lies.OLD_GROUPS else "few.h5"


def tell(kind: str, folder: Path, seed: int, path: Path) -> None:
    """Write a file with a lie of a kind; the same one for the same seed."""
    LIES[kind](folder, random.Random(f"{kind} {seed}"), path)


def _by_library(change: library_lies.Change, libver=_NEWER) -> Lie:
    def lie(folder: Path, chance: random.Random, path: Path) -> None:
        shutil.copyfile(folder / "few.h5", path)
        with h5py.File(path, "r+", libver=libver) as file:
            change(file, chance)

    return lie


def _by_hand(base: str, change: table_lies.Change) -> Lie:
    def lie(folder: Path, chance: random.Random, path: Path) -> None:
        data = bytearray((folder / base).read_bytes())
        change(data, chance)
        path.write_bytes(data)

    return lie


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
        put_chunk(file, "weights/a", (1, items), "f8", bytes(12))
    data = bytearray(path.read_bytes())
    message, after = next(each for each in single_chunks(data) if number(data, each[1] + 1) == 12)
    put(data, after + 1, 8, items * 8 + 4)
    put(data, message.at + message.size - 8, 8, len(data))
    seal(data, message.block)
    end = len(data) + items * 8 + 4
    superblock(28, 8, end)(data, chance)
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.truncate(end)


LIES |= {kind: _by_library(change) for kind, change in library_lies.CHANGES.items()}
LIES |= {kind: _by_library(change, "earliest") for kind, change in library_lies.OLDER.items()}
for _changes in (table_lies.CHANGES, table_lies.LARGE_GROUPS, table_lies.OLD_GROUPS):
    LIES |= {kind: _by_hand(base_of(kind), change) for kind, change in _changes.items()}
LIES |= {"cut_and_grown": _cut_and_grown, "behind_other_bytes": _behind_other_bytes, "holes": _holes}
