"""Folders that are not what they seem: every command says what is wrong, at once and in little memory."""

import json
import os
import resource
import subprocess
import sys

import pytest
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


def run(*words):
    """A command in a process of its own: its output, and the most memory that it had, in MB."""
    code = (
        "import resource, sys; from xbraid_py.cli import main; status = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=job_environment(),
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limited,
    )
    *said, memory = done.stderr.splitlines()
    return done.returncode, done.stdout, said, int(memory) / 1e3


FILES = ("metrics.jsonl", "status.json", "config.yaml")
CASES = [
    *((name, kind) for name in FILES for kind in ("pipe", "device", "bomb", "deep", "long line")),
    ("config.yaml", "itself"),
    ("metrics.jsonl", "curves"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_command_says_what_is_wrong(name, kind, tmp_path):
    folder = make(tmp_path, name, kind)
    for words in (("status", folder), ("report", folder), ("resume", folder, "--print", "--driver=drivers/peaks.py")):
        code, out, errors, memory = run(*words)
        assert code in (0, 2) and len(errors) <= 1, errors
        assert memory < 500
        if words[0] == "status" and kind != "curves":
            assert name in out, out


@pytest.mark.parametrize("name", ["log.txt", "figures/classes.png"])
def test_a_pipe_among_what_the_page_shows(name, tmp_path):
    folder = make(tmp_path, name, "pipe")
    assert run("report", folder)[0] == 0
    (folder / name).unlink()
    (folder / name).symlink_to(PROJECT / "LICENSE")
    assert run("report", folder)[0] == 0
    assert "Permission is hereby" not in (folder / "report.html").read_text()


def test_a_record_of_a_thousand_runs(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [row | {"run": f"run {k}"} for k in range(1000) for row in nested_rows(3)]
    write_record(folder, [{"kind": "header"}, *rows])
    code, _, errors, memory = run("report", folder)
    assert (code, errors) == (0, []) and memory < 500
    assert "more are left out" in (folder / "report.html").read_text()


def test_a_thousand_folders(tmp_path):
    folders = [tmp_path / f"run{k}" for k in range(1000)]
    for folder in folders:
        folder.mkdir()
        (folder / "status.json").write_text(json.dumps(status()))
    code, out, _, _ = run("status", *folders)
    assert code == 0 and len(out.splitlines()) == 1001
    code, _, errors, _ = run("report", *folders)
    assert code == 2 and errors == ["error: DIR names 1000 folders, more than a page compares; use at most 50"]


def test_the_end_of_a_long_record(tmp_path):
    """What is between the first line and the end is left out, and that is said; the last rows are there."""
    folder = make_run(tmp_path / "run", said={})
    with (folder / "metrics.jsonl").open("a") as file:
        for update in range(100_000):
            file.write(json.dumps({"kind": "update", "update": update, "objective": 1.0, "note": "x" * 150}) + "\n")
    code, out, _, memory = run("status", folder)
    assert memory < 500 and "is long: " in out
    code, out, _, _ = run("watch", "--once", folder)
    assert "99999" in out
