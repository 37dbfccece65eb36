"""Newton over the steps in benchmarks/newton.py: its solution is the sequential one, its adjoint that of autograd."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from processes import PROJECT

WIDTH, STEPS, BATCH, BLOCKS = 5, 12, 3, 4


@pytest.fixture
def newton(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("newton")


def chain_of(newton, kind: str):
    """Some steps, and what autograd shall differentiate by."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()

    if kind == "dense":
        weight, bias = random(STEPS, WIDTH, WIDTH), random(STEPS, WIDTH)
        return newton.Dense(weight, bias, 0.3), weight
    weight, bias = random(3 * WIDTH, WIDTH, scale=0.5), random(3 * WIDTH, scale=0.1)
    return newton.Gru(weight, bias, random(STEPS, BATCH, 3 * WIDTH)), bias


@pytest.mark.parametrize("how", ["full", "scan", "diagonal", "blocks"])
@pytest.mark.parametrize("kind", ["dense", "gru"])
def test_newton_finds_the_sequential_states(newton, kind, how):
    chain, _ = chain_of(newton, kind)
    start = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        exact = newton.sequential(chain, start)
        if how == "blocks":
            exact = exact[:: STEPS // BLOCKS]
        found = start.expand_as(exact)
        # After k iterations k states are exact, whatever the start.
        for _ in range(STEPS):
            if how == "blocks":
                found = newton.block_iteration(chain, found, BLOCKS)
            else:
                found = newton.iteration(chain, found, how)
    assert newton.relative(found, exact) < 1e-10


@pytest.mark.parametrize("kind", ["dense", "gru"])
def test_full_newton_needs_fewer_iterations_than_steps(newton, kind):
    chain, _ = chain_of(newton, kind)
    start = torch.zeros(BATCH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        exact = newton.sequential(chain, start)
        guess = start.expand_as(exact)
        full, diagonal = (
            newton.count(lambda v, how=how: newton.iteration(chain, v, how), guess, exact, STEPS)
            for how in ("full", "diagonal")
        )
    assert full[0] <= full[-1] < STEPS - 2
    assert full[-1] <= diagonal[-1]


@pytest.mark.parametrize("kind", ["dense", "gru"])
def test_the_adjoint_by_a_scan_is_that_of_autograd(newton, kind):
    chain, leaf = chain_of(newton, kind)
    start = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states = newton.sequential(chain, start)
    states[1:].square().sum().backward()
    with torch.no_grad():
        adjoints = newton.adjoint(chain, states[:-1], 2 * states[1:])
        slopes = chain.slopes(states[:-1], slice(None))
        found = chain.gradient(slopes, states[:-1], adjoints)
        if kind == "gru":
            found = found.sum((0, 1)).flatten()  # all steps have the same bias
    torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-10)


def test_the_scan_is_the_recurrence(newton):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(STEPS, BATCH, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    b = torch.randn(STEPS, BATCH, WIDTH, generator=generator, dtype=torch.float64)
    d, expected = torch.zeros(BATCH, WIDTH, dtype=torch.float64), []
    for n in range(STEPS):
        d = (a[n] @ d[..., None])[..., 0] + b[n]
        expected.append(d)
    torch.testing.assert_close(newton.scan(a, b), torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.job
@pytest.mark.long
def test_the_benchmark_runs(run_job):
    tiny = "--quick --widths=4 --counted=64 --depths=64 --hidden=4 --lengths=64 --batches=1,16 --ranks=1,4".split()
    done = run_job([PROJECT / "benchmarks" / "newton.py", *tiny], timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["figures"]
    assert found.keys() == {"gain_ranks", "gain_ranks_exact", "gain_gpu", "gain_gpu_exact"}
    assert all(math.isfinite(value) for value in found.values())
