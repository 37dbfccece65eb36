"""The command line `xbraid-py`: starts runs, looks at them, reports on them, stops, continues and exports them.

The module of a command is loaded only when it is asked for, and what takes long to load (torch, HDF5) is loaded inside
the functions that need it.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from xbraid_py.cli.reader import printable

__all__ = ["main"]

COMMANDS = {
    "status": "what runs are doing, a line each; the exit status says it to scripts",
    "watch": "a run while it goes on: a live table and curves in the terminal",
    "report": "one HTML page with the pictures and tables of a run, or a comparison of several",
    "resume": "continue a run, with the same options, on any number of ranks, here or in the queue",
    "export": "the network of a checkpoint as a plain torch module",
    "events": "the record of a run as TensorBoard event files",
    "run": "run a program of the library, or one of your own, on some ranks",
    "submit": "start a driver on some ranks, or queue it: on this machine, or by SLURM",
    "ls": "all runs below a folder, and the jobs of its queue",
    "stop": "ask jobs or runs for a checkpoint and their end",
    "logs": "what a job prints",
    "serve": "runs, live curves and the queue in a browser",
    "plan": "how long a weight update takes on how many ranks, and which cycle is best",
}
# Each is main(words) of the module of its name, or of its own name beside another; it returns the exit status.
_BESIDE = {"watch": "status", "events": "export", **dict.fromkeys(("ls", "stop", "logs"), "submit")}
BAD_INPUT, INTERRUPTED, READER_GONE = 2, 130, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The command and its words; those of this process by default.

    Returns
    -------
    int
        Exit status: that of the command; 2 for what it cannot do as asked, after one message; 130 after Ctrl-C; 1 if
        the reader of the output has gone.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal has no letters for is no reason to fail
    try:
        status = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), sys.stdout.fileno())  # what is left in the buffer has somewhere to go
        return READER_GONE
    except (ValueError, OSError) as error:
        # It may quote what a file says.
        print("error: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return BAD_INPUT
    return status


class _Printable(logging.Formatter):
    """Warnings may quote what a file says."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else BAD_INPUT
    if words[0] == "--version":
        print(f"xbraid_py {importlib.import_module('xbraid_py').__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {words[0]!r}; {hint}")
    module = importlib.import_module(f"xbraid_py.cli.{_BESIDE.get(words[0], words[0])}")
    return getattr(module, words[0] if words[0] in _BESIDE else "main")(words[1:])


def _help() -> str:
    lines = "\n".join(f"  {name:<8}  {does}" for name, does in COMMANDS.items())
    return (
        "usage: xbraid-py COMMAND [...]\n\n"
        "Runs of layer-parallel training: see what they do, and what became of them.\n\n"
        f"{lines}\n\n"
        "xbraid-py COMMAND --help says more of each; --version prints the version."
    )
