"""Cases of multilevel training in width: networks, samples, validation, and states that a run goes on from."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from studies.width.case import Case, train
from studies.width.rows import CURVE
from torch import nn
from width_runs import NETWORK, TINY, job, samples

from xbraid_py.data.darcy_public import FILES
from xbraid_py.recipes.width import ERRORS, cycles_of
from xbraid_py.recipes.width_networks import WidthNetwork

mse = nn.functional.mse_loss


@pytest.mark.parametrize(
    ("problem", "kind", "shapes"),
    [
        ("poisson", "dense", [(400, 3072), (400, 400), (1024, 400)]),
        ("darcy", "dense", [(1024, 3072), (1024, 1024), (1024, 1024), (1024, 1024)]),
        # 32 points become 13 and 4.
        ("poisson", "convolutional", [(200, 3, 7, 7), (200, 200, 7, 7), (400, 3200), (400, 400), (1024, 400)]),
    ],
)
def test_networks_have_the_sizes_of_the_paper(problem, kind, shapes):
    network = WidthNetwork(kind=kind).of(problem).module((3, 32, 32), 1024, seed=0)
    assert [tuple(p.shape) for p in network.parameters() if p.ndim > 1] == shapes
    relus = sum(isinstance(part, nn.ReLU) for part in network)
    assert relus == len(shapes) - 1 and isinstance(network[-1], nn.Linear)


def test_convolutions_of_darcy():
    """32 points become 11, 5 and 3."""
    found = WidthNetwork(kind="convolutional", channels=(4, 5, 6), widths=(7, 7)).of("darcy")
    assert found.kernels == (11, 7, 3) and found.strides == (2, 1, 1)
    network = found.module((1, 32, 32), 1, seed=0)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 1)
    assert network[7].in_features == 6 * 3 * 3
    full = WidthNetwork(kind="convolutional").of("darcy_public")
    assert (full.channels, full.widths) == ((100, 200, 400), (2048, 2048))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (NETWORK.module((3, 8, 8), 4, seed) for seed in (1, 1, 2))
    double = NETWORK.module((3, 8, 8), 4, 1, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c, d in zip(*(each.parameters() for each in (one, same, other, double)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a.double(), d)


@pytest.mark.parametrize("standardize", [False, True])
def test_errors_are_in_the_units_of_the_problem(standardize):
    run = job(levels=2, standardize=standardize)
    assert all(run.errors()[name] is None for name in ERRORS if name.startswith("aux"))
    run.training.match()
    found, (seen, unseen) = run.errors(), samples()
    assert run.mean_error() == pytest.approx(float((unseen.targets - seen.targets.mean(0)).square().mean()), rel=1e-9)
    deviation = float((seen.targets - seen.targets.mean()).square().mean().sqrt())
    for level, prefix in enumerate(("", "aux_")):
        layout, x = run.training.auxiliary(level)
        with torch.no_grad():
            learned = layout.module(x)(run.unseen[0])
        if standardize:
            learned = learned * deviation + seen.targets.mean()
        error = learned - unseen.targets.flatten(1)
        assert found[f"{prefix}val_l2"] == pytest.approx(float(error.square().mean()), rel=1e-9)
        assert found[f"{prefix}val_linf"] == pytest.approx(float(error.abs().max()), rel=1e-9)
    assert len(run.seen[0]) == 10 and found["train_l2"] != found["val_l2"]
    exact, learned = run.predict(4)
    torch.testing.assert_close(exact, run.unseen[1][4])
    assert learned.shape == (64,)


def test_validations_stand_before_multiples_of_work_units():
    """Cycles of 7 units, validations for every 14 and 20 of them."""
    for every, expected in (
        (14.0, [1, 3, 5, 6]),
        (20.0, [2, 5, 6]),
        (7.0, [1, 2, 3, 4, 5, 6]),
        (1.0, [1, 2, 3, 4, 5, 6]),
    ):
        found = [record.cycle for record, errors, _ in job().run(6, every) if errors is not None]
        assert found == expected, every


def test_cycles_within_work_units():
    options = replace(TINY, levels=2).options
    assert options.work() == (7.0, 4.5)
    assert (cycles_of(options, 45.0), cycles_of(options, 45.0, count_tau=False)) == (6, 10)
    assert cycles_of(options, 0.1) == 1
    assert TINY.cycles() == 10 and replace(TINY, levels=1).cycles() == 22


def test_a_case():
    found = train(asdict(TINY))
    columns = {name: [point[n] for point in found["curve"]] for n, name in enumerate(CURVE)}
    assert columns["cycle"][-1] == 10 and columns["work"][-1] == 70.0 and columns["work_without_tau"][-1] == 45.0
    assert found["best"] == {name: min(columns[name]) for name in ERRORS}
    assert found["widths"][0] == (16, 12) and len(found["widths"]) == 2
    again = train(asdict(TINY))
    place = CURVE.index("seconds")
    assert [[*p[:place], *p[place + 1 :]] for p in again["curve"]] == [
        [*p[:place], *p[place + 1 :]] for p in found["curve"]
    ]
    single = train(asdict(replace(TINY, levels=1)))
    assert single["best"]["aux_val_l2"] is None and single["best"]["val_l2"] > 0 == single["matching_seconds"]
    assert single["mean_l2"] == found["mean_l2"]


def test_methods_of_a_seed_begin_alike():
    cases = (TINY, replace(TINY, levels=1), replace(TINY, method="adam", alpha_m=0.0, tau="none", scaling="mean"))
    jobs = [case.job() for case in cases]
    for other in jobs[1:]:
        assert torch.equal(other.training.x, jobs[0].training.x) and torch.equal(other.unseen[0], jobs[0].unseen[0])
        (mine,), (theirs,) = other.training.minibatches.draw(), jobs[0].training.minibatches.draw()
        assert torch.equal(mine[0], theirs[0])
        other.training.minibatches.drawn = jobs[0].training.minibatches.drawn = 0
    assert cases[2].options.gamma == 0.0 and cases[2].options.pairs.scaling == "mean"
    other = replace(TINY, seed=1).job()
    assert not torch.equal(other.training.x, jobs[0].training.x)
    assert not torch.equal(other.unseen[1], jobs[0].unseen[1])


def test_darcy_and_the_public_set(tmp_path):
    small = replace(TINY, problem="darcy", target="flux", widths=(12, 8), max_work=9.0)
    assert small.job().unseen[1].shape == (10, 1)
    assert train(asdict(small), data_dir=tmp_path)["best"]["val_l2"] > 0
    assert len(list(tmp_path.glob("darcy-*.h5"))) == 1
    random = np.random.default_rng(0)
    for name, (count, n) in zip(FILES, ((12, 6), (5, 6), (5, 12)), strict=True):
        x, y = random.random((count, n, n)) > 0.5, random.random((count, n, n), dtype=np.float32)
        np.savez_compressed(tmp_path / name, x=x, y=y)
    public = replace(small, problem="darcy_public", target="", num_train=10, num_val=4)
    run = public.job(tmp_path)
    assert run.training.minibatches.inputs.shape == (10, 1, 6, 6) and run.unseen[1].shape == (4, 36)


@pytest.mark.parametrize(
    "how",
    [
        {"levels": 1},
        {"levels": 3},
        {"levels": 2, "alpha_m": 0.0, "tau": "other"},
        {"levels": 2, "method": "adam", "alpha_m": 0.0, "learning_rate": 0.01},
    ],
)
@pytest.mark.parametrize("first", [3, 4])
def test_a_run_goes_on_bitwise_from_its_state(how, first):
    """Within a matching of four cycles, and where the next one is due."""
    whole, before, after = (job(**how) for _ in range(3))
    expected = [record for record, _, _ in whole.run(7, 100.0)][-1]
    done = [record for record, _, _ in before.run(first, 100.0)][-1]
    state = {name: values.clone() for name, values in before.training.state().items()}
    after.training.restore(state)
    assert after.errors() == before.errors()
    found = [record for record, _, _ in after.run(7, 100.0, done)][-1]
    assert torch.equal(after.training.x, whole.training.x) and found.loss == expected.loss
    assert (found.work, found.widths) == (expected.work, expected.widths)
    assert found.counted == pytest.approx(expected.counted) and after.errors() == whole.errors()


def test_a_state_of_another_network_is_refused():
    run = job(network=WidthNetwork(widths=(16, 10)))
    with pytest.raises(ValueError, match="^x has the shape"):
        run.training.restore(job().training.state())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Case(problem="heat"), "^problem='heat' must be one of poisson, darcy, darcy_public; use poisson$"),
        (lambda: Case(tau="never"), "^tau='never' must be same, other or none; use same$"),
        (lambda: Case(max_work=0.0), "^max_work=0.0 must be positive and finite; use 50$"),
        (lambda: Case(num_val=0).source(), "^num_val=0 must be at least 1; use 500$"),
        (lambda: Case(network="flat").layers, "^kind='flat' must be dense or convolutional; use dense$"),
        (lambda: Case(widths=(4, 0)).layers, r"^widths=\[4, 0\] must be numbers of at least 1; use 400,400$"),
        (
            lambda: Case(network="convolutional", channels=(4,)).layers,
            r"^channels=\[4\], kernels=\[7, 7\] and strides=\[2, 2\] must be as many; use one of each",
        ),
        (
            lambda: Case(network="convolutional").layers.module((3, 8, 8), 1, 0),
            r"^kernels=\[7, 7\]: 7 does not fit into 1 x 1 points; use \[1, 1\] or smaller strides$",
        ),
    ],
)
def test_wrong_cases(make, message):
    with pytest.raises(ValueError, match=message):
        make()
