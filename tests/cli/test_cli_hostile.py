"""Folders that are not what they seem: every command says what is wrong, at once and in little memory."""

import json
import os
import resource
import subprocess
import sys

from processes import PROJECT, job_environment
from runs_on_disk import make_run, nested_rows, status, write_record

LISTS = b'{"a": [' + b"[]," * 400_000 + b"1]}\n"
CURVES = b"".join(b"%s\n" % json.dumps({f"{row} name {k}": k for k in range(20_000)}).encode() for row in range(10))


def make(folder, name, kind):
    """A folder of which one file is of a kind."""
    path = make_run(folder / "run", said=status("stopped", ranks=1)) / name
    whole = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "bomb":
        path.write_bytes({"config.yaml": BOMB, "status.json": LISTS, "metrics.jsonl": LISTS * 20}[name])
    elif kind == "itself":
        path.write_bytes(b"&a [*a]")
    elif kind == "deep":
        path.write_bytes(b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n")
    elif kind == "long line":
        path.write_bytes(whole)
        os.truncate(path, 400_000_000)
    elif kind == "curves":
        path.write_bytes(whole + CURVES)
    return path.parent


BOMB = (
    b"a: [&a [1,1,1,1,1,1,1,1,1], "
    + b", ".join(
        b"&%c [%s]" % (name, b",".join([b"*%c" % before] * 10))
        for before, name in zip(b"abcdefgh", b"bcdefghi", strict=True)
    )
    + b"]\n"
)


def limited():
    """Of addresses, of which the libraries alone take much."""
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))


CHILD = """
import contextlib, io, json, re, sys
from pathlib import Path
from xbraid_py.cli import main

for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    # Not what resource.getrusage says: that begins with the memory of who has started this process.
    memory = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
    print(json.dumps([status, out.getvalue(), err.getvalue().splitlines(), memory]))
"""


def run(*commands):
    """Commands in a process: of each status, output, lines of errors, and the most memory so far, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([[*map(str, words)] for words in commands]),
        env=job_environment(),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=20 + 20 * len(commands),
        preexec_fn=limited,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


FILES = ("metrics.jsonl", "status.json", "config.yaml")
CASES = [
    *((name, kind) for name in FILES for kind in ("pipe", "bomb")),
    ("status.json", "device"),
    ("status.json", "deep"),
    ("config.yaml", "itself"),
    ("config.yaml", "long line"),
    ("metrics.jsonl", "long line"),
    ("metrics.jsonl", "curves"),
]


def test_every_command_says_what_is_wrong(tmp_path):
    folders = [make(tmp_path / f"{number}", *case) for number, case in enumerate(CASES)]
    resume = ("--print", "--driver=drivers/peaks.py")
    words = [
        each for folder in folders for each in (("status", folder), ("report", folder), ("resume", folder, *resume))
    ]
    found = run(*words)
    assert len(found) == 3 * len(CASES)
    for number, (code, out, errors, memory) in enumerate(found):
        name, kind = CASES[number // 3]
        assert code in (0, 2) and len(errors) <= 1, (name, kind, errors)
        assert memory < 500, (name, kind)
        assert number % 3 or kind == "curves" or name in out, (kind, out)


def test_a_pipe_among_what_the_page_shows(tmp_path):
    """Nor does the page show what a link in place of the log leads to."""
    folder = make_run(tmp_path / "run")
    for name in ("log.txt", "figures/classes.png"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert run(("report", folder))[0][0] == 0
    (folder / "log.txt").unlink()
    (folder / "log.txt").symlink_to(PROJECT / "LICENSE")
    assert run(("report", folder))[0][0] == 0
    assert "Permission is hereby" not in (folder / "report.html").read_text()


def test_a_record_of_a_thousand_runs(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [row | {"run": f"run {k}"} for k in range(1000) for row in nested_rows(3)]
    write_record(folder, [{"kind": "header"}, *rows])
    ((code, _, errors, memory),) = run(("report", folder))
    assert (code, errors) == (0, []) and memory < 500
    assert "more are left out" in (folder / "report.html").read_text()


def test_a_thousand_folders(tmp_path):
    folders = [tmp_path / f"run{k}" for k in range(1000)]
    for folder in folders:
        folder.mkdir()
        (folder / "status.json").write_text(json.dumps(status()))
    shown, page = run(("status", *folders), ("report", *folders))
    assert shown[0] == 0 and len(shown[1].splitlines()) == 1001
    assert page[0] == 2
    assert page[2] == ["error: DIR names 1000 folders, more than a page compares; use at most 50"]


def test_the_end_of_a_long_record(tmp_path):
    """What is between the first line and the end is left out, and that is said; the last rows are there."""
    folder = make_run(tmp_path / "run", said={})
    with (folder / "metrics.jsonl").open("a") as file:
        for update in range(100_000):
            file.write(json.dumps({"kind": "update", "update": update, "objective": 1.0, "note": "x" * 150}) + "\n")
    said, live = run(("status", folder), ("watch", "--once", folder))
    assert "metrics.jsonl is long: " in said[1] and live[3] < 500
    assert "99999" in live[1]
