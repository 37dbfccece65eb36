"""Multilevel training in width as a job: networks, samples, validation, work units, runs of the study, pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from studies.width.case import changed, options_of, runs
from studies.width.rows import CURVE
from studies.width.runs import train
from torch import nn
from width_runs import NETWORK, TINY, run_of, samples

from xbraid_py.data.darcy import FILES, Darcy
from xbraid_py.multilevel.width.options import WidthOptions
from xbraid_py.recipes.options.device import DeviceOptions
from xbraid_py.recipes.options.width import ERRORS, INPUTS, DarcyOptions, PoissonOptions, WidthNetwork
from xbraid_py.recipes.pictures.curves import fields, over_work, smoothed
from xbraid_py.recipes.width import WidthRun
from xbraid_py.run.engine import rows_of


def settings(options, seed=0):
    """Of one run, as the study has them."""
    return runs([options], [seed])[0]


def ready(options):
    """The run in memory."""
    return WidthRun(options, *options.samples.load(dtype=options.torch_dtype))


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
    full = WidthNetwork(kind="convolutional").of("darcy")
    assert (full.channels, full.widths) == ((100, 200, 400), (2048, 2048))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (NETWORK.module((3, 8, 8), 4, seed) for seed in (1, 1, 2))
    double = NETWORK.module((3, 8, 8), 4, 1, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c, d in zip(*(each.parameters() for each in (one, same, other, double)), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(a.double(), d)


def test_all_that_a_run_computes_with_is_on_its_device(monkeypatch):
    """A device without numbers shows what would be left behind."""
    monkeypatch.setattr(DeviceOptions, "device_of", lambda self, rank: torch.device("meta"))
    options = replace(TINY, standardize=True)
    run = WidthRun(options, *options.samples.load())
    tensors = [run.method.x, run.method.minibatches.inputs, run.method.minibatches.targets, *run.seen, *run.unseen]
    assert {each.device.type for each in tensors} == {"meta"}
    assert {each.device.type for each in run.method.objective.module.parameters()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_a_gpu_learns_the_same(kind):
    network = WidthNetwork(kind=kind, widths=(32, 32), channels=(8,), kernels=(3,), strides=(2,))
    options = replace(TINY, dtype="float64", network=network)
    (case,) = runs([options], [0])
    here, there = (train(case, device=device)["curve"] for device in ("cpu", "cuda"))
    places = [place for place, name in enumerate(CURVE) if name.endswith(("l2", "linf"))]
    for one, other in zip(here, there, strict=True):
        assert [one[place] for place in places] == pytest.approx([other[place] for place in places], rel=1e-3)


@pytest.mark.parametrize("standardize", [False, True])
def test_errors_are_in_the_units_of_the_problem(standardize):
    run = run_of(standardize=standardize)
    assert all(run.errors()[name] is None for name in ERRORS if name.startswith("aux"))
    run.method.match()
    found, (seen, unseen) = run.errors(), samples()
    assert run.mean_error() == pytest.approx(float((unseen.targets - seen.targets.mean(0)).square().mean()), rel=1e-9)
    deviation = float((seen.targets - seen.targets.mean()).square().mean().sqrt())
    for level, prefix in enumerate(("", "aux_")):
        layout, x = run.method.auxiliary(level)
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
        run = run_of(max_work=42.0, validate_every=every)
        rows = list(rows_of(run))
        assert [row["update"] for row in rows if "val_l2" in row] == expected, every
        assert [row["final"] for row in rows] == 5 * [False] + [True]
        assert run.best["val_l2"] == min(row["val_l2"] for row in rows if "val_l2" in row)
        assert run.score(rows[-1]).objective == rows[-1]["val_l2"] and not run.score(rows[3]).accuracy


def test_cycles_within_work_units():
    assert TINY.training.work() == (7.0, 4.5)
    assert (replace(TINY, count_tau=True).cycles, TINY.cycles) == (6, 10)
    assert replace(TINY, max_work=0.1).cycles == 1 and changed(TINY, levels=1).cycles == 22
    run = run_of(max_work=42.0)
    assert run.is_over({"update": 6, "final": True}) and not run_of(max_work=49.0).is_over({"update": 6, "final": True})


def test_a_run_of_the_study():
    found = train(settings(TINY))
    columns = {name: [point[n] for point in found["curve"]] for n, name in enumerate(CURVE)}
    assert columns["cycle"][-1] == 10 and columns["work"][-1] == 70.0 and columns["work_without_tau"][-1] == 45.0
    assert found["best"] == {name: min(columns[name]) for name in ERRORS}
    assert found["widths"][0] == (16, 12) and len(found["widths"]) == 2
    again = train(settings(TINY))
    place = CURVE.index("seconds")
    assert [[*p[:place], *p[place + 1 :]] for p in again["curve"]] == [
        [*p[:place], *p[place + 1 :]] for p in found["curve"]
    ]
    single = train(settings(changed(TINY, levels=1)))
    assert single["best"]["aux_val_l2"] is None and single["best"]["val_l2"] > 0 == single["matching_seconds"]
    assert single["mean_l2"] == found["mean_l2"]


def test_settings_are_the_options_of_the_recipe():
    for options in (TINY, DarcyOptions(target="flux", network=WidthNetwork(kind="convolutional", kernels=(7, 7, 3)))):
        assert options_of(settings(options, seed=4)) == replace(options, seed=4)


def test_methods_of_a_seed_begin_alike():
    cases = (
        TINY,
        changed(TINY, levels=1),
        changed(TINY, method="adam", alpha_m=0.0, gamma=0.0, pairs=WidthOptions(scaling="mean")),
    )
    first, *others = (ready(case) for case in cases)
    (theirs,) = first.method.minibatches.draw()
    for other in others:
        assert torch.equal(other.method.x, first.method.x) and torch.equal(other.unseen[0], first.unseen[0])
        (mine,) = other.method.minibatches.draw()
        assert torch.equal(mine[0], theirs[0])
    other = ready(replace(TINY, seed=1))
    assert not torch.equal(other.method.x, first.method.x) and not torch.equal(other.unseen[1], first.unseen[1])


def test_darcy_and_the_public_set(tmp_path):
    sizes = {"mesh": 8, "num_train": 40, "num_val": 10, "batch_size": 8, "network": WidthNetwork(widths=(12, 8))}
    small = DarcyOptions(target="flux", max_work=9.0, **sizes)
    assert ready(small).unseen[1].shape == (10, 1)
    assert train(settings(small), data_dir=tmp_path)["best"]["val_l2"] > 0
    assert len(list(tmp_path.glob("darcy-*.h5"))) == 1
    random = np.random.default_rng(0)
    for name, (count, n) in zip(FILES, ((12, 6), (5, 6), (5, 12)), strict=True):
        x, y = random.random((count, n, n)) > 0.5, random.random((count, n, n), dtype=np.float32)
        np.savez_compressed(tmp_path / name, x=x, y=y)
    run = ready(DarcyOptions(source="public", data_dir=tmp_path, **(sizes | {"num_train": 10, "num_val": 4})))
    assert run.method.minibatches.inputs.shape == (10, 1, 6, 6) and run.unseen[1].shape == (4, 36)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoissonOptions(max_work=0.0), "^max_work=0.0 must be positive and finite; use 50$"),
        (lambda: PoissonOptions(validate_every=-1.0), "^validate_every=-1.0 must be positive and finite; use 50$"),
        (lambda: PoissonOptions(keep=0), "^keep=0 must be at least 1; use 5$"),
        (lambda: PoissonOptions(batch_size=0), "^batch_size=0 must lie in 1 .. num_train=9000; use 200$"),
        (lambda: PoissonOptions(num_val=0).samples, "^num_val=0 must be at least 1; use 500$"),
        (lambda: WidthNetwork(kind="flat"), "^kind='flat' must be dense or convolutional; use dense$"),
        (lambda: WidthNetwork(widths=(4, 0)), r"^widths=\[4, 0\] must be numbers of at least 1; use 400,400$"),
        (
            lambda: PoissonOptions(network=WidthNetwork(kind="convolutional", channels=(4,))).layers,
            r"^channels=\[4\], kernels=\[7, 7\] and strides=\[2, 2\] must be as many; use one of each",
        ),
        (
            lambda: PoissonOptions(network=WidthNetwork(kind="convolutional")).layers.module((3, 8, 8), 1, 0),
            r"^kernels=\[7, 7\]: 7 does not fit into 1 x 1 points; use \[1, 1\] or smaller strides$",
        ),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pictures(tmp_path):
    names = [f"{samples}_{norm}" for samples in ("val", "train", "aux_val") for norm in ("l2", "linf")]
    rows = [{"work": 7.0 * k, "counted_work": 8.0 * k, **dict.fromkeys(names, 1 / k)} for k in range(1, 5)]
    single = [row | {"aux_val_l2": None, "aux_val_linf": None} for row in rows]
    lines = [("val", "-", ""), ("aux_val", "--", "aux")]
    over_work({"two": rows, "one": single}, tmp_path / "a.png", over="counted_work", lines=lines, window=3)
    fields([[0.0, 1.0], [2.0, 3.0]], [[0.0, 1.0], [2.0, 4.0]], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert smoothed([1.0, 3.0, 5.0, 7.0], 3) == [1.0, 2.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="^runs holds no run"):
        over_work({}, tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"^exact.shape=\(2, 2\) and learned.shape=\(1, 2\) must be square"):
        fields([[0, 1], [2, 3]], [[0, 1]], tmp_path / "c.png")


def test_the_inputs_are_the_channels_of_the_problem():
    assert INPUTS == Darcy.channels
