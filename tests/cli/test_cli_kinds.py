"""The command line on the runs of every driver: what they do, their pages, how they go on, their networks."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from kinds import KINDS, finished
from processes import PROJECT
from torch import nn

from xbraid_py.cli import main
from xbraid_py.run.store.read import numbered

ALL = pytest.mark.parametrize("name", KINDS)


@ALL
def test_status_and_watch(name, capsys):
    out = finished(name)
    last = max(number for number, _ in numbered(out / "checkpoints"))
    capsys.readouterr()  # what the run has said
    assert main(["status", str(out)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if str(out) in line)
    assert "finished" in line and f"{last} /" in line and "no checkpoints" not in line
    assert line.rstrip().endswith(" 1"), f"no flaw is said: {line}"
    assert main(["watch", str(out), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown and "loss" in shown and "no " not in shown


@ALL
def test_report(name, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(finished(name)), f"--out={page}"]) == 0
    text = page.read_text()
    assert "update_0000" in text and "best.h5" in text and text.count("data:image/png") >= 2
    assert "damaged" not in text


@ALL
def test_resume(name, tmp_path, capsys, monkeypatch):
    out = tmp_path / KINDS[name].folder
    shutil.copytree(finished(name), out)
    assert main(["resume", str(out), "--print"]) == 0
    assert "is finished" in capsys.readouterr().out
    (out / "status.json").unlink()
    (out / "metrics.jsonl").write_text("")
    driver = PROJECT / "drivers" / f"{KINDS[name].driver}.py"
    assert main(["resume", str(out), "--print", f"--driver={driver}", "--ranks=1"]) == 0
    assert capsys.readouterr().out.split()[:2] == [sys.executable, str(driver)]


@ALL
@pytest.mark.parametrize("which", ["newest", "best"])
def test_export(name, which, tmp_path, capsys):
    out = tmp_path / "network.pt"
    assert main(["export", str(finished(name)), str(out), *(["--best"] if which == "best" else [])]) == 0
    assert "residual layers; load it with" in capsys.readouterr().out
    network = torch.load(out, weights_only=False)
    assert isinstance(network, nn.Module) and not network.training
    assert sum(parameter.numel() for parameter in network.parameters()) > 0
