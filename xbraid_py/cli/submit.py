"""Jobs: `submit` starts or queues one, `ls` shows them and all runs, `stop` ends them, `logs` is what they print."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from xbraid_py.cli import control
from xbraid_py.cli.queue import Queue, launcher
from xbraid_py.cli.reader import LOG, command_parser, printable, quoted
from xbraid_py.cli.status import COLORS, STUDIES, console, duration, progress, shown, study
from xbraid_py.run import programs
from xbraid_py.run.documents import open_regular, tail

_FOLDER = "Folder of runs, which holds the queue (%(default)s)."
_EPILOG = (
    "What is no option of this command is one of the driver, and what follows -- in any case. Without --out a run has "
    "a folder of its own, FOLDER/DRIVER-JOB. A job is asked for a checkpoint when its time is over, and "
    "`xbraid-py resume JOB` goes on."
)


def main(words: Sequence[str]) -> int:
    """Queue a driver, and print the number of the job."""
    words, extra = list(words), []
    if "--" in words:
        words, extra = words[: words.index("--")], words[words.index("--") + 1 :]
    usage = "DRIVER [OPTION OF THE DRIVER ...] [--ranks N] [--on here|slurm] [--time T] [--jobs N] [--folder DIR]"
    parser = command_parser("submit", usage, "Start a driver, or queue it.", _EPILOG)
    parser.add_argument("DRIVER", help="Name of a program of the library, such as peaks, or a file.")
    parser.add_argument("--ranks", type=int, default=1, help="Number of ranks (%(default)s).")
    parser.add_argument("--on", choices=("here", "slurm"), default="here", help="Who starts it (%(default)s).")
    parser.add_argument("--time", help="Longest time, as SLURM writes it: minutes, HH:MM:SS or D-HH:MM.")
    parser.add_argument("--jobs", type=int, help="From now on so many jobs of the queue at a time (1 at first).")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help=_FOLDER)
    parser.add_argument("--launcher", help="What starts several ranks here, see `xbraid-py resume --help`.")
    options, others = parser.parse_known_args(words)
    for name in ("ranks", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name}={getattr(options, name)} must be at least 1; use --{name}=2")
    driver = program_of(options.DRIVER)
    out, program = _without_out([*others, *extra])
    if any(word.partition("=")[0] == "--resume" for word in program):
        raise ValueError("resume is said by the queue itself; leave it out, or use xbraid-py resume")
    if options.on == "slurm":
        control.require_slurm()
    else:
        launcher(options.ranks, options.launcher)  # says now what it would say when the job begins
    job = {
        "program": [str(driver), *program],
        "out": os.path.abspath(out) if out is not None else None,
        "ranks": options.ranks,
        "on": options.on,
        "limit": None if options.time is None else seconds_of(options.time),
        "launcher": options.launcher,
        "folder": os.getcwd(),
    }
    queue = Queue(options.folder)
    added = control.start(queue, job, options.jobs)
    print(added.number)
    at = "" if options.folder == Path("runs") else f" --folder {quoted(str(options.folder))}"
    by = f" (SLURM's {added.slurm})" if added.slurm else ""
    print(f"job {added.number}{by} runs into {printable(added.out)}; see it with xbraid-py ls{at}", file=sys.stderr)
    return 0


def program_of(driver: str) -> Path:
    """The file of a program of the library, by its name, or another one, by its path; `ValueError` if there is none."""
    path = Path(driver)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    found = programs.path_of(driver)
    if found is None:
        known = ", ".join(programs.names()) or "none here"
        raise ValueError(f"DRIVER={driver} is no file and no program of the library; use one of {known}")
    return found


def _without_out(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder that the options of a driver name, and the other options."""
    out, rest, left = None, [], iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == "--out":
            out = value if equals else next(left, "")
            if not out:
                raise ValueError("out is given without a folder; use --out=runs/mine")
        else:
            rest.append(word)
    return out, rest


