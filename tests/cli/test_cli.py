"""The command line: what it reads of a folder, `status`, and one message for whatever is wrong."""

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import PROJECT, job_environment
from rich.console import Console
from runs_on_disk import CONFIGURATION, ago, make_run, minibatch_rows, nested_rows, status, write_record

from xbraid_py.cli import COMMANDS, main
from xbraid_py.cli.reader import RunReader, read_run
from xbraid_py.cli.report import page
from xbraid_py.cli.status import duration, frame, shown, summarize, table, worst

HEAVY = ("torch", "mpi4py", "h5py", "matplotlib", "jinja2")
# A command, and then which of these it has loaded.
COMMAND = f"""
import sys
from xbraid_py.cli import main
status = main(sys.argv[1:])
print([name for name in {HEAVY} if name in sys.modules])
sys.exit(status)
"""


def python(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=job_environment(), cwd=PROJECT, capture_output=True, text=True, timeout=100)


# ---- what is in a folder


def test_a_complete_run_is_read(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.flaws == []
    assert run.configuration == CONFIGURATION and run.about["ranks"] == 2
    assert len(run.rows) == 13 and [path.name for path in run.checkpoints] == ["update_000010.h5"]
    assert run.curves("objective") == {"nested": [(n, 2.0 / (n + 1)) for n in range(13)]}
    assert run.curves("val_accuracy")["nested"][:2] == [(0, 0.5), (2, 0.52)], "null is no value"
    assert "update" not in run.columns and "final" not in run.columns


def test_any_numeric_column_is_read(tmp_path):
    rows = [*minibatch_rows(), {"update": 12, "loss": 0.0}, {"loss": 7.0}]
    run = read_run(make_run(tmp_path / "run", rows))
    assert run.curves("stacks.1.gradient_error") == {"": [(n, 0.01 * n) for n in range(1, 13)]}
    assert run.curves("val_accuracy") == {"": [(4, 0.04), (8, 0.08), (12, 0.12)]}
    assert run.curves("loss")[""][-2:] == [(12, 0.0), (13, 7.0)], "the last of an update; rows without one by number"


@pytest.mark.parametrize("name", ["status.json", "metrics.jsonl", "config.yaml", "figures", "checkpoints"])
def test_what_is_missing_is_said(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / name).rename(tmp_path / "away")
    run = read_run(folder)
    assert run.flaws == [f"no {name}"]
    assert run.configuration == CONFIGURATION, "from the header where the file is missing"


def test_what_is_damaged_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "status.json").write_text('{"state": "runn')
    (folder / "config.yaml").write_text("seed: [1,\n")
    with open(folder / "metrics.jsonl", "ab") as record:
        record.write(b'no JSON\n[1]\n\xff\n{"update": 13, "objective": 1.0}\n{"update": 14, "obj')
    run = read_run(folder)
    assert run.flaws == [
        "status.json is damaged or half-written",
        "metrics.jsonl: 3 damaged lines left out",
        "config.yaml is damaged or half-written",
    ]
    assert run.rows[-1] == {"update": 13, "objective": 1.0}
    assert run.configuration == CONFIGURATION


def test_a_record_is_followed(tmp_path):
    folder = make_run(tmp_path / "run")
    reader = RunReader(folder)
    assert len(reader.read().rows) == 13
    with open(folder / "metrics.jsonl", "ab") as record:
        for part, expected in ((b'{"update": 13, "obj', 13), (b'ective": 9.0}\n', 14)):
            record.write(part)
            record.flush()
            assert len(reader.read().rows) == expected
    assert reader.read().curves("objective")[""] == [(13.0, 9.0)]
    # A resumed run replaces the record by a shorter one, and goes on.
    resumed = {"kind": "resume", "ranks": 5}
    (folder / "metrics.jsonl").unlink()
    assert reader.read().rows == []
    write_record(folder, [{"kind": "header", "ranks": 2}, *nested_rows(5), resumed])
    run = reader.read()
    assert len(run.rows) == 5 and run.about["ranks"] == 5
    assert run.curves("objective")["nested"][-1] == (4, 0.4)


# ---- status


@pytest.mark.parametrize(
    ("said", "state", "exit_status"),
    [
        (status("starting"), "starting", 0),
        (status("running"), "running", 0),
        (status("running", age=100), "running", 0),
        (status("stopped", age=1e6), "stopped", 0),
        (status("finished", age=1e6), "finished", 0),
        (status("failed", message="the loss is nan"), "failed", 1),
        (status("on fire"), "finished", 0),  # the record has come to its end
    ],
)
def test_the_state_and_the_exit_status(tmp_path, capsys, said, state, exit_status):
    folder = make_run(tmp_path / "run", said=said)
    assert main(["status", str(folder)]) == exit_status
    line = capsys.readouterr().out.splitlines()[1]
    assert f" {state} " in line and "12 / 40" in line and "87.50 %" in line and said["message"] in line


def test_a_run_without_a_sign_of_life_is_stale(tmp_path, capsys):
    run = read_run(make_run(tmp_path / "run"))
    assert summarize(run, stale=60, now=run.record_time + 59).state == "running"
    late = summarize(run, stale=60, now=run.record_time + 70)
    assert (late.state, late.exit_status) == ("stale", 3) and late.age >= 60
    assert summarize(run, stale=100, now=run.record_time + 70).state == "running"
    assert summarize(run, now=run.record_time - 500).age == 0.0, "clocks differ"
    assert main(["status", str(run.path), "--stale=1e-9"]) == 3
    assert " stale " in capsys.readouterr().out


