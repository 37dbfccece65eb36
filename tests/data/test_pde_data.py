"""Samples of the Poisson and of the Darcy problem: how they are drawn, their data sets, splits and statistics."""

import numpy as np
import pytest
import torch
from refusal import refusal

from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.darcy import Darcy, covariance, embedding
from xbraid_py.data.elliptic import RANGES, Poisson, coefficient, solve_darcy, solve_poisson, source
from xbraid_py.data.pde_dataset import PdeDataset, Standardization, split
from xbraid_py.data.pde_samples import generate

PROBLEMS = [Poisson(mesh=6), Darcy(mesh=4, correlation_length=0.3)]
SERIAL = SerialCommunicator()


class Failing(Poisson):
    """Poisson without a solution of sample 4."""

    def sample(self, seed, number):
        if number == 4:
            raise ValueError("no solution")
        return super().sample(seed, number)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("num_samples", [2, 7])
def test_the_same_samples_on_any_number_of_ranks(spmd, problem, num_samples):
    expected = generate(problem, num_samples, 3, SERIAL).arrays
    assert all(same(found, expected) for found in spmd(lambda comm: generate(problem, num_samples, 3, comm).arrays))


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_fewer_samples_are_the_first_ones(problem):
    few, many = (generate(problem, number, 5, SERIAL).arrays for number in (3, 8))
    assert same(few, {name: rows[:3] for name, rows in many.items()})
    other = generate(problem, 3, 6, SERIAL).arrays
    name = problem.default_channels[0]
    drawn = torch.cat([many[name], other[name]]).flatten(1)
    assert len(drawn.unique(dim=0)) == len(drawn) == 11


@pytest.mark.ranks(2, 3)
def test_ranks_must_agree(spmd):
    for message in spmd(lambda comm: refusal(ValueError, generate, Poisson(mesh=4), 2 + (comm.rank == 1), 0, comm)):
        assert message.startswith("(problem, num_samples, seed)=") and "on rank 1" in message


def test_a_sample_that_cannot_be_solved_stops_all_ranks(spmd):
    for message in spmd(lambda comm: refusal(ValueError, generate, Failing(mesh=3), 6, 0, comm)):
        assert message.startswith("sample 4 of ") and message.endswith("with seed=0: no solution")


