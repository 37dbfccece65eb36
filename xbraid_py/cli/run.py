"""`xbraid-py run`: a program that comes with the library, or another one, on some ranks and on this terminal."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence

from xbraid_py.cli.queue import launcher
from xbraid_py.cli.reader import command_parser, quoted
from xbraid_py.cli.submit import program_of
from xbraid_py.run import programs

_HELP = ("-h", "--help")


def main(words: Sequence[str]) -> int:
    """Run a program in place of this process, or print the command."""
    words, extra = list(words), []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    asked = []
    if words and not words[0].startswith("-"):  # of that program
        asked = [word for word in words if word in _HELP]
        words = [word for word in words if word not in _HELP]
    parser = command_parser(
        "run",
        "DRIVER [--ranks N] [--launcher WORDS] [--print] [OPTION OF THE DRIVER ...]",
        "Run a program on this terminal, with its exit status.",
        "What is no option of this command is one of the driver, --help too, and what follows -- in any case. Programs "
        "of the library: " + "; ".join(f"{name} ({_about(name)})" for name in programs.names()) + ".",
    )
    parser.add_argument("DRIVER", help="Name of a program of the library, such as peaks, or a file.")
    parser.add_argument("--ranks", type=int, help="Number of ranks; one if not given.")
    parser.add_argument("--launcher", help="What starts several ranks, see `xbraid-py resume --help`.")
    parser.add_argument("--print", action="store_true", help="Print the command instead of running it.")
    options, others = parser.parse_known_args(words)
    ranks = 1 if options.ranks is None else options.ranks
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1; use --ranks=4")
    program = [sys.executable, str(program_of(options.DRIVER)), *others, *asked, *extra]
    command = program if asked else launcher(ranks, options.launcher) + program  # one help is enough
    if options.print:
        print(" ".join(map(quoted, command)))
        return 0
    sys.stdout.flush()
    os.execvp(command[0], command)  # signals reach the driver itself, and a launcher its ranks


def _about(name: str) -> str:
    """What a program is, by the head of its first sentence."""
    path = programs.path_of(name)
    text = ast.get_docstring(ast.parse(path.read_text())) if path else None
    return (text or name).splitlines()[0].partition(":")[0].rstrip(".")
