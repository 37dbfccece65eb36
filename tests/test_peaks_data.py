"""The peaks data: function, bands, draws, the published files and every refusal of bad input."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch

from xbraid_py.data import Dataset, peaks
from xbraid_py.data.dataset import data_folder, read_features, read_labels


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


def test_seed_decides():
    for a, b, c in zip(*(peaks.generate(100, 50, seed) for seed in (7, 7, 8)), strict=True):
        assert torch.equal(a.features, b.features) and torch.equal(a.labels, b.labels)
        assert not torch.equal(a.features, c.features)


def test_training_points_do_not_depend_on_validation_nor_on_other_random_states():
    train, _ = peaks.generate(100, 50, seed=1)
    torch.manual_seed(5)
    assert torch.equal(train.features, peaks.generate(100, 500, seed=1)[0].features)


def test_float32_rounds_the_same_points():
    for a, b in zip(peaks.generate(50, 50), peaks.generate(50, 50, dtype=torch.float32), strict=True):
        assert b.features.dtype == torch.float32
        assert torch.equal(a.features.float(), b.features) and torch.equal(a.labels, b.labels)


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


@pytest.fixture
def published():
    folder = data_folder("peaks")
    if not folder.is_dir():
        pytest.skip(f"PUBLISHED PEAKS FILES NOT FOUND in {folder}: name the folder above it with XBRAID_DATA")
    return folder


def test_published_points_agree_with_our_classes(published, caplog):
    train, validation = peaks.load()
    assert not caplog.records
    for part, number in ((train, 5000), (validation, 200)):
        assert torch.bincount(part.labels).tolist() == [number // 5] * 5
        assert np.array_equal(part.labels, peaks.class_of(*part.features.numpy()))
    assert train.features[:, 0].tolist() == [5.76470588235294e-01, -1.89411764705882e00]


def test_part_of_the_published_points(published):
    train, validation = peaks.load(published, num_train=50, num_val=10, dtype=torch.float32)
    complete, _ = peaks.load(published)
    assert validation.num_samples == 10
    rows = [1000 * k + i for k in range(5) for i in range(10)]
    assert torch.equal(train.features, complete.features[:, rows].float())


POINTS = "0 0\n-3.0e0\t1.5\n1 2\n-1 -2\n0.25 3\n"
ONE_HOT = "1 0 0 0 0\n0 1.0 0 0 0\n0 0 1 0 0\n0 0 0 1 0\n0 0 0 0 1\n"


@pytest.fixture
def folder(tmp_path):
    for part in ("training", "validation"):
        (tmp_path / f"features_{part}.dat").write_text(POINTS)
        (tmp_path / f"labels_{part}.dat").write_text(ONE_HOT)
    return tmp_path


def test_own_files_load_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        train, validation = peaks.load(folder)
    assert train.features.tolist() == [[0, -3, 1, -1, 0.25], [0, 1.5, 2, -2, 3]]
    assert train.features.is_contiguous() and train.labels.tolist() == [0, 1, 2, 3, 4]
    assert [record.message for record in caplog.records] == [
        f"{folder / name} is not the published file (its SHA-256 differs)" for name in peaks.PUBLISHED
    ]
    assert torch.equal(validation.features, train.features)


def test_folder_from_argument_variable_or_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XBRAID_DATA", str(tmp_path))
    assert data_folder("peaks") == tmp_path / "peaks"
    assert data_folder("peaks", tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("XBRAID_DATA")
    assert data_folder("peaks").parts[-4:] == ("..", "shared", "data", "peaks")


@pytest.mark.parametrize("name", list(peaks.PUBLISHED))
def test_missing_file(folder, monkeypatch, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        peaks.load(folder)
    for part in (str(folder / name), peaks.ORIGIN, "--data_dir", "XBRAID_DATA"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3\n", "line 2: found '3': 1 number(s) where every row holds 2; a good row is '0.5 -1.25'"),
        ("1 2 3\n", "line 1: found '1 2 3': 3 number(s) where every row holds 2; a good row is '0.5 -1.25'"),
        ("1 2\n\n3 4\n", "line 2: found '': 0 number(s) where every row holds 2; a good row is '0.5 -1.25'"),
        ("1 2\n3 abc\n", "line 2: found '3 abc': 'abc' is not a finite number; a good row is '0.5 -1.25'"),
        ("1,2\n", "line 1: found '1,2': '1,2' is not a finite number; a good row is '0.5 -1.25'"),
        ("1 nan\n", "line 1: found '1 nan': 'nan' is not a finite number; a good row is '0.5 -1.25'"),
        ("1 2\n3 4\n-inf 4\n", "line 3: found '-inf 4': '-inf' is not a finite number; a good row is '0.5 -1.25'"),
    ],
)
def test_bad_feature_row(folder, text, message):
    path = folder / "features_training.dat"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        peaks.load(folder)
    assert str(caught.value) == f"{path}, {message}"


@pytest.mark.parametrize("row", ["0 1 1 0 0", "0 0 0 0 0", "0 2 0 0 0", "0 0.5 0.5 0 0", "2 -1 0 0 0"])
def test_label_row_that_is_not_one_hot(folder, row):
    path = folder / "labels_validation.dat"
    path.write_text("1 0 0 0 0\n" + row + "\n")
    with pytest.raises(ValueError) as caught:
        peaks.load(folder)
    rule = "not one-hot (a single 1, otherwise 0); a good row is '0 1 0 0 0'"
    assert str(caught.value) == f"{path}, line 2: found '{row}': {rule}"


def test_short_label_row(folder):
    (folder / "labels_training.dat").write_text("1 0 0 0\n")
    with pytest.raises(
        ValueError, match=r"line 1: found '1 0 0 0': 4 number\(s\) where every row holds 5; .*'0 1 0 0 0'"
    ):
        peaks.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"features_training.dat has no rows; .* as in '0.5 -1.25'"),
        (b"\n \n", r"features_training.dat has no rows; .* as in '0.5 -1.25'"),
        (bytes(range(128, 256)), r"line 1: .*\.\.\.' is not a finite number"),
    ],
)
def test_empty_file_and_file_that_is_no_text(folder, content, message):
    (folder / "features_training.dat").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        peaks.load(folder)


def test_features_and_labels_of_different_lengths(folder):
    (folder / "labels_training.dat").write_text(ONE_HOT * 2)
    with pytest.raises(ValueError, match=r"features_training.dat has 5 rows but .*labels_training.dat has 10;"):
        peaks.load(folder)


@pytest.mark.parametrize("number", [7, 10])
def test_more_points_than_the_files_hold(folder, number):
    with pytest.raises(ValueError, match=rf"num_val={number} must be a multiple of the 5 classes, .*; use 5$"):
        peaks.load(folder, num_val=number)


def test_number_of_columns_is_that_of_the_first_row(tmp_path):
    path = tmp_path / "any.txt"
    path.write_text("1 2 3\n4 5 6\n")
    assert read_features(path).tolist() == [[1, 4], [2, 5], [3, 6]]
    path.write_text("0 1 0\n1 0 0")
    labels, num_classes = read_labels(path)
    assert (labels.tolist(), labels.dtype, num_classes) == ([1, 0], torch.int64, 3)
    path.write_text("1 2 3\n4 5\n")
    with pytest.raises(
        ValueError, match=r"line 2: .*2 number\(s\) where every row holds 3; a good row is '0.5 0.5 -1.25'"
    ):
        read_features(path)


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
