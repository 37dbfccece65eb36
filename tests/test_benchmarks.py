"""The benchmarks run: each with tiny settings, as a job of its own; their last line has the figures."""

from __future__ import annotations

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from processes import PROJECT

LEVELS = ("", "_32", "_64", "_iterative")
CYCLES = ("lagged", "V", "F", "published")
SWEEPS = ("forward", "adjoint", "evaluations")
PLANS = ("limit", "serial", "one portion", "replicas", "pipeline of 4", "pipeline of 8", "lagged", "V")

# Options that make a script tiny, and its figures.
SCRIPTS = {
    "gradient": (
        ["--num_layers=8", "--samples=60", "--rounds=2", "--widths=2,3"],
        {"native_vs_autograd", "fallback_vs_autograd", "native_vs_stream"},
    ),
    "update": (
        ["--depths=64", "--samples=50", "--updates=7"],
        {"objective_deviation", "objective_worst", "speedup_64"},
    ),
    "equations": (
        ["--quick"],
        {
            f"{name}_{how}_factor"
            for name in ("dahlquist", "heat", "lorenz")
            for how in ("V_2_2", "V_4_2", "V_4_3", "F_4_3")
        },
    ),
    "sweeps": (
        ["--samples=50", "--updates=4,3"],
        {f"{name}{end}{worst}" for name in SWEEPS for end in ("", "_iterative") for worst in ("", "_worst")},
    ),
    "gradient_error": (
        ["--samples=50", "--updates=4,8", "--depths=32,64", "--scales=0.1,1"],
        {f"{name}{level}" for name in ("median", "worst") for level in LEVELS}
        | {f"random_{cycle}_{N}" for cycle in CYCLES for N in (32, 64)}
        | {"random_scale"},
    ),
    "layer_parallel": (
        "--blocks=dense,encoder --layers=3 --rounds=2 --intervals=2,8 --num_layers=32 --ranks=2 --steps=1".split(),
        {f"{kind}_{block}" for kind in ("overhead", "batched") for block in ("dense", "encoder")}
        | {"speedup_encoder_2", "error_encoder_2"},
    ),
    "serial_ends": (
        "--num_layers=32 --updates=1 --steps=1".split(),
        {f"{kind}_{ends}_{count}" for kind in ("drawn", "trained") for ends in (0, 2, 4, 8) for count in (1, 2, 3)},
    ),
    "checks": (["--rounds=1"], {"checks_mlp", "agree_us_mlp"}),
    "graph": (
        ["--cpu", "--depths=32,64", "--rounds=2"],
        {f"{name}_{num_layers}_8_32" for name in ("vs_eager", "error") for num_layers in (32, 64)},
    ),
    "wide_layers": (["--width=80", "--samples=20", "--num_layers=2", "--rounds=2"], {"forward_share", "adjoint_share"}),
    "checkpoint": (["--ranks=2", "--megabytes=1", "--rounds=2"], {"checkpoint_ratio"}),
    "soak": (["--ranks=2", "--updates=20", "--every=5", "--from=5"], {"rss_growth", "fds_growth", "requests"}),
    "resident": (["--from=20"], {"peaks_solver", "peaks_plan"}),
    "windows": (
        "--num_layers=8 --samples=4 --updates=2 --windows=2 --ranks=2 --kinds=checkpoint,windows".split(),
        {f"{what}_{kind}" for what in ("memory", "time") for kind in ("checkpoint_2_1", "windows_2_2")},
    ),
    "spatial": (
        ["--cases=2d", "--weights=random"],
        {
            f"{kind}_2d_random_{states}_{choice}"
            for kind in ("iterations", "time")
            for states in ("carry", "restrict")
            for choice in ("galerkin", "same", "last")
        },
    ),
    "memory": (["--num_layers=64", "--samples=1000", "--updates=2"], {"ratio", "ratio_2"}),
    "ranks": (["--depths=16", "--samples=80", "--updates=2"], {f"16 {name}" for name in PLANS}),
}


def figures(run_job, name: str, *options: str) -> dict[str, float]:
    """What a script prints on its last line."""
    done = run_job([PROJECT / "benchmarks" / f"{name}.py", *options], timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"benchmark", "figures"} and found["benchmark"] == name
    return flat(found["figures"])


def flat(found: dict) -> dict[str, float]:
    """The figures of all cases, behind their names."""
    cases = [(case, value if isinstance(value, dict) else None) for case, value in found.items()]
    return {
        name: value
        for case, inner in cases
        for name, value in ([(case, found[case])] if inner is None else [(f"{case} {k}", v) for k, v in inner.items()])
    }


@pytest.mark.job
@pytest.mark.long
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_runs(run_job, name):
    options, names = SCRIPTS[name]
    if name == "gradient":
        pytest.importorskip("xbraid_py.kernels._native", reason="no native kernels in this installation")
    found = figures(run_job, name, "--quick", *options)
    assert found.keys() == names
    assert all(math.isfinite(value) for value in found.values()), found


@pytest.fixture
def benchmark_module(monkeypatch):
    """`benchmark_module(name)` imports a script."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module


def test_sweeps_count_with_the_layers_of_their_level(benchmark_module):
    def level(num_layers, evaluations, sweeps, gradients, adjoint_sweeps):
        network = SimpleNamespace(grid=SimpleNamespace(num_layers=num_layers))
        counts = dict(evaluations=evaluations, sweeps=sweeps, gradients=gradients, adjoint_sweeps=adjoint_sweeps)
        return SimpleNamespace(network=network, **counts)

    levels, exact = [level(10, 6, 6, 4, 8), level(30, 2, 4, 2, 2)], [level(10, 8, 8, 4, 4), level(30, 2, 2, 2, 2)]
    found = benchmark_module("sweeps").ratios(levels, exact)
    expected = {"forward": 180 / 120, "adjoint": 140 / 100, "evaluations": 8 / 10}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("wrong", [(1.0 + 1e-9, 0.0), (1.0, 1e-9)], ids=["value", "gradient"])
def test_opponents_that_compute_something_else_are_refused(benchmark_module, wrong):
    module = benchmark_module("gradient")
    exact = 1.0, torch.ones(3)
    module.check({"same": lambda: (1.0, (torch.ones(2), torch.ones(1)))}, exact)
    with pytest.raises(SystemExit, match="^error: other: value and gradient are wrong by"):
        module.check({"other": lambda: (wrong[0], torch.ones(3, dtype=torch.float64) + wrong[1])}, exact)


def test_repeats_are_interleaved(benchmark_module):
    common, calls = benchmark_module("common"), []
    times = common.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert "".join(calls) == "aabb" + "bbaa"
    assert [len(each) for each in times.values()] == [2, 2]
    assert common.Spread.of_ratios([4.0, 9.0, 1.0], [2.0, 3.0, 1.0]) == common.Spread(2.0, 1.0, 3.0)
