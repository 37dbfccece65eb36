"""Co-centric circles: classes, the two samplings, and what is refused."""

import numpy as np
import pytest
import torch

from xbraid_py.data import circles


def radii(data) -> torch.Tensor:
    return data.features.square().sum(0).sqrt()


def test_class_by_equation_11():
    points = np.array([[0.0, 1.9, 2.0, 0.0, 2.9, 3.0, 2.5], [0.0, 0.0, 0.0, 2.5, 0.0, 0.0, 2.5]])
    assert circles.class_of(*points).tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_balanced_points_are_uniform_in_disc_and_ring():
    train, validation = circles.generate(20000, 1000)
    for data in (train, validation):
        assert torch.bincount(data.labels).tolist() == [data.num_samples / 2] * 2
        assert torch.equal(torch.from_numpy(circles.class_of(*data.features.numpy())), data.labels)
    r = radii(train)
    disc, ring = r[train.labels == 0], r[train.labels == 1]
    assert disc.max() <= 1 and ring.min() >= 2 and ring.max() < 3
    # Uniform in area: half of the points within the radius that halves the area, from the quadrants alike.
    assert abs((disc < 0.5**0.5).double().mean() - 0.5) < 0.02
    assert abs((ring < ((4 + 9) / 2) ** 0.5).double().mean() - 0.5) < 0.02
    assert (train.features > 0).double().mean(1).sub(0.5).abs().max() < 0.02


def test_points_in_the_square_have_the_class_of_the_ring_and_its_share():
    train, _ = circles.generate(20000, 10, sampling="square")
    assert torch.equal(torch.from_numpy(circles.class_of(*train.features.numpy())), train.labels)
    assert abs(train.labels.double().mean() - np.pi * 5 / 36) < 0.02
    assert train.features.abs().max() <= 3 and (radii(train) > 3).any()


def test_draws_depend_on_their_arguments_alone():
    train, validation = circles.generate(100, 50, seed=3)
    again, _ = circles.generate(100, 20, seed=3, dtype=torch.float32)
    assert again.features.dtype == torch.float32
    assert torch.equal(again.features, train.features.float()) and torch.equal(again.labels, train.labels)
    assert not torch.equal(circles.generate(100, 50, seed=4)[0].features, train.features)
    assert not torch.equal(train.features[:, :50], validation.features)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_train": 5}, ValueError, "^num_train=5 is not a multiple of the 2 classes; use 4 or 6$"),
        ({"num_val": 0}, ValueError, "^num_val=0 must be at least 2; use 1000$"),
        ({"seed": -1}, ValueError, "^seed=-1 must be at least 0; use 0$"),
        ({"sampling": "ring"}, ValueError, "^sampling='ring' must be balanced or square; use balanced$"),
        ({"num_train": 2.0}, TypeError, "^num_train=2.0 must be an integer"),
        ({"dtype": torch.int64}, TypeError, "^dtype=torch.int64 is no"),
    ],
)
def test_bad_values_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        circles.generate(**arguments)
