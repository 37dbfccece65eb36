"""`xbraid-py resume DIR`: continue a run with its own options, on any number of ranks."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import CONFIGURATION, Run, read_run
from xbraid_py.cli.summary import printable, progress, summarize
from xbraid_py.run.option_table import text

DRIVERS = Path(__file__).resolve().parents[2] / "drivers"
_EPILOG = (
    "What follows -- goes to the driver as it is. The run goes on from its newest good checkpoint; on this process's "
    "terminal, with the driver's exit status."
)


def main(words: Sequence[str]) -> int:
    """Run the command that continues the run, or print it."""
    words, extra = list(words), []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    usage = "DIR [--ranks N] [--print] [--driver FILE] [--launcher WORDS] [-- OPTION ...]"
    parser = command_parser("resume", usage, "Continue a run with its own options.", _EPILOG)
    parser.add_argument("DIR", type=Path, help="Folder of the run.")
    parser.add_argument("--ranks", type=int, help="Number of ranks; as before if not given.")
    parser.add_argument("--print", action="store_true", help="Print the command instead of running it.")
    parser.add_argument("--driver", type=Path, help="The program; found from the record if not given.")
    parser.add_argument(
        "--launcher",
        help="What starts several ranks, up to their number, as in --launcher 'srun --mpi=pmi2 -n'; "
        "the mpirun beside this python, or else on the PATH, if not given.",
    )
    options = parse(parser, words)
    run = read_run(options.DIR)
    summary = summarize(run)
    if run.status.get("state") == "finished":
        print(f"{printable(run.path)} is finished (update {progress(summary)}): there is nothing to continue")
        return 0
    ranks = options.ranks if options.ranks is not None else summary.ranks or 1
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1; use --ranks={summary.ranks or 4}")
    driver = options.driver or find_driver(run)
    if not driver.is_file():
        raise ValueError(f"driver={driver} is no file; use --driver=drivers/peaks.py")
    command = launcher(ranks, options.launcher) + [sys.executable, str(driver), *configured(run)]
    command += ["--resume=auto", f"--out={run.path}", *extra]
    if not run.checkpoints:
        print(f"{printable(run.path)} holds no checkpoint: the run starts from its beginning", file=sys.stderr)
    print(shlex.join(command), file=sys.stdout if options.print else sys.stderr, flush=True)
    if options.print:
        return 0
    os.execvp(command[0], command)  # signals reach the driver itself


def launcher(ranks: int, given: str | None) -> list[str]:
    """The words before the program, which start it on so many ranks; none for one rank unless they are given."""
    if given is not None:
        words = shlex.split(given)
        if not words or shutil.which(words[0]) is None:
            raise ValueError(f"launcher={given} is no command to be found; use --launcher='mpirun -n'")
        return [*words, str(ranks)]
    if ranks == 1:
        return []
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise ValueError(f"ranks={ranks} needs an mpirun, and there is none; use --launcher='srun -n', or --ranks=1")
    return [mpirun, "-n", str(ranks)]


def configured(run: Run) -> list[str]:
    """The options of a run as words: its configuration file, or else what its record says.

    Raises
    ------
    ValueError
        If neither is to be had.
    """
    file = run.path / CONFIGURATION
    if not any(flaw.endswith(CONFIGURATION) or flaw.startswith(CONFIGURATION) for flaw in run.flaws):
        return [f"--config={file}"]
    if not run.configuration:
        raise ValueError(f"{run.path} says nowhere with which options it was started: {'; '.join(run.flaws)}")
    return [f"--{name}={value}" for name, value in _flat(run.configuration, "")]


def _flat(values: Mapping[str, Any], prefix: str):
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("resume", "out"):
            yield f"{prefix}{name}", text(value)


def find_driver(run: Run) -> Path:
    """The program that a run was made by: the one that its record names, or else the one that has all its options.

    Raises
    ------
    ValueError
        If neither tells.
    """
    named = run.about.get("driver") or run.header.get("driver")
    if isinstance(named, str) and named:
        places = (Path(named), DRIVERS / Path(named).name)
        return next((path for path in places if path.is_file()), places[0])
    names = set(run.configuration)
    found = [path for path in sorted(DRIVERS.glob("*.py")) if names and names <= _options_of(path)]
    if len(found) != 1:
        known = ", ".join(path.name for path in found)
        what = f"may have been made by {known}" if found else "does not say which program it was made by"
        raise ValueError(f"{run.path} {what}; use --driver=drivers/peaks.py")
    return found[0]


def _options_of(path: Path, name: str = "Options") -> set[str]:
    """Names of the options of a driver, from the text of its class `Options` and of those that it is derived from."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return set()
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return set()
    fields = {
        item.target.id for item in found.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    homes = {
        alias.asname or alias.name: (DRIVERS.parent / Path(*node.module.split(".")).with_suffix(".py"), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xbraid_py.") and not node.level
        for alias in node.names
    }
    for base in found.bases:
        if isinstance(base, ast.Name) and base.id != name:
            fields |= _options_of(*homes.get(base.id, (path, base.id)))
    return fields