def test_poisson_samples_are_those_of_the_paper():
    n, number = 8, 200
    arrays = generate(Poisson(mesh=n), number, 0, SERIAL).arrays
    low, high = torch.tensor(list(RANGES.values()), dtype=torch.float64).T
    parameters = arrays["parameters"]
    assert torch.all((parameters >= low) & (parameters < high))
    # Uniform: no tenth of any interval is empty, and the means are those of the intervals.
    tenths = ((parameters - low) / (high - low) * 10).long()
    assert all(len(column.unique()) == 10 for column in tenths.T)
    assert torch.all((parameters.mean(0) - (low + high) / 2).abs() < 4 * (high - low) / (12 * number) ** 0.5)
    assert arrays["kappa"].min() >= 0.1 and arrays["kappa"].max() <= 2.1
    kx, ky, ax, ay, alpha = parameters[7].tolist()
    for row, column in ((0, 0), (2, 5), (7, 3)):
        x, y = column / (n - 1), row / (n - 1)
        turned_x = np.cos(alpha) * (x - 0.5) - np.sin(alpha) * (y - 0.5) + 0.5
        turned_y = np.sin(alpha) * (x - 0.5) + np.cos(alpha) * (y - 0.5) + 0.5
        expected = 1.1 + np.cos(kx * np.pi * (turned_x + ax)) * np.cos(ky * np.pi * (turned_y + ay))
        assert arrays["kappa"][7, row, column].item() == pytest.approx(expected, rel=1e-12)
    line = np.linspace(0, 1, n)
    f = 32 * np.exp(-4 * ((line - 0.25) ** 2 + (line[:, None] - 0.25) ** 2))
    np.testing.assert_allclose(arrays["u"][7].numpy(), solve_poisson(arrays["kappa"][7].numpy(), f), rtol=1e-12)
    edge = torch.ones(n, n, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert torch.all(arrays["u"][:, edge] == 0) and torch.all(arrays["u"][:, ~edge] > 0)


def test_solutions_do_not_depend_much_on_the_mesh():
    # The parameters of a sample are the same on every mesh, so its solutions approach each other.
    coarse, middle, fine = (generate(Poisson(mesh=n), 4, 1, SERIAL).arrays for n in (17, 33, 65))
    assert torch.equal(coarse["parameters"], fine["parameters"])
    first = (coarse["u"] - middle["u"][:, ::2, ::2]).square().mean().sqrt()
    second = (middle["u"] - fine["u"][:, ::2, ::2]).square().mean().sqrt()
    assert 3 < first / second < 5


@pytest.mark.parametrize("smoothness", [0.5, 1.0, 1.7])
def test_the_torus_has_the_covariance_of_the_square(smoothness):
    n, length, variance = 6, 0.25, 1.7
    roots = embedding(n, length, variance, smoothness)
    on_torus = np.fft.ifft2(roots**2).real[:n, :n]
    line = np.arange(n) / n
    expected = covariance(np.hypot(line[:, None], line), length, variance, smoothness)
    np.testing.assert_allclose(on_torus, expected, atol=1e-6)
    assert expected[0, 0] == variance


def test_half_a_smoothness_is_the_exponential_covariance():
    distance = np.linspace(0, 2, 9)
    np.testing.assert_allclose(covariance(distance, 0.3, 2.0, 0.5), 2 * np.exp(-distance / 0.3), rtol=1e-12)


def test_darcy_samples_have_the_stated_field():
    problem = Darcy(mesh=4, correlation_length=0.3, variance=0.5, smoothness=0.5)
    number = 1500
    arrays = generate(problem, number, 0, SERIAL).arrays
    field = arrays["k"].log().reshape(number, 16)
    line = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    x, y = line.repeat(4), line.repeat_interleave(4)
    expected = 0.5 * torch.exp(-torch.hypot(x - x[:, None], y - y[:, None]) / 0.3)
    # Deviations of a mean and of a covariance of normal numbers: a little more than 4 of them.
    assert field.mean(0).abs().max() < 4.5 * (0.5 / number) ** 0.5
    assert (field.T @ field / number - expected).abs().max() < 4.5 * 0.5 * (2 / number) ** 0.5
    pressure, outflow = solve_darcy(arrays["k"][9].numpy(), 1.0, 0.0)
    assert np.array_equal(arrays["pressure"][9].numpy(), pressure) and arrays["flux"][9].item() == outflow


def test_data_sets_of_poisson():
    samples = generate(Poisson(mesh=5), 3, 0, SERIAL)
    found = samples.dataset()
    assert found.channels == ("kappa", "x", "y") and found.inputs.shape == (3, 3, 5, 5)
    x, y = np.meshgrid(np.linspace(0, 1, 5), np.linspace(0, 1, 5))
    assert torch.equal(found.inputs[:, 0], samples.arrays["kappa"])
    assert np.array_equal(found.inputs[1, 1], x) and np.array_equal(found.inputs[2, 2], y)
    assert torch.equal(found.targets, samples.arrays["u"])
    assert torch.equal(found.parameters, samples.arrays["parameters"])
    kappa = coefficient(x, y, *samples.arrays["parameters"][0].tolist())
    np.testing.assert_allclose(found.inputs[0, 0], kappa, rtol=1e-12)
    other = samples.dataset(["f", "kappa"], dtype=torch.float32)
    assert other.inputs.dtype == other.targets.dtype == torch.float32 and other.inputs.shape == (3, 2, 5, 5)
    np.testing.assert_allclose(other.inputs[2, 0], source(x, y), rtol=1e-6)


def test_data_sets_of_darcy():
    samples = generate(Darcy(mesh=4), 3, 0, SERIAL)
    pressure, flux = samples.dataset(), samples.dataset(["log_k", "x"], "flux")
    assert torch.equal(pressure.inputs[:, 0], samples.arrays["k"]) and pressure.targets.shape == (3, 4, 4)
    assert torch.equal(flux.targets, samples.arrays["flux"]) and flux.targets.shape == (3, 1)
    assert torch.equal(flux.inputs[:, 0], samples.arrays["k"].log())
    assert flux.inputs[0, 1, 2].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert flux.parameters.shape == (3, 0)


def plain(number=10):
    inputs = torch.arange(number * 2 * 9, dtype=torch.float64).reshape(number, 2, 3, 3)
    return PdeDataset(inputs, inputs[:, 1] ** 2, ("a", "b"), inputs[:, :, 0, 0])


def test_a_split_is_seeded_and_complete():
    dataset = plain()
    train, validation = split(dataset, 3, seed=4)
    firsts = [part.inputs[:, 0, 0, 0].tolist() for part in (train, validation)]
    assert [len(part) for part in firsts] == [7, 3] and all(part == sorted(part) for part in firsts)
    assert sorted(firsts[0] + firsts[1]) == dataset.inputs[:, 0, 0, 0].tolist()
    for part in (train, validation):
        assert torch.equal(part.targets, part.inputs[:, 1] ** 2) and torch.equal(
            part.parameters, part.inputs[..., 0, 0]
        )
    again, others = split(dataset, 3, seed=4)[1], [split(dataset, 3, seed=seed)[1] for seed in range(5, 10)]
    assert torch.equal(again.inputs, validation.inputs)
    assert not all(torch.equal(other.inputs, validation.inputs) for other in others)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_standardization_by_the_training_samples(dtype):
    samples = generate(Poisson(mesh=5), 12, 0, SERIAL).dataset(["kappa", "f", "x"], dtype=dtype)
    train, validation = split(samples, 4)
    found = Standardization.of(train)
    inside, outside = found.apply(train), found.apply(validation)
    assert inside.inputs.dtype == dtype and inside.channels == train.channels
    close = 1e-12 if dtype == torch.float64 else 2e-5
    for channel in range(3):
        values = [value for sample in train.inputs[:, channel].tolist() for row in sample for value in row]
        mean = sum(values) / len(values)
        deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        expected = (validation.inputs[:, channel].double() - mean) / deviation
        assert torch.allclose(outside.inputs[:, channel].double(), expected, rtol=0, atol=close * 10)
    assert abs(inside.targets.mean()) < close and abs(inside.targets.square().mean() - 1) < close * 10
    assert torch.allclose(found.raw_targets(outside.targets), validation.targets, rtol=0, atol=close)
    # What the mean square error of predicting the mean is in both units.
    raw = (train.targets - found.target_mean).square().mean()
    assert torch.allclose(inside.targets.square().mean() * found.target_scale**2, raw, rtol=1e-5)


def test_what_never_differs_is_only_centered():
    dataset = PdeDataset(torch.full((4, 1, 2, 2), 0.1), torch.full((4, 1), 7.0), ("same",))
    found = Standardization.of(dataset).apply(dataset)
    assert found.inputs.abs().max() < 1e-7 and torch.equal(found.targets, torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Poisson(mesh=2), "^mesh=2 must be at least 3; use 32"),
        (lambda: Poisson(mesh=8.0), "^mesh=8.0 must be an integer; use 32"),
        (lambda: Darcy(mesh=1), "^mesh=1 must be at least 2; use 32"),
        (lambda: Darcy(variance=0), "^variance=0 must be positive and finite; use 1.0"),
        (lambda: Darcy(correlation_length="long"), "^correlation_length='long' must be a number; use 0.2"),
        (lambda: Darcy(mesh=4, correlation_length=5.0).sample(0, 0), "^correlation_length=.* is too long"),
        (lambda: generate(PROBLEMS[0], 0, 0, SERIAL), "^num_samples=0 must be at least 1; use 10000"),
        (lambda: generate(PROBLEMS[0], 1, -1, SERIAL), "^seed=-1 must be at least 0; use 0"),
        (lambda: split(plain(), 10), "^num_val=10 must leave some of the 10 samples for training; use 1"),
        (lambda: split(plain(), 0), "^num_val=0 must be at least 1"),
        (lambda: PdeDataset(torch.zeros(2, 1, 3, 3), torch.zeros(3, 1), ("a",)), r"^targets.shape=\(3, 1\) must begin"),
        (lambda: PdeDataset(torch.zeros(2, 3, 3), torch.zeros(2, 1), ("a",)), r"^inputs.shape=\(2, 3, 3\) must be"),
        (lambda: PdeDataset(torch.zeros(2, 2, 3, 3), torch.zeros(2, 1), ("a",)), "with C=1 channels"),
        (lambda: PdeDataset(torch.zeros(2, 1, 3, 3), torch.zeros(2), ("a",)), r"^targets.shape=\(2,\) must be"),
        (lambda: PdeDataset(torch.zeros(2, 1, 3, 3), torch.full((2, 1), np.nan), ("a",)), "^targets holds a value"),
        (lambda: PdeDataset(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1).double(), ("a",)), "^targets is torch.float64"),
        (lambda: PdeDataset(None, torch.zeros(2, 1), ("a",)), "^inputs is NoneType, must be a tensor"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"channels": ["kappa", "k"]}, r"channels=\['kappa', 'k'\] must be different names of kappa, f, x, y; use"),
        ({"channels": ["x", "x"]}, "must be different names"),
        ({"channels": []}, "must be different names"),
        ({"channels": "x"}, "must be different names"),
        ({"target": "pressure"}, "^target='pressure' must be u; use u"),
        ({"dtype": torch.int64}, "^dtype=torch.int64 is no floating-point type; use torch.float32"),
    ],
)
def test_bad_choices_of_a_data_set(wrong, message):
    samples = generate(Poisson(mesh=3), 1, 0, SERIAL)
    with pytest.raises((ValueError, TypeError), match=message):
        samples.dataset(**wrong)
