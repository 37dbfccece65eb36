"""The files of the peaks data set: published ones, own ones, damaged ones."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from xbraid_py.data import dataset, peaks
from xbraid_py.data.dataset import data_folder, read_features, read_labels


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


def test_published_validation_points_are_in_part_training_points(published):
    """As benchmarks/results/nested says."""
    train, validation = peaks.load(published)
    points = {tuple(point) for point in train.features.T.tolist()}
    assert sum(tuple(point) in points for point in validation.features.T.tolist()) == 72
    assert validation.features.shape[1] == 200


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
    monkeypatch.setattr(dataset, "user_data_path", lambda name, appauthor: tmp_path / "user" / name)
    assert data_folder("peaks") == tmp_path / "user" / "xbraid_py" / "peaks"
    with pytest.raises(FileNotFoundError, match=f"without both it is looked for in {data_folder('peaks')}"):
        peaks.load(tmp_path)


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
