"""Groups, rates by depth and loss scales, against plain modules with a group for each layer and torch's own scaler."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, C, distance, linear, loop, loss_of, unstacked
from torch import nn

from xbraid_py import (
    MGRIT,
    GradScaler,
    LayerParallel,
    ParallelGRU,
    PipelineParallel,
    Splines,
    layer_lr,
    param_groups,
    to_sequential,
)

MLP, N, DECAY = CASES["mlp"], 9, 0.7
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.2),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_rates_by_depth_are_those_of_groups(spmd, which, windows):
    def body(comm):
        stack = MLP.stack(comm, N, solve="exact", windows=windows)
        first = {key: value.clone() for key, value in stack.state_dict().items()}
        optimizer = OPTIMIZERS[which](stack.parameters())
        handles = layer_lr(optimizer, nn.Sequential(stack), DECAY)
        for update in range(4):
            if update == 3:
                for handle in handles:
                    handle.remove()
            optimizer.zero_grad()
            loss_of(stack(MLP.input(update))).backward()
            optimizer.step()
        return first, stack.state_dict()

    results = spmd(body)
    modules = unstacked(results[0][0], MLP)
    optimizer = OPTIMIZERS[which]([{"params": list(module.parameters())} for module in modules])
    rate = optimizer.param_groups[0]["lr"]
    for update in range(4):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = rate * (DECAY ** (N - 1 - number) if update < 3 else 1.0)
        optimizer.zero_grad()
        loss_of(loop(modules, MLP.input(update))).backward()
        optimizer.step()
    wanted = [module.state_dict() for module in modules]
    for _, state in results:
        rows = {key: torch.stack([each[key.removeprefix("layers.")] for each in wanted]) for key in state}
        assert distance(state, rows) < 1e-12


def test_what_has_no_rates_by_depth():
    stack, splines = MLP.stack(None, N), MLP.stack(None, N, splines=Splines(4))
    sgd = torch.optim.SGD(stack.parameters(), 0.1)
    for optimizer, model, decay, message in [
        (sgd, stack, 1.5, "decay=1.5 must be above 0"),
        (sgd, nn.Linear(2, 2), 0.5, "model=Linear holds no LayerParallel"),
        (torch.optim.SGD(splines.parameters(), 0.1), splines, 0.5, "coefficients of splines belong to no layer"),
        (torch.optim.SGD(MLP.stack(None, N).parameters(), 0.1), stack, 0.5, "optimizer does not have"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_lr(optimizer, model, decay)


class Parts(nn.Module):
    """A bit of everything: in a stack a bias is a tensor of two axes, and so is what a norm has."""

    def __init__(self, comm, splines):
        super().__init__()
        self.tokens, self.gru = nn.Embedding(5, C), ParallelGRU(C, C, comm=comm)
        layer = lambda: nn.TransformerEncoderLayer(C, 2, 8, 0.0, norm_first=True)  # noqa: E731
        self.stack = LayerParallel(layer, N, 2.0, comm, form="map", splines=splines)
        self.windows = LayerParallel(
            lambda: nn.Sequential(nn.LayerNorm((2, C)), nn.Linear(C, C)), 4, comm=comm, windows=2
        )
        self.pipeline = PipelineParallel([nn.Linear(C, C), nn.LayerNorm(C), nn.Conv1d(2, 2, 1)], comm)
        self.scale = nn.Parameter(torch.ones(()))
        self.relative = nn.Parameter(torch.zeros(3, 2))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("splines", [None, Splines(4)])
def test_weight_decay_is_for_matrices_of_layers(spmd, splines):
    def body(comm):
        model = Parts(comm, splines)
        names = {id(p): name for name, p in model.named_parameters()}
        decayed, others = param_groups(model, 0.1)
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        torch.optim.AdamW([decayed, others])
        found = [[names[id(p)] for p in group["params"]] for group in (decayed, others)]
        assert sorted(sum(found, [])) == sorted(names.values())
        return found

    for rank, (decayed, others) in enumerate(spmd(body)):
        assert {name.split(".")[0] for name in decayed} - {"pipeline"} == {
            "tokens",
            "gru",
            "stack",
            "windows",
            "relative",
        }
        assert all(name.split(".")[-1].startswith(("weight", "in_proj_weight", "relative")) for name in decayed)
        assert not [name for name in decayed if "norm" in name or name in ("pipeline.layers.1.weight", "scale")]
        assert "windows.windows.0.layers.0.weight" in others, "a norm of two axes"
        assert {"scale", "gru.bias_ih_l0", "stack.layers.self_attn.in_proj_bias"} <= set(others)
        assert ("pipeline.layers.0.weight" in decayed) == (rank == 0)


def test_groups_are_those_of_the_plain_model():
    """The numbers of AdamW are those of the same groups of single layers."""
    model = nn.Sequential(MLP.stack(None, N), linear(C, 2, 1))
    plain = to_sequential(model)
    both = []
    for each in (model, plain):
        optimizer = torch.optim.AdamW(param_groups(each, 0.5), lr=0.1)
        loss_of(each(MLP.input(1))).backward()
        optimizer.step()
        both.append(each(MLP.input(2)).detach())
    assert distance(*both) < 1e-6
    with pytest.raises(ValueError, match="weight_decay=-1 must be at least 0 and finite"):
        param_groups(model, -1)


@pytest.mark.ranks(1, 2, 3)
def test_an_overflow_on_one_rank_is_one_of_all(spmd):
    """The gradient of the last layer alone overflows in the second update: no rank makes that step."""

    def body(comm):
        stack = LayerParallel(MLP.make, N, 2.0, comm, mgrit=MGRIT(max_levels=1), vmap=False)
        head = linear(C, 2, 3).float()
        parameters = [*stack.parameters(), *head.parameters()]
        optimizer, scaler = torch.optim.SGD(parameters, 0.1), GradScaler(comm, init_scale=1024.0)
        scales, moved = [], []
        for update in range(3):
            before = [p.detach().clone() for p in parameters]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = head(stack(MLP.input(update).float()))
            scaler.scale(loss_of(output.float())).backward()
            if update == 1 and stack.own_layers and stack.own_layers[-1] == N - 1:
                next(stack.parameters()).grad[-1] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append(any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)))
        return scales, moved

    assert all(found == ([1024.0, 512.0, 512.0], [True, False, True]) for found in spmd(body))
