"""Memory, open files and MPI requests of a long training: 2,000 updates with a checkpoint every 10 on 4 ranks.

    python benchmarks/soak.py [--quick] [--ranks 4] [--updates 2000] [--every 50] [--from 200]

A small peaks job (32 layers, 500 samples) leaves everything that a driver leaves: record, status, log, checkpoints.
Every 50 updates each rank notes its resident memory, its open file descriptors, and how many of the requests that it
has made are still pending or not waited for. Last line, each for the worst rank and from update 200 on: `rss_growth`,
the most by which memory exceeds that of update 200, relative to it; `fds_growth`; `requests`, the most at any time.
With --quick 300 updates, counted from the 100th.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import common

from xbraid_py.comm import Communicator, world
from xbraid_py.data.dataset import Dataset
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.problem.problem import Problem
from xbraid_py.recipes.classification import NestedTraining
from xbraid_py.recipes.options.classification import ClassificationOptions
from xbraid_py.run.engine import Row, train

NUM_LAYERS, SAMPLES, CHECKPOINT_EVERY = 32, 500, 10
REQUESTS = ("Isend", "Irecv", "Ibcast", "Iallgatherv", "Ibarrier")
GOAL = 0.02


class Requests:
    """Stands in front of the ranks of MPI, and keeps the requests that they have handed out.

    Parameters
    ----------
    mpi : mpi4py.MPI.Comm
    """

    def __init__(self, mpi):
        self._mpi = mpi
        self._open: list = []

    def __getattr__(self, name: str):
        found = getattr(self._mpi, name)
        if name not in REQUESTS:
            return found

        def called(*args):
            request = found(*args)
            self._open.append(request)
            if len(self._open) > 10_000:
                self.pending()
            return request

        return called

    def pending(self) -> int:
        """How many have not been waited for: a request that is over is a null request."""
        self._open = [request for request in self._open if request]
        return len(self._open)


class Watched(NestedTraining):
    """A training that notes update, bytes, descriptors and requests every so many updates."""

    def __init__(self, options: ClassificationOptions, problem: Problem, requests: Requests, every: int):
        samples = Dataset(problem.features, problem.labels, problem.num_classes)
        super().__init__(options, problem, samples)
        self.samples: list[tuple[int, int, int, int]] = []
        self.requests, self.every = requests, every

    def steps(self) -> Iterator[Row]:
        for row in super().steps():
            yield row
            self.note(row["update"])  # now its checkpoint is written

    def note(self, update: int) -> None:
        """Take a sample after this update, if it is one of those."""
        if update % self.every == 0:
            self.samples.append((update, resident(), len(os.listdir("/proc/self/fd")), self.requests.pending()))


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(comm: Communicator, folder: Path, updates: int, every: int) -> None:
    """What the ranks of the job do."""
    requests = comm.mpi = Requests(comm.mpi)
    problem = common.problem(comm, MGRIT(), SAMPLES)
    options = ClassificationOptions(
        num_layers=NUM_LAYERS,
        nested=NestedOptions(refinements=0, updates=(updates,)),
        checkpoint_every=CHECKPOINT_EVERY,
        validate_every=CHECKPOINT_EVERY,
        out=folder,
    )
    training = Watched(options, problem, requests, every)
    last = train("nested", training, options, comm)()
    training.note(last["update"])
    found = comm.gather(training.samples)
    if comm.rank == 0:
        common.report({"samples": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 updates")
    parser.add_argument("--ranks", type=int, default=4, help="at least 2")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--every", type=int, default=50, help="updates between two samples")
    parser.add_argument("--from", type=int, dest="first", help="update that counts as the start")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not Path("/proc/self/statm").exists():
        raise SystemExit("error: there is no /proc/self/statm: this benchmark needs Linux")
    updates = arguments.updates or (300 if arguments.quick else 2000)
    first = arguments.first or (100 if arguments.quick else 200)
    if arguments.job is not None:
        soak(world(), Path(arguments.job), updates, arguments.every)
        return
    with tempfile.TemporaryDirectory() as folder:
        row = common.job(
            __file__, arguments.ranks, f"--job={folder}/run", f"--updates={updates}", f"--every={arguments.every}"
        )
    ranks = [[sample for sample in samples if sample[0] >= first] for samples in row["samples"]]
    print("update  MiB, open files and pending requests of each rank")
    for samples in zip(*row["samples"], strict=True):
        shown = (f"{memory / 2**20:8.1f} {files:3d} {pending:2d}" for _, memory, files, pending in samples)
        if samples[0][0] % (4 * arguments.every) == 0:
            print(f"{samples[0][0]:6d}  " + " |".join(shown))
    growth = [max(sample[1] for sample in samples) / samples[0][1] - 1 for samples in ranks]
    files = [max(sample[2] for sample in samples) - samples[0][2] for samples in ranks]
    pending = max(sample[3] for samples in row["samples"] for sample in samples)
    print(f"memory grows by at most {100 * max(growth):.2f} %, goal at most {100 * GOAL:g} %")
    common.finish("soak", {"rss_growth": max(growth), "fds_growth": max(files), "requests": pending})


if __name__ == "__main__":
    main()
