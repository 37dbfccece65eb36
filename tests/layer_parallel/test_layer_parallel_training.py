"""Training loops with stacks in them: the weights of the loop over modules, update by update, on any grid of ranks."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from blocks import CASES, C, Case, Convolution, distance, linear, loop, unstacked
from torch import nn

from xbraid_py import broadcast_loss, clip_grad_norm_
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.module_block import own_random_numbers

RANKS = pytest.mark.ranks(1, 2, 3)
FEATURES, CLASSES, T = 3, 2, 2.0


class Loop(nn.Module):
    """The reference of a stack: modules, one for each layer."""

    def __init__(self, modules: nn.ModuleList):
        super().__init__()
        self.steps = modules

    def forward(self, u):
        return loop(self.steps, u, T)


def batch(update: int, samples: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Other samples in every update."""
    features = ref.random(samples, FEATURES, seed=100 + update)
    return features, (features.sum(1) > 0).long()


def network(middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(linear(FEATURES, C, seed=1), nn.Tanh(), middle, linear(C, CLASSES, seed=2))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.02), None


def sgd(parameters):
    optimizer = torch.optim.SGD(parameters, 0.2, momentum=0.9, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def train(model, make_optimizer, updates: int, clip=None, loss_of=None, grid: ProcessGrid | None = None) -> list[float]:
    """The losses of the updates."""
    optimizer, scheduler = make_optimizer(model.parameters())
    found = []
    for update in range(updates):
        features, labels = batch(update) if grid is None else grid.shard(batch(update))
        loss = nn.functional.cross_entropy(model(features), labels)
        loss = loss_of(loss) if loss_of else loss
        optimizer.zero_grad()
        loss.backward()
        if grid is not None:
            grid.average_gradients(model, samples=len(labels))
        if clip is not None:
            clip(model)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(loss.item())
    return found


def weights(model: nn.Sequential) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def reference_run(case: Case, start: dict, make_optimizer, updates: int, clip=None) -> tuple[list[float], dict]:
    """The run of the loop over modules, weights named as those of a stack."""
    model = network(Loop(unstacked(start, case, "2.layers.")))
    losses = train(model, make_optimizer, updates, clip)
    found = {name: value for name, value in model.state_dict().items() if not name.startswith("2.")}
    for name in [name for name in start if name.startswith("2.")]:
        own = name.removeprefix("2.layers.")
        found[name] = torch.stack([dict(module.state_dict())[own] for module in model[2].steps])
    return losses, found


def same_run(found: tuple, exact: tuple, start: dict, bound: float = 1e-8) -> None:
    losses, after = exact
    assert losses[-1] < 0.8 * losses[0], "the run learns something"
    assert found[0] == pytest.approx(losses, rel=bound)
    for name, value in after.items():
        assert distance(found[1][name], value) < bound, name
        assert distance(start[name], value) > 1e-3, "the weights have moved"


@RANKS
@pytest.mark.parametrize(("block", "num_layers", "solve"), [("dense", 9, "V"), ("mlp", 6, "one-shot 3")])
def test_fifty_updates_of_adam(spmd, block, num_layers, solve):
    case = CASES[block]

    def body(comm):
        model = network(case.stack(comm, num_layers, T, solve))
        start = weights(model)
        return start, (train(model, adam, 50), weights(model))

    results = spmd(body)
    start = results[0][0]
    exact = reference_run(case, start, adam, 50)
    for _, found in results:
        same_run(found, exact, start)


@RANKS
@pytest.mark.parametrize("output", ["all", "last"])
def test_momentum_and_a_scheduler(spmd, output):
    """Clipped where every rank has the gradients of opening and head; elsewhere with the loss of the last rank."""
    case = CASES["dense"]
    clip = {"all": (lambda model: clip_grad_norm_(model, 0.3)), "last": None}[output]
    library = {"all": (lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3)), "last": None}[output]

    def body(comm):
        stack = case.stack(comm, 9, T, "V", output=output)
        model = network(stack)
        start = weights(model)

        def shared(loss):
            return loss if output == "all" else broadcast_loss(loss, comm, stack.last_rank)

        losses = train(model, sgd, 20, clip, shared)
        found = weights(model)
        # With "last" the opening is trained on the first rank, the head on the last one.
        for name, owner in (
            ("0.weight", stack.first_rank),
            ("0.bias", stack.first_rank),
            ("3.weight", stack.last_rank),
        ):
            found[name] = comm.bcast(found[name], owner)
        found["3.bias"] = comm.bcast(found["3.bias"], stack.last_rank)
        return start, (losses, found)

    results = spmd(body)
    start = results[0][0]
    exact = reference_run(case, start, sgd, 20, library)
    for _, found in results:
        # The library's clipping divides by the norm plus 1e-6.
        same_run(found, exact, start, 1e-8 if output == "last" else 1e-4)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize(("block", "num_layers"), [("dense", 9), ("mlp", 6)])
