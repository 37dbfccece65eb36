"""Files that lie, read by processes that may have 1 GB, and 5 s for each.

    python tests/helpers/read_lies.py SEED FILES [KIND ...]

writes so many files, of all kinds of lies (or of those named) in turn, and prints a line of JSON for each: "refused",
"harmless" (accepted, and all that is read is what was written), "wrong" (accepted, with other numbers), "raw" (another
error than `CheckpointError`, or a good file before it that is not taken), "crash" or "hang"; with seconds, and the
megabytes that reading has added. With XBRAID_LIES_UNLIMITED set nothing is limited, to leave room for memory checkers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from hdf5_lies import LIES, base_of, sound_files, tell

from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good

SECONDS, BYTES = 5, 2**30
Content = tuple[dict, dict[str, torch.Tensor]]


def content(path: Path) -> Content:
    """Everything in a checkpoint."""
    with load(path) as checkpoint:
        return checkpoint.meta, {name: checkpoint.rows(name) for name in checkpoint.names()}


def same(found: Content, truth: Content) -> bool:
    """Whether two checkpoints hold the same, bit by bit."""
    return (
        found[0] == truth[0]
        and found[1].keys() == truth[1].keys()
        and all(
            rows.shape == truth[1][name].shape
            and rows.dtype == truth[1][name].dtype
            and rows.numpy().tobytes() == truth[1][name].numpy().tobytes()
            for name, rows in found[1].items()
        )
    )


def judged(path: Path, before: Path, truth: Content) -> dict[str, object]:
    """What the reader makes of a file; the one before it in the same folder is good."""
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        taken = newest_good(path.parent)
        try:
            verdict = "harmless" if same(content(path), truth) else "wrong"
        except CheckpointError as error:
            verdict = "refused" if str(path) in str(error) else "raw"
        if taken != (before if verdict == "refused" else path):
            verdict = "raw"
    except Exception as error:  # noqa: BLE001  whatever it is, it is what this looks for
        verdict = f"raw {type(error).__name__}: {error}"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {"verdict": verdict, "seconds": round(time.monotonic() - began, 2), "MB": round(used / 1024)}


class Reader:
    """Judges files in another process, which is replaced when it has crashed or hung, and after some files anyway."""

    FILES = 50

    def __init__(self, before: Path, truths: dict[str, Content]):
        self._before, self._truths = before, truths
        self._child, self._left = 0, 0

    def verdict(self, path: Path, base: str) -> dict[str, object]:
        """What the process makes of a file, by what it is made from, see `judged`; or that it has crashed or hung."""
        if not self._left:
            self.end()
            self._start()
        self._left -= 1
        self._asks.send((path, base))
        limit = None if "XBRAID_LIES_UNLIMITED" in os.environ else SECONDS
        try:
            if self._asks.poll(limit):
                return self._asks.recv()
        except (EOFError, ConnectionError):
            _, status = os.waitpid(self._child, 0)
            self._child, self._left = 0, 0
            return {"verdict": "crash", "signal": os.WTERMSIG(status)}
        self._left = 0
        return {"verdict": "hang", "seconds": SECONDS}

    def end(self) -> None:
        """End the process."""
        if self._child:
            self._asks.close()
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0

    def _start(self) -> None:
        self._asks, answers = Pipe()
        self._left, self._child = self.FILES, os.fork()
        if self._child == 0:
            try:
                self._asks.close()
                self._answer(answers)
            finally:
                os._exit(0)
        answers.close()

    def _answer(self, answers: Connection) -> None:
        if "XBRAID_LIES_UNLIMITED" not in os.environ:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, held + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(EOFError):
            while True:
                path, base = answers.recv()
                answers.send(judged(path, self._before, self._truths[base]))


def main() -> None:
    seed, files, kinds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or sorted(LIES)
    logging.disable()  # of what is refused
    with tempfile.TemporaryDirectory() as folder:
        sound, place = Path(folder) / "sound", Path(folder) / "checkpoints"
        sound.mkdir()
        place.mkdir()
        truths = sound_files(sound)
        before, path = place / file_name(1), place / file_name(2)
        shutil.copyfile(sound / "few.h5", before)
        reader = Reader(before, truths)
        for number in range(files):
            kind, own = kinds[number % len(kinds)], seed + number // len(kinds)
            path.unlink(missing_ok=True)
            tell(kind, sound, own, path)
            verdict = reader.verdict(path, base_of(kind))
            print(json.dumps({"kind": kind, "seed": own, **verdict}), flush=True)
        reader.end()


if __name__ == "__main__":
    main()
