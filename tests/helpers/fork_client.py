"""Asks the fork server for a process; as a program it is a rank of mpirun that hands its place over to one.

    mpirun -n 3 python -E -S fork_client.py SOCKET WORDS     for     mpirun -n 3 python WORDS

It imports little, since every rank of every job starts it.
"""

import json
import os
import resource
import signal
import socket
import sys

LENGTH = 4  # bytes of every number that is sent
# What the launcher's MPI opens for its ranks, by the names of the variables that hold the numbers.
_FILES_OF_MPI = ("PMI_FD", "HYDI_CONTROL_FD")
# What a launcher or a test may send to a rank; SIGKILL ends the client, and thereby the process.
_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def ask(address: str, words: list[str], environment: dict[str, str], folder: str, files: dict[int, int]):
    """Start `python *words`: the connection that keeps it alive, and its process id.

    `files` are the numbers that open files have in the process, and those that they have here.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    content = json.dumps([words, environment, folder, list(files)]).encode()
    socket.send_fds(connection, [len(content).to_bytes(LENGTH)], list(files.values()))
    connection.sendall(content)
    return connection, receive(connection)


def receive(connection: socket.socket) -> int:
    """The next number: first the process id, then the exit status as `subprocess` has it."""
    content = connection.recv(LENGTH, socket.MSG_WAITALL)
    if len(content) < LENGTH:
        raise EOFError("the fork server has ended")
    return int.from_bytes(content, signed=True)


def main(address: str, words: list[str]) -> None:
    """Start the process in the place of this one, pass signals on to it, and end as it does."""
    if "PMI_FD" not in os.environ:  # another MPI than MPICH: its ranks are what its launcher has started
        os.execv(sys.executable, [sys.executable, *words])
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    numbers = [0, 1, 2, *(int(os.environ[name]) for name in _FILES_OF_MPI if name in os.environ)]
    connection, pid = ask(address, words, dict(os.environ), os.getcwd(), {number: number for number in numbers})
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Closed here, these end with the process, as they do where the process is the rank.
    for number in numbers:
        os.close(number)
    status = receive(connection)
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
