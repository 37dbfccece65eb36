"""The display: readable logs of any length, the first and last row of each level, rank 0 alone."""

import io
import logging
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import job_environment

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run import progress
from xbraid_py.run.progress import Progress, format_row, setup_logging, titles

SCHEDULE = ((0, 16, 200), (1, 32, 125), (2, 64, 75))


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Peer(SerialCommunicator):
    rank = 3
    size = 4


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_ROW_SECONDS", math.inf)


def make_row(update, level=0, num_layers=16, run="nested", **values):
    return {
        "run": run,
        "level": level,
        "num_layers": num_layers,
        "update": update,
        "work": 0.25 * update,
        "seconds": 0.1 * update,
        "objective": 1.6 / (update + 1),
        "loss": 1.6 / (update + 1),
        "grad_norm": 0.5,
        "train_accuracy": 0.5,
        "val_accuracy": 0.96875,
        "state_residual": 1e-3,
        "adjoint_residual": None,
        "step_size": 1.0,
        "evaluations": 1,
        **values,
    }


def schedule_rows():
    update = 0
    for level, num_layers, count in SCHEDULE:
        for _ in range(count):
            yield make_row(update, level, num_layers)
            update += 1


def show(rows, **options) -> str:
    stream = io.StringIO()
    with Progress(SerialCommunicator(), 400, stream, **options) as display:
        for row in rows:
            display.update(row)
    return stream.getvalue()


def updates_shown(text) -> list[int]:
    return [int(line.split()[0]) for line in text.splitlines() if re.match(r" *\d+ ", line)]


def test_a_batch_log_shows_first_and_last_rows_and_some_between():
    text = show(schedule_rows())
    shown = updates_shown(text)
    assert shown == sorted(set(shown)) and {0, 199, 200, 324, 325, 399} <= set(shown)
    assert 40 <= len(shown) <= 46
    assert max(b - a for a, b in zip(shown, shown[1:], strict=False)) == 10
    of_these = titles({*make_row(0)} - {"adjoint_residual"})
    assert text.count(of_these) == 3
    for level, num_layers, _ in SCHEDULE:
        assert f"\nnested, level {level}, {num_layers} layers\n{of_these}\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("every", "expected"), [(1, list(range(7))), (3, [0, 3, 6]), (100, [0, 6])])
def test_every(every, expected):
    assert updates_shown(show([make_row(update) for update in range(7)], every=every)) == expected


def test_slow_updates_are_all_shown(monkeypatch):
    monkeypatch.setattr(progress, "_ROW_SECONDS", 0.0)
    assert updates_shown(show(schedule_rows(), every=100)) == list(range(400))


def test_rows_align_under_their_titles():
    rows = [make_row(7), {}, make_row(123456, val_accuracy=None, objective=1.5e-200, grad_norm=math.inf, work=98765.4)]
    starts = [match.end() for match in re.finditer(r"\S+( \S+)*", titles())]
    for row in rows:
        line = format_row(row)
        assert len(line) == len(titles()) <= 130
        assert [match.end() for match in re.finditer(r"\S+", line)] == starts
    cells = dict(zip(re.split(r"  +", titles().strip()), format_row(rows[0]).split(), strict=True))
    assert cells == {
        "update": "7",
        "layers": "16",
        "work": "1.8",
        "seconds": "0.7",
        "objective": "2.0000e-01",
        "gradient": "5.00e-01",
        "train %": "50.00",
        "valid %": "96.88",
        "val loss": "-",
        "state res": "1.0e-03",
        "adj. res": "-",
        "step": "1.0e+00",
        "evals": "1",
    }
    assert set(format_row({}).split()) == {"-"}


def test_columns_that_nothing_fills_are_left_out():
    rows = [{"run": "sgd", "update": n, "loss": 2.0, "seconds": 0.5 * n, "val_accuracy": None} for n in range(4)]
    rows[2] |= {"val_accuracy": 0.5}
    lines = show(rows, every=1).splitlines()
    assert lines[:2] == ["", "sgd"] and lines[2].split() == ["update", "seconds", "objective"]
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "update", "2", "3"]
    assert lines[5].split("  ")[-1].strip() == "valid %", "from where there is a value on"
    assert lines[7].split()[-1] == "-"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["file", "pipe", "terminal", "nothing"])
