"""Recurrent networks parallel over the sequence against torch.nn.GRU: seconds, accuracy, and what windows cost.

    python benchmarks/sequences.py [--quick] [--lengths 128,256,512,1024,2048,4096] [--ranks 1,2] [--windows 1,2,4,8]

1. Digits read row by row, resampled to each length: seconds of an update (forward and backward pass, batch 32, 64
   hidden numbers, single precision) of `ParallelGRU` on each number of ranks, over those of `torch.nn.GRU` with one
   thread in the same job, interleaved, median of the ratios. `ratio_L_P`; with more than one rank, `torch.nn.GRU` runs
   on each rank at the same time, so that both have the machine's memory to share. `implicit_L_P` the same for the
   implicit unit; `sequential_L_1` with exact propagation; `lstm_L_P`: `ParallelLSTM` over `torch.nn.LSTM`. `sweeps_L`
   and `adjoint_sweeps_L`: relaxations that the solver needed; `error_L`: relative error of the gradient of the weights,
   `told_L` what the record says that it is, over that.
2. Accuracy on test images after the same updates from the same weights, by `drivers/sequences.py`:
   `accuracy_torch`, `accuracy_plain` and `accuracy_implicit` (MGRIT on two ranks).
3. Windows, at the greatest length, on two ranks, over those with the fewest windows: seconds of an update,
   `window_seconds_W`, and by how much the peak of rank 0's memory grows with the updates, `window_memory_W`.

With --quick lengths 128 and 512, windows 1 and 4, 30 updates of 2,000 images.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import torch

from xbraid_py import MGRIT, GradientControl, ParallelGRU, ParallelLSTM
from xbraid_py.comm import Communicator, world
from xbraid_py.data import mnist
from xbraid_py.data.mnist import sequences
from xbraid_py.run.record import read

SCRIPT = Path(__file__).resolve()
DRIVER = SCRIPT.parent.parent / "drivers" / "sequences.py"
FEATURES, BATCH = 28, 32


def peak_memory() -> float:
    """Largest resident memory of this process so far, in megabytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit(f"error: there is no {status}: this benchmark needs Linux")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def solver_of(arguments: argparse.Namespace) -> MGRIT:
    """Of all timings."""
    return MGRIT(intervals=arguments.intervals, tol=arguments.tol)


def step(model: torch.nn.Module, x: torch.Tensor) -> None:
    """Forward and backward pass of an update."""
    model.zero_grad()
    end = model(x)[1]
    (end[0] if isinstance(end, tuple) else end).square().sum().backward()