def seconds_of(text: str) -> float:
    """A time as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; `ValueError` for anything else, and for none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    found = 0
    if match:
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        if days is not None:
            hours, minutes, seconds = (*numbers, 0, 0)[:3]
            found = ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
        else:
            hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers)}.get(len(numbers), numbers)
            found = (hours * 60 + minutes) * 60 + seconds
    if not found:
        raise ValueError(f"time={text} is none; use --time=30 (minutes), --time=04:00:00 or --time=2-00:00")
    return float(found)


def ls(words: Sequence[str]) -> int:
    """Print a line for each run and job."""
    parser = command_parser("ls", "[DIR]", "All runs below a folder, and the jobs of its queue.")
    parser.add_argument("DIR", nargs="?", type=Path, default=Path("runs"), help=_FOLDER)
    parser.add_argument("--folder", type=Path, help="The same.")
    options = parser.parse_args(words)
    folder = options.folder or options.DIR
    found = control.entries(folder)
    studies = [path for path in sorted(folder.rglob(STUDIES)) if path.is_file()]
    if not found and not studies:
        print(f"no runs below {printable(folder)} yet; start one with xbraid-py submit")
        return 0
    table = Table(box=None, pad_edge=False)
    for title in ("job", "run", "state", "update", "left", "accuracy", "objective", "ranks", "on", "says"):
        table.add_column(title, justify="left" if title in ("run", "state", "on", "says") else "right", no_wrap=True)
    for each in found:
        table.add_row(*map(_cell, _cells(each)))
    for path in studies:
        state, says = study(path.parent)
        table.add_row(*map(_cell, ("-", os.path.relpath(path.parent, folder), state, *"-----", "study", says)))
    console().print(table)
    return 0


def _cell(text: str) -> Text:
    return Text(printable(text), style=COLORS.get(text, ""))


def _cells(each: control.Entry) -> Sequence[str]:
    job, summary = each.job, each.summary
    under_way = each.state in ("running", "stopping")
    return (
        str(job.number) if job else "-",
        each.name,
        each.state,
        progress(summary) if summary else "-",
        duration(summary.seconds_left) if summary and under_way else "-",
        shown(summary.accuracy, percent=True) if summary else "-",
        shown(summary.objective) if summary else "-",
        str(job.ranks) if job else shown(summary.ranks) if summary else "-",
        (f"slurm {job.slurm}" if job.on == "slurm" else job.on) if job else "-",
        each.message,
    )


def stop(words: Sequence[str]) -> int:
    """Ask for a checkpoint and the end."""
    usage = "JOB|DIR ... [--now] [--folder DIR]"
    about = "Asks jobs or runs for a checkpoint and their end; `xbraid-py resume` goes on, on any number of ranks."
    parser = command_parser("stop", usage, about)
    parser.add_argument("JOB", nargs="+", help="Numbers of jobs, or folders of runs.")
    parser.add_argument("--now", action="store_true", help="End them at once, without a checkpoint.")
    parser.add_argument("--folder", type=Path, help="Folder of the queue; runs, or the one that the run is in.")
    options = parser.parse_args(words)
    for word in options.JOB:
        target = _target(word)
        queue = control.queue_of(options.folder, target if isinstance(target, Path) else None)
        print(printable(control.stop(queue, target, options.now)))
    return 0


def _target(word: str) -> int | Path:
    return int(word) if word.isdecimal() and not Path(word).exists() else Path(word)


_EVERY, _AT_ONCE = 0.5, 1 << 20


def logs(words: Sequence[str]) -> int:
    """Print the end of what a job prints, or of the log of a run; with -f all that follows, until its end."""
    usage = "JOB|DIR [-f] [--lines N] [--folder DIR]"
    parser = command_parser("logs", usage, "What a job prints, or the log of a run.")
    parser.add_argument("JOB", help="Number of a job, or folder of a run.")
    parser.add_argument("-f", "--follow", action="store_true", help="Go on with what is new, until the job is over.")
    parser.add_argument("--lines", type=int, default=40, help="Lines from the end (%(default)s).")
    parser.add_argument("--folder", type=Path, help="Folder of the queue; runs, or the one that the run is in.")
    options = parser.parse_args(words)
    if options.lines < 1:
        raise ValueError(f"lines={options.lines} must be at least 1; use --lines=40")
    target = _target(options.JOB)
    queue = control.queue_of(options.folder, target if isinstance(target, Path) else None)
    job = control.job_of(queue, target)
    path = queue.log(job.number) if job else Path(options.JOB) / LOG
    if job is None and not path.parent.is_dir():
        raise ValueError(f"JOB={options.JOB} is no job and no folder of a run; use xbraid-py ls")
    place = 0
    if path.exists():
        lines = tail(path, _AT_ONCE).decode(errors="replace").splitlines()[-options.lines :]
        place = path.stat().st_size
        sys.stdout.writelines(f"{printable(line)}\n" for line in lines)
    elif not options.follow:
        print(f"{printable(path)} is not there yet")
    while options.follow:
        sys.stdout.flush()
        is_over = _is_over(queue, job.number if job else Path(options.JOB))
        place = _print_from(path, place)
        if is_over:
            return 0
        time.sleep(_EVERY)
    return 0


def _is_over(queue: Queue, target: int | Path) -> bool:
    if isinstance(target, int):
        control.looked_up(queue)
        return queue.job(target).is_over
    return control.summarize(control.read_run(target)).state not in ("starting", "running")


def _print_from(path: Path, place: int) -> int:
    try:
        with open_regular(path) as stream:
            stream.seek(place)
            content = stream.read(_AT_ONCE)
    except FileNotFoundError:
        return place
    whole = content.rfind(b"\n") + 1 if len(content) < _AT_ONCE else len(content)
    sys.stdout.writelines(f"{printable(line)}\n" for line in content[:whole].decode(errors="replace").splitlines())
    return place + whole
