"""MNIST's images as columns, against columns made by hand."""

from __future__ import annotations

import pytest
import torch
from digit_files import write_digits

from xbraid_py.data import mnist
from xbraid_py.data.mnist import columns


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 200, 103)


def literal(images, scaling, train):
    """Columns by hand, in double precision."""
    pixels = images.double().flatten(1).T / 255
    if scaling == "centered":
        pixels = pixels - (train.double() / 255).flatten(1).mean(0)[:, None]
    return (pixels - mnist.MEAN) / mnist.STANDARD_DEVIATION if scaling == "standard" else pixels


@pytest.mark.parametrize("scaling", ["centered", "unit", "standard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns(digits, scaling, dtype):
    data = mnist.load(digits)
    train, test = columns(data, scaling, dtype, num_train=150)
    assert (len(train), len(test)) == (150, 103)
    for half, images, labels in ((train, data.train_images, data.train_labels), (test, data.test_images, None)):
        features, found = half.samples()
        assert features.dtype == dtype and features.is_contiguous()
        expected = literal(images[: len(half)], scaling, data.train_images)
        torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=2e-6)
        assert labels is None or torch.equal(found, labels[:150])
    which = torch.tensor([7, 3])
    assert torch.equal(train.samples(which)[0], train.samples()[0][:, which])
    assert torch.equal(train.samples(which)[1], train.labels[which])
    portions = train.portions(40)
    assert [len(labels) for _, labels in portions] == [38, 38, 37, 37]
    assert torch.equal(torch.cat([features for features, _ in portions], 1), train.samples()[0])


def test_wrong_columns_are_refused(digits):
    data = mnist.load(digits)
    with pytest.raises(ValueError, match="^scaling='raw' must be centered or unit or standard; use centered$"):
        columns(data, "raw")
    with pytest.raises(ValueError, match=r"^num_test=104 must lie in 1 .. 103, the images there are; use 103$"):
        columns(data, num_test=104)
