"""The command `run`: a program of the library by its name, on ranks of its own."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from processes import PROJECT, run_job

from xbraid_py.cli import main
from xbraid_py.run import programs

PEAKS = str(PROJECT / "drivers" / "peaks.py")


def command(capsys, *words) -> list[str]:
    """The words of the command that `run --print` prints."""
    assert main(["run", str(words[0]), "--print", *map(str, words[1:])]) == 0
    return shlex.split(capsys.readouterr().out)


def test_options_go_to_their_owner(capsys, tmp_path):
    assert command(capsys, "peaks") == [sys.executable, PEAKS]
    mine = tmp_path / "my program.py"
    mine.touch()
    expected = [sys.executable, str(mine), "--smoke", "--out", "a b", "--ranks", "3"]
    assert command(capsys, mine, "--smoke", "--ranks=1", "--out", "a b", "--", "--ranks", "3") == expected
    start = command(capsys, "peaks", "--launcher=env -u X -n", "--ranks=2", "--seed=4")
    assert start == ["env", "-u", "X", "-n", "2", sys.executable, PEAKS, "--seed=4"]
    if shutil.which("mpirun") or (Path(sys.executable).parent / "mpirun").exists():
        assert command(capsys, "peaks", "--ranks", 3, "--smoke")[-5:] == ["-n", "3", sys.executable, PEAKS, "--smoke"]
    assert command(capsys, "peaks", "--ranks=3", "--help") == [sys.executable, PEAKS, "--help"], "once, not thrice"


def test_help_names_all_programs(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "xbraid-py run DRIVER" in said and "peaks (Peaks)" in said
    assert len(programs.names()) > 10 and all(f"{name} (" in said for name in programs.names())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["peeks"], "DRIVER=peeks is no file and no program of the library; use one of adaptive_depth"),
        (["../drivers/peaks"], "DRIVER=../drivers/peaks is no file and no program of the library"),
        (["peaks", "--ranks=0"], "ranks=0 must be at least 1; use --ranks=4"),
        (["peaks", "--ranks=2", "--launcher=nowhere -n"], "launcher=nowhere -n is no command to be found"),
        ([], "DRIVER must be given"),
    ],
)
def test_what_cannot_be_run(capsys, words, message):
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_installed_library_has_its_programs_with_it(tmp_path, monkeypatch):
    installed = tmp_path / "xbraid_py"
    (installed / "drivers").mkdir(parents=True)
    (installed / "drivers" / "peaks.py").touch()
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / "other.py").touch()
    monkeypatch.setattr(programs, "_LIBRARY", installed)
    monkeypatch.setattr(programs, "_CHECKOUT", tmp_path)
    assert programs.names() == ["peaks"], "a folder drivers beside it is somebody else's"
    assert programs.path_of("peaks") == installed / "drivers" / "peaks.py" and programs.path_of("other") is None


@pytest.mark.job
def test_a_program_by_its_name_on_two_ranks(tmp_path):
    small = ["--smoke", "--num_layers=8", "--num_train=50", "--num_val=50", "--nested.updates=[2]"]
    words = ["run", "peaks", "--ranks=2", *small, "--nested.refinements=0", f"--out={tmp_path / 'run'}"]
    done = run_job(["-m", "xbraid_py", *words])
    assert done.returncode == 0, done.stderr
    assert '"ranks": 2' in (tmp_path / "run" / "metrics.jsonl").read_text()
