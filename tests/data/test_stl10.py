"""STL-10: the reader's order of pixels and labels, partial, missing and damaged files."""

import dataclasses
import hashlib
import logging

import pytest
import torch

from xbraid_py.data import image_sets
from xbraid_py.data.image_sets import load_images, load_stl10

FILES = ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"]
NUMBERS = 3 * 96 * 96


def value(start, color, row, column):
    return (start + 100 * color + 7 * row + 13 * column) % 256


def image(start):
    """Literal image: color by color, column by column, each from top to bottom."""
    return bytes(value(start, color, row, column) for color in range(3) for column in range(96) for row in range(96))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train_X.bin").write_bytes(image(0) + image(50) + image(200))
    (tmp_path / "train_y.bin").write_bytes(bytes([10, 1, 4]))
    (tmp_path / "test_X.bin").write_bytes(image(9))
    (tmp_path / "test_y.bin").write_bytes(bytes([2]))
    (tmp_path / "class_names.txt").write_text("".join(f"class {k}\n" for k in range(10)))
    return tmp_path


def test_rows_and_classes(folder, caplog):
    with caplog.at_level(logging.WARNING):
        sets = load_stl10(folder)
    assert sets.train.pixels.shape == (3, 3, 96, 96) and sets.train.pixels.dtype == torch.uint8
    assert sets.train.pixels.is_contiguous()
    for number, start in enumerate((0, 50, 200)):
        for place in ((0, 0, 0), (0, 0, 95), (0, 95, 0), (1, 30, 64), (2, 95, 95)):
            assert sets.train.pixels[number][place] == value(start, *place)
    assert sets.test.pixels[0, 1, 2, 90] == value(9, 1, 2, 90)
    assert sets.train.labels.tolist() == [9, 0, 3] and sets.test.labels.tolist() == [1]
    assert sets.train.labels.dtype == torch.int64
    assert sets.num_classes == 10 and sets.names[9] == "class 9" and not sets.complete
    assert sets.found == (
        "training (3 of 5,000 images): train_X.bin, train_y.bin",
        "test (1 of 8,000 images): test_X.bin, test_y.bin",
    )
    assert [record.message for record in caplog.records] == [
        *(f"{folder / name} does not hold the published values (its MD5 differs)" for name in FILES),
        f"STL-10 in {folder} is not the whole published set: {'; '.join(sets.found)}",
    ]


def test_a_whole_set_is_loaded_without_a_word(folder, caplog, monkeypatch):
    digests = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in FILES}
    monkeypatch.setattr(image_sets, "DIGESTS", digests)
    monkeypatch.setattr(image_sets, "STL10", dataclasses.replace(image_sets.STL10, num_train=3, num_test=1))
    with caplog.at_level(logging.WARNING):
        assert load_stl10(folder).complete
    assert not caplog.records


def test_unpacked_archive_beside_other_sets(folder, monkeypatch):
    unpacked = folder / "stl10_binary"
    unpacked.mkdir()
    for name in FILES:
        (folder / name).rename(unpacked / name)
    monkeypatch.setenv("XBRAID_DATA", str(folder))
    sets = load_images("stl10")
    assert sets.train.labels.tolist() == [9, 0, 3]
    assert sets.names == () and sets.found[-1] == "missing: class_names.txt"


@pytest.mark.parametrize("gone", [[name] for name in FILES] + [FILES[2:], FILES])
def test_missing_files(folder, gone):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_stl10(folder)
    places = f"{folder} or {folder / 'stl10_binary'}" if gone == FILES else folder
    assert str(caught.value).startswith(f"STL-10 needs {' and '.join(gone)}, not found in {places}. It comes from")
    for part in ("cs.stanford.edu/~acoates/stl10", "--data_dir", "stl10/ with the variable XBRAID_DATA"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_X.bin", b"", "is empty; it must hold a multiple of 27648 bytes, such as 276480000 for 10,000 images"),
        ("train_X.bin", bytes(NUMBERS - 1), "ends within a record: it has 27647 bytes; it must hold a multiple of"),
        ("train_X.bin", bytes(2 * NUMBERS), "holds 2 images but {folder}/train_y.bin holds 3 labels; entry k of both"),
        ("train_y.bin", b"", "is empty; it must hold a multiple of 1 bytes"),
        ("train_y.bin", bytes([1, 0, 4]), "holds the label 0 at record 1, must lie in 1 .. 10"),
        ("test_y.bin", bytes([11]), "holds the label 11 at record 0, must lie in 1 .. 10"),
        ("class_names.txt", b"airplane\nbird\n", "holds 2 names of classes, must hold 10, one a line"),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_stl10(folder)
    assert str(caught.value).startswith(f"{folder / name} {message.format(folder=folder)}")


def test_published_files(caplog):
    try:
        with caplog.at_level(logging.WARNING):
            sets = load_stl10()
    except FileNotFoundError as missing:
        pytest.skip(f"PUBLISHED STL-10 FILES NOT FOUND: {missing}")
    assert not caplog.records and sets.complete
    # As published: 500 training and 800 test images a class.
    assert torch.bincount(sets.train.labels).tolist() == [500] * 10
    assert torch.bincount(sets.test.labels).tolist() == [800] * 10
