"""Layers too wide for the native kernels: torch does them, and layer-parallel training is the serial one."""

from functools import cache

import pytest
import torch
from scenes import scene
from small_runs import SEQUENTIAL, gathered

from xbraid_py import kernels
from xbraid_py.comm import SerialCommunicator
from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization

WIDTH, LAYERS, UPDATES = 100, 8, 6
# Converged: to rounding, or exactly, after as many iterations as there are intervals.
CYCLES = {
    "lagged": MGRIT(intervals=4, coarse_parts=1, min_coarse=1, tol=1e-12),
    "V": MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, tol=1e-12, max_iter=4),
}


def training(comm, mgrit):
    """All weights after some updates, and the objectives on the way."""
    cube, truth = scene(8, 9)
    labeled = truth.reshape(-1) > 0
    spectra = torch.from_numpy(cube.reshape(-1, cube.shape[2])[labeled].astype(float)).T
    problem = Problem(
        features=(spectra - spectra.mean(1, keepdim=True)) / spectra.std(1, keepdim=True),
        labels=torch.from_numpy(truth.reshape(-1)[labeled].astype(int)) - 1,
        num_classes=4,
        architecture=DenseResNetOptions(width=WIDTH),
        regularization=Regularization(),
        forward=mgrit,
        adjoint=mgrit,
        comm=comm,
    )
    options = NestedOptions(refinements=0, updates=(UPDATES,))
    optim = OneShotOptions(boost_updates=0, memory=4)
    scales = InitialScales(opening=0.3, layers=1e-2, classification=1e-2)
    run = NestedIteration(problem, LAYERS, options=options, one_shot=optim, scales=scales)
    objectives = [record.evaluation.value for record in run.run()]
    return objectives, gathered(run.network, run.weights)


@cache
def serial():
    return training(SerialCommunicator(), SEQUENTIAL)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("cycle", CYCLES)
def test_layer_parallel_training_is_the_serial_one(spmd, cycle):
    results = spmd(lambda comm: training(comm, CYCLES[cycle]))
    expected, weights = serial()
    assert len(expected) == UPDATES + 1 and expected[-1] < 0.5 * expected[0]
    for objectives, found in results:
        assert objectives == pytest.approx(expected, rel=1e-8)
        for name, rows in weights.items():
            assert (found[name] - rows).norm() <= 1e-8 * rows.norm(), name


@pytest.mark.parametrize("width", [64, 65, 220])
def test_wide_layers_are_left_to_torch(monkeypatch, width):
    native = pytest.importorskip("xbraid_py.kernels.native", reason="no native kernels in this installation")
    monkeypatch.setattr(kernels, "implementation", native)
    called = []
    for name in ("relax", "relax_adjoint"):
        own = getattr(fallback, name)
        monkeypatch.setattr(
            fallback, name, lambda *args, own=own, name=name, **how: called.append(name) or own(*args, **how)
        )
    layer = DenseLayer(width, width)
    theta = torch.rand(2, layer.num_parameters, dtype=torch.float64) / width
    points, states = torch.rand(1, width, 5, dtype=torch.float64), torch.empty(2, width, 5, dtype=torch.float64)
    kernels.relax(layer, theta, points, 2, h=0.1, inputs=states)
    kernels.relax_adjoint(layer, theta, states, points, 2, h=0.1, gradient=torch.empty_like(theta))
    assert called == (["relax", "relax_adjoint"] if width > native.max_width() else [])