def test_without_status_the_record_tells(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "status.json").unlink()
    found = summarize(read_run(folder))
    assert (found.state, found.update, found.objective, found.accuracy) == ("finished", 12, 2 / 13, 0.62)
    assert found.ranks == 2 and found.total is None
    write_record(folder, [{"kind": "header"}, *minibatch_rows(4)])
    found = summarize(read_run(folder))
    assert (found.state, found.update, found.objective, found.accuracy) == ("running", 4, 0.75, 0.04)


def test_several_runs_and_the_worst_of_them(tmp_path, capsys):
    good, failed = make_run(tmp_path / "good"), make_run(tmp_path / "bad", said=status("failed"))
    assert main(["status", str(good), str(failed)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["status", str(failed), str(tmp_path / "none"), str(good)]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert (
        said.err == f"error: {tmp_path / 'none'} does not exist; give the --out folder of a run, such as runs/peaks\n"
    )
    assert [worst(each) for each in ((0, 3), (3, 1), (1, 2, 3), ())] == [3, 1, 2, 0]


def test_numbers_in_words():
    assert [duration(s) for s in (None, 0.2, 59, 61, 3660, 3600 * 50)] == [
        *("-", "0 s", "59 s", "1 min", "1 h 1 min", "2 d 2 h"),
    ]
    assert [shown(x) for x in (None, 3.0, 0.123456789, 1e-9)] == ["-", "3", "0.12346", "1e-09"]
    assert ago(0) > ago(10)


# ---- whatever is wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stat"], "unknown command 'stat'; did you mean status?"),
        (["zzz"], "use one of status, watch"),
        (["status"], "DIR must be given"),
        (["status", "nowhere"], "nowhere does not exist"),
        (["status", "setup.cfg"], "setup.cfg is a file, not a folder"),
        (["status", "tests"], "tests holds no run: no status.json, metrics.jsonl, config.yaml or checkpoints"),
        (["status", "tests", "--stal=3"], "unknown option --stal; did you mean --stale?"),
        (["status", "tests", "--stale=x"], "stale=x is not a float; use --stale=60.0"),
        (["status", "tests", "--stale=-1"], "stale=-1.0 must be positive; use --stale=60"),
        (["watch", "a", "b"], "'b' is one folder or file too many"),
        (["watch", "tests", "--every=0"], "every=0.0 must be a number of seconds from 0.1"),
        (["watch", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["resume", "nowhere"], "nowhere does not exist"),
        (["resume", "tests", "--ranks=two"], "ranks=two is not an int; use --ranks=4"),
        (["export", "nowhere", "x.pt"], "nowhere does not exist"),
        (["export", "nowhere"], "OUT must be given"),
        (["events", "nowhere"], "nowhere does not exist"),
    ],
)
def test_one_message_and_status_2(monkeypatch, capsys, words, message):
    monkeypatch.chdir(PROJECT)
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and message in said.err
    assert len(said.err.splitlines()) <= 2 and "Traceback" not in said.err


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "plan"])
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"xbraid-py {name} " in capsys.readouterr().out


def test_help_names_all_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_looking_at_a_run_loads_nothing_heavy(tmp_path):
    folder = make_run(tmp_path / "run")
    for words in (
        ["--help"],
        ["status", folder],
        ["watch", "--once", folder],
        ["resume", folder, "--driver=setup.cfg", "--print"],
    ):
        done = python("-c", COMMAND, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]", words


def test_python_m(tmp_path):
    done = python("-m", "xbraid_py", "status", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} holds no run")


# ---- anything may be in the files

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["kind", "run", "update", "objective", "loss", "val_accuracy", "final", "stacks", "note", "$x_$", "<b>", "[red]"]
)
ROWS = st.dictionaries(NAMES, JSON | st.sampled_from(["header", "resume", "update", "<i>", 1, 2.5, -1e308, 1e308]))
FIELDS = st.dictionaries(st.sampled_from(sorted(status())), JSON)


@settings(max_examples=40)
@given(said=FIELDS | JSON, rows=st.lists(ROWS, max_size=5), configuration=JSON, tail=st.binary(max_size=30))
def test_any_content_is_shown(tmp_path_factory, said, rows, configuration, tail):
    folder = tmp_path_factory.mktemp("run")
    (folder / "status.json").write_text(json.dumps(said))
    (folder / "config.yaml").write_text(json.dumps(configuration))
    write_record(folder, [{"kind": "header"}, *rows])
    with open(folder / "metrics.jsonl", "ab") as record:
        record.write(tail)
    run = read_run(folder)
    found = summarize(run)
    console = Console(file=io.StringIO(), width=80)
    console.print(table([(run, found)]))
    console.print(frame(run, found, console))
    assert found.state in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue(), "what the files hold is no command to the terminal"


@settings(max_examples=12)
@given(said=FIELDS, rows=st.lists(ROWS, min_size=2, max_size=5), configuration=st.dictionaries(NAMES, JSON))
def test_any_content_is_reported(tmp_path_factory, said, rows, configuration):
    folder = tmp_path_factory.mktemp("run")
    (folder / "status.json").write_text(json.dumps(said))
    write_record(folder, [{"kind": "header", "configuration": configuration}, *rows])
    (folder / "log.txt").write_bytes(b"\x1b[31m<script>\xff")
    run = read_run(folder)
    for text in (page([run]), page([run, run])):
        assert text.rstrip().endswith("</html>") and "<script" not in text and "<i>" not in text
