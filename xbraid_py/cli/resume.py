"""`xbraid-py resume DIR`: continue a run with its own options, on any number of ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from xbraid_py.cli.reader import CONFIGURATION, Run, command_parser, read_run
from xbraid_py.cli.status import printable, progress, summarize
from xbraid_py.run.options import flat, text

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
    options = parser.parse_args(words)
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
    """The options of a run as words: its configuration file, or else what its record says; `ValueError` without
    either.
    """
    file = run.path / CONFIGURATION
    if not any(flaw.endswith(CONFIGURATION) or flaw.startswith(CONFIGURATION) for flaw in run.flaws):
        return [f"--config={file}"]
    if not run.configuration:
        raise ValueError(f"{run.path} says nowhere with which options it was started: {'; '.join(run.flaws)}")
    options = {name: value for name, value in flat(run.configuration).items() if name not in ("resume", "out")}
    return [f"--{name}={text(value)}" for name, value in options.items()]


def find_driver(run: Run) -> Path:
    """The program that a run was made by; `ValueError` if its record names none."""
    named = run.about.get("driver") or run.header.get("driver")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{run.path} does not say which program it was made by; use --driver=drivers/peaks.py")
    return Path(named)
