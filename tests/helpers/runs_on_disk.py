"""Folders of runs as the command line meets them: made by hand, complete, under way, and damaged."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import yaml
from matplotlib.figure import Figure

CONFIGURATION = {"seed": 0, "num_layers": 8, "mgrit": {"cycle": "V", "max_iter": 2}, "data_dir": None}


def ago(seconds: float) -> str:
    """A time as `status.json` has it."""
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat()


def status(state: str = "running", age: float = 1.0, **changes) -> dict:
    """What `status.json` holds."""
    return {
        "state": state,
        "update": 12,
        "total": 40,
        "objective": 0.625,
        "accuracy": 0.875,
        "started": ago(100 + age),
        "updated": ago(age),
        "seconds_left": 90.0,
        "ranks": 3,
        "host_kind": "x86_64 Linux, 2 cpus",
        "pid": 1,
        "message": "",
    } | changes


def nested_rows(count: int = 13) -> list[dict]:
    """Rows like those of nested iteration."""
    return [
        {
            "kind": "update",
            "run": "nested",
            "level": 0,
            "update": n,
            "objective": 2.0 / (n + 1),
            "grad_norm": None if n == count - 1 else 0.5**n,
            "val_accuracy": 0.5 + n / 100 if n % 2 == 0 else None,
            "note": None,
            "final": n == count - 1,
        }
        for n in range(count)
    ]


def minibatch_rows(count: int = 12) -> list[dict]:
    """Rows like those of training on minibatches, some of them validated."""
    rows: list[dict] = []
    for n in range(1, count + 1):
        stack = {"residual": 1e-3, "gradient_error": 0.01 * n, "measured": False, "event": None}
        rows.append({"kind": "update", "update": n, "loss": 3.0 / n, "learning_rate": 0.1, "stacks": [stack, stack]})
        if n % 4 == 0:
            rows[-1]["val_accuracy"] = n / 100
    return rows


def make_run(folder: Path, rows: list[dict] | None = None, said: dict | None = None, **configuration) -> Path:
    """A complete folder; `said` is the content of `status.json`."""
    for name in ("checkpoints", "figures"):
        (folder / name).mkdir(parents=True)
    configuration = CONFIGURATION | configuration
    header = {"kind": "header", "configuration": configuration, "versions": {"torch": "2"}, "ranks": 2, "date": ago(99)}
    write_record(folder, [header, *(nested_rows() if rows is None else rows)])
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    (folder / "status.json").write_text(json.dumps(status() if said is None else said))
    (folder / "log.txt").write_text("a line of the log\n")
    (folder / "checkpoints" / "update_000010.h5").write_bytes(b"none of HDF5")
    Figure(figsize=(1, 1)).savefig(folder / "figures" / "classes.png")
    return folder


def write_record(folder: Path, rows: list[dict]) -> None:
    """`metrics.jsonl`."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
