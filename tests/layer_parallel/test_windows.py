"""Window by window: the same network as one stack, with states and graphs of one window in memory.

Shape letters: `N` layers, `W` windows.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from blocks import (
    CASES,
    SOLVES,
    UNCHECKED,
    C,
    Case,
    are_the_same,
    copied,
    distance,
    gradients,
    linear,
    loss_of,
    reduced,
    run_updates,
    unstacked,
)
from normed import SHAPES, Normed
from torch import nn

import xbraid_py
from xbraid_py import (
    MGRIT,
    GradientControl,
    LayerGrid,
    LayerParallel,
    broadcast_loss,
    clip_grad_norm_,
    to_sequential,
)

T = 2.0
ALL = {**CASES, "moving": Case(Normed, SHAPES[1])}


def windowed(case: Case, comm, num_layers: int, windows: int, solve: str = "V", **options):
    defaults = {"mgrit": SOLVES[solve], "accuracy": UNCHECKED, "vmap": False}
    return LayerParallel(case.block, num_layers, T, comm, windows=windows, **{**defaults, **options})


@pytest.mark.parametrize(
    ("block", "num_layers", "windows", "solve", "recompute"),
    [
        ("dense", 12, 2, "one-shot 3", False),
        ("dropout", 18, 4, "V", True),
        ("moving", 18, 3, "V", False),
        ("convolution", 8, 2, "lagged", False),
        ("mlp", 7, 3, "default", True),
    ],
)
def test_converged_windows_equal_one_stack(spmd, block, num_layers, windows, solve, recompute):
    case = ALL[block]
    options = {"mgrit": MGRIT(intervals=2, tol=0.0)} if solve == "default" else {"solve": solve}

    def body(comm):
        return run_updates(windowed(case, comm, num_layers, windows, recompute=recompute, **options), case)

    exact = run_updates(case.stack(None, num_layers, T, "exact"), case)
    for found in spmd(body):
        are_the_same(found, exact)


@pytest.mark.parametrize("block", ["dropout", "moving"])
@pytest.mark.parametrize("windows", [4, 11])
def test_exact_windows_are_bitwise_one_stack(spmd, block, windows):
    """2 / 11, times 3 layers, divided by 3 is another number; with 5 ranks some have no layer of a window."""
    case = ALL[block]
    exact = run_updates(case.stack(None, 11, T, "exact"), case)
    for found in spmd(lambda comm: run_updates(windowed(case, comm, 11, windows, "exact"), case)):
        for mine, wanted in zip(found, exact, strict=True):
            assert mine["output"].equal(wanted["output"]) and mine["input"].equal(wanted["input"])
            for key in ("weights", "state"):
                assert all(mine[key][name].equal(value) for name, value in wanted[key].items())


def test_windows_of_a_grid_with_steps_of_several_lengths(spmd):
    case = CASES["mlp"]
    grid = LayerGrid(12, T, (1, 2, 3, 1, 1, 2, 4, 1, 1, 1, 2, 3))

    def body(comm):
        model = LayerParallel(case.block, grid, comm=comm, windows=2, mgrit=SOLVES["V"], accuracy=UNCHECKED, vmap=False)
        return run_updates(model, case)

    exact = run_updates(LayerParallel(case.block, grid, mgrit=SOLVES["exact"]), case)
    for found in spmd(body):
        for mine, wanted in zip(found, exact, strict=True):
            assert all(distance(mine[key], wanted[key]) < 1e-10 for key in ("output", "input", "weights", "state"))


@pytest.mark.parametrize(("recompute", "check"), [("states", 0), ("all", 2)])
@pytest.mark.parametrize("block", ["dense", "dropout", "moving"])
def test_a_stack_that_solves_for_its_states_again(spmd, block, recompute, check):
    """Rough solves, measured gradients or not, a retained graph: the same bits as with everything kept."""
    case = ALL[block]
    rough = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1)

    def body(comm):
        found = []
        for how in (recompute == "all", recompute):
            accuracy = GradientControl(check=check, adapt=False)
            stack = case.stack(comm, 9, T, mgrit=rough, accuracy=accuracy, recompute=how, vmap=False)
            u = case.input().requires_grad_()
            losses = [loss_of(stack(u)), loss_of(stack(2.0 * u))]
            losses[1].backward(retain_graph=True)
            losses[0].backward()
            losses[1].backward()
            found.append((gradients(stack), u.grad, [loss.item() for loss in losses], copied(stack.state_dict())))
        return found

    for kept, again in spmd(body):
        assert kept[2] == again[2] and kept[1].equal(again[1])
        for place in (0, 3):
            assert all(kept[place][name].equal(value) for name, value in again[place].items())


class Watched(nn.Module):
    """Remembers who holds its outputs."""

    seen: list = []

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        found = torch.tanh(self.linear(u))
        if u.requires_grad:
            Watched.seen.append(weakref.ref(found))
        return found


def alive() -> int:
    return sum(ref() is not None for ref in Watched.seen)


@pytest.mark.parametrize("windows", [1, 4])
def test_no_layer_is_kept_between_the_passes(windows):
    """Outputs of layers with a graph: none behind the forward pass, those of one window during the backward pass."""
    case = Case(Watched, CASES["mlp"].shape)
    Watched.seen.clear()
    model = windowed(case, None, 12, windows, "exact", recompute="states")
    most = []
    for window in model.windows:
        window.layers.get_parameter("linear.weight").register_hook(lambda gradient: most.append(alive()))
    loss = loss_of(model(case.input()))
    # The first call tries the block, once, with a graph.
    assert alive() == 0, "no graph is left"
    Watched.seen.clear()
    loss.backward()
    assert len(Watched.seen) == 12 and max(most) <= 12 // windows and alive() == 0


def test_inputs_of_windows_are_kept_by_the_ranks_in_turns(spmd):
    """What is held between the passes: each window's input on one rank, and elsewhere not one number of it."""
    case = CASES["mlp"]
    windows = 5

    def body(comm):
        model = windowed(case, comm, 15, windows)
        loss = loss_of(model(case.input().requires_grad_()))
        node, held = loss.grad_fn, []
        while node is not None:
            if getattr(node, "run", None) is not None:
                held.append(node.run.start.untyped_storage().nbytes() == case.input().untyped_storage().nbytes())
                assert node.run.forward is None and node.u.untyped_storage().nbytes() == 8
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            node = parents[0] if parents else None
        loss.backward()
        return held[::-1]

    results = spmd(body)
    for rank, held in enumerate(results):
        assert held == [w % len(results) == rank for w in range(windows)]


