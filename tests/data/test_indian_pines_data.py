"""Indian Pines: standardization, where the scene comes from, and the scene itself."""

import importlib.util
import logging
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scenes import real, scene, write, write_split

from xbraid_py.data import indian_pines
from xbraid_py.data.indian_pines import CUBE, TRUTH

SMALL = {"num_train": 40}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, *scene())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", [0, 5])
def test_bands_are_standardized_by_the_training_pixels_alone(folder, seed, dtype):
    cube, truth = scene()
    found = indian_pines.load(folder, num_train=40, seed=seed, dtype=dtype)
    rows, columns, bands = cube.shape
    assert found.pixels.shape == (bands, rows * columns) and found.pixels.dtype == dtype
    places = found.train_places.tolist()
    assert len(set(places)) == 40
    for band in range(bands):
        seen = [float(cube[place // columns, place % columns, band]) for place in places]
        mean = sum(seen) / len(seen)
        deviation = (sum((value - mean) ** 2 for value in seen) / len(seen)) ** 0.5
        expected = [(float(value) - mean) / deviation for row in cube[:, :, band] for value in row]
        assert found.pixels[band].tolist() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_parts_are_the_pixels_of_their_places(folder):
    _, truth = scene()
    found = indian_pines.load(folder, **SMALL)
    assert torch.equal(found.truth, torch.from_numpy(truth.astype(np.int64) - 1))
    classes = found.truth.flatten()
    chosen = set(found.train_places.tolist())
    rest = torch.tensor([place for place, number in enumerate(classes.tolist()) if number >= 0 and place not in chosen])
    for part, places in ((found.train, found.train_places), (found.validation, rest)):
        assert torch.equal(part.features, found.pixels[:, places]) and part.features.is_contiguous()
        assert torch.equal(part.labels, classes[places]) and part.num_classes == 4
    # By default as many as the issue of the data asks for, if there are.
    with pytest.raises(ValueError, match="^num_train=1000 must leave each of the 4 classes"):
        indian_pines.load(folder)


@pytest.mark.parametrize("name", [CUBE, TRUTH])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    for source in ("auto", "files"):
        with pytest.raises(FileNotFoundError) as caught:
            indian_pines.load(folder, source=source, **SMALL)
        assert str(caught.value).startswith(
            f"{folder / name} not found. It comes from https://doi.org/10.4231/R7RX991C"
        )
        for part in (CUBE, TRUTH, "tensorly", "--source tensorly", "--data_dir", "XBRAID_DATA"):
            assert part in str(caught.value)


def test_own_files_are_read_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        indian_pines.load(folder, **SMALL)
    expected = [f"{folder / name} is not the published file (its SHA-256 differs)" for name in (CUBE, TRUTH)]
    assert [record.message for record in caplog.records] == expected


@pytest.fixture
def package(monkeypatch):
    """A package tensorly that holds the small scene, as floating-point numbers."""
    cube, truth = scene()
    module = ModuleType("tensorly.datasets")
    bunch = SimpleNamespace(tensor=cube.astype(float), ticks=[truth, list(range(6))])
    module.load_indian_pines = lambda: bunch
    monkeypatch.setitem(sys.modules, "tensorly", ModuleType("tensorly"))
    monkeypatch.setitem(sys.modules, "tensorly.datasets", module)
    monkeypatch.setattr(indian_pines, "_has_tensorly", lambda: True)
    return bunch


def same(one, other):
    parts = [(one.pixels, other.pixels), (one.truth, other.truth), (one.train_places, other.train_places)]
    for name in ("train", "validation"):
        a, b = getattr(one, name), getattr(other, name)
        parts += [(a.features, b.features), (a.labels, b.labels)]
    return all(torch.equal(a, b) for a, b in parts)


def test_the_copy_in_a_package_is_the_same_scene(folder, package, monkeypatch, tmp_path_factory):
    files = indian_pines.load(folder, source="files", **SMALL)
    assert same(indian_pines.load(source="tensorly", **SMALL), files)
    package.tensor = package.tensor + 1000.0 * np.arange(20 * 17)[:, None].reshape(20, 17, 1)
    other = indian_pines.load(folder, source="tensorly", **SMALL)
    assert not same(other, files)
    # auto: the files if they are there or a folder is named, otherwise the package.
    monkeypatch.setenv("XBRAID_DATA", str(tmp_path_factory.mktemp("empty")))
    assert same(indian_pines.load(**SMALL), other)
    assert same(indian_pines.load(folder, **SMALL), files)
    with pytest.raises(FileNotFoundError):
        indian_pines.load(source="files", **SMALL)
    with pytest.raises(FileNotFoundError):
        indian_pines.load(tmp_path_factory.mktemp("empty"), **SMALL)
    monkeypatch.setenv("XBRAID_DATA", str(folder.parent))
    folder.rename(folder.parent / "indian_pines")
    assert same(indian_pines.load(**SMALL), files)


def test_errors_name_the_package(package):
    package.ticks[0] = package.ticks[0][:, :5]
    with pytest.raises(ValueError, match="^the scene in tensorly has 20 x 17 pixels, but its ground truth is uint8 of"):
        indian_pines.load(source="tensorly")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    monkeypatch.setitem(sys.modules, "tensorly.datasets", None)
    with pytest.raises(ValueError, match=r"^source=tensorly: .*; install tensorly \(pip install\), or use files$"):
        indian_pines.load(source="tensorly")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XBRAID_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/indian_pines/{CUBE} not found")):
        indian_pines.load()


def test_files_and_package_have_the_same_published_split(folder, package):
    write_split(folder, scene()[1], 60, 30)
    found = [indian_pines.load(folder, source=source, split="published") for source in ("files", "tensorly")]
    assert same(*found)


def test_names():
    assert len(indian_pines.names(16)) == 16 and indian_pines.names(16)[8] == "Oats"
    assert indian_pines.names(3) == ["class 1", "class 2", "class 3"]


# Labeled pixels of the 16 classes, as published.
COUNTS = [46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93]


def test_the_scene(caplog):
    found = real()
    assert not caplog.records
    assert found.pixels.shape == (200, 145 * 145) and found.truth.shape == (145, 145)
    counts = torch.bincount(found.truth[found.truth >= 0])
    assert counts.tolist() == COUNTS and sum(COUNTS) == 10249
    assert (found.train.num_samples, found.validation.num_samples) == (1000, 9249)
    shares = torch.bincount(found.train.labels, minlength=16)
    assert shares.min() >= 1 and torch.all((shares - counts * 1000 / 10249).abs() < 1)
    assert torch.equal(shares + torch.bincount(found.validation.labels), counts)
    train = found.train.features
    assert (
        found.pixels.isfinite().all()
        and train.mean(1).abs().max() < 1e-12
        and (train.std(1, correction=0) - 1).abs().max() < 1e-12
    )


def test_tensorly_holds_the_same_scene():
    pytest.importorskip("tensorly", reason="tensorly is not installed")
    files = real()
    assert same(indian_pines.load(source="tensorly"), files)
