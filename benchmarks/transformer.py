"""A language model trained layer-parallel and serially: whether the losses are the same, and what the solves were.

    python benchmarks/transformer.py [--quick] [--updates 200] [--ranks 2] [-- OPTIONS OF THE DRIVER]

Runs `drivers/transformer.py` (32 decoder blocks, its defaults) twice with the same seeds: by MGRIT on `--ranks` ranks,
and with exact propagation on one. Last line: `loss_deviation`, the largest relative difference, after the first tenth
of the updates, of the training losses (means over the last 20 updates) and of the validation losses; `forward` and
`adjoint`, sweeps through all layers for each update; `gradient_error`, the median of its estimates, and
`gradient_error_measured`, the worst of the measured ones; `exact_updates`, those that were not made by MGRIT. With
--quick 50 updates.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

import common

from xbraid_py.run.record import read

DRIVER = Path(__file__).resolve().parent.parent / "drivers" / "transformer.py"
SMOOTH = 20


def run(out: Path, ranks: int, words: list[str]) -> list[dict]:
    """The record of the driver's run with these options."""
    launcher = [common.mpirun(), "-n", str(ranks)] if ranks > 1 else []
    command = [*launcher, sys.executable, str(DRIVER), *words, f"--out={out}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with status {done.returncode}")
    print(f"{out.name}: {done.stdout.splitlines()[-1]}", flush=True)
    return read(out / "metrics.jsonl")


def curve(rows: list[dict], kind: str) -> dict[int, float]:
    """Losses by the number of the update: of training, smoothed, or of validation."""
    if kind == "validation":
        return {row["update"]: row["val_loss"] for row in rows if row.get("val_loss") is not None}
    losses = [row["loss"] for row in rows if row["kind"] == "update"]
    return {n: mean(losses[max(0, n - SMOOTH) : n]) for n in range(1, len(losses) + 1)}


def deviation(ours: dict[int, float], exact: dict[int, float]) -> float:
    """Largest relative difference of two curves after the first tenth."""
    first = max(exact) / 10
    return max(abs(ours[n] - exact[n]) / exact[n] for n in exact if n > first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 updates")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("options", nargs="*", help="of the driver, for both runs")
    arguments = parser.parse_args()
    updates = arguments.updates or (50 if arguments.quick else 200)
    every = max(updates // 8, 1)
    words = [f"--updates={updates}", f"--validate_every={every}", "--record_every=1", "--sample=0", *arguments.options]

    with tempfile.TemporaryDirectory() as folder:
        ours = run(Path(folder, "mgrit"), arguments.ranks, words)
        exact = run(Path(folder, "exact"), 1, [*words, "--exact"])
    curves = {kind: (curve(ours, kind), curve(exact, kind)) for kind in ("training", "validation")}
    stacks = {row["update"]: row["stacks"][0] for row in ours if row["kind"] == "update"}

    print(f"\nupdate  training loss (mean of {SMOOTH})   validation loss        sweeps   gradient error")
    print("           mgrit     exact            mgrit     exact    forw.  adj.  (* measured)")
    for n, validation in curves["validation"][0].items():
        stack, pair = stacks[n], curves["training"]
        print(
            f"{n:6d}  {pair[0][n]:8.4f}  {pair[1][n]:8.4f}         {validation:8.4f}  {curves['validation'][1][n]:8.4f}"
            f"     {stack['iterations']:4d}  {stack['adjoint_iterations']:4d}  {stack['gradient_error']:9.4f}"
            f"{'*' if stack['measured'] else ''}"
        )
    for n, stack in stacks.items():
        if stack["event"] or stack["measured"]:
            print(f"update {n}: error {stack['gradient_error']:.4f}, measured {stack['measured']}; {stack['event']}")
    deviations = {kind: deviation(*pair) for kind, pair in curves.items()}
    figures = {
        "loss_deviation": max(deviations.values()),
        **{f"loss_deviation_{kind}": value for kind, value in deviations.items()},
        "forward": mean(stack["iterations"] for stack in stacks.values()),
        "adjoint": mean(stack["adjoint_iterations"] for stack in stacks.values()),
        "gradient_error": median(stack["gradient_error"] for stack in stacks.values()),
        "gradient_error_measured": max(stack["gradient_error"] for stack in stacks.values() if stack["measured"]),
        "exact_updates": sum(stack["mode"] == "exact" for stack in stacks.values()),
    }
    common.finish("transformer", figures)


if __name__ == "__main__":
    main()
