"""MNIST: the reader of idx files, the four files and every refusal, standardized images, the order of minibatches."""

import gzip
import itertools
import logging
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.data import Batches, mnist
from xbraid_py.data.dataset import read_idx

# Code of the format, type in Python's struct, type in numpy.
KINDS = [(8, "B", "uint8"), (9, "b", "int8"), (11, "h", "int16"), (12, "i", "int32"), (13, "f", "f4"), (14, "d", "f8")]
NAMES = list(mnist.PUBLISHED)


def packed(code, letter, shape, values):
    """Literal writer of the idx format."""
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)
    return header + struct.pack(f">{len(values)}{letter}", *values)


def digits(num_samples, labels=None):
    """An image file whose k-th image is filled with k, and a label file."""
    pixels = [k % 256 for k in range(num_samples) for _ in range(28 * 28)]
    labels = [k % 10 for k in range(num_samples)] if labels is None else labels
    return packed(8, "B", (num_samples, 28, 28), pixels), packed(8, "B", (len(labels),), labels)


@pytest.fixture
def folder(tmp_path):
    for name, content in zip(NAMES, (*digits(12), *digits(3)), strict=True):
        (tmp_path / name).write_bytes(content)
    return tmp_path


@given(kind=st.sampled_from(KINDS), shape=st.lists(st.integers(0, 4), max_size=5), pack=st.booleans())
def test_idx_files_of_all_types_and_shapes(tmp_path, kind, shape, pack):
    code, letter, dtype = kind
    signed = -1 if letter in "bhifd" else 1
    values = [signed * (k % 128) for k in range(math.prod(shape))]
    content = packed(code, letter, shape, values)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(content, 1) if pack else content)
    found = read_idx(path)
    assert found.dtype == np.dtype(dtype) and found.dtype.isnative and found.flags.writeable
    assert np.array_equal(found, np.array(values, dtype).reshape(shape))


def test_wide_values_are_big_endian(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(bytes.fromhex("00000c01 00000002 01020304 fffffffe"))
    assert read_idx(path).tolist() == [0x01020304, -2]


GOOD = packed(8, "B", (2, 3), range(6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with the bytes '', which is no magic number of an idx file"),
        (b"\0\0\x08", "begins with the bytes '00 00 08', which is no magic number of an idx file"),
        (b"\x01" + GOOD[1:], "begins with the bytes '01 00 08 02', which is no magic number of an idx file"),
        (b"\0\0\x0a" + GOOD[3:], "begins with the bytes '00 00 0a 02', which is no magic number of an idx file"),
        (GOOD[:9], "is truncated: 2 axes need a header of 12 bytes, it has 9"),
        (GOOD[:-1], "is truncated: uint8 of shape (2, 3) needs 18 bytes, it has 17"),
        (GOOD + b"\n", "has surplus bytes: uint8 of shape (2, 3) needs 18 bytes, it has 19"),
        (packed(14, "d", (2**32 - 1,) * 3, [0.0]), "is truncated: float64 of shape (4294967295, 4294967295, 42949"),
        (packed(8, "B", (1,) * 255, [0]), "has a shape that numpy cannot hold, 255 axes"),
        (gzip.compress(GOOD, mtime=0)[:-9], "is damaged, gzip says"),
        (gzip.compress(GOOD, mtime=0) + b"x", "is damaged, gzip says"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"\xff\xff" + gzip.compress(GOOD, mtime=0)[14:], "is damaged, gzip says"),
    ],
)
def test_damaged_idx_file(tmp_path, content, message):
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_idx(path)
    assert str(caught.value).startswith(f"{path} {message}")


def test_own_files_load_with_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        data = mnist.load(folder)
    assert data.train_images.shape == (12, 28, 28) and data.train_images.dtype == torch.uint8
    assert torch.equal(data.train_images[:, 3, 5], torch.arange(12))
    assert data.train_labels.tolist() == [*range(10), 0, 1] and data.train_labels.dtype == torch.int64
    assert data.test_images.shape == (3, 28, 28) and data.test_labels.tolist() == [0, 1, 2]
    assert data.test_labels.dtype == torch.int64
    assert [record.message for record in caplog.records] == [
        f"{folder / name} does not hold the published values (their SHA-256 differs)" for name in NAMES
    ]


@pytest.mark.parametrize(("dot", "pack"), list(itertools.product((False, True), repeat=2)))
def test_spellings_and_packing(folder, dot, pack):
    expected = mnist.load(folder)
    for name in NAMES:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        spelt = name.replace("-idx", ".idx") if dot else name
        (folder / (spelt + ".gz" * pack)).write_bytes(gzip.compress(content, 1) if pack else content)
    found = mnist.load(folder)
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_folder_from_the_variable(folder, monkeypatch, tmp_path_factory):
    # The files themselves lie in the folder that the variable names.
    monkeypatch.setenv("XBRAID_DATA", str(folder))
    assert len(mnist.load().train_labels) == 12
    # A folder mnist in it goes first, and is not mixed with the files beside it.
    (folder / "mnist").mkdir()
    assert len(mnist.load().train_labels) == 12
    for name, content in zip(NAMES[:3], (*digits(2), *digits(1)), strict=False):
        (folder / "mnist" / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=NAMES[3]):
        mnist.load()
    (folder / "mnist" / NAMES[3]).write_bytes(digits(1)[1])
    assert len(mnist.load().train_labels) == 2
    # The argument goes before both, and stands alone.
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=f"not found in {empty}. It"):
        mnist.load(empty)


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        mnist.load(folder)
    for part in (name, name.replace("-idx", ".idx"), ".gz", str(folder), mnist.ORIGIN, "--data_dir", "XBRAID_DATA"):
        assert part in str(caught.value)


