"""Time of a checkpoint of 100 MB on 8 ranks, against a plain write and fsync of the same bytes.

    python benchmarks/checkpoint.py [--quick] [--ranks 8] [--megabytes 100] [--rounds 9] [--folder FOLDER]

The ranks own equal shares of three global arrays. In every round all ranks write a checkpoint together (checksums,
fsync, rename and fsync of the folder included), and rank 0 alone writes the same number of bytes to a file and waits
for the disk; now the one goes first, now the other, so that whatever else the disk does meets both.

Last line: `checkpoint_ratio`, the median over the rounds of the quotient of the two times. With --quick fewer rounds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import common
import torch

from xbraid_py.comm import Communicator, world
from xbraid_py.comm.partition import Partition
from xbraid_py.run.store.read import file_name
from xbraid_py.run.store.write import Shard, save

# Shares of the bytes: weights and the two halves of the memory of an optimizer.
ARRAYS = {"weights/layers.weight": 0.2, "optimizer/s/layers.weight": 0.4, "optimizer/y/layers.weight": 0.4}
WIDTH = 64
GOAL = 3.0


def shards(comm: Communicator, megabytes: float) -> dict[str, Shard]:
    """The share of this rank in arrays of so many MB in all."""
    found = {}
    source = torch.Generator().manual_seed(comm.rank)
    for name, share in ARRAYS.items():
        part = Partition.balanced(round(share * megabytes * 1e6 / (8 * WIDTH * WIDTH)), comm.size)
        rows = torch.randn(part.count(comm.rank), WIDTH, WIDTH, dtype=torch.float64, generator=source)
        found[name] = Shard(rows, part.first(comm.rank), part.num_rows)
    return found


def plain(path: Path, content: memoryview) -> None:
    """Write and wait for the disk."""
    with open(path, "wb", buffering=0) as file:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())


def measure(folder: Path, megabytes: float, rounds: int) -> None:
    """What the ranks of a job do: report the seconds of both in every round."""
    comm = world()
    own = shards(comm, megabytes)
    total = sum(shard.total * shard.rows[:1].nbytes for shard in own.values())
    content = memoryview(torch.randint(256, (total,), dtype=torch.uint8).numpy()) if comm.rank == 0 else None
    bodies = {
        "checkpoint": lambda path: save(path, comm, own, {"update": 0}),
        "plain": lambda path: plain(path, content) if comm.rank == 0 else None,
    }
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for number in range(rounds + 1):
        for name in list(bodies)[:: -1 if number % 2 else 1]:
            path = folder / file_name(number)
            comm.barrier()
            start = time.perf_counter()
            bodies[name](path)
            comm.barrier()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            if comm.rank == 0:
                path.unlink()
    if comm.rank == 0:
        common.report({**seconds, "bytes": total})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--folder", help="on the disk in question; the one for temporary files if not given")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    if arguments.job is not None:
        measure(Path(arguments.job), arguments.megabytes, rounds)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        handed_on = (f"--job={folder}", f"--megabytes={arguments.megabytes}", f"--rounds={rounds}")
        row = common.job(__file__, arguments.ranks, *handed_on)
    times = [common.Spread.of(row[name]) for name in ("checkpoint", "plain")]
    ratio = common.Spread.of_ratios(row["checkpoint"], row["plain"])
    print(f"{row['bytes'] / 1e6:.1f} MB, {arguments.ranks} ranks, {rounds} rounds")
    print(f"checkpoint {times[0]} s, plain write and fsync {times[1]} s, ratio {ratio}, goal at most {GOAL:g}")
    common.finish("checkpoint", {"checkpoint_ratio": ratio.median})


if __name__ == "__main__":
    main()
