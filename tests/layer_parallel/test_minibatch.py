"""Training on minibatches: against a literal loop, over ranks and replicas, and what all ranks refuse together."""

import math

import pytest
import torch
from blocks import linear
from refusal import refusal
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbraid_py import MGRIT, DenseBlock, LayerParallel, RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.updates import check_alike, evaluate, train
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.nn import Dropout
from xbraid_py.testing import run_threads

CONVERGED = MGRIT(cycle="V", cfactor=2, max_iter=8, min_coarse=2)


def batches(count=6, samples=7):
    """Inputs (samples, 3) and classes 0 .. 1."""
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(samples, 3, generator=random, dtype=torch.float64) for _ in range(count)]
    return [(each, (each.sum(1) > 0).long()) for each in inputs]


def model_on(comm, num_layers=8, **options):
    stack = LayerParallel(lambda: DenseBlock(4, "tanh"), num_layers, 2.0, comm, **options)
    return nn.Sequential(linear(3, 4, 2), stack, linear(4, 2, 3)).double()


def accuracy_of(logits, labels):
    return (logits.argmax(1) == labels).double().mean()


def plain_model():
    """The same network without a stack: weights in `layers`, one row each."""
    model = model_on(None)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}

    def predict(u):
        u = u @ weights["0.weight"].T + weights["0.bias"]
        for W, b in zip(weights["1.layers.weight"], weights["1.layers.bias"], strict=True):
            u = u + 2.0 / 8 * torch.tanh(u @ W.T + b)
        return u @ weights["2.weight"].T + weights["2.bias"]

    return weights, predict


def literal(clip=None, rates=(0.1,) * 6):
    """Losses, norms of gradients, and weights in the end, by the loop that everybody writes."""
    weights, predict = plain_model()
    optimizer = torch.optim.Adam(weights.values(), lr=rates[0])
    losses, norms = [], []
    for (inputs, targets), rate in zip(batches(), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(predict(inputs), targets)
        loss.backward()
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in weights.values())))
        if clip is not None and norms[-1] > clip:
            for p in weights.values():
                p.grad *= clip / norms[-1]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, {name: value.detach() for name, value in weights.items()}


def trained(comm, replicas=1, clip=None, halving=False, accumulate=1):
    """Rows, and the weights of all layers."""
    grid = ProcessGrid(comm, replicas)
    model = model_on(grid.layers, mgrit=CONVERGED)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if halving else None
    loss = nn.functional.cross_entropy
    how = {"scheduler": scheduler, "clip": clip, "grid": grid, "accumulate": accumulate}
    rows = list(train(model, batches(), loss, optimizer, **how))
    state = {name: value.tolist() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return rows, state


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.ranks(1, 3)
def test_the_same_as_a_literal_loop(spmd, clip, halving):
    losses, norms, weights = literal(clip, [0.1 * 0.5**k if halving else 0.1 for k in range(6)])
    assert min(norms) < 0.7 < max(norms), "the clipping would never, or always, take place"
    for rows, state in spmd(lambda comm: trained(comm, clip=clip, halving=halving)):
        assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
        assert [row["learning_rate"] for row in rows] == [0.1 * 0.5 ** (k * halving) for k in range(6)]
        assert [row["grad_norm"] for row in rows] == (pytest.approx(norms, rel=1e-8) if clip else [None] * 6)
        for name, value in weights.items():
            assert torch.allclose(torch.tensor(state[name], dtype=value.dtype), value, rtol=0, atol=1e-8), name


@pytest.mark.ranks(2, 4)
def test_replicas_share_out_a_batch(spmd):
    # 7 samples: the shares differ in their length.
    losses, _, weights = literal()
    for rows, state in spmd(lambda comm: trained(comm, replicas=comm.size if comm.size % 2 else 2)):
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
        for name, value in weights.items():
            assert torch.allclose(torch.tensor(state[name], dtype=value.dtype), value, rtol=0, atol=1e-8), name


@pytest.mark.parametrize(("replicas", "accumulate"), [(1, 3), (2, 2)])
@pytest.mark.ranks(1, 2)
def test_micro_batches_are_one_batch(spmd, replicas, accumulate):
    # 7 samples: neither shares nor micro-batches have the same length.
    losses, norms, weights = literal(clip=0.7)

    def body(comm):
        return trained(comm, replicas if comm.size % replicas == 0 else comm.size, 0.7, accumulate=accumulate)

    for rows, state in spmd(body):
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-9)
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-8)
        for name, value in weights.items():
            assert torch.allclose(torch.tensor(state[name], dtype=value.dtype), value, rtol=0, atol=1e-8), name