def test_nothing_found_names_all_places(tmp_path, monkeypatch):
    monkeypatch.setenv("XBRAID_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"not found in {tmp_path / 'mnist'} or {tmp_path}. It comes from"):
        mnist.load()


IMAGES, LABELS = NAMES[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, digits(11)[0], "{images} holds 11 images but {labels} holds 12 labels; entry k of both"),
        (LABELS, digits(0, [0] * 13)[1], "{images} holds 12 images but {labels} holds 13 labels; entry k of both"),
        (LABELS, digits(0, [9] * 11 + [10])[1], "{labels} holds the label 10 at entry 11, labels must lie in 0 .. 9"),
        (LABELS, digits(1)[0], "{labels} holds uint8 of shape (1, 28, 28), must hold uint8 of shape (n,), n at least"),
        (
            IMAGES,
            digits(5)[1],
            "{images} holds uint8 of shape (5,), must hold uint8 of shape (n, 28, 28), n at least 1",
        ),
        (IMAGES, packed(8, "B", (1, 2, 2), [0] * 4), "{images} holds uint8 of shape (1, 2, 2), must hold uint8 of"),
        (IMAGES, digits(0)[0], "{images} holds uint8 of shape (0, 28, 28), must hold uint8 of shape (n, 28, 28)"),
        (LABELS, packed(8, "B", (), [0]), "{labels} holds uint8 of shape (), must hold uint8 of shape (n,)"),
        (LABELS, packed(9, "b", (12,), [-1] * 12), "{labels} holds int8 of shape (12,), must hold uint8 of shape (n,)"),
        (IMAGES, digits(12)[0][:-5], "{images} is truncated: uint8 of shape (12, 28, 28) needs 9424 bytes"),
    ],
)
def test_bad_file(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        mnist.load(folder)
    assert str(caught.value).startswith(message.format(images=folder / IMAGES, labels=folder / LABELS))


def test_published_files(caplog):
    try:
        data = mnist.load()
    except FileNotFoundError as missing:
        pytest.skip(f"PUBLISHED MNIST FILES NOT FOUND: {missing}")
    assert not caplog.records
    assert data.train_images.shape == (60000, 28, 28) and data.test_images.shape == (10000, 28, 28)
    # As published: the first digits, and how often each occurs.
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(data.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    # From whole numbers, so that no rounding is in the way.
    counts = torch.bincount(data.train_images.flatten().int(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ levels / counts.sum()).item()
    deviation = (counts @ (levels - mean) ** 2 / counts.sum()).sqrt().item()
    assert (round(mean, 4), round(deviation, 4)) == (mnist.MEAN, mnist.STANDARD_DEVIATION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardized(dtype):
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 16, 8)
    found = mnist.standardized(images, dtype)
    assert found.shape == (2, 1, 16, 8) and found.dtype == dtype
    expected = [(value / 255 - 0.1307) / 0.3081 for value in range(256)]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    ("images", "dtype", "error", "message"),
    [
        (torch.zeros(1, 28, 28), torch.float32, TypeError, "images is torch.float32, must be a uint8 tensor"),
        (np.zeros((1, 28, 28), np.uint8), torch.float32, TypeError, "images is ndarray, must be a uint8 tensor"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), torch.int64, TypeError, "dtype=torch.int64 is no floating-point"),
        (torch.zeros(28, 28, dtype=torch.uint8), torch.float32, ValueError, "images.shape=(28, 28) must be (B, H, W)"),
    ],
)
def test_standardized_refuses(images, dtype, error, message):
    with pytest.raises(error) as caught:
        mnist.standardized(images, dtype)
    assert str(caught.value).startswith(message)


SIZES = {"num_samples": st.integers(1, 300), "batch_size": st.integers(1, 320), "seed": st.integers(0, 2**70)}


@given(**SIZES, number=st.integers(0, 1000))
def test_every_sample_exactly_once_or_only_complete_batches(num_samples, batch_size, seed, number):
    batches = Batches(num_samples, batch_size, seed, drop_last=False)
    parts = batches.epoch(number)
    assert len(parts) == len(batches)
    assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert sorted(torch.cat(parts).tolist()) == list(range(num_samples))
    assert all(part.dtype == torch.int64 for part in parts)
    if batch_size <= num_samples:
        whole = Batches(num_samples, batch_size, seed)
        complete = whole.epoch(number)
        assert len(complete) == len(whole) == num_samples // batch_size
        assert all(part.shape == (batch_size,) and torch.equal(part, parts[k]) for k, part in enumerate(complete))


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, number):
        return torch.cat(Batches(1000, 10, seed).epoch(number)).tolist()

    orders = [order(seed, number) for seed in range(3) for number in range(3)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert orders == [order(seed, number) for seed in range(3) for number in range(3)]
    # Another permutation each: two random ones agree in one place on average.
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples=0 must be at least 1; use 60000"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1; use 100"),
        ({"batch_size": 2.0}, TypeError, "batch_size=2.0 must be an integer; use 100"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0; use 0"),
        ({"drop_last": 1}, TypeError, "drop_last=1 must be True or False; use True"),
        ({"batch_size": 21}, ValueError, "batch_size=21 is more than num_samples=20, and drop_last=True leaves no"),
    ],
)
def test_batches_refuse(options, error, message):
    with pytest.raises(error) as caught:
        Batches(**{"num_samples": 20, "batch_size": 4, **options})
    assert str(caught.value).startswith(message)


def test_epochs_count_from_zero():
    with pytest.raises(ValueError, match="number=-1 must be at least 0; use 0"):
        Batches(20, 4).epoch(-1)