def test_two_replicas_equal_one_run_on_the_joined_batch(spmd, block, num_layers):
    case = CASES[block]

    def body(comm):
        if comm.size % 2:
            return None
        grid = ProcessGrid(comm, 2)
        model = network(case.stack(grid.layers, num_layers, T, "V"))
        grid.broadcast_parameters(model)
        start = weights(model)
        losses = train(model, adam, 50, None, None, grid)
        return start, (losses, weights(model))

    results = spmd(body)
    if results[0] is None:
        pytest.skip("two replicas need an even number of ranks")
    start = results[0][0]
    losses, after = reference_run(case, start, adam, 50)
    half = len(results) // 2
    # Shares of 4 and 3 samples.
    joined = [(4 * a + 3 * b) / 7 for a, b in zip(results[0][1][0], results[half][1][0], strict=True)]
    for _, (_, found) in results:
        same_run((joined, found), (losses, after), start)
        assert all(found[name].equal(value) for name, value in results[0][1][1].items()), "all replicas alike"


@RANKS
def test_several_stages_in_one_pipeline(spmd):
    """Convolutions; between the stages half the image and twice the channels."""
    images = ref.random(4, 1, 8, 6, seed=3)
    first, second = Case(lambda: Convolution(4), (4, 4, 8, 6)), Case(lambda: Convolution(8), (4, 8, 4, 3))

    def convolution(*shape, seed, **options):
        with own_random_numbers(seed):
            return nn.Conv2d(*shape, **options).double()

    def between(one, two):
        return nn.Sequential(
            convolution(1, 4, 3, padding=1, seed=1),
            one,
            nn.Sequential(nn.Tanh(), convolution(4, 8, 2, stride=2, seed=2)),
            two,
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(8, CLASSES, seed=3)),
        )

    def solved(model):
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 1, 0]))
        loss.backward()
        return loss.item()

    def body(comm):
        model = between(first.stack(comm, 9, T, "V"), second.stack(comm, 8, T, "lagged"))
        state = weights(model)
        loss = solved(model)
        of_layers = {
            f"{place}.layers.{name}": model[place].layers.gathered(p.grad)
            for place in (1, 3)
            for name, p in model[place].layers.named_parameters()
        }
        others = {name: p.grad for name, p in model.named_parameters() if ".layers." not in name}
        return state, loss, of_layers | others

    results = spmd(body)
    state = results[0][0]
    model = between(Loop(unstacked(state, first, "1.layers.")), Loop(unstacked(state, second, "3.layers.")))
    exact = solved(model)
    slopes = {name: p.grad for name, p in model.named_parameters()}
    for _, loss, found in results:
        assert loss == pytest.approx(exact, rel=1e-12)
        for name, value in found.items():
            if ".layers." in name:
                place, own = name.split(".layers.")
                wanted = torch.stack([slopes[f"{place}.steps.{n}.{own}"] for n in range(len(value))])
            else:
                wanted = slopes[name]
            assert distance(value, wanted) < 1e-10, name
