"""Validation accuracy of the peaks job over several seeds, nested and non-nested with the same work.

    python benchmarks/peaks_accuracy.py [--quick] [--ranks 4] [--seeds 5] [-- OPTION ...]

Runs `drivers/peaks.py --compare` once for each seed (which draws the points and the initial weights) with the `mpirun`
beside this Python, further options handed on. Prints a table and, as its last line, the figures `nested_mean`,
`nested_std`, `non_nested_mean`, `non_nested_std` (accuracies in per cent) and `seconds` (median training time of a
nested run).
With --quick one seed and half of the training points.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

DRIVER = Path(__file__).resolve().parents[1] / "drivers" / "peaks.py"


def train(seed: int, ranks: int, options: list[str], folder: Path) -> dict[str, dict]:
    """Last rows of the nested and of the non-nested run of a seed."""
    out = folder / f"seed{seed}"
    command = [common.mpirun(), "-n", str(ranks), sys.executable, str(DRIVER), f"--seed={seed}", f"--out={out}"]
    command += ["--compare", "--checkpoint_every=100000", *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"error: seed {seed} ended with status {done.returncode}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["run"]: row for row in rows if row.get("final")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, half of the training points")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("options", nargs="*", help="further options of the driver, behind --")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    options = (["--num_train=2500"] if arguments.quick else []) + arguments.options
    results: dict[str, list[dict]] = {"nested": [], "non-nested": []}
    print(f"{'seed':>4s} {'nested':>9s} {'non-nested':>11s} {'s':>7s} {'s':>7s}")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            last = train(seed, arguments.ranks, options, Path(folder))
            for run, rows in results.items():
                rows.append(last[run])
            accuracies = [100 * last[run]["val_accuracy"] for run in results]
            seconds = [last[run]["seconds"] for run in results]
            print(
                f"{seed:4d} {accuracies[0]:8.2f}% {accuracies[1]:10.2f}%", *(f"{s:7.1f}" for s in seconds), flush=True
            )
    figures = {"seconds": statistics.median(row["seconds"] for row in results["nested"])}
    for run, rows in results.items():
        accuracies = [100 * row["val_accuracy"] for row in rows]
        name = run.replace("-", "_")
        figures[f"{name}_mean"] = statistics.mean(accuracies)
        figures[f"{name}_std"] = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        print(f"{run}: {figures[f'{name}_mean']:.2f} % +- {figures[f'{name}_std']:.2f}")
    print(json.dumps({"benchmark": "peaks_accuracy", "figures": figures}))


if __name__ == "__main__":
    main()
