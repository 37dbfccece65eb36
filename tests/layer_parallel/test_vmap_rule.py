"""Which stacks evaluate their intervals in one call, by default: a rule, and so the same bits in every run."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, UNCHECKED, C, Case, gradients, loss_of
from torch import nn

from xbraid_py import MGRIT, LayerGrid
from xbraid_py.layer_parallel.window import LEAST_INTERVALS, MOST_NUMBERS, MOST_WEIGHTS

K = LEAST_INTERVALS
WIDE = 1 + int(MOST_WEIGHTS**0.5)


def linear(width: int) -> Case:
    return Case(lambda: nn.Linear(width, width), (2, width))


# Case, intervals, samples of the input, and what is chosen.
CHOICES = {
    "small": (CASES["mlp"], K, 6, True),
    "convolution": (CASES["convolution"], K, 6, True),
    "two intervals more": (CASES["mlp"], K + 2, 6, True),
    "few intervals": (CASES["mlp"], K - 1, 6, False),
    "as large as may be": (CASES["mlp"], K, MOST_NUMBERS // C, True),
    "a large state": (CASES["mlp"], K, MOST_NUMBERS // C + 1, False),
    "some weights": (linear(WIDE - 2), K, 2, True),
    "many weights": (linear(WIDE), K, 2, False),
    "no batched form": (CASES["attention"], K, 6, False),
    "masks": (CASES["dropout"], K, 6, False),
    "native kernels": (CASES["dense"], K, 6, False),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_is_the_same_on_any_number_of_ranks(spmd, name):
    case, intervals, samples, wanted = CHOICES[name]

    def body(comm):
        stack = case.stack(comm, 2 * intervals, solve="lagged", vmap=None)
        return stack.windows[0].vmaps(case.input(batch=samples))

    assert all(found is wanted for found in spmd(body))


def test_exact_propagation_and_what_is_asked_for():
    u = CASES["mlp"].input()
    assert not CASES["mlp"].stack(None, 2 * K, solve="exact", vmap=None).windows[0].vmaps(u)
    for vmap in (False, True):
        assert CASES["mlp"].stack(None, 4, solve="lagged", vmap=vmap).windows[0].vmaps(u) is vmap
    assert not CASES["dropout"].stack(None, 4, solve="lagged", vmap=True).windows[0].vmaps(u)
    grid = LayerGrid(2 * K, 2.0, (1, 2) * K)
    assert CASES["mlp"].stack(None, grid, solve="lagged", vmap=None).windows[0].vmaps(u)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_two_runs_give_the_same_bits(spmd, name, windows):
    """For inputs of several shapes; those that the choice gives when it is asked for."""
    case = CASES[name]
    rough = MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, max_iter=1)

    def run(comm, vmap):
        stack = case.stack(comm, 2 * K * windows, mgrit=rough, accuracy=UNCHECKED, vmap=vmap, windows=windows)
        optimizer = torch.optim.SGD(stack.parameters(), 0.1)
        found = []
        for batch in (6, 3, 6):
            optimizer.zero_grad()
            output = stack(case.input(batch=batch))
            loss_of(output).backward()
            optimizer.step()
            found += [output.detach(), *gradients(stack).values()]
        return found

    for first, second, wanted in spmd(lambda comm: [run(comm, vmap) for vmap in (None, None, name == "mlp")]):
        assert all(a.equal(b) and a.equal(c) for a, b, c in zip(first, second, wanted, strict=True))
