"""A python that has loaded torch and forks itself for the processes of jobs.

Python and torch take a second and a half to start, a fork takes milliseconds. A client (`fork_client.py`) connects and
sends the words, the environment, the folder and the open files of a process; it is told the process id, and at the end
the status. The process runs the program as `python WORDS` does, with nothing of this project loaded. It lives as long
as its client holds the connection, and all of them end with the process that started the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import shutil
import signal
import site
import socket
import sys
from importlib.machinery import SourceFileLoader

from fork_client import LENGTH

# What the programs of this project load sooner or later. Nothing of its own, and not `mpi4py.MPI`, which starts MPI.
LOADED = (
    *("torch", "torch.export", "torch.utils.flop_counter", "numpy", "h5py", "yaml", "mpi4py"),
    *("rich.console", "rich.progress", "rich.table", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("scipy.interpolate", "scipy.io", "scipy.linalg", "scipy.sparse", "scipy.special"),
)
_HIGH = 500  # received files wait above this number until those of the server are closed


class Server:
    """Starts processes, tells of their ends, and ends those that nobody waits for."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.path = sys.path[1:]  # without the folder of this file
        self.processes: dict[socket.socket, tuple[int, int]] = {}  # process id and its file, of each client
        self.events = selectors.DefaultSelector()
        self.events.register(0, selectors.EVENT_READ, self._end)  # closed when the process that started us has ended
        self.events.register(listener, selectors.EVENT_READ, self._start)

    def serve(self) -> list[str]:
        """Serve for ever. Comes back in the processes that are started only, with the words of each."""
        while True:
            for key, _ in self.events.select():
                words = key.data()
                if words is not None:
                    return words

    def _start(self) -> list[str] | None:
        client, _ = self.listener.accept()
        head, files, _, _ = socket.recv_fds(client, LENGTH, 16)
        length = int.from_bytes(head)
        content = client.recv(length, socket.MSG_WAITALL)
        if not length or len(content) < length:  # a rank that was killed while it asked
            client.close()
            for file in files:
                os.close(file)
            return None
        words, environment, folder, numbers = json.loads(content)
        pid = os.fork()
        if pid == 0:
            self._become(client, dict(zip(numbers, files, strict=True)))
            self._arrange(words, environment, folder)
            return words
        for file in files:
            os.close(file)
        process = os.pidfd_open(pid)
        self.processes[client] = pid, process
        self.events.register(process, selectors.EVENT_READ, lambda: self._report(client))
        self.events.register(client, selectors.EVENT_READ, lambda: self._release(client))
        return None

    def _become(self, client: socket.socket, files: dict[int, int]) -> None:
        """In the new process: a session of its own, and its files in the place of those of the server."""
        os.setsid()
        waiting = {number: fcntl.fcntl(file, fcntl.F_DUPFD, _HIGH) for number, file in files.items()}
        client.sendall(os.getpid().to_bytes(LENGTH))
        for each in (client, self.listener, self.events, *self.processes):
            each.close()
        for file in (*files.values(), *(process for _, process in self.processes.values())):
            os.close(file)
        for number, file in waiting.items():
            os.dup2(file, number)
            os.close(file)

    def _arrange(self, words: list[str], environment: dict[str, str], folder: str) -> None:
        """In the new process: what python does between its start and the program."""
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.orig_argv = [sys.executable, *words]
        # Made anew, they know whether they are pipes or terminals.
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            old = getattr(sys, name)
            unbuffered = old.write_through and number > 0
            file = open(number, "wb" if number else "rb", 0 if unbuffered else -1, closefd=False)
            lines = number == 2 or file.isatty()
            stream = io.TextIOWrapper(file, old.encoding, old.errors, "\n" if number else None, lines, unbuffered)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        given = environment.get("PYTHONPATH")
        sys.path[:] = [*(given.split(os.pathsep) if given else ()), *self.path]
        site.removeduppaths()
        importlib.invalidate_caches()
        sys.modules["numpy"].random.seed()  # otherwise the numbers of the server

    def _report(self, client: socket.socket) -> None:
        """Tell the client of the end. The process id is not given to another before the client knows."""
        if client not in self.processes:  # released in the same moment
            return
        pid, process = self.processes[client]
        self.events.unregister(process)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        with contextlib.suppress(BrokenPipeError):
            client.sendall(status.to_bytes(LENGTH, signed=True))

    def _release(self, client: socket.socket) -> None:
        """The client has ended or knows all: so ends the process, if it has not yet."""
        pid, process = self.processes.pop(client)
        with contextlib.suppress(KeyError):
            self.events.unregister(process)
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(process)
        self.events.unregister(client)
        client.close()

    def _end(self) -> None:
        for client in list(self.processes):
            self._release(client)
        shutil.rmtree(os.path.dirname(self.listener.getsockname()), ignore_errors=True)
        os._exit(0)


def run(words: list[str]) -> None:
    """Run a program as `python *words` does; raises what ends it."""
    kind, main = words[0], sys.modules["__main__"]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = ["-m", *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        code = compile(words[1], "<string>", "exec", dont_inherit=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        sys.argv = words
        main.__file__ = os.path.abspath(kind)
        main.__cached__ = None
        main.__loader__ = SourceFileLoader("__main__", main.__file__)
        with open(main.__file__, "rb") as file:
            code = compile(file.read(), main.__file__, "exec", dont_inherit=True)
    exec(code, vars(main))


class _Reported:
    """An error is reported as by the interpreter, without this file in the traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or issubclass(kind, (SystemExit, KeyboardInterrupt)):
            return
        error.__traceback__ = trace.tb_next.tb_next
        sys.excepthook(kind, error, error.__traceback__)
        raise SystemExit(1) from None


def serve(file: int) -> None:
    """Serve at a listening socket; in the processes that are started, run the program."""
    for name in LOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()  # or the collector of every process would write to, and so copy, all that is loaded
    words = Server(socket.socket(fileno=file)).serve()
    with _Reported():
        run(words)
