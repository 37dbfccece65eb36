"""B-splines in depth: against the recursion of Cox and de Boor, free weights exactly, knot insertion."""

from __future__ import annotations

import re

import numpy as np
import pytest
import reference as ref
import torch
from spline_cases import CASES, matrix, middles

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.splines import SplineLayers, Splines
from xbraid_py.mgrit.grid import LayerGrid


@pytest.mark.parametrize("case", CASES)
def test_basis_is_that_of_the_recursion(case):
    splines = CASES[case]
    # Inside, on knots and at the ends.
    times = sorted({0.0, 1.0, *splines.breaks, *middles(16), *np.linspace(0.0, 1.0, 23)})
    found, expected = splines.matrix(times), matrix(splines, times)
    assert (found - expected).abs().max() < 1e-14
    assert (expected.sum(1) - 1).abs().max() < 1e-14, "the functions add up to 1"
    numbers, values = splines.band(times)
    assert numbers.shape == values.shape == (len(times), splines.degree + 1)
    assert (numbers.diff(dim=1) == 1).all() and numbers.min() == 0 and numbers.max() == splines.num - 1
    rows = ref.random(splines.num, 6, seed=1)
    torch.testing.assert_close(splines.rows(times, rows), expected @ rows, rtol=0, atol=1e-14)
    assert splines.matrix([]).shape == (0, splines.num) and splines.rows([], rows).shape == (0, 6)


@pytest.mark.parametrize("num_layers", [4, 5, 17, 64, 200])
@pytest.mark.parametrize("degree", range(4))
def test_as_many_functions_as_layers_reproduce_free_weights(degree, num_layers):
    splines, times = Splines(num_layers, degree, "centered"), LayerGrid(num_layers, 5.0).middles()
    free = ref.random(num_layers, 9, seed=num_layers)
    found = splines.rows(times, splines.fit(times, free))
    assert (found - free).abs().max() < 1e-13 * free.abs().max()
    assert np.linalg.cond(splines.matrix(times).numpy()) < 11
    uniform = Splines(num_layers, degree)
    assert uniform.matrix(times).diagonal().min() > 0, "what makes the matrix regular (Schoenberg and Whitney)"
    if degree == 0:
        assert torch.equal(splines.matrix(times), torch.eye(num_layers, dtype=torch.float64))
        assert torch.equal(uniform.rows(times, free), free)
    elif degree == 1 or num_layers < 20:
        assert (uniform.rows(times, uniform.fit(times, free)) - free).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_refined_splines_hold_the_same_functions(case):
    splines, times = CASES[case], np.linspace(0.0, 1.0, 101)
    rows = ref.random(splines.num, 3, seed=2)
    fine = splines.refine()
    assert fine.num == 2 * (splines.num - splines.degree) + splines.degree and fine.coarsen().breaks == splines.breaks
    for other in (fine, fine.refine()):
        again = splines.insertion(other) @ rows
        assert (matrix(other, times) @ again - matrix(splines, times) @ rows).abs().max() < 1e-14
    assert (splines.insertion(splines) - torch.eye(splines.num)).abs().max() < 1e-14


@pytest.mark.parametrize("grid", [LayerGrid(6, 2.0), LayerGrid.of_lengths((1, 2, 1, 4), 3.0)])
def test_middles_of_steps(grid):
    sizes = grid.sizes()
    expected = [(sum(sizes[:n]) + sizes[n] / 2) / grid.T for n in range(len(sizes))]
    assert grid.middles() == pytest.approx(expected, rel=1e-15)
    assert grid.middles(1, 2) == grid.middles()[1:3] and grid.middles(2, 0) == []


