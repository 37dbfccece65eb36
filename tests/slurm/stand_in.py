"""A job of seconds that starts, ends and writes as drivers do: what a batch script sees of one, without a network.

Newton's iteration for a square root, one step an update, its state in a checkpoint. SIGUSR1 or SIGTERM on any rank end
all of them behind the update under way, with a checkpoint and status 75; `--resume auto` goes on from there. With
`--hold N` it waits before update N until there is a file `go` in its folder: what it is sent meanwhile comes in time.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))

# A signal would interrupt the system calls by which MPI starts; one that comes meanwhile is met behind them.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM])
from mpi4py import MPI  # noqa: E402

signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGTERM])


def replace(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> int:
    """The job; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("config", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds an update")
    parser.add_argument("--hold", type=int, default=0, help="update before which to wait for the file `go`")
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    checkpoint, record = options.out / "state.json", options.out / "metrics.jsonl"
    state = {"update": 0, "x": 1e12}
    if options.resume == "auto" and checkpoint.exists():
        state = json.loads(checkpoint.read_text())
    comm.barrier()
    if comm.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = record.read_text().splitlines(keepends=True) if record.exists() else []
        replace(record, "".join(rows[: state["update"]]))
    while state["update"] < options.updates:
        time.sleep(options.pause)
        is_held = state["update"] + 1 == options.hold and not comm.bcast((options.out / "go").exists())
        if is_held:
            time.sleep(0.05)
        else:
            x = state["x"]
            state = {"update": state["update"] + 1, "x": x - (x * x - 2.0) / (2.0 * x)}
        if comm.rank == 0 and not is_held:
            final = state["update"] == options.updates
            row = {"kind": "update", "update": state["update"], "objective": state["x"], "final": final}
            with record.open("a") as file:
                file.write(json.dumps({**row, "ranks": comm.size}) + "\n")
        stop = comm.allreduce(bool(asked), MPI.LOR)
        if stop or state["update"] == options.updates:
            if comm.rank == 0:
                replace(checkpoint, json.dumps(state))
            comm.barrier()
        if stop and state["update"] < options.updates:
            return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
