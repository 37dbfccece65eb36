"""Processes that a fork server starts, as `subprocess` would start them: one of its own, and the command of a rank."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from fork_client import ask, receive

_HERE = Path(__file__).parent
# What an interpreter or a library reads when it is loaded: where it differs, a fork would not be the same.
_READ_ON_LOADING = (
    *("PYTHON", "LD_", "LC_", "LANG", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GLIBC_", "TORCH"),
    *("ATEN_", "NPY_", "NUMPY_", "HDF5_", "H5", "MPLBACKEND", "MATPLOTLIB", "MPLCONFIGDIR"),
)


class ForkServer:
    """The python of `fork_server.py`; it is started when the first process is asked for."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
        self.folder: str | None = None

    def can_start(self, words: list[str], environment: Mapping[str, str]) -> bool:
        """Whether a fork is the same as `python *words` in this environment, on this machine."""
        program = bool(words) and (words[0] in ("-c", "-m") or not words[0].startswith("-"))
        return hasattr(os, "pidfd_open") and program and _loading(environment) == _loading(self.environment)

    def start(self, words: list[str], environment: Mapping[str, str], folder) -> ForkedJob:
        """`python *words`, a session of its own."""
        return ForkedJob(self._address(), words, environment, folder)

    def command(self, words: list[str]) -> list[str]:
        """The command for a launcher that stands for `python *words`."""
        return [sys.executable, "-E", "-S", str(_HERE / "fork_client.py"), self._address(), *words]

    def stop(self) -> None:
        """End it, and all that it has started."""
        if self.folder is not None:
            self.process.stdin.close()  # which it takes as the end
            self.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _address(self) -> str:
        """The socket that takes requests; those that come while torch is being loaded wait there."""
        if self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="jobs")
            with socket.socket(socket.AF_UNIX) as listener, open(f"{self.folder}/log", "wb") as log:
                listener.bind(f"{self.folder}/socket")
                listener.listen(64)
                # Not as the program itself: the module __main__ is left to the processes.
                code = (
                    f"__import__('sys').path[0] = {str(_HERE)!r}; __import__('fork_server').serve({listener.fileno()})"
                )
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                )
        return f"{self.folder}/socket"


def _loading(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name.startswith(_READ_ON_LOADING) and name != "PYTHONPATH"
    }


class ForkedJob:
    """A process of the fork server, with what tests use of `subprocess.Popen`; it reads nothing, its output is text."""

    def __init__(self, address: str, words: list[str], environment: Mapping[str, str], folder):
        self.args = [sys.executable, *words]
        self.returncode: int | None = None
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        with open(os.devnull, "rb") as nothing, open(out_end, "wb"), open(err_end, "wb"):
            files = {0: nothing.fileno(), 1: out_end, 2: err_end}
            self._connection, self.pid = ask(address, words, dict(environment), str(folder), files)
        self.stdout, self.stderr = open(out), open(err)
        self._said = ["", ""]
        self._readers: list[threading.Thread] = []

    def poll(self) -> int | None:
        """The exit status, None before the end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit status, minus the signal if one has ended it."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = receive(self._connection)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.settimeout(None)
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.recv(1)  # nothing: from now on the process id is free
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read all output and wait for the end; after `subprocess.TimeoutExpired` it can be called again."""
        until = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            self._readers = [threading.Thread(target=self._read, args=(which,), daemon=True) for which in (0, 1)]
            for reader in self._readers:
                reader.start()
        for reader in self._readers:
            reader.join(_left(until))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(_left(until))
        return self._said[0], self._said[1]

    def _read(self, which: int) -> None:
        with (self.stdout, self.stderr)[which] as output:
            self._said[which] = output.read()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
