"""Resident memory of whole jobs over 2,000 updates, looked at from outside: peaks, mnist, transformer, sequences.

    python benchmarks/resident.py [--quick] [--drivers peaks,mnist,transformer,sequences] [--updates 2000] [--from 200]

Each driver runs a small job on two ranks, with its record, its validations and a checkpoint every 100 updates, once
with the solver and once by its own plan. Twice a second the memory of its ranks and the update in `status.json` are
noted. Last line: for each job the most by which a rank's memory exceeds that of update 200, relative to it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

GOAL = 0.02
PROJECT = Path(__file__).resolve().parent.parent
# Words of so many updates; the presets give the solver, which is then taken away for the plan's own choice.
JOBS = {
    "peaks": "--nested.refinements=0 --nested.updates={0} --validate_every=50",
    "mnist": "--max_updates={0} --epochs={0} --validate_every=200",
    "transformer": "--updates={0} --validate_every=200",
    "sequences": "--max_updates={0} --epochs={0} --validate_every=200",
}


def samples(name: str, words: list[str], folder: Path) -> list[tuple[int, list[int]]]:
    """Updates, and bytes of each rank, as long as a job runs."""
    driver = str(PROJECT / "drivers" / f"{name}.py")
    command = [common.mpirun(), "-n", "2", sys.executable, driver, *words, f"--out={folder}", "--checkpoint_every=100"]
    found: list[tuple[int, list[int]]] = []
    with (folder.parent / "said").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as job:
        while job.poll() is None:
            ranks = sorted(each for each in below(job.pid) if "python" in command_of(each))
            memory = [resident(each) for each in ranks]
            update = update_of(folder)
            if any(map(draws, ranks)):  # at the end: libraries are loaded for that
                break
            if len(memory) == 2 and all(memory) and update is not None:
                found.append((update, memory))
            time.sleep(0.5)
        job.wait()
    if job.returncode:
        raise SystemExit(f"error: {' '.join(command)}: {(folder.parent / 'said').read_text()[-500:]}")
    return found


def below(pid: int) -> list[int]:
    """Processes that descend from one."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *below(child))]


def command_of(pid: int) -> str:
    """The program of a process; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
    except OSError:
        return ""


def resident(pid: int) -> int:
    """Bytes in memory; 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def draws(pid: int) -> bool:
    """Whether a process has loaded what draws pictures."""
    try:
        return "matplotlib" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def update_of(folder: Path) -> int | None:
    """To where a run has come, while it trains."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    return status["update"] if status["state"] == "running" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="peaks, 400 updates")
    parser.add_argument("--drivers")
    parser.add_argument("--updates", type=int)
    parser.add_argument("--from", type=int, default=200, dest="first", help="update that counts as the start")
    given = parser.parse_args()
    drivers = given.drivers or ("peaks" if given.quick else ",".join(JOBS))
    updates = given.updates or (400 if given.quick else 2000)
    growth = {}
    for name in drivers.split(","):
        for kind, more in (("solver", []), ("plan", ["--mgrit=null"])):
            with tempfile.TemporaryDirectory() as folder:
                words = ["--smoke", *JOBS[name].format(updates).split(), *more]
                found = samples(name, words, Path(folder) / "run")
            last = found[-1][0]
            found = [memory for update, memory in found if update >= given.first]
            growth[f"{name}_{kind}"] = max(max(rank) / rank[0] - 1 for rank in zip(*found, strict=True))
            start, end = ([f"{bytes / 2**20:.1f}" for bytes in memory] for memory in (found[0], found[-1]))
            print(f"{name}, {kind}: MiB {' | '.join(start)} at update {given.first}, {' | '.join(end)} before {last}, "
                  f"at most {100 * growth[f'{name}_{kind}']:.2f} % more in between", flush=True)  # fmt: skip
    print(f"goal: at most {100 * GOAL:g} %")
    common.finish("resident", growth)


if __name__ == "__main__":
    main()
