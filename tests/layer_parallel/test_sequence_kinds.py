"""Recurrent networks as torch has them, on any ranks: LSTM, two directions, packed and unbatched sequences, dropout."""

from __future__ import annotations

import pickle

import pytest
import torch
from blocks import reduced as message_of
from sequence_cases import CONVERGED, EXACT, B, D, F, H, L, distance, drawn
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import xbraid_py
from xbraid_py import MGRIT, GradientControl, ParallelGRU, ParallelLSTM
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.norm_dropout import Dropout, at_position

KINDS = {"GRU": ParallelGRU, "LSTM": ParallelLSTM}
LENGTHS = (13, L, 5)
WAYS = {
    **CONVERGED,
    "pipeline": MGRIT(cycle="pipeline", portions=2),
}
pytestmark = pytest.mark.ranks(1, 2, 3)


def plain(kind: str, **options) -> nn.Module:
    """torch's module with weights of its own for each kind."""
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        return getattr(nn, kind)(F, H, D, dtype=torch.float64, **options)


def parallel(kind: str, comm, state: dict | None = None, **options) -> nn.Module:
    given = {"dtype": torch.float64, "mgrit": CONVERGED["lagged"], "comm": comm, **options}
    model = KINDS[kind](F, H, D, **given)
    if state is not None:
        model.load_state_dict(state)
    return model


def results(model: nn.Module, form: str, batch: int = B) -> list[torch.Tensor]:
    """Output, states behind, and gradients of a loss of both by inputs, states before and weights."""
    count = D * (2 if model.bidirectional else 1)
    pair = isinstance(model, nn.LSTM | ParallelLSTM)
    shape = (count, H) if form == "unbatched" else (count, batch, H)
    states = [drawn(*shape, seed=number).requires_grad_() for number in range(2 if pair else 1)]
    if "packed" in form:
        lengths = LENGTHS if form == "packed" else sorted(LENGTHS, reverse=True)
        leaves = [drawn(length, F, seed=length).requires_grad_() for length in lengths]
        x = pack_sequence(leaves, enforce_sorted=form == "packed, sorted")
    else:
        axes = {"unbatched": (L, F), "batch first": (batch, L, F), "batch": (L, batch, F)}
        leaves = [drawn(*axes[form], seed=7).requires_grad_()]
        x = leaves[0]
    output, ends = model(x, tuple(states) if pair else states[0])
    if "packed" in form:
        assert isinstance(output, PackedSequence)
        assert all(a is b or torch.equal(a, b) for a, b in zip(output[1:], x[1:], strict=True))
        output = pad_packed_sequence(output)[0]
    made = [output, *(ends if pair else (ends,))]
    loss = sum((each * drawn(*each.shape, seed=number)).sum() for number, each in enumerate(made, 20))
    return [*(each.detach() for each in made), *torch.autograd.grad(loss, (*leaves, *states, *model.parameters()))]


# ---- Equal to torch's


@pytest.mark.parametrize("form", ["batch", "batch first", "unbatched", "packed", "packed, sorted"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_converged_solves_are_those_of_torch(spmd, kind, bidirectional, form):
    """Outputs, states behind the sequences, and gradients by the inputs, the states before them and all weights."""
    options = {"bidirectional": bidirectional, "batch_first": form == "batch first"}
    torchs = plain(kind, **options)
    wanted, state = results(torchs, form), torchs.state_dict()

    def body(comm):
        model = parallel(kind, comm, state, **options)
        assert list(model.state_dict()) == list(state)
        found = results(model, form)
        assert min(model.record.forward_sweeps) > 1, "by iterations"
        # And the other way.
        torchs.load_state_dict(model.state_dict())
        with torch.no_grad():
            x = drawn(*((B, 7, F) if options["batch_first"] else (7, B, F)))
            exact = distance([model.eval()(x)[0]], [torchs(x)[0]])
        return distance(found, wanted), exact

    assert all(error < EXACT and exact < 1e-14 for error, exact in spmd(body))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "windows"), [("GRU", 4), ("LSTM", 1)])
