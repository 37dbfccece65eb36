"""What the tests of queue, server and page share: a driver that stands in for a training, a folder, and a server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xbraid_py.cli.queue import Queue, signal_job

# A record that grows, a checkpoint when it is asked to end, and it goes on from there.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if "config" in options:
    options = json.loads(Path(options["config"]).read_text()) | options
out, asked, total = Path(options["out"]), [], int(options["total"])
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
kept = {"total": total, "rate": options.get("rate", "0.5"), "name": "<img src=x onerror=alert(1)>"}
(out / "config.yaml").write_text(json.dumps(kept))
record, state = out / "metrics.jsonl", out / "checkpoints" / "update.h5"
done = int(state.read_text()) if options.get("resume") == "auto" else 0
kind = "resume" if done else "header"
lines = open(record, "a" if done else "w", buffering=1)
lines.write(json.dumps({"kind": kind, "driver": "mine", "configuration": kept, "ranks": 1}) + "\\n")
def say(word, update):
    said = {"state": word, "update": update, "total": total, "accuracy": update / total, "objective": 1 / (update + 1),
            "message": "stopped <b>here</b>" if word == "stopped" else ""}
    (out / "new").write_text(json.dumps(said))
    (out / "new").replace(out / "status.json")
update = done
while update < total and not asked:
    update += 1
    lines.write(json.dumps({"kind": "update", "run": "nested", "num_layers": 8 if update < 10 else 16, "update": update,
                            "seconds": update / 10, "work": update / 2.0, "objective": 1 / update, "loss": 0.9 / update,
                            "val_accuracy": update / total, "train_accuracy": update / total}) + "\\n")
    say("running", update)
    while not (out.parent / "fast").exists() and not asked:
        time.sleep(0.05)
        break
state.write_text(str(update))
say("stopped" if update < total else "finished", update)
sys.exit(75 if update < total else 0)
"""


@contextlib.contextmanager
def room_for(program: str, folder: Path) -> Iterator[Path]:
    """A folder of runs with a space in its name, beside the program `driver.py`; nothing is left running."""
    (folder / "driver.py").write_text(program)
    room = folder / "my runs"
    room.mkdir()
    yield room
    for job in Queue(room).jobs():
        signal_job(job, signal.SIGKILL)


@contextlib.contextmanager
def server(folder: Path, *words: str, **variables: str) -> Iterator[str]:
    """`xbraid-py serve` of a folder, on a free port; its address."""
    command = [sys.executable, "-m", "xbraid_py", "serve", str(folder), "--port=0", *words]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
    try:
        yield job.stdout.readline().rpartition(" is at ")[2].strip()
    finally:
        job.terminate()
        job.wait(timeout=30)
        job.stdout.close()


def until(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for it; the time only tells a hang from something slow."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it has not come to this"
        time.sleep(0.05)