class Watched(nn.Linear):
    """A linear layer that notes what it is called with, and what it gives."""

    def forward(self, u):
        found = super().forward(u)
        self.calls = [*getattr(self, "calls", []), (len(u), found.dtype, self.training)]
        return found


@pytest.mark.ranks(1, 2)
def test_what_the_model_is_called_with(spmd):
    """Micro-batches one by one with masks of their own, in bfloat16; validations whole, in the type of the weights."""

    def body(comm):
        stack = LayerParallel(lambda: nn.Sequential(nn.Linear(3, 3), Dropout(0.5)), 4, 1.0, comm, mgrit=CONVERGED)
        with own_random_numbers(1):
            model = nn.Sequential(Watched(3, 3), stack)
        data = [(inputs.float(), targets) for inputs, targets in batches(2)]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = nn.functional.cross_entropy
        rows = list(train(model, data, loss, optimizer, accumulate=2, autocast=torch.bfloat16))
        evaluate(model, data[:1], loss)
        return model[0].calls, stack.solver_state()["draws"], [row["loss"] for row in rows]

    wanted = [(samples, torch.bfloat16, True) for samples in (4, 3, 4, 3)] + [(7, torch.float32, False)]
    results = spmd(body)
    for calls, draws, losses in results:
        assert calls == wanted and draws == 4 and losses == pytest.approx(results[0][2], rel=1e-3)


@pytest.mark.ranks(1, 3)
def test_averaged_weights(spmd):
    def body(comm):
        model = model_on(comm, mgrit=CONVERGED)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        wanted: dict[str, torch.Tensor] = {}
        for _ in train(model, batches(), nn.functional.cross_entropy, optimizer, average=average):
            for name, value in model.state_dict().items():
                if isinstance(value, torch.Tensor):
                    before = wanted.get(name, value)
                    wanted[name] = 0.75 * before + 0.25 * value
        found = average.module.state_dict()
        return all(torch.allclose(found[name], value, rtol=0, atol=1e-14) for name, value in wanted.items())

    results = spmd(body)
    assert results == [True] * len(results)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.ranks(2)
def test_evaluation_counts_every_sample_once(spmd, replicas):
    parts = [*batches(2), *batches(1, 3)]
    _, predict = plain_model()
    right = sum(int((predict(inputs).argmax(1) == targets).sum()) for inputs, targets in parts)

    def body(comm):
        grid = ProcessGrid(comm, comm.size if comm.size % replicas else replicas)
        model = model_on(grid.layers)
        found = evaluate(model, parts, accuracy_of, grid)
        return found, model.training, evaluate(model.eval(), parts, accuracy_of, grid) == found, model.training

    results = spmd(body)
    assert results == [(right / 17, True, True, False)] * len(results)


def test_an_evaluation_without_batches_is_refused():
    with pytest.raises(ValueError, match="batches is empty; use at least one batch"):
        evaluate(model_on(None), [], accuracy_of)


@pytest.mark.ranks(1, 2)
def test_a_loss_of_nan_ends_the_run_on_all_ranks(spmd):
    def body(comm):
        model = model_on(comm)
        data = batches(3)
        data[1][0][4, 2] = math.nan
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = train(model, data, nn.functional.cross_entropy, optimizer)
        next(rows)
        kept = [p.detach().clone() for p in model.parameters()]
        said = refusal(RunError, next, rows)
        return said, all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))

    for message, unchanged in spmd(body):
        assert message.startswith("update 2: the loss is nan; use") and unchanged


def test_a_model_without_stacks():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    rows = list(train(model, batches(2), nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert [(row["stacks"], row["state_residual"], row["telling"]) for row in rows] == [([], None, False)] * 2
    assert rows[1]["seconds"] >= rows[0]["seconds"] > 0


@pytest.mark.parametrize(("replicas", "part"), [(1, "0.weight"), (2, "1.layers.weight"), (2, "2.bias")])
def test_ranks_with_different_models_are_refused(replicas, part):
    """As when no seed was set before the model was built."""

    def body(comm):
        grid = ProcessGrid(comm, replicas)
        model = model_on(grid.layers)
        with torch.no_grad():
            model.get_parameter(part).add_(float(comm.rank))
        with pytest.raises(ValueError, match=f"^{part} is not the same on ranks 0 and 1; draw it from one seed"):
            check_alike(model, comm)
        check_alike(model_on(grid.layers), comm)

    run_threads(2, body)
