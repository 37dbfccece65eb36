"""What people do with any torch module: copies, files, averages; each beside the same module made anew, or a loop."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from blocks import CASES, C, Dropped, Mlp, distance, loop, loss_of, unstacked
from blocks import reduced as message_of
from sequence_cases import F, H, drawn
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from xbraid_py import MGRIT, GradientControl, ParallelGRU, ParallelLSTM, PipelineParallel, Splines
from xbraid_py.layers.module_block import own_random_numbers

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
    "lstm": lambda comm: ParallelLSTM(F, H, 2, dropout=0.2, bidirectional=True, comm=comm, dtype=torch.float64),
}


def batch_of(name: str) -> torch.Tensor:
    return drawn(9, 2, F) if name in ("gru", "lstm") else MLP.input()


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


# ---- Around a stack


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_behind_may_write_to_the_output(spmd, name):
    """ReLU(inplace=True) behind the module: the same bits as with the other ReLU."""

    def body(comm):
        model = MODELS[name](comm)
        kept = copy.deepcopy(model)
        first = outcome(_First(model, nn.ReLU(inplace=True)), batch_of(name))
        return same(first, outcome(_First(kept, nn.ReLU()), batch_of(name)))

    assert all(spmd(body))


class _First(nn.Module):
    """The first result of a module, through another one."""

    def __init__(self, module, behind):
        super().__init__()
        self.module, self.behind = module, behind

    def forward(self, u):
        output = self.module(u)
        return self.behind(output[0] if isinstance(output, tuple) else output)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("name", ["V", "random", "vmap", "windows", "pipeline", "gru", "modules"])
def test_hooks_are_called_as_of_any_module(spmd, name):
    def body(comm):
        model, calls = MODELS[name](comm), []
        model.register_forward_pre_hook(lambda module, inputs: calls.append(("before", len(inputs))))
        model.register_forward_hook(lambda module, inputs, output: calls.append(("behind", type(output).__name__)))
        model.register_full_backward_hook(lambda module, inner, outer: calls.append(("back", inner[0].shape)))
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: calls.append(("weight", p.shape)))
        u = batch_of(name).requires_grad_()
        outcome(model, u)
        shapes = [("weight", p.shape) for p in model.parameters()]
        found = [call for call in calls if call[0] == "weight"]
        assert sorted(map(str, found)) == sorted(map(str, shapes))
        return [call for call in calls if call[0] != "weight"]

    kind = "tuple" if name == "gru" else "Tensor"
    wanted = [("before", 1), ("behind", kind), ("back", batch_of(name).shape)]
    assert all(calls == wanted for calls in spmd(body))


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["V", "dense", "vmap", "windows", "splines", "pipeline", "plain modules", "gru"])
def test_a_checkpoint_around_the_module(spmd, name, reentrant):
    """Around the module and what is behind it, from the first call on: the bits of the same without it."""

    def body(comm):
        if name == "plain modules":
            model = PipelineParallel([lambda: nn.Linear(C, C).double(), nn.Tanh(), Mlp().double()], comm, portions=2)
        else:
            model = MODELS[name](comm)
        model = _First(model, nn.Sequential(nn.Tanh(), nn.ReLU()))
        kept = copy.deepcopy(model)
        u, v = (batch_of(name).requires_grad_() for _ in range(2))
        first = outcome(_Checkpointed(model, reentrant), u)
        return same([*first, u.grad], [*outcome(kept, v), v.grad])

    assert all(spmd(body))


class _Checkpointed(nn.Module):
    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, u):
        return checkpoint(self.module, u, use_reentrant=self.reentrant)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["random", "modules"])
def test_a_checkpoint_around_a_module_with_masks_is_refused(spmd, name, reentrant):
    """The same sentence on all ranks, wherever the masks are."""

    def body(comm):
        model = _Checkpointed(_First(MODELS[name](comm), nn.Tanh()), reentrant)
        return message_of(comm, lambda: outcome(model, batch_of(name).requires_grad_()))

    for message in spmd(body):
        assert "with dropout" in message and "use recompute=True in its place" in message


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("options", [{}, {"windows": 3}, {"vmap": True}, {"solve": "exact"}])
def test_an_output_lies_in_memory_as_the_input_does(spmd, options):
    case = CASES["convolution"]

    def body(comm):
        model = case.stack(comm, 9, **options)
        u = case.input()
        plain = outcome(model, u)
        last = u.contiguous(memory_format=torch.channels_last)
        found = outcome(model, last)
        assert same(found, plain) and plain[0].is_contiguous()
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            layouts = [model.eval()(each).is_contiguous() for each in (u, last)]
        # Weights of one layer have such a layout, those of all layers do not: their values stay.
        moved = model.train().to(memory_format=torch.channels_last)
        return layouts, same(outcome(moved, last), found)

    assert all(each == ([True, False], True) for each in spmd(body))


# ---- model.apply


def initial(part: nn.Module) -> None:
    """Weights by the fan of a layer, which stacked weights do not have; a part without gradients; a part set."""
    if hasattr(part, "weight") and getattr(part.weight, "ndim", 0) > 1:
        nn.init.xavier_uniform_(part.weight)
    if isinstance(part, nn.Linear | nn.Conv2d):
        nn.init.constant_(part.bias, 0.5)
    if isinstance(part, nn.LayerNorm):
        part.requires_grad_(False)
        part.eps = 1e-3


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "convolution", "tied", "frozen", "dense"])
def test_apply_reaches_every_layer_as_if_it_stood_alone(spmd, name, windows):
    case = CASES[name]

    def body(comm):
        model = nn.Sequential(case.stack(comm, 9, windows=windows))
        with own_random_numbers(5):
            assert model.apply(initial) is model
        return model.state_dict(), [p.requires_grad for p in model.parameters()], model(case.input()).detach()

    with own_random_numbers(5):
        starts = [int(torch.randint(1 << 62, ())) for _ in range(windows)]
    results = spmd(body)
    before = unstacked(results[0][0], case, "0.layers.")
    for layer, module in enumerate(before):
        with own_random_numbers(hash((starts[layer * windows // 9], layer)) & (2**63 - 1)):
            module.apply(initial)
    wanted = [dict(module.state_dict()) for module in before]
    for state, flags, output in results:
        for key, value in state.items():
            assert value.equal(torch.stack([each[key.removeprefix("0.layers.")] for each in wanted]))
        assert flags == [p.requires_grad for p in before[0].parameters()] * windows
        assert distance(output, loop(before, case.input()).detach()) < 1e-12


@pytest.mark.ranks(1, 2)
def test_apply_reaches_coefficients_of_splines(spmd):
    def body(comm):
        stack = CASES["mlp"].stack(comm, 9, splines=Splines(4))
        with own_random_numbers(5):
            stack.apply(initial)
        return stack.state_dict()

    states = spmd(body)
    for state in states:
        assert all(value.equal(states[0][key]) for key, value in state.items())
        bound = (6.0 / (C + 2 * C)) ** 0.5
        for row in state["layers.net.1.weight"]:
            assert 0.5 * bound < row.abs().max() <= bound
        assert state["layers.net.1.bias"].eq(0.5).all()


def test_a_function_that_takes_weights_away_is_refused():
    def cut(part):
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight[:1].clone())

    with pytest.raises(ValueError, match="after cut the block has no net.1.weight with the shape"):
        MLP.stack(None, 9).apply(cut)


# ---- What went wrong


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("check", [0, 1])
@pytest.mark.parametrize("solve", ["lagged", "one-shot 3", "V", "F"])
def test_nan_in_a_batch_is_shown_as_nan(spmd, solve, check):
    """Estimated or measured; the update after it is what it would have been."""

    def body(comm):
        stack = MLP.stack(comm, 12, solve=solve, accuracy=GradientControl(check=check))
        kept = copy.deepcopy(stack)
        u = MLP.input()
        u[0, 0] = torch.nan
        outcome(stack, u)
        found = stack.record
        kept.load_solver_state({**kept.solver_state(), "draws": 1})
        assert same(outcome(stack, MLP.input()), outcome(kept, MLP.input()))
        assert stack.record.event == "" and stack.record.gradient_error < 1e-2
        return found.gradient_error, found.event, found.measured

    for error, event, measured in spmd(body):
        assert error != error and event.startswith("gradient error NaN: there are NaN") and measured == bool(check)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", ["V", "windows", "modules", "gru"])
def test_inputs_of_all_ranks_are_compared_where_it_is_asked_for(spmd, name, monkeypatch):
    monkeypatch.setenv("XBRAID_CHECK_INPUTS", "1")

    def body(comm):
        model, u = MODELS[name](comm), batch_of(name)
        outcome(model, u)
        # One bit, on one rank.
        u[0, -1] = torch.nextafter(u[0, -1], torch.ones(())) if comm.rank == 1 else u[0, -1]
        return message_of(comm, lambda: model(u))

    messages = spmd(body)
    assert len(set(messages)) == 1 and "inputs (XBRAID_CHECK_INPUTS=1): tensor 0=" in messages[0]
    assert "on rank 1" in messages[0] and "with digest" in messages[0]


WRITTEN = {
    "states again": {"recompute": "states"},
    "windows": {"windows": 3},
    "checked": {"accuracy": GradientControl(check=1)},
    "pipeline": {"mgrit": MGRIT(cycle="pipeline", portions=2), "recompute": "states"},
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("how", WRITTEN)
def test_an_input_that_is_overwritten_before_the_backward_pass(spmd, how):
    def body(comm):
        stack = MLP.stack(comm, 9, **WRITTEN[how])
        u = MLP.input()
        output = stack(u)
        u.add_(1.0)
        return message_of(comm, lambda: output.sum().backward())

    for message in spmd(body):
        assert "overwritten by an operation in place" in message and "use a form not in place" in message


@pytest.mark.ranks(1, 2)
def test_an_input_that_is_not_read_again_may_be_overwritten(spmd):
    def body(comm):
        stack = MLP.stack(comm, 9, recompute=True)
        u = MLP.input()
        output = stack(u)
        u.add_(1.0)
        output.sum().backward()
        found = [p.grad.clone() for p in stack.parameters()]
        stack.zero_grad()
        stack(MLP.input()).sum().backward()
        return [a.equal(p.grad) for a, p in zip(found, stack.parameters(), strict=True)]

    assert all(all(same) for same in spmd(body))


@pytest.mark.ranks(2, 3)
def test_an_autocast_on_some_ranks_alone_is_refused(spmd):
    def body(comm):
        stack = MLP.stack(comm, 9)

        def call():
            with torch.autocast("cpu", torch.bfloat16, enabled=comm.rank == 1):
                stack(MLP.input())

        return message_of(comm, call)

    for message in spmd(body):
        assert "shape and mode of the input" in message and "bfloat16" in message


def test_the_table_of_the_docs_names_tests_that_are_there():
    page = Path(__file__).resolve().parents[2] / "docs" / "pytorch.md"
    rows = [row for row in page.read_text().splitlines() if row.startswith("| ")][1:]
    found = [re.findall(r"\]\((.+?)\)", row.rsplit("|", 2)[1]) for row in rows]
    assert len(rows) > 20 and all(found)
    assert all((page.parent / file).is_file() for files in found for file in files)
