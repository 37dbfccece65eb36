"""The peaks data: function, bands, draws, the published files and every refusal of bad input."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from xbraid_py.data import Dataset, peaks


def columns(dataset):
    """The points of a data set as a set of grid indices."""
    index = ((dataset.features.double() + 3) * (peaks.GRID_SIZE - 1) / 6).round().long()
    return set(map(tuple, index.T.tolist()))


def test_function_has_the_values_matlab_prints():
    # peaks(5): rows are y = -3, -1.5, 0, 1.5, 3, columns x.
    printed = [
        [0.0001, 0.0042, -0.2450, -0.0298, -0.0000],
        [-0.0005, 0.3265, -5.6803, -0.4405, 0.0036],
        [-0.0365, -2.7736, 0.9810, 3.2695, 0.0331],
        [-0.0031, 0.4784, 7.9966, 1.1853, 0.0044],
        [0.0000, 0.0312, 0.2999, 0.0320, 0.0000],
    ]
    values = peaks.peaks_function(*peaks.mesh(5).numpy()).reshape(5, 5)
    assert np.abs(values - printed).max() <= 0.5001e-4


def slow_height(x, y):
    """Literal reference: one point, in plain Python."""
    first = 3 * (1 - x) ** 2 * math.exp(-x * x - (y + 1) ** 2)
    second = 10 * (x / 5 - x**3 - y**5) * math.exp(-x * x - y * y)
    return first - second - math.exp(-((x + 1) ** 2) - y * y) / 3


def test_class_is_the_band_of_equal_height():
    line = [-3 + 6 * k / 255 for k in range(256)]
    heights = [[slow_height(x, y) for x in line] for y in line]
    low = min(map(min, heights))
    band = (max(map(max, heights)) - low) / 5
    expected = [[min(4, int((z - low) / band)) for z in row] for row in heights]
    x, y = peaks.mesh(256).numpy()
    assert np.array_equal(peaks.class_of(x, y).reshape(256, 256), expected)
    assert peaks.band_edges() == pytest.approx([low + k * band for k in range(6)], rel=1e-14, abs=1e-13)
    assert peaks.class_names()[::4] == ["0: -6.5 to -3.6", "4: 5.2 to 8.1"]


def test_points_beyond_the_extrema_of_the_grid_have_a_class():
    top, bottom = (-0.009318, 1.581365), (0.228279, -1.625535)
    assert peaks.peaks_function(*top) > peaks.band_edges()[-1]
    assert peaks.peaks_function(*bottom) < peaks.band_edges()[0]
    assert (peaks.class_of(*top), peaks.class_of(*bottom)) == (4, 0)


def test_mesh_runs_through_x_first():
    assert peaks.mesh(3).tolist() == [[-3, 0, 3, -3, 0, 3, -3, 0, 3], [-3, -3, -3, 0, 0, 0, 3, 3, 3]]
    assert peaks.mesh(2, torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match=r"resolution=1 must be at least 2; use 200"):
        peaks.mesh(1)


@pytest.mark.parametrize(("num_train", "num_val"), [(5000, 5000), (5, 1), (8990, 65536 - 8990)])
def test_draw_is_equal_disjoint_and_of_grid_points(num_train, num_val):
    train, validation = peaks.generate(num_train, num_val, seed=3)
    assert train.features.shape == (2, num_train) and validation.features.shape == (2, num_val)
    assert torch.bincount(train.labels, minlength=5).tolist() == [num_train // 5] * 5
    assert len(columns(train)) == num_train and len(columns(validation)) == num_val
    assert not columns(train) & columns(validation)
    grid = set(map(tuple, peaks.mesh(256).T.tolist()))
    for part in (train, validation):
        assert grid.issuperset(map(tuple, part.features.T.tolist()))
        assert np.array_equal(part.labels, peaks.class_of(*part.features.numpy()))
        assert part.num_classes == 5


def test_validation_is_uniform_over_the_rest():
    _, validation = peaks.generate(5000, 20000)
    x, y = peaks.mesh(256).numpy()
    left = np.bincount(peaks.class_of(x, y)) - 1000
    share = torch.bincount(validation.labels) / 20000
    # Five standard deviations of a frequency.
    assert np.abs(share.numpy() - left / left.sum()).max() < 5 * 0.5 / math.sqrt(20000)


def test_training_is_shuffled():
    train, _ = peaks.generate(5000, 1)
    assert torch.bincount(train.labels[:1000], minlength=5).min() > 100


def test_draws_depend_on_their_arguments_alone():
    drawn = peaks.generate(100, 50, seed=7)
    torch.manual_seed(5)
    for a, b, other in zip(drawn, *(peaks.generate(100, 50, s, dtype=torch.float32) for s in (7, 8)), strict=True):
        assert b.features.dtype == torch.float32, "the same points, rounded"
        assert torch.equal(a.features.float(), b.features) and torch.equal(a.labels, b.labels)
        assert not torch.equal(b.features, other.features)
    assert torch.equal(drawn[0].features, peaks.generate(100, 500, seed=7)[0].features), "whatever the validation is"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_train": 5001}, ValueError, "num_train=5001 is not a multiple of the 5 classes; use 5000 or 5005"),
        ({"num_train": 0}, ValueError, "num_train=0 must be at least 5; use 5000"),
        ({"num_train": 8995}, ValueError, "num_train=8995 needs 1799 points of class 4, of which the grid has 1798; "),
        ({"num_val": 60537}, ValueError, "num_val=60537 is more than the 60536 grid points that num_train=5000 "),
        ({"num_val": 0}, ValueError, "num_val=0 must be at least 1; use 5000"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0; use 0"),
        ({"num_train": 50.0}, TypeError, "num_train=50.0 must be an integer; use 5000"),
        ({"num_val": True}, TypeError, "num_val=True must be an integer; use 5000"),
        ({"dtype": torch.int64}, TypeError, "dtype=torch.int64 is no floating-point type; use torch.float64"),
    ],
)
def test_generate_refuses(options, error, message):
    with pytest.raises(error) as caught:
        peaks.generate(**options)
    assert str(caught.value).startswith(message)


def test_dataset_is_frozen_and_knows_its_sizes():
    dataset = Dataset(torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), 2)
    assert (dataset.num_features, dataset.num_samples) == (3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.num_classes = 3


@pytest.mark.parametrize(
    ("features", "labels", "num_classes", "error", "message"),
    [
        (np.zeros((2, 3)), torch.tensor([0, 1, 0]), 2, TypeError, "features is ndarray, "),
        (torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 1, 0]), 2, TypeError, "features is torch.int32, "),
        (torch.zeros(2, 3), torch.zeros(3), 2, TypeError, "labels is torch.float32, "),
        (torch.zeros(3), torch.tensor([0, 1, 0]), 2, ValueError, "features.shape=(3,) must be (F, B)"),
        (torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64), 2, ValueError, "features.shape=(2, 0) must be (F, B)"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 0]), 2, ValueError, "labels.shape=(3,) must hold one label for each"),
        (torch.zeros(2, 3), torch.tensor([0, 0, 0]), 1, ValueError, "num_classes=1 must be at least 2"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), 2, ValueError, "labels holds values from 0 to 2, must lie in 0"),
        (torch.zeros(2, 3), torch.tensor([0, 1, -1]), 2, ValueError, "labels holds values from -1 to 1, must lie"),
    ],
)
def test_dataset_refuses(features, labels, num_classes, error, message):
    with pytest.raises(error) as caught:
        Dataset(features, labels, num_classes)
    assert str(caught.value).startswith(message)


def test_balanced_validation_points():
    train, validation = peaks.generate(500, 250, 3, balanced=True)
    same, square = peaks.generate(500, 250, 3)
    assert torch.equal(train.features, same.features), "whatever the validation points are"
    assert validation.labels.bincount().tolist() == [50] * 5
    assert torch.equal(validation.labels, torch.from_numpy(peaks.class_of(*validation.features.numpy())))
    points = [set(map(tuple, part.features.T.tolist())) for part in (train, validation)]
    assert len(points[1]) == 250 and not points[0] & points[1]
    assert square.labels.bincount().max() > 150
    for number, message in (
        (251, "num_val=251 is not a multiple of the 5 classes; use 250 or 255"),
        (9000, "use at most 8490"),
    ):
        with pytest.raises(ValueError, match=message):
            peaks.generate(500, number, balanced=True)