def test_no_bar_where_open_mpi_stands_between(tmp_path, end):
    """As its mpirun does: a process of that name gives the rank a terminal, whatever its own output is."""
    body = (
        "import os, pty, sys\n"
        "open('/proc/self/comm', 'w').write('prterun')\n"
        "pid, ours = pty.fork()\n"
        "if not pid: os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])\n"
        "said = b''\n"
        "while True:\n"
        "    try: part = os.read(ours, 1000)\n"
        "    except OSError: break\n"
        "    said += part\n"
        "    if not part: break\n"
        "open(sys.argv[2], 'wb').write(said)\n"
    )
    rank = "import os; from xbraid_py.run.progress import reaches_terminal; print(os.isatty(1), reaches_terminal())"
    ours, theirs = pty.openpty()
    with open(tmp_path / "out", "w") as file:
        out = {"file": file, "pipe": subprocess.PIPE, "terminal": theirs, "nothing": subprocess.DEVNULL}[end]
        env = job_environment({"OMPI_COMM_WORLD_SIZE": "1"})
        command = [sys.executable, "-c", body, rank, tmp_path / "said"]
        subprocess.run(command, stdout=out, env=env, check=True, timeout=100)
    os.close(ours)
    os.close(theirs)
    assert (tmp_path / "said").read_text().split() == ["True", str(end == "terminal")]


def test_notes_come_after_the_rows_before_them():
    stream = io.StringIO()
    with Progress(SerialCommunicator(), 400, stream) as display:
        for update in range(5):
            display.update(make_row(update))
        display.note("[refined] to 32 layers")
        display.update(make_row(5, level=1, num_layers=32))
    before, after = stream.getvalue().split("[refined] to 32 layers\n")
    assert updates_shown(before) == [0, 4] and updates_shown(after) == [5]


def test_the_held_row_appears_even_if_the_run_fails():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(SerialCommunicator(), 400, stream) as display:
        for update in range(4):
            display.update(make_row(update))
        raise RuntimeError
    assert updates_shown(stream.getvalue()) == [0, 3]


def test_other_ranks_print_nothing(capsys):
    stream = io.StringIO()
    with Progress(Peer(), 400, stream) as display:
        display.update(make_row(0))
        display.note("text")
    assert stream.getvalue() == "" and capsys.readouterr() == ("", "")


def test_rank_0_prints_for_all(spmd):
    def body(comm):
        stream = io.StringIO()
        with Progress(comm, 3, stream) as display:
            for update in range(3):
                display.update(make_row(update))
        return updates_shown(stream.getvalue())

    assert spmd(body) == [[0, 1, 2]] + [[]] * (len(spmd(body)) - 1)


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress(SerialCommunicator(), 399, stream) as display:
        for row in schedule_rows():
            display.update(row)
            if row["update"] == 199:
                display.note("[refined] to 32 layers")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    of_these = titles({*make_row(0)} - {"adjoint_residual"})
    assert "399/399" in text and text.count(of_these) == 1 and "[refined] to 32 layers" in text
    assert "64 layers  obj 4.000e-03  valid 96.88 %" in text
    for update, num_layers in ((199, 16), (324, 32), (399, 64)):
        assert format_row(make_row(update, num_layers=num_layers), {*make_row(0)} - {"adjoint_residual"}) in text
    # A bar drawn for each of 400 updates would be hundreds of lines.
    assert len(text) < 200 * 140


def test_a_narrow_terminal_keeps_the_bar_on_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Progress(SerialCommunicator(), 399, stream) as display:
        for row in schedule_rows():
            display.update(row)
    last = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).rstrip())[-1]
    assert last.startswith("━" * 12)
    assert "399/399 0:00:00 64 layers  obj 4.000e-03  valid 96.88 %" in last and len(last) <= 80


def test_a_dumb_terminal_gets_rows(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(SerialCommunicator(), 1, stream) as display:
        display.update(make_row(0))
    assert updates_shown(stream.getvalue()) == [0] and "\x1b" not in stream.getvalue()


def test_standard_output_is_the_default(capsys):
    with Progress(SerialCommunicator(), 1) as display:
        display.update(make_row(0))
    assert updates_shown(capsys.readouterr().out) == [0]


def test_a_resumed_bar_starts_where_the_run_stopped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    with Progress(SerialCommunicator(), 39, stream, done=38) as display:
        display.update(make_row(38))
        display.update(make_row(39))
    assert "39/39" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.mark.parametrize("options", [{"total_updates": -1}, {"every": 0}, {"done": -2}])
def test_numbers_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}={value} must be at least \d; use 10"):
        Progress(SerialCommunicator(), **{"total_updates": 10, **options})


@pytest.fixture
def library_logger():
    logger = logging.getLogger("xbraid_py")
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_messages(library_logger, capsys):
    child = logging.getLogger("xbraid_py.some.module")
    for comm, expected in (
        (SerialCommunicator(), "INFO xbraid_py.some.module: a\nWARNING xbraid_py.some.module: b\n"),
        (Peer(), ""),
    ):
        setup_logging(comm)
        setup_logging(comm)
        child.debug("-")
        child.info("a")
        child.warning("b")
        child.error("c")
        rank = f"rank {comm.rank}: " if comm.rank else ""
        assert capsys.readouterr() == ("", f"{expected}{rank}ERROR xbraid_py.some.module: c\n")
