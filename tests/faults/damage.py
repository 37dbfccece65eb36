"""Damage to checkpoints: cut at random bytes, bits flipped in their data and tables, read by the loader itself.

    python tests/faults/damage.py CHECKPOINT SEED TRUNCATIONS FLIPS

prints a line for every damaged copy, so that whoever has started it sees that it goes on: "refused", "harmless" (all
that is read is what was written), or "wrong" with the place.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

import h5py
from read_lies import Content, content, same

from xbraid_py.run.store.read import CheckpointError, file_name, newest_good


def truncate(path: Path, source: random.Random) -> str:
    """Cut a file at a random byte; what was done."""
    size = source.randrange(path.stat().st_size)
    with open(path, "r+b") as file:
        file.truncate(size)
    return f"cut at byte {size}"


def chunks(path: Path) -> list[tuple[int, int]]:
    """First byte and number of bytes of every chunk of data in a file."""
    found: list[tuple[int, int]] = []

    def look(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks:
            stored = (item.id.get_chunk_info(at) for at in range(item.id.get_num_chunks()))
            found.extend((chunk.byte_offset, chunk.size) for chunk in stored)

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(look)
    return found


def flip(path: Path, source: random.Random, at: int | None = None) -> str:
    """Flip a bit of a file, by default one within the data; what was done."""
    if at is None:
        places = chunks(path)
        first, size = source.choices(places, [size for _, size in places])[0]
        at = source.randrange(first, first + size)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << source.randrange(8)]))
    return f"bit of byte {at}"


def judged(path: Path, truth: Content) -> str:
    """Whether a damaged file is refused, harmless or wrong."""
    try:
        found = content(path)
    except CheckpointError:
        return "refused"
    return "harmless" if same(found, truth) else "wrong"


def main() -> None:
    good, seed, truncations, flips = Path(sys.argv[1]), *map(int, sys.argv[2:])
    source = random.Random(seed)
    logging.disable()  # of what it refuses
    truth, tables = content(good), set(range(good.stat().st_size))
    for first, size in chunks(good):
        tables -= set(range(first, first + size))
    places = sorted(tables)
    with tempfile.TemporaryDirectory() as folder:
        before, path = Path(folder) / file_name(1), Path(folder) / file_name(2)
        shutil.copyfile(good, before)
        for number in range(truncations + flips):
            shutil.copyfile(good, path)
            if number < truncations:
                what = truncate(path, source)
                # A cut file is never taken for good.
                found = "refused" if newest_good(folder) == before else "wrong"
            else:
                # Two of three within the data; the rest in the tables around them.
                what = flip(path, source, source.choice(places) if number % 3 == 0 else None)
                found = judged(path, truth)
            print(found, what, flush=True)


if __name__ == "__main__":
    main()
