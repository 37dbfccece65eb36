"""Sets of labeled images: some of their rows, and what they refuse."""

import dataclasses

import numpy as np
import pytest
import torch

from xbraid_py.data.images import Images, ImageSets


def some_images(number=4, size=8):
    return Images(
        torch.arange(number).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size), torch.arange(number)
    )


def test_rows():
    images = some_images()
    assert images.num_samples == 4 and images.size == 8
    part = images.rows(slice(1, 3))
    assert part.labels.tolist() == [1, 2] and part.pixels[:, 2, 0, 0].tolist() == [1, 2]
    assert part.labels.data_ptr() == images.labels[1:].data_ptr()  # no copy
    assert images.rows(torch.tensor([3, 0, 3])).pixels[:, 0, 7, 7].tolist() == [3, 0, 3]
    assert images.rows(slice(0, 0)).num_samples == 0
    for chosen in (1, [1, 2], torch.tensor([True, False, True, True]), torch.tensor([[1]])):
        with pytest.raises(TypeError, match="must be a slice or an int64 tensor of shape"):
            images.rows(chosen)


BYTES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pixels", "labels", "error", "message"),
    [
        (BYTES.float(), LABELS, TypeError, "pixels is torch.float32 of shape (2, 3, 8, 8), must be a uint8 tensor"),
        (BYTES.numpy(), LABELS, TypeError, "pixels is ndarray, must be a uint8 tensor"),
        (BYTES[0], LABELS, ValueError, "pixels.shape=(3, 8, 8) must be (B, C, H, W); use (100, 3, 32, 32)"),
        (BYTES[:, :1], LABELS, ValueError, "pixels.shape=(2, 1, 8, 8) must be (B, 3, H, H); use (100, 3, 32, 32)"),
        (BYTES[..., :7], LABELS, ValueError, "pixels.shape=(2, 3, 8, 7) must be (B, 3, H, H); use (100, 3, 32, 32)"),
        (BYTES, LABELS.int(), TypeError, "labels is torch.int32 of shape (2,), must be an int64 tensor"),
        (BYTES, np.zeros(2, int), TypeError, "labels is ndarray, must be an int64 tensor of shape (B,)"),
        (BYTES, LABELS[:1], ValueError, "labels.shape=(1,) must hold one label for each of the 2 images; use (2,)"),
    ],
)
def test_images_refuse(pixels, labels, error, message):
    with pytest.raises(error) as caught:
        Images(pixels, labels)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2; use 10"),
        ({"num_classes": 3}, "train.labels holds values from 0 to 3, must lie in 0 .. num_classes - 1 = 2"),
        (
            {"test": Images(some_images(2).pixels, torch.tensor([0, -1]))},
            "test.labels holds values from -1 to 0, must lie",
        ),
        ({"test": some_images(size=9)}, "train.size=8 and test.size=9 must be the same; use 32 for both"),
        ({"names": ("a", "b")}, "names holds 2 names, must hold one for each of num_classes=4 classes; use ()"),
    ],
)
def test_sets_refuse(changes, message):
    sets = ImageSets(some_images(), some_images(0), 4, (), (), True)
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(sets, **changes)
    assert str(caught.value).startswith(message)