@pytest.mark.parametrize("case", CASES)
def test_sums_are_the_transposed_map(spmd, case):
    """Seven layers of different sizes, of which some ranks have none; with the same bits wherever the layers are."""
    splines, grid = CASES[case], LayerGrid.of_lengths((1, 2, 1, 4, 4, 1, 2), 3.0)
    gradient, coefficients = ref.random(7, 5, seed=3), ref.random(splines.num, 5, seed=4)
    dense = matrix(splines, grid.middles())

    def body(comm):
        bounds = {1: (0, 7), 2: (0, 3, 7), 3: (0, 4, 4, 7), 5: (0, 2, 2, 5, 7, 7)}.get(comm.size)
        partition = Partition(bounds) if bounds else Partition.balanced(7, comm.size)
        here = slice(*partition.bounds[comm.rank : comm.rank + 2])
        layers = SplineLayers(splines, grid, partition, comm)
        return layers.sums(gradient[here]), layers.layers(coefficients)

    parts = spmd(body)
    sums = parts[0][0]
    assert all(other is None for other, _ in parts[1:])
    assert (sums - dense.T @ gradient).abs().max() < 1e-13
    rows = torch.cat([part[1] for part in parts])
    assert (rows - dense @ coefficients).abs().max() < 1e-13
    alone = SplineLayers(splines, grid, Partition((0, 7)), SerialCommunicator())
    assert torch.equal(alone.sums(gradient), sums) and torch.equal(alone.layers(coefficients), rows)


def test_sums_in_portions_are_the_same(monkeypatch):
    splines, partition = Splines(6, 3), Partition((0, 40))
    gradient = ref.random(40, 5, seed=3)
    layers = SplineLayers(splines, LayerGrid(40, 1.0), partition, SerialCommunicator())
    expected = layers.sums(gradient)
    monkeypatch.setattr("xbraid_py.layers.splines._AT_ONCE", 60)
    assert torch.equal(layers.sums(gradient), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num=3, degree=3), ValueError, "num=3 must be at least 4, one more than degree=3; use 8"),
        (dict(num=8.0), TypeError, "num=8.0 must be a whole number; use 8"),
        (dict(num=True, degree=0), TypeError, "num=True must be a whole number; use 8"),
        (dict(num=8, degree="3"), TypeError, "degree='3' must be a whole number; use 3"),
        (dict(num=8, degree=4), ValueError, "degree=4 must be 0, 1, 2 or 3; use 3"),
        (dict(num=8, degree=-1), ValueError, "degree=-1 must be 0, 1, 2 or 3; use 3"),
        (dict(num=8, knots="even"), ValueError, "knots='even' must be uniform, centered or a list of numbers; use"),
        (
            dict(num=4, degree=1, knots=(0.0, 0.5, 0.5, 1.0)),
            ValueError,
            "knots=[0.0, 0.5, 0.5, 1.0] must be num - degree + 1 = 4 numbers that rise from 0 to 1; "
            "use [0.0, 0.333, 0.667, 1.0]",
        ),
        (dict(num=4, degree=1, knots=(0.0, 1.0)), ValueError, "knots=[0.0, 1.0] must be num - degree + 1 = 4 numbers"),
        (dict(num=3, degree=1, knots=(0.0, float("nan"), 1.0)), ValueError, "must be num - degree + 1 = 3 numbers"),
        (dict(num=3, degree=1, knots=(0.0, 0.5, 2.0)), ValueError, "must be num - degree + 1 = 3 numbers"),
    ],
)
def test_bad_options_name_what_works(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Splines(**options)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=re.escape("num=8 makes num - degree = 5 intervals, not a multiple of 2; use")):
        Splines(8, 3).coarsen()
    with pytest.raises(ValueError, match="intervals, not a multiple of 4; use 7$"):
        Splines(5, 3).coarsen(4)
    with pytest.raises(ValueError, match=r"^knots=0.25 is no knot of the fine splines, .*; use refine\(\)$"):
        Splines(7, 3).insertion(Splines(6, 3))
    with pytest.raises(ValueError, match="^fine degree=2 must be 3, as here"):
        Splines(7, 3).insertion(Splines(10, 2))
    for time in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"^times={time} must lie in 0 .. 1, as parts of the depth; use 0.5$"):
            Splines(7, 3).matrix([0.5, time])
    assert Splines(3, 1, [0, 0.5, 1]) == Splines(3, 1), "equal intervals are equal intervals"
