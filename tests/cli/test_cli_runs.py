"""The commands that make something of a run: `resume`, `export` and `events`."""

import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from kinds import KINDS, finished, options_of
from processes import PROJECT, job_environment, run_job
from runs_on_disk import CONFIGURATION, make_run, status, write_record
from small_runs import nested, save_state

from xbraid_py import LayerParallel
from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.state import load_weights
from xbraid_py.recipes import digits
from xbraid_py.run.store.read import Checkpoint, load, newest_good

PEAKS = PROJECT / "drivers" / "peaks.py"


def command(capsys, *words) -> list[str]:
    """The words of the command that `resume --print` prints."""
    assert main(["resume", *map(str, words), "--print"]) == 0
    return shlex.split(capsys.readouterr().out)


# ---- resume


def test_the_command_that_continues_a_run(tmp_path, capsys):
    folder = make_run(tmp_path / "a run", said=status("stopped", ranks=1))
    driver = tmp_path / "my driver.py"
    driver.touch()
    expected = [sys.executable, str(driver), f"--config={folder / 'config.yaml'}", "--resume=auto", f"--out={folder}"]
    assert command(capsys, folder, f"--driver={driver}") == expected
    assert main(["resume", str(folder), f"--driver={driver}", "--print", "--", "--keep", "2"]) == 0
    assert shlex.split(capsys.readouterr().out) == [*expected, "--keep", "2"]


