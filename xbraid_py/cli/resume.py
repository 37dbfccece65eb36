"""`xbraid-py resume`: a run goes on, with its own options, on this terminal or as a job of the queue."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from xbraid_py.cli import control
from xbraid_py.cli.queue import launcher
from xbraid_py.cli.reader import command_parser, printable, quoted, read_run
from xbraid_py.cli.status import progress, summarize

_EPILOG = (
    "What follows -- goes to the driver as it is. The run goes on from its newest good checkpoint: a folder on this "
    "process's terminal, with the driver's exit status; the number of a job, or a folder with --on, in the queue."
)


def main(words: Sequence[str]) -> int:
    """Run the command that continues the run, print it, or queue it."""
    words, extra = list(words), []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    usage = "DIR|JOB [--ranks N] [--on here|slurm] [--print] [--driver FILE] [--launcher WORDS] [-- OPTION ...]"
    parser = command_parser("resume", usage, "Continue a run with its own options.", _EPILOG)
    parser.add_argument("DIR", type=Path, help="Folder of the run, or the number of a job.")
    parser.add_argument("--ranks", type=int, help="Number of ranks; as before if not given.")
    parser.add_argument("--on", choices=("here", "slurm"), help="Queue it, and who starts it.")
    parser.add_argument("--folder", type=Path, help="Folder of the queue; runs, or the one that the run is in.")
    parser.add_argument("--print", action="store_true", help="Print the command instead of running it.")
    parser.add_argument("--driver", type=Path, help="The program, if it is none of the library's: it is run.")
    parser.add_argument(
        "--launcher",
        help="What starts several ranks, up to their number, as in --launcher 'srun --mpi=pmi2 -n'; "
        "the mpirun beside this python, or else on the PATH, if not given.",
    )
    options = parser.parse_args(words)
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"ranks={options.ranks} must be at least 1; use --ranks=4")
    is_job = options.DIR.name == str(options.DIR) and options.DIR.name.isdecimal() and not options.DIR.exists()
    if is_job or options.on is not None:
        return _queued(options, int(options.DIR.name) if is_job else options.DIR)
    run = read_run(options.DIR)
    summary = summarize(run)
    if run.status.get("state") == "finished":
        print(f"{printable(run.path)} is finished (update {progress(summary)}): there is nothing to continue")
        return 0
    ranks = options.ranks or summary.ranks or 1
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be at least 1; use --ranks=4")
    driver = options.driver or control.find_driver(run)
    if not driver.is_file():
        raise ValueError(f"driver={driver} is no file; use --driver=drivers/peaks.py")
    command = launcher(ranks, options.launcher) + [sys.executable, str(driver), *control.configured(run)]
    command += ["--resume=auto", f"--out={run.path}", *extra]
    if not run.checkpoints:
        print(f"{printable(run.path)} holds no checkpoint: the run starts from its beginning", file=sys.stderr)
    print(" ".join(map(quoted, command)), file=sys.stdout if options.print else sys.stderr, flush=True)
    if options.print:
        return 0
    os.execvp(command[0], command)  # signals reach the driver itself


def _queued(options, target: int | Path) -> int:
    for name in ("print", "launcher"):
        if getattr(options, name):
            raise ValueError(f"{name} is for a run that goes on in this terminal; leave it or --on out")
    if options.on == "slurm":
        control.require_slurm()
    queue = control.queue_of(options.folder, target if isinstance(target, Path) else None)
    job = control.resume(queue, target, options.ranks, options.on, options.driver)
    print(f"job {job.number} goes on, on {job.ranks} ranks, in {printable(job.out)}")
    return 0
