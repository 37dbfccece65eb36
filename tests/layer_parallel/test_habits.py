"""What people do with any torch module: copies, files, averages; each beside the same module made anew, or a loop."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from blocks import CASES, C, Dropped, distance, loss_of
from blocks import reduced as message_of
from sequence_cases import F, H, drawn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbraid_py import MGRIT, ParallelGRU, PipelineParallel, Splines

MLP = CASES["mlp"]


def modules(comm) -> PipelineParallel:
    made = [lambda: nn.Linear(C, 2 * C).double(), nn.Tanh(), lambda: nn.Linear(2 * C, C).double()]
    return PipelineParallel([*made, lambda: Dropped().double()], comm, portions=2)


MODELS = {
    "V": lambda comm: MLP.stack(comm, 9),
    "random": lambda comm: CASES["dropout"].stack(comm, 9, solve="one-shot 3"),
    "dense": lambda comm: CASES["dense"].stack(comm, 12, solve="lagged"),
    "vmap": lambda comm: MLP.stack(comm, 9, vmap=True),
    "windows": lambda comm: MLP.stack(comm, 9, windows=3),
    "splines": lambda comm: CASES["dense"].stack(comm, 9, splines=Splines(4)),
    "pipeline": lambda comm: MLP.stack(comm, 9, mgrit=MGRIT(cycle="pipeline", portions=2)),
    "modules": modules,
    "gru": lambda comm: ParallelGRU(F, H, 2, comm=comm, windows=2, dtype=torch.float64),
}


def batch_of(name: str) -> torch.Tensor:
    return drawn(9, 2, F) if name == "gru" else MLP.input()


def outcome(model, u) -> list[torch.Tensor]:
    """The output of one update, and the gradients of the weights owned here."""
    model.zero_grad()
    output = model(u)
    output = output[0] if isinstance(output, tuple) else output
    loss_of(output).backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_does_the_same_and_shares_the_communicator_alone(spmd, name):
    def body(comm):
        model = nn.Sequential(MODELS[name](comm))
        u = batch_of(name)
        outcome(model, u)
        found = copy.deepcopy(model)
        assert found[0].comm is model[0].comm
        mine = {p.data_ptr() for p in model.parameters() if p.numel()}
        assert not mine & {p.data_ptr() for p in found.parameters() if p.numel()}
        first, second = outcome(model, u), outcome(found, u)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for p in found.parameters():
                p.mul_(1.5)
        third = outcome(found, u)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        return same(first, second), not torch.equal(third[0], first[0])

    assert spmd(body) == [(True, True)] * len(spmd(lambda comm: None))


@pytest.mark.parametrize("name", MODELS)
def test_what_one_process_has_saved_whole_is_loaded_as_a_serial_module(name):
    model = nn.Sequential(MODELS[name](None))
    u = batch_of(name)
    outcome(model, u)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    wanted = outcome(copy.deepcopy(model), u)
    for found in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert found[0].comm.size == 1 and same(outcome(found, u), wanted)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_a_module_of_several_ranks_is_not_saved_whole(spmd, name):
    def body(comm):
        return message_of(comm, lambda: torch.save(nn.Sequential(MODELS[name](comm)), io.BytesIO()))

    for message in spmd(body):
        assert message.startswith("TypeError: a communicator of ") and "save model.state_dict(), which" in message


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_averages_of_weights_are_those_of_each_parameter(spmd, name):
    """A decaying mean over three updates, by its formula; its network is that of the mean weights."""

    def body(comm):
        model = MODELS[name](comm)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
        wanted = None
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            outcome(model, batch_of(name))
            optimizer.step()
            average.update_parameters(model)
            state = {key: value.clone() for key, value in model.state_dict().items()}
            wanted = state if wanted is None else {key: 0.75 * wanted[key] + 0.25 * state[key] for key in state}
        found = {key.removeprefix("module."): v for key, v in average.state_dict().items() if key != "n_averaged"}
        model.load_state_dict(wanted)
        with torch.no_grad():
            a, b = (each.eval()(batch_of(name)) for each in (average, model))
        a, b = (each[0] if isinstance(each, tuple) else each for each in (a, b))
        return distance(found, wanted), distance(a, b)

    assert all(max(each) < 1e-14 for each in spmd(body))