def test_ranks_and_launchers(tmp_path, capsys):
    folder = make_run(tmp_path / "run", said=status("failed", ranks=3))
    driver = f"--driver={PEAKS}"
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun:
        assert command(capsys, folder, driver)[:4] == [mpirun, "-n", "3", sys.executable]
        assert command(capsys, folder, driver, "--ranks=5")[:3] == [mpirun, "-n", "5"]
    assert command(capsys, folder, driver, "--ranks=1")[0] == sys.executable
    assert command(capsys, folder, driver, "--ranks=1", "--launcher=env -u X -n")[:5] == ["env", "-u", "X", "-n", "1"]
    for words, message in (
        (["--ranks=0"], "ranks=0 must be at least 1"),
        (["--launcher=nonesuch -n"], "is no command"),
    ):
        assert main(["resume", str(folder), driver, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    folder = make_run(tmp_path / "run", said=status("finished"))
    assert main(["resume", str(folder)]) == 0
    assert "is finished (update 12 / 40): there is nothing to continue" in capsys.readouterr().out


def test_the_driver_is_found(tmp_path, capsys):
    """By its name, or by the path that older records have; nothing is guessed."""
    folder = make_run(tmp_path / "run", said=status(ranks=1))
    for named in ("peaks", str(PEAKS)):
        write_record(folder, [{"kind": "header", "driver": named}])
        assert command(capsys, folder)[1] == str(PEAKS)
    write_record(folder, [{"kind": "header"}])
    assert main(["resume", str(folder), "--print"]) == 2
    assert "does not say which program it was made by; use --driver=" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["FOLDER/peaks.py", "FOLDER/link/peaks.py", "../run/peaks.py", "nowhere", "\x1b[31m"])
def test_what_a_folder_names_is_not_run(named, tmp_path, capsys):
    """A folder of somebody else may name anything."""
    folder = make_run(tmp_path / "run", said=status(ranks=1))
    witness = tmp_path / "witness"
    (folder / "peaks.py").write_text(f"open({str(witness)!r}, 'w')")
    (folder / "link").symlink_to(folder)
    for kind in ("header", "resume"):
        write_record(folder, [{"kind": "header"}, {"kind": kind, "driver": named.replace("FOLDER", str(folder))}])
        done = run_job(["-m", "xbraid_py", "resume", folder])
        assert done.returncode == 2 and not witness.exists()
        assert "is no program of this library" in done.stderr and "--driver=" in done.stderr
        assert "\x1b" not in done.stderr


def test_words_are_quoted_for_a_shell_and_a_terminal(tmp_path, capfd):
    """Without a configuration file the options come from the record, whatever they hold."""
    evil = "a\x1b]0;title\x07 'b' \\ é\n"
    folder = make_run(tmp_path / "run", said=status(ranks=1))
    (folder / "config.yaml").unlink()
    write_record(folder, [{"kind": "header", "driver": "peaks", "configuration": {"data_dir": evil}}])
    assert main(["resume", str(folder), "--print"]) == 0
    said = capfd.readouterr().out
    assert all(letter.isprintable() for letter in said.rstrip("\n"))
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {said}"], capture_output=True, text=True)
    assert f"--data_dir={evil}" in done.stdout.split("\0")


def test_options_from_the_record(tmp_path, capsys):
    folder = make_run(tmp_path / "run", said=status(ranks=1))
    (folder / "config.yaml").unlink()
    said = command(capsys, folder, f"--driver={PEAKS}")
    options = ["--seed=0", "--num_layers=8", "--mgrit.cycle=V", "--mgrit.max_iter=2", "--data_dir=null"]
    assert said[2:] == [*options, "--resume=auto", f"--out={folder}"]
    (folder / "metrics.jsonl").unlink()
    assert main(["resume", str(folder), f"--driver={PEAKS}"]) == 2
    assert "says nowhere with which options it was started: no metrics.jsonl; no config.yaml" in capsys.readouterr().err


def test_the_command_is_run(tmp_path):
    folder = make_run(tmp_path / "run", said=status(ranks=1))
    driver = tmp_path / "driver.py"
    driver.write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    words = [sys.executable, "-m", "xbraid_py", "resume", folder, f"--driver={driver}", "--", "--x=1"]
    done = subprocess.run(words, env=job_environment(), cwd=PROJECT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 7 and done.stderr.startswith(sys.executable)
    assert done.stdout.strip() == str([f"--config={folder}/config.yaml", "--resume=auto", f"--out={folder}", "--x=1"])


@pytest.mark.job
@pytest.mark.timeout(300)
def test_a_real_run_goes_on(tmp_path):
    """By its record, and by its file of options."""
    out = tmp_path / "run"
    tiny = ["--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3", "--checkpoint_every=2"]
    tiny += ["--nested.refinements=1", "--nested.updates=3,4", f"--out={out}"]
    first = run_job([PEAKS, *tiny], timeout=100)
    assert first.returncode == 0, first.stderr
    for configuration in ("record", "file"):
        for path in (*sorted((out / "checkpoints").glob("update_*.h5"))[1:], *out.glob("*/best.h5")):
            path.unlink()
        for name in ("config.yaml", "status.json"):
            (out / name).unlink(missing_ok=True)
        if configuration == "file":
            header = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
            (out / "config.yaml").write_text(yaml.safe_dump(header["configuration"]))
        again = run_job(["-m", "xbraid_py", "resume", out, "--ranks=2"], timeout=150)
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


# ---- export


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two updates of a small network, and the network's logits of some features."""
    folder = make_run(tmp_path_factory.mktemp("trained") / "run")
    (folder / "checkpoints" / "update_000010.h5").unlink()
    run = nested(SerialCommunicator(), (1, 1), num_layers=16)
    configuration = CONFIGURATION | {"network": {"T": 2.0, "activation": "smooth_relu", "width": 3, "bias": "vector"}}
    about = {"run": "nested", "recipe": "peaks", "configuration": configuration}
    for record in run.run():
        row = {"update": record.update, "final": record.final}
        save_state(folder / "checkpoints", run, record.update, update=record.update, row=row, **about)
    network, x = run.network, run.weights
    features = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(2, 10)
    u = network.steps(x).relax(network.open(x, features)[None], 16, None, None)[0]
    return folder, features, network.classify(x, u)


def test_the_exported_module_is_the_network(tmp_path, capsys, trained):
    folder, features, logits = trained
    out = tmp_path / "net.pt"
    assert main(["export", str(folder), str(out)]) == 0
    said = capsys.readouterr().out
    assert "update_00000" in said and "16 residual layers" in said
    assert f"torch.load({str(out)!r}, weights_only=False)" in said
    code = f"import sys, torch; model = torch.load({str(out)!r}, weights_only=False); "
    code += (
        f"print(model(torch.tensor({features.T.tolist()}, dtype=torch.float64)).tolist(), 'mpi4py.MPI' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=job_environment(), cwd=PROJECT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(" False"), "without MPI"
    found = torch.tensor(json.loads(done.stdout.rpartition(" ")[0]), dtype=torch.float64)
    assert torch.allclose(found.T, logits, rtol=1e-12, atol=1e-12)


def test_export_replaces_nothing_unasked(tmp_path, capsys, trained):
    folder, out = trained[0], tmp_path / "net.pt"
    out.write_text("mine")
    assert main(["export", str(folder), str(out)]) == 2
    assert f"OUT={out} exists; give another name, or --force to replace it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["export", str(folder), str(out), "--force"]) == 0
    assert out.read_bytes() != b"mine" and list(tmp_path.iterdir()) == [out]
    for bad, message in ((tmp_path, "is a folder"), (tmp_path / "none" / "x.pt", "which is no folder")):
        assert main(["export", str(folder), str(bad)]) == 2
        assert message in capsys.readouterr().err


def test_the_best_and_the_newest_good_checkpoint(tmp_path, capsys, caplog, trained):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    first, *_, last = sorted((folder / "checkpoints").glob("*.h5"))
    assert main(["export", str(folder), str(tmp_path / "a.pt"), "--best"]) == 2
    assert "holds no best.h5; leave out --best" in capsys.readouterr().err
    shutil.copy(first, first.with_name("best.h5"))
    assert main(["export", str(folder), str(tmp_path / "a.pt"), "--best"]) == 0
    assert "best.h5" in capsys.readouterr().out
    last.write_bytes(last.read_bytes()[:-500])
    assert main(["export", str(folder), str(tmp_path / "b.pt")]) == 0
    assert last.name not in capsys.readouterr().out and last.name in caplog.text
    assert main(["export", str(last), str(tmp_path / "c.pt")]) == 2
    assert "truncated, damaged or no HDF5 file" in capsys.readouterr().err
    empty = make_run(tmp_path / "empty")
    assert main(["export", str(empty), str(tmp_path / "c.pt")]) == 2
    assert "holds no good checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "c.pt").exists()


def test_a_network_trained_on_minibatches(tmp_path):
    source = sorted((finished("digits") / "checkpoints").glob("update*"))[-1]
    options = options_of(KINDS["digits"], tmp_path / "run")
    model, out, images = digits.build(options, None), tmp_path / "net.pt", torch.rand(5, 1, 28, 28)
    with load(source) as checkpoint:
        load_weights(checkpoint, model)
    assert main(["export", str(source), str(out)]) == 0
    found = torch.load(out, weights_only=False)
    assert not found.training and not any(isinstance(part, LayerParallel) for part in found.modules())
    with torch.no_grad():
        assert torch.allclose(found(images), model.eval()(images), rtol=1e-6, atol=1e-6)


OWN = """
from torch import nn

from xbraid_py.recipes import digits
from xbraid_py.recipes.digits import MnistOptions as Options

class Opening(nn.Conv2d):
    pass

def build(options, comm):
    model = digits.build(options, comm)
    return model
"""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("digits", {"num_layers": 10**6}),
        ("digits", {"width": 10**6}),
        ("text", {"context": 10**9}),
        ("sequences", {"hidden_size": 10**6}),
        ("width", {"mesh": 10**6}),
        ("images", {"filters": [10**6] * 2}),
        ("images", {"blocks": [10**6] * 2}),
    ],
)
def test_sizes_that_the_arrays_do_not_have(name, change, tmp_path, capsys, monkeypatch):
    """The file may say anything: nothing is built of it before its own arrays have been looked at."""
    out = finished(name)
    path = newest_good(out / "checkpoints")
    whole = Checkpoint.__init__

    def changed(self, *args):
        whole(self, *args)
        for part in ("configuration", "sizes"):
            self.meta[part] = {**self.meta[part], **{k: v for k, v in change.items() if k in self.meta[part]}}

    monkeypatch.setattr(Checkpoint, "__init__", changed)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, limit[1]))
    try:
        assert main(["export", str(path), str(tmp_path / "net.pt")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert str(path) in capsys.readouterr().err and not (tmp_path / "net.pt").exists()


def test_weights_that_are_not_finite(tmp_path, capsys, monkeypatch):
    path = newest_good(finished("digits") / "checkpoints")
    monkeypatch.setattr("xbraid_py.recipes.digits.to_sequential", lambda model: with_nan(to_sequential(model)))
    assert main(["export", str(path), str(tmp_path / "net.pt")]) == 2
    assert "holds weights that are not finite, in " in capsys.readouterr().err
    assert not (tmp_path / "net.pt").exists()


def with_nan(module):
    next(module.parameters()).data[0] = torch.nan
    return module


def test_the_program_of_a_network_trained_on_minibatches(tmp_path, capsys):
    (path,) = (finished("digits") / "checkpoints").glob("update_000003.h5")
    out, driver = tmp_path / "net.pt", tmp_path / "mine.py"
    driver.write_text(OWN)
    assert main(["export", str(path), str(out), f"--driver={driver}"]) == 0
    assert out.exists() and capsys.readouterr().err == ""
    end = "    return model\n"
    for program, message in (
        ("x = 1", "has no Options and build; use the program"),
        (
            OWN.replace(end, f"    model[0] = Opening(1, 8, 5, stride=2, padding=2)\n{end}"),
            "parts of the network, Opening",
        ),
        (OWN.replace("MnistOptions", "DigitOptions"), "unknown option"),
        (OWN.replace(end, f"    model[-1] = nn.Linear(model[-1].in_features, 7)\n{end}"), "holds another network"),
    ):
        driver.write_text(program)
        assert main(["export", str(path), str(out), "--force", f"--driver={driver}"]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(path), str(out), "--force", f"--driver={tmp_path / 'none.py'}"]) == 2
    assert "none.py is no file; use --driver=FILE" in capsys.readouterr().err


# ---- events, plan


def test_events(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    folder = make_run(tmp_path / "run")
    assert main(["events", str(folder)]) == 0
    assert f"tensorboard --logdir {folder / 'tensorboard'}" in capsys.readouterr().out
    assert len(list((folder / "tensorboard").iterdir())) == 1
    write_record(folder, [{"kind": "header"}])
    assert main(["events", str(folder)]) == 2
    assert "holds no rows yet" in capsys.readouterr().err