def test_state_goes_from_any_number_of_windows_to_any_other(spmd):
    case = ALL["moving"]

    def body(comm):
        models = [case.stack(comm, 12, T, "V", seed=1)]
        models += [windowed(case, comm, 12, w, seed=1) for w in (1, 2, 4)]
        states = [copied(model.state_dict()) for model in models]
        first = all(state[name].equal(value) for state in states for name, value in states[0].items())
        run_updates(models[2], case)
        trained = copied(nn.Sequential(models[2]).state_dict())
        found = []
        for model in (models[0], models[3]):
            around = nn.Sequential(model)
            loaded = around.load_state_dict(trained)
            assert not loaded.missing_keys and not loaded.unexpected_keys
            model.load_solver_state(models[2].solver_state())
            found.append(model(case.input(7)).detach())
            found.append(
                all(around.state_dict()[name].equal(value) for name, value in trained.items() if "map" in name)
            )
        models[2].load_solver_state(models[3].solver_state())
        shorter = case.stack(comm, 9).state_dict()
        return first, found, reduced(comm, lambda: models[3].load_state_dict(shorter)), list(trained)

    for first, (one, same, four, alike), message, names in spmd(body):
        assert first, "initial weights"
        assert same and alike and distance(four, one) < 1e-10
        assert "layers.map.weight has 9 layers, the windows have 12" in message
        assert "0.layers.map.weight" in names and not any("windows" in name for name in names)


@pytest.mark.parametrize("output", ["all", "last"])
def test_around_windows(spmd, output):
    """An opening and a head, clipped gradients or the loss of the last rank, evaluation and the plain form."""
    case = CASES["mlp"]

    def made(middle):
        return nn.Sequential(linear(C, C, 1), middle, linear(C, 2, 2))

    def body(comm):
        windows = windowed(case, comm, 12, 3, "lagged", output=output)
        model = made(windows)
        state = copied(windows.state_dict())
        loss = loss_of(model(case.input()))
        loss = broadcast_loss(loss, comm, windows.last_rank) if output == "last" else loss
        loss.backward()
        norm = clip_grad_norm_(model, 1e9) if output == "all" else None
        plain = to_sequential(model)
        with torch.no_grad():
            ends = [part.eval()(case.input()) for part in (model, plain)]
        own = gradients(windows)
        return (
            state,
            loss.item(),
            norm,
            own,
            model[0].weight.grad,
            (windows.first_rank, windows.last_rank),
            ends,
            len(plain[1]),
        )

    results = spmd(body)
    modules = unstacked(results[0][0], case)
    exact = made(nn.Sequential(*(xbraid_py.ResidualStep(module, T / 12) for module in modules)))
    loss = loss_of(exact(case.input()))
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()]).norm().item()
    slopes = {
        name: torch.stack([dict(module.named_parameters())[name].grad for module in modules])
        for name in dict(modules[0].named_parameters())
    }
    for rank, (_, value, norm, own, opening, (first, last), (mine, plain), steps) in enumerate(results):
        assert value == pytest.approx(loss.item(), rel=1e-12) and steps == 12
        assert norm is None or norm == pytest.approx(wanted, rel=1e-12)
        assert distance(own, slopes) < 1e-10
        if output == "all" or rank == first:
            assert distance(opening, exact[0].weight.grad) < 1e-10
        if output == "all" or rank == last:
            assert distance(plain, mine) < 1e-12
