"""Layers cut in the middle of a training: the same function in time, on any number of ranks, optimizers along.

Shape letters: `N` layers.
"""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, UNCHECKED, Case, distance, gradients, linear, loss_of
from blocks import reduced as message_of
from normed import SHAPES, Normed
from torch import nn

from xbraid_py import MGRIT, LayerGrid, LayerParallel, Splines, refine_depth

ALL = {**CASES, "moving": Case(Normed, SHAPES[1])}
EXACT = {"mgrit": MGRIT(max_levels=1), "accuracy": UNCHECKED}
T = 2.0
KINDS = {
    "mlp": ("mlp", 6, {}),
    "dense": ("dense", 6, {}),
    "moving": ("moving", 4, {}),
    "dropout": ("dropout", 4, {"seed": 3}),
    "windows": ("mlp", 6, {"windows": 2}),
    "ends": ("mlp", 6, {"serial_ends": (1, 2)}),
    "lengths": ("mlp", LayerGrid.of_lengths((1, 2, 1, 3), T), {}),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_statistics_and_the_rest_are_those_of_the_layers_cut(spmd, kind, factor):
    name, grid, options = KINDS[kind]

    def body(comm):
        stack = ALL[name].stack(comm, grid, T, **{**EXACT, **options})
        loss_of(stack(ALL[name].input())).backward()
        coarse = stack.state_dict()
        fine = refine_depth(stack, factor=factor)
        output = fine(ALL[name].input())
        loss_of(output).backward()
        return coarse, fine.state_dict(), fine.grid, stack.grid, fine.solver_state()["draws"], fine.cut.serial_ends

    for coarse, fine, grid, before, draws, ends in spmd(body):
        assert grid == before.refine(factor) and draws == 2
        assert ends == tuple(factor * count for count in options.get("serial_ends", (0, 0)))
        assert coarse.keys() == fine.keys()
        for key, rows in coarse.items():
            if "running" not in key and "num_batches" not in key:  # which have moved since
                assert torch.equal(fine[key], rows.repeat_interleave(factor, 0))


@pytest.mark.ranks(1, 2, 3)
def test_the_function_converges_with_the_step(spmd):
    """Of first order in the step: the network before is Euler's rule on a grid of half as many steps."""

    def body(comm):
        stack = CASES["mlp"].stack(comm, 4, T, **EXACT)
        with torch.no_grad():
            ends = [stack(CASES["mlp"].input())]
            for _ in range(4):
                stack = refine_depth(stack)
                ends.append(stack(CASES["mlp"].input()))
        return [float((a - b).norm()) for a, b in zip(ends, ends[1:], strict=False)]

    for steps in spmd(body):
        assert all(0.4 < fine / coarse < 0.6 for coarse, fine in zip(steps[1:], steps[2:], strict=False))


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"momentum_buffer": 1}),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True), {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 0.01), {"square_avg": 2}),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_an_optimizer_goes_on(spmd, which):
    make, powers = OPTIMIZERS[which]

    def body(comm):
        model = nn.Sequential(CASES["mlp"].stack(comm, 6, T, **EXACT), linear(4, 2, 1))
        groups = [{"params": list(model[0].parameters()), "lr": 0.02}, {"params": list(model[1].parameters())}]
        optimizer = make(groups)
        for update in range(3):
            optimizer.zero_grad()
            loss_of(model(CASES["mlp"].input(update))).backward()
            optimizer.step()
        names = [name for name, _ in model.named_parameters()]

        def kept(key):
            layers = model[0].layers
            return {name: layers.gathered(optimizer.state[p][key]).clone() for name, p in layers.named_parameters()}

        before = {key: kept(key) for key in powers}
        assert refine_depth(model, optimizer) is model
        after = {key: kept(key) for key in powers}
        have = {id(p) for group in optimizer.param_groups for p in group["params"]}
        loss = []
        for _ in range(3):
            optimizer.zero_grad()
            loss.append(loss_of(model(CASES["mlp"].input(0))))
            loss[-1].backward()
            optimizer.step()
        return (
            before,
            after,
            names,
            have == {id(p) for p in model.parameters()},
            optimizer.param_groups[0]["lr"],
            [each.item() for each in loss],
        )

    results = spmd(body)
    for before, after, _, is_whole, rate, losses in results:
        assert is_whole and rate == 0.02
        assert losses == pytest.approx(results[0][-1], rel=1e-12)
        for key, power in powers.items():
            for name, rows in before[key].items():
                assert torch.equal(after[key][name], rows.repeat_interleave(2, 0) / 2**power)


@pytest.mark.ranks(1, 2)
def test_moments_are_those_of_gradients_of_the_layers_cut(spmd):
    """As the step goes to 0 the gradient of a layer is the sum of those of the layers it is cut into, equal ones."""

    def body(comm):
        stack = CASES["mlp"].stack(comm, 8, 1e-4, **EXACT)
        found = []
        for _ in range(2):
            stack.zero_grad()
            loss_of(stack(CASES["mlp"].input())).backward()
            found.append(gradients(stack))
            stack = refine_depth(stack)
        return found

    for coarse, fine in spmd(body):
        assert distance(fine, {name: rows.repeat_interleave(2, 0) / 2 for name, rows in coarse.items()}) < 1e-3


@pytest.mark.ranks(1, 2)
def test_coefficients_of_splines_stay(spmd):
    def body(comm):
        stack = CASES["mlp"].stack(comm, 8, T, splines=Splines(4), **EXACT)
        optimizer = torch.optim.Adam(stack.parameters())
        loss_of(stack(CASES["mlp"].input())).backward()
        optimizer.step()
        before = {name: value.clone() for name, value in stack.state_dict().items()}
        moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
        fine = refine_depth(stack, optimizer)
        after = [optimizer.state[p]["exp_avg"] for p in fine.parameters()]
        return before, fine.state_dict(), fine.grid.num_layers, moments, after

    for before, after, num_layers, moments, kept in spmd(body):
        assert num_layers == 16
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))


@pytest.mark.ranks(1, 2)
def test_what_is_refused(spmd):
    class Keeps(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["strange"] = torch.zeros_like(p)

    def body(comm):
        stack = CASES["mlp"].stack(comm, 9, T)
        optimizer = Keeps(stack.parameters(), 0.1)
        optimizer.step()
        maps = LayerParallel(lambda: nn.Linear(4, 4), 8, comm=comm, form="map")
        return [
            message_of(comm, lambda: refine_depth(stack, factor=1)),
            message_of(comm, lambda: refine_depth(nn.Linear(2, 2))),
            message_of(comm, lambda: refine_depth(maps)),
            message_of(comm, lambda: refine_depth(stack, optimizer)),
            message_of(comm, lambda: refine_depth(CASES["mlp"].stack(comm, 5, T, windows=2, **EXACT))),
        ]

    for found in spmd(body):
        words = (
            "factor=1 must be",
            "holds no LayerParallel",
            "form='map'",
            "keeps 'strange'",
            "of num_layers=5 would cut",
        )
        assert all(word in message for word, message in zip(words, found, strict=True))
