"""CIFAR-10 and CIFAR-100: sound, partial, missing and damaged files, both kinds of labels, the published files."""

import dataclasses
import hashlib
import logging

import pytest
import torch

from xbraid_py.data import image_sets
from xbraid_py.data.image_sets import load_cifar10, load_cifar100, load_images

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def record(labels, start):
    """Literal record: its label bytes, then red, green and blue, row by row, each byte one more than the last."""
    return bytes(labels) + bytes((start + place) % 256 for place in range(3072))


def literal_pixel(start, color, row, column):
    return (start + 1024 * color + 32 * row + column) % 256


@pytest.fixture
def folder10(tmp_path):
    """Two batches of 2 and 3 images, 4 test images, and the names with the empty line that the published file has."""
    home = tmp_path / "ten"
    home.mkdir()
    (home / "data_batch_4.bin").write_bytes(b"".join(record([k], 10 * k) for k in (7, 8, 9)))
    (home / "data_batch_2.bin").write_bytes(b"".join(record([k], 10 * k) for k in (3, 1)))
    (home / "test_batch.bin").write_bytes(b"".join(record([k], k) for k in (0, 9, 4, 4)))
    (home / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return home


@pytest.fixture
def folder100(tmp_path):
    """Parts of unusual names; image k has the coarse class k % 20 and the fine class 99 - k."""
    home = tmp_path / "hundred"
    home.mkdir()
    for name, numbers in {"train_b": (5, 6), "train_a": (99, 21), "test_all": (40,)}.items():
        content = b"".join(record([k % 20, 99 - k], k) for k in numbers)
        (home / f"cifar100_{name}.bin").write_bytes(content)
    for name, number in (("coarse", 20), ("fine", 100)):
        (home / f"{name}_label_names.txt").write_text("".join(f"{name} {k}\n" for k in range(number)))
    return home


def test_batches_in_their_order(folder10, caplog):
    with caplog.at_level(logging.WARNING):
        sets = load_cifar10(folder10)
    assert sets.train.labels.tolist() == [3, 1, 7, 8, 9] and sets.test.labels.tolist() == [0, 9, 4, 4]
    assert sets.train.pixels.shape == (5, 3, 32, 32) and sets.train.pixels.dtype == torch.uint8
    assert sets.train.labels.dtype == torch.int64
    for image, start in enumerate((30, 10, 70, 80, 90)):
        for place in ((0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 7, 30), (2, 31, 31)):
            assert sets.train.pixels[image][place] == literal_pixel(start, *place)
    assert sets.num_classes == 10 and sets.names == tuple(NAMES) and not sets.complete
    assert sets.found == (
        "2 of 5 training batches (5 of 50,000 images): data_batch_2.bin, data_batch_4.bin",
        "test batch (4 of 10,000 images): test_batch.bin",
        "missing: data_batch_1.bin, data_batch_3.bin, data_batch_5.bin",
    )
    messages = [record.message for record in caplog.records]
    assert messages == [
        *(
            f"{folder10 / name} does not hold the published values (its SHA-256 differs)"
            for name in ("data_batch_2.bin", "data_batch_4.bin", "test_batch.bin")
        ),
        f"CIFAR-10 in {folder10} is not the whole published set: {'; '.join(sets.found)}",
    ]


def test_a_whole_set_is_loaded_without_a_word(folder10, caplog, monkeypatch):
    for place, name in enumerate(("data_batch_1.bin", "data_batch_3.bin", "data_batch_5.bin")):
        (folder10 / name).write_bytes(record([place], 0))
    digests = {name: hashlib.sha256((folder10 / name).read_bytes()).hexdigest() for name in image_sets.CIFAR10_FILES}
    monkeypatch.setattr(image_sets, "DIGESTS", digests)
    monkeypatch.setattr(image_sets, "CIFAR10", dataclasses.replace(image_sets.CIFAR10, num_train=8, num_test=4))
    with caplog.at_level(logging.WARNING):
        sets = load_cifar10(folder10)
    assert sets.complete and not caplog.records
    assert sets.train.labels.tolist() == [0, 3, 1, 1, 7, 8, 9, 2]
    assert [words.split(":")[0] for words in sets.found] == [
        "5 of 5 training batches (8 of 8 images)",
        "test batch (4 of 4 images)",
    ]


@pytest.mark.parametrize("fine", [True, False])
def test_both_kinds_of_labels(folder100, fine):
    sets = load_cifar100(folder100, fine)
    numbers = (99, 21, 5, 6)  # the files in the order of their names
    assert sets.train.labels.tolist() == [99 - k if fine else k % 20 for k in numbers]
    assert sets.test.labels.tolist() == [59 if fine else 0]
    for image, start in enumerate(numbers):
        assert sets.train.pixels[image, 2, 30, 1] == literal_pixel(start, 2, 30, 1)
    assert sets.num_classes == len(sets.names) == (100 if fine else 20)
    assert sets.names[3] == ("fine 3" if fine else "coarse 3")
    assert sets.found == (
        "training (4 of 50,000 images): cifar100_train_a.bin, cifar100_train_b.bin",
        "test (1 of 10,000 images): cifar100_test_all.bin",
        "missing: train.bin, test.bin",
    )


def test_the_published_name_goes_first(folder100, caplog):
    content = record([1, 2], 3)
    (folder100 / "train.bin").write_bytes(content)
    with caplog.at_level(logging.INFO):
        sets = load_cifar100(folder100)
    assert sets.train.labels.tolist() == [2]
    assert f"{folder100 / 'train.bin'}: SHA-256 {hashlib.sha256(content).hexdigest()}, not compared" in caplog.text


def test_names_are_not_necessary(folder10, folder100):
    (folder10 / "batches.meta.txt").unlink()
    sets = load_cifar10(folder10)
    assert sets.names == () and sets.found[-1].endswith("data_batch_5.bin, batches.meta.txt")
    (folder100 / "fine_label_names.txt").unlink()
    assert load_cifar100(folder100).names == () and len(load_cifar100(folder100, fine=False).names) == 20


def test_folders_from_the_variable(folder10, monkeypatch, tmp_path):
    monkeypatch.setenv("XBRAID_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_cifar10()
    home = tmp_path / "cifar10"
    places = home, home / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-bin"
    assert f"not found in {' or '.join(map(str, places))}. It" in str(caught.value)
    for place in reversed(places):
        place.parent.mkdir(exist_ok=True)
        folder10 = folder10.rename(place)
        assert load_cifar10().train.labels.tolist() == [3, 1, 7, 8, 9]
        folder10 = folder10.rename(tmp_path / "ten")
        home.rmdir() if home.is_dir() else None
    # The folder of an argument may be the one that the archive was unpacked in.
    folder10.rename(tmp_path / "cifar-10-batches-bin")
    assert len(load_cifar10(tmp_path).test.labels) == 4


@pytest.mark.parametrize(
    ("gone", "wanted"),
    [
        (["test_batch.bin"], "CIFAR-10 needs test_batch.bin, not found in {home}. It comes from"),
        (
            ["data_batch_2.bin", "data_batch_4.bin"],
            "CIFAR-10 needs one or more of data_batch_1.bin, data_batch_2.bin, data_batch_3.bin, data_batch_4.bin, "
            "data_batch_5.bin, not found in {home}. It",
        ),
        (
            ["data_batch_2.bin", "data_batch_4.bin", "test_batch.bin"],
            "data_batch_5.bin and test_batch.bin, not found in {home} or {home}/cifar-10-batches-bin. It",
        ),
    ],
)
def test_missing_files_of_cifar10(folder10, gone, wanted):
    for name in gone:
        (folder10 / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_cifar10(folder10)
    for part in (wanted.format(home=folder10), "www.cs.toronto.edu/~kriz/cifar.html", "--data_dir", "XBRAID_DATA"):
        assert part in str(caught.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_files_of_cifar100(folder100, part):
    for path in folder100.glob(f"cifar100_{part}*"):
        path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_cifar100(folder100)
    assert f"CIFAR-100 needs {part}.bin or cifar100_{part}*.bin, not found in {folder100}. It" in str(caught.value)
    assert "holds cifar100/ with the variable XBRAID_DATA" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_4.bin", b"", "is empty; it must hold a multiple of 3073 bytes, such as 30730000 for 10,000"),
        ("data_batch_4.bin", record([1], 0)[:-1], "ends within a record: it has 3072 bytes; it must hold a multiple"),
        ("test_batch.bin", record([1], 0) + b"\n", "ends within a record: it has 3074 bytes; it must hold a multiple"),
        ("data_batch_2.bin", record([9], 0) + record([10], 0), "holds the label 10 at record 1, must lie in 0 .. 9"),
        ("batches.meta.txt", b"airplane\n", "holds 1 names of classes, must hold 10, one a line"),
        ("batches.meta.txt", b"\xff\n" * 11, "holds 11 names of classes, must hold 10, one a line"),
    ],
)
def test_damaged_files_of_cifar10(folder10, name, content, message):
    (folder10 / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_cifar10(folder10)
    assert str(caught.value).startswith(f"{folder10 / name} {message}")


@pytest.mark.parametrize("fine", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([20, 0], "holds the coarse label 20 at record 0, must lie in 0 .. 19"),
        ([19, 100], "holds the fine label 100 at record 0, must lie in 0 .. 99"),
        ([0], "ends within a record: it has 3073 bytes; it must hold a multiple of 3074 bytes"),
    ],
)
def test_damaged_files_of_cifar100(folder100, fine, labels, message):
    path = folder100 / "cifar100_train_b.bin"
    path.write_bytes(record(labels, 0))
    with pytest.raises(ValueError) as caught:
        load_cifar100(folder100, fine)
    assert str(caught.value).startswith(f"{path} {message}")


def test_fine_is_a_bool(folder100):
    with pytest.raises(TypeError, match="fine='coarse' must be True or False; use True"):
        load_cifar100(folder100, "coarse")


def test_load_by_name(folder10, folder100):
    assert load_images("cifar10", folder10).train.labels.tolist() == [3, 1, 7, 8, 9]
    assert load_images("cifar100", folder100).num_classes == 100
    with pytest.raises(FileNotFoundError, match="STL-10 needs"):
        load_images("stl10", folder10)
    with pytest.raises(ValueError, match="name='mnist' is none of cifar10, cifar100, stl10; use 'cifar10'"):
        load_images("mnist", folder10)


def published(load):
    try:
        return load()
    except FileNotFoundError as missing:
        pytest.skip(f"PUBLISHED FILES NOT FOUND: {missing}")


def test_published_cifar10(caplog):
    with caplog.at_level(logging.WARNING):
        sets = published(load_cifar10)
    # Whatever batches are there hold the published values.
    assert "SHA-256" not in caplog.text and sets.complete == (not caplog.records)
    assert len(sets.train.labels) == 10000 * int(sets.found[0].split()[0])
    # As published: the test images' first classes, and 1,000 images a class.
    assert [sets.names[label] for label in sets.test.labels[:4]] == ["cat", "ship", "ship", "airplane"]
    assert torch.bincount(sets.test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize("fine", [True, False])
def test_published_cifar100(fine):
    sets = published(lambda: load_cifar100(fine=fine))
    number = 100 if fine else 20
    assert torch.bincount(sets.test.labels).tolist() == [10000 // number] * number
    assert torch.bincount(sets.train.labels).tolist() == [sets.train.num_samples // number] * number
    assert sets.names[0] == ("apple" if fine else "aquatic_mammals")