def test_packed_sequences_in_both_directions_by_all_cycles_and_in_windows(spmd, kind, way, windows):
    torchs = plain(kind, bidirectional=True)
    wanted, state = results(torchs, "packed"), torchs.state_dict()

    def body(comm):
        model = parallel(kind, comm, state, mgrit=WAYS[way], windows=windows, bidirectional=True)
        return distance(results(model, "packed"), wanted)

    assert max(spmd(body)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_on_any_number_of_ranks(spmd, kind):
    """Also unconverged, with masks of dropout, and where the control of the gradient has its say."""

    def body(comm):
        found = []
        for bidirectional in (False, True):
            accuracy = GradientControl(gradient_error=1e-3, noise=0.25)
            more = {"accuracy": accuracy, "dropout": 0.3, "bidirectional": bidirectional}
            model = parallel(kind, comm, mgrit=MGRIT(intervals=4, max_iter=1), windows=2, **more)
            for _ in range(2):
                found += results(model, "packed")
                record = model.record
                found.append(torch.tensor([record.gradient_error, record.level, record.noise]))
        return [t.numpy().tobytes() for t in found]

    serial = body(SerialCommunicator())
    assert all(rank == serial for rank in spmd(body))


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_is_solved_for_sample_by_sample(spmd, kind):
    """Unconverged: as in a batch where all are as long, and a sample meets the same whatever the others are."""

    def body(comm):
        unchecked = GradientControl(check=0, adapt=False)
        model = parallel(kind, comm, mgrit=MGRIT(intervals=4, max_iter=1), accuracy=unchecked)

        def gradient(leaves, x):
            output = model(x)[0]
            rows = pad_packed_sequence(output)[0] if isinstance(output, PackedSequence) else output
            slope = drawn(L, 1, H)[: len(rows)].expand_as(rows)
            return rows, *torch.autograd.grad((rows * slope).sum(), (*leaves, *model.parameters()))

        whole = drawn(L, B, F).requires_grad_()
        leaves = [row.detach().clone().requires_grad_() for row in whole.unbind(1)]
        rows, *found = gradient(leaves, pack_sequence(leaves))
        alike = distance([rows, torch.stack(found[:B], 1), *found[B:]], gradient([whole], whole))
        short = [drawn(13, F, seed=1).requires_grad_() for _ in range(2)]
        others = [drawn(L, F, seed=seed).requires_grad_() for seed in (2, 3)]
        pairs = [
            gradient((a, b), pack_sequence([a, b], enforce_sorted=False)) for a, b in zip(short, others, strict=True)
        ]
        same = [torch.equal(pairs[0][i], pairs[1][i]) for i in (1, 2)]
        return alike, same, distance([pairs[0][0][:13, 0]], [pairs[1][0][:13, 0]])

    for alike, same, other in spmd(body):
        assert alike < 1e-14 and same == [True, False] and other == 0.0


@pytest.mark.ranks(1)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_states_of_both_directions(kind):
    torchs = plain(kind, bidirectional=True, batch_first=True)
    model = parallel(kind, None, torchs.state_dict(), bidirectional=True, batch_first=True, output="last")
    x = drawn(B, L, F)
    (nothing, ends), (_, wanted) = model(x), torchs(x)
    ends, wanted = (each if isinstance(each, tuple) else (each,) for each in (ends, wanted))
    assert nothing is None and distance(ends, wanted) < EXACT
    gradients = [
        torch.autograd.grad(sum(t.square().sum() for t in made), [*module.parameters()])
        for made, module in ((ends, model), (wanted, torchs))
    ]
    assert distance(*gradients) < EXACT
    model.flatten_parameters()


def test_steps_of_an_lstm_owned_by_each_rank(spmd):
    def body(comm):
        whole, own = (parallel("LSTM", comm, windows=3, output=output) for output in ("all", "own"))
        slope, x = drawn(L, B, H, seed=3), drawn(L, B, F, seed=1)
        steps = own.own_steps(L)
        output, (h, c) = own(x)
        assert not h.requires_grad and not c.requires_grad
        found = torch.autograd.grad((output * slope[steps]).sum(), tuple(own.parameters()))
        everything = whole(x)[0]
        wanted = torch.autograd.grad((everything * slope).sum(), tuple(whole.parameters()))
        same = own.record.gradient_error == whole.record.gradient_error
        return same and torch.equal(output, everything[steps]) and all(map(torch.equal, found, wanted))

    assert all(spmd(body))


@pytest.mark.parametrize("kind", KINDS)
def test_an_autocast_casts_nothing(spmd, kind):
    short = torch.bfloat16

    def body(comm):
        model = KINDS[kind](F, H, comm=comm, bidirectional=True, accuracy=GradientControl(check=0))
        leaves = [drawn(length, F).to(short) for length in LENGTHS]
        found = []
        for cast in (False, True):
            model.zero_grad()
            x = pack_sequence(leaves if cast else [leaf.float() for leaf in leaves], enforce_sorted=False)
            with torch.autocast("cpu", short, enabled=cast):
                model(x)[0].data.square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        return all(map(torch.equal, *found))

    assert all(spmd(body))


# ---- How the solver gets there


@pytest.mark.ranks(1)
def test_composed_coarse_steps_of_an_lstm_converge_where_euler_steps_of_a_plain_one_do_not():
    x = torch.sin(torch.linspace(0, 20, 256, dtype=torch.float64))[:, None, None] * drawn(1, B, F)

    def end_of(**options):
        return ParallelLSTM(F, 16, output="last", dtype=torch.float64, **options)(x)[1][0].detach()

    def error(kind, coarse, iterations):
        mgrit = MGRIT(cycle="V", cfactor=8, max_levels=2, max_iter=iterations, nrelax=0)
        found, wanted = end_of(kind=kind, coarse=coarse, mgrit=mgrit), end_of(kind=kind, mgrit=MGRIT(max_levels=1))
        return float((found - wanted).norm() / wanted.norm())

    first = {
        (kind, coarse): error(kind, coarse, 1) for kind in ("plain", "implicit") for coarse in ("compose", "euler")
    }
    factor = {key: (error(*key, 4) / value) ** (1 / 3) for key, value in first.items()}
    assert first["plain", "euler"] > 1 and factor["plain", "euler"] > 0.9
    assert first["plain", "compose"] < 0.01 and factor["plain", "compose"] < 0.4
    assert factor["implicit", "compose"] < 0.4 and factor["implicit", "euler"] < 0.7


# ---- Dropout between layers


def with_masks(state: dict, x: torch.Tensor, kind: str, bidirectional: bool, draw: int) -> torch.Tensor:
    """torch's layers, one by one, with the mask of each step in between."""
    sides = 2 if bidirectional else 1
    weights = list(state.values())
    for layer in range(D):
        made = getattr(nn, kind)(x.shape[-1], H, bidirectional=bidirectional, dtype=torch.float64)
        own = weights[layer * 4 * sides : (layer + 1) * 4 * sides]
        x = torch.func.functional_call(made, dict(zip(made.state_dict(), own, strict=True)), (x,))[0]
        if layer < D - 1:
            drop = Dropout(0.4)
            drop.number = layer
            rows = []
            for step, row in enumerate(x):
                with at_position(3, draw, step):
                    rows.append(drop(row))
            x = torch.stack(rows)
    return x


@pytest.mark.parametrize("options", [{}, {"windows": 3}, {"mgrit": WAYS["pipeline"]}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_a_mask_for_each_step_layer_and_update(spmd, kind, options):
    def body(comm):
        model = parallel(kind, comm, dropout=0.4, seed=3, **options)
        x, slope = drawn(L, B, F), drawn(L, B, H * (2 if model.bidirectional else 1), seed=2)
        errors, outputs = [], []
        for draw in (1, 2):
            output = model(x)[0]
            outputs.append(output.detach())
            state = {name: t.detach().clone().requires_grad_() for name, t in model.state_dict().items()}
            wanted = with_masks(state, x, kind, model.bidirectional, draw)
            slopes = torch.autograd.grad((wanted * slope).sum(), tuple(state.values()))
            found = torch.autograd.grad((output * slope).sum(), tuple(model.parameters()))
            errors.append(distance([output, *found], [wanted, *slopes]))
        assert not torch.equal(*outputs)
        # In evaluation mode there are none; a copy goes on with the same masks.
        other = parallel(kind, comm, model.state_dict(), dropout=0.4, seed=3, **options)
        other.load_solver_state(model.solver_state())
        assert torch.equal(other(x)[0], model(x)[0])
        model.eval()
        return max(errors), distance([model(x)[0]], [parallel(kind, comm, model.state_dict(), **options)(x)[0]])

    assert all(max(found) < EXACT for found in spmd(body))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_network_with_masks_is_refused(spmd, reentrant):
    def body(comm):
        model = parallel("LSTM", comm, dropout=0.4)
        x = drawn(L, B, F).requires_grad_()
        made = torch.utils.checkpoint.checkpoint(lambda x: model(x)[0], x, use_reentrant=reentrant)
        return message_of(comm, lambda: made.sum().backward())

    assert all("a ParallelLSTM with dropout is evaluated again" in found for found in spmd(body))
    assert all("use windows=4 in its place" in found for found in spmd(body))


def test_a_single_layer_with_dropout_is_told_by_torch():
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        ParallelGRU(F, H, dropout=0.4)


# ---- How good the gradient is


def gradient_of(model: nn.Module, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (model(x)[0] * slope).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.ranks(2)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_record_has_the_error_of_the_gradient(spmd, kind, bidirectional):
    """At the defaults: measured, and then estimated for other samples and other weights."""

    def body(comm):
        options = {"comm": comm, "dtype": torch.float64, "bidirectional": bidirectional}
        model = KINDS[kind](F, H, D, **options)
        unchecked = KINDS[kind](F, H, D, accuracy=GradientControl(check=0, adapt=False), **options)
        exact = KINDS[kind](F, H, D, mgrit=MGRIT(max_levels=1), **options)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        estimates, errors, first = [], [], None
        for update in range(7):
            x, slope = drawn(64, 16, F, seed=update), drawn(64, 16, H * (2 if bidirectional else 1), seed=50 + update)
            for other in (unchecked, exact):
                other.load_state_dict(model.state_dict())
            wanted, rough, used = (gradient_of(each, x, slope) for each in (exact, unchecked, model))
            if update == 0:
                first = float((used - wanted).norm() / wanted.norm())
            errors.append(float((rough - wanted).norm() / wanted.norm()))
            estimates.append(model.record.gradient_error)
            assert model.record.measured == (update == 0) and model.record.update == update + 1
            optimizer.step()
        assert exact.record.gradient_error == 0.0 and exact.record.mode == "exact"
        return first, errors, estimates

    for first, errors, estimates in spmd(body):
        assert first < 1e-12, "the exact gradient is used where it is known"
        assert abs(estimates[0] / errors[0] - 1.0) < 1e-6 and min(errors) > 1e-4
        ratios = sorted(a / b for a, b in zip(estimates, errors, strict=True))
        assert 0.8 < ratios[len(ratios) // 2] < 1.2
        assert 0.4 < ratios[0] and ratios[-1] < 2.5


def test_errors_above_the_bound_tighten_the_solver_and_the_state_is_kept(spmd):
    def body(comm):
        made = {"mgrit": MGRIT(intervals=8, max_iter=1, tol=1.0), "accuracy": GradientControl(gradient_error=1e-3)}
        model = parallel("LSTM", comm, **made)
        found = []
        for _ in range(8):
            model(drawn(L, B, F))[0].square().sum().backward()
            found.append((model.record.level, model.record.mode, model.record.event))
        other = parallel("LSTM", comm, **made)
        other.load_solver_state(pickle.loads(pickle.dumps(model.solver_state())))
        assert other.controller.state() == model.controller.state()
        return found

    for found in spmd(body):
        assert found[0][0] == 0 and "above 0.001: 1 tightening(s)" in found[0][2]
        assert found[-1][0] > 1 or found[-1][1] == "exact"


def test_a_checkpoint_has_counts_of_masks_and_how_exactly_solves_are_made(spmd, shared_tmp_path):
    def body(comm):
        made = []
        for _ in range(2):
            model = parallel("LSTM", comm, mgrit=MGRIT(intervals=4, tol=0.1), dropout=0.4)
            made.append((model, torch.optim.Adam(model.parameters(), 1e-2)))

        def update(model, optimizer):
            optimizer.zero_grad()
            model(drawn(L, B, F))[0].square().sum().backward()
            optimizer.step()
            return [model.record, *(p.detach().numpy().tobytes() for p in model.parameters())]

        update(*made[0])
        update(*made[0])
        path = shared_tmp_path / f"of_{comm.size}.h5"
        xbraid_py.save_checkpoint(path, *made[0], comm=comm)
        xbraid_py.load_checkpoint(path, *made[1], comm=comm)
        return update(*made[0]) == update(*made[1]), made[1][0].record.update

    assert all(found == (True, 3) for found in spmd(body))


@pytest.mark.ranks(1)
def test_the_noise_of_a_minibatch_is_that_of_its_halves():
    model = parallel("LSTM", None, accuracy=GradientControl(noise=0.25))
    exact = parallel("LSTM", None, model.state_dict(), mgrit=MGRIT(max_levels=1))
    x, slope = drawn(L, 5, F), drawn(L, 5, H)
    gradient_of(model, x, slope)
    whole, half = gradient_of(exact, x, slope), gradient_of(exact, x[:, :2], slope[:, :2])
    first, second = half / 0.4, (whole - half) / 0.6
    wanted = (0.4 * 0.6) ** 0.5 * float((first - second).norm() / whole.norm())
    assert model.record.noise == pytest.approx(wanted, rel=1e-9)


@pytest.mark.ranks(1)
def test_sequences_too_short_for_a_coarse_level_are_exact_and_measure_nothing():
    model = parallel("GRU", None, mgrit=MGRIT(tol=0.1))
    model(drawn(3, B, F))[0].sum().backward()
    assert (model.record.mode, model.record.gradient_error, model.record.measured) == ("exact", 0.0, False)
    model(drawn(64, B, F))[0].sum().backward()
    assert model.record.mode == "mgrit" and model.record.measured and model.record.update == 2


# ---- Refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_size": 2}, "proj_size=2 must be 0: coarse steps of projected states are not known; use proj_size=0"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1; use 0.1"),
        ({"output": "own", "bidirectional": True}, "output='own' with bidirectional=True: the directions own other"),
        ({"dt": -1.0}, "dt=-1.0 must be positive and finite; use 1.0"),
    ],
)
def test_arguments_that_do_not_apply_are_refused(spmd, kind, options, message):
    assert all(found.startswith(f"ValueError: {message}") for found in spmd(refused(kind, options)))


def refused(kind, options):
    return lambda comm: message_of(comm, lambda: KINDS[kind](F, H, comm=comm, **options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: (drawn(L, F), drawn(D, H)), "h_0=Tensor must be a pair of tensors; use (h_0, c_0)"),
        (lambda: (drawn(L, F), (drawn(D, H), 1.0)), "c_0=float must be a tensor with the shape (D, H)=(2, 5)"),
        (lambda: (drawn(L, F), (drawn(D, H), drawn(D, 1, H))), "c_0=(2, 1, 5) must be a tensor with the shape (D, H)"),
        (lambda: (drawn(L, B, F), (drawn(D, B, H), drawn(D, B, H).float())), "c_0 is torch.float32 on cpu"),
        (lambda: (pack_sequence([drawn(3, F + 1)]), None), "x has shape (3, 5) as packed; it must be (sum of the"),
        (lambda: (pack_sequence([drawn(3, F).float()]), None), "x is torch.float32 on cpu, the weights are"),
    ],
)
def test_inputs_of_an_lstm_that_do_not_fit_are_refused_on_all_ranks(spmd, given, message):
    def body(comm):
        return message_of(comm, lambda: parallel("LSTM", comm)(*given()))

    assert all(found.startswith(f"ValueError: {message}") for found in spmd(body))


def test_packed_sequences_of_which_a_rank_has_some_are_refused(spmd):
    def body(comm):
        x = pack_sequence([drawn(3, F)])
        return message_of(comm, lambda: parallel("GRU", comm, output="own")(x))

    assert all("use output='all'" in found for found in spmd(body))


@pytest.mark.ranks(2, 3)
def test_ranks_with_other_lengths_are_told(spmd):
    def body(comm):
        x = pack_sequence([drawn(5, F), drawn(3 + (comm.rank == 1), F)])
        return message_of(comm, lambda: parallel("GRU", comm)(x))

    assert all("shape and mode of the input=" in found for found in spmd(body))


def test_second_derivatives_name_the_module_of_torch():
    model = parallel("LSTM", None)
    with pytest.raises(RuntimeError, match="a ParallelLSTM has no second derivatives; use torch.nn.LSTM"):
        torch.autograd.grad(model(drawn(L, B, F))[0].sum(), tuple(model.parameters()), create_graph=True)


def test_the_public_names_are_there():
    assert xbraid_py.ParallelLSTM is ParallelLSTM and xbraid_py.ParallelGRU is ParallelGRU