def gradient(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of all weights, in one vector."""
    step(model, x)
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def made(
    comm: Communicator | None, hidden: int, mgrit: MGRIT, module: type = ParallelGRU, **options
) -> ParallelGRU | ParallelLSTM:
    """The network of the timings."""
    return module(FEATURES, hidden, batch_first=True, comm=comm, mgrit=mgrit, output="last", **options)


def time_lengths(arguments: argparse.Namespace) -> None:
    """The job of part 1 on one number of ranks: a row for each length."""
    comm, solver, rows = world(), solver_of(arguments), []
    images = mnist.load(arguments.data_dir or None).train_images[:BATCH]
    for length in arguments.lengths:
        x = sequences(images, "rows", length)
        models = {
            "torch": torch.nn.GRU(FEATURES, arguments.hidden, batch_first=True),
            "ratio": made(comm, arguments.hidden, solver),
            "implicit": made(comm, arguments.hidden, solver, kind="implicit"),
            "sequential": made(comm, arguments.hidden, common.SERIAL),
            "torch_lstm": torch.nn.LSTM(FEATURES, arguments.hidden, batch_first=True),
            "lstm": made(comm, arguments.hidden, solver, ParallelLSTM),
        }
        bodies = {name: lambda m=model, x=x: step(m, x) for name, model in models.items()}
        found = common.interleaved(bodies, arguments.rounds)
        record, exact = models["ratio"].record, gradient(models["sequential"], x)
        names = ("ratio", "implicit", "sequential")
        row = {name: common.Spread.of_ratios(found[name], found["torch"]).median for name in names}
        row["lstm"] = common.Spread.of_ratios(found["lstm"], found["torch_lstm"]).median
        row |= {"seconds_of_torch": common.Spread.of(found["torch"]).median, "sweeps": record.forward_sweeps[0]}
        row |= {"adjoint_sweeps": record.adjoint_sweeps[0]}
        row["error"] = float((gradient(models["ratio"], x) - exact).norm() / exact.norm())
        row["told"] = record.gradient_error / row["error"]
        rows.append(row)
    if comm.rank == 0:
        common.report({"rows": rows})


def time_windows(arguments: argparse.Namespace) -> None:
    """The job of part 3: for each number of windows, seconds of an update, and by how much memory has grown."""
    comm, rows, length = world(), {}, max(arguments.lengths)
    # Noise: to read images would take more memory than what is measured.
    x = torch.randn(BATCH, length, FEATURES, generator=torch.Generator().manual_seed(0))
    step(made(comm, arguments.hidden, solver_of(arguments)), x[:, :32])  # what is set up once
    before = peak_memory()
    # The most windows first: they take the least memory, and a peak is never forgotten.
    for count in sorted(arguments.windows, reverse=True):
        # Without a measurement of the gradient's error, which keeps a window more.
        unchecked = GradientControl(check=0)
        model = made(comm, arguments.hidden, solver_of(arguments), windows=count, accuracy=unchecked)
        seconds = common.interleaved({"ours": lambda m=model: step(m, x)}, arguments.rounds)["ours"]
        rows[count] = {"seconds": common.Spread.of(seconds).median, "megabytes": peak_memory() - before}
    if comm.rank == 0:
        common.report({str(count): row for count, row in rows.items()})


def accuracy(name: str, ranks: int, arguments: argparse.Namespace, *words: str) -> float:
    """Part 2 for one network."""
    launcher = [common.mpirun(), "-n", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        words = (*words, f"--out={folder}/{name}", f"--max_updates={arguments.updates}", "--epochs=99")
        words += (f"--num_train={arguments.num_train}", f"--num_test={arguments.num_test}", "--validate_every=1000000")
        if arguments.data_dir:
            words += (f"--data_dir={arguments.data_dir}",)
        command = [*launcher, sys.executable, str(DRIVER), "--batch_size=50", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} ended with status {done.returncode}")
        found = [row for row in read(Path(folder, name, "metrics.jsonl")) if row["kind"] == "update"][-1]
    print(f"{name:9s} test accuracy {found['val_accuracy']:.4f}, {found['seconds']:.1f} s of training", flush=True)
    return found["val_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths, fewer repeats")
    parser.add_argument("--lengths", type=common.integers)
    parser.add_argument("--ranks", type=common.integers, default=[1, 2])
    parser.add_argument("--windows", type=common.integers)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--intervals", type=int, default=8)
    parser.add_argument("--tol", type=float, default=0.1)
    parser.add_argument("--networks", default="torch,plain,implicit", help="of part 2")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--job", choices=["lengths", "windows"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.lengths = arguments.lengths or ([128, 512] if quick else [128, 256, 512, 1024, 2048, 4096])
    arguments.windows = arguments.windows or ([1, 4] if quick else [1, 2, 4, 8])
    arguments.rounds = arguments.rounds or (3 if quick else 7)
    if arguments.job:
        return time_lengths(arguments) if arguments.job == "lengths" else time_windows(arguments)
    arguments.updates = arguments.updates or (30 if quick else 3600)
    arguments.num_train, arguments.num_test = (2000, 500) if quick else (60000, 10000)
    words = [f"--{name}={getattr(arguments, name)}" for name in ("hidden", "intervals", "rounds", "tol", "data_dir")]
    words += [f"--{name}={','.join(map(str, getattr(arguments, name)))}" for name in ("lengths", "windows")]

    figures: dict[str, float] = {}
    print(
        "length  ranks  torch [s]   plain  implicit  sequential    LSTM   sweeps  gradient error  told   (over torch's)"
    )
    for ranks in arguments.ranks:
        rows = common.job(str(SCRIPT), ranks, "--job=lengths", *words)["rows"]
        for length, row in zip(arguments.lengths, rows, strict=True):
            figures |= {f"{name}_{length}_{ranks}": row[name] for name in ("ratio", "implicit", "sequential", "lstm")}
            figures |= {f"{name}_{length}": row[name] for name in ("sweeps", "adjoint_sweeps", "error", "told")}
            print(
                f"{length:6d}  {ranks:5d}  {row['seconds_of_torch']:9.4f}  {row['ratio']:6.2f}  {row['implicit']:8.2f}"
                f"  {row['sequential']:10.2f}  {row['lstm']:6.2f}    {row['sweeps']:2d} / {row['adjoint_sweeps']:d}"
                f"  {row['error']:14.4f} {row['told']:4.2f}",
                flush=True,
            )
    print()
    for name in arguments.networks.split(","):
        options = ["--network=torch"] if name == "torch" else [f"--kind={name}", f"--mgrit.tol={arguments.tol}"]
        figures[f"accuracy_{name}"] = accuracy(name, 1 if name == "torch" else 2, arguments, *options)
    print(f"\nwindows  seconds of an update  memory [MB]   (two ranks, {max(arguments.lengths)} steps)")
    rows = common.job(str(SCRIPT), 2, "--job=windows", *words)
    first = rows[str(min(arguments.windows))]
    for count in arguments.windows:
        row = rows[str(count)]
        figures[f"window_seconds_{count}"] = row["seconds"] / first["seconds"]
        figures[f"window_memory_{count}"] = row["megabytes"] / max(first["megabytes"], 0.1)
        print(f"{count:7d}  {row['seconds']:20.4f}  {row['megabytes']:11.1f}", flush=True)
    common.finish("sequences", figures)


if __name__ == "__main__":
    main()
