"""Scores of a classifier: by hand, against a literal count, and where classes have no samples."""

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.recipes.classification import Scores


def of(table):
    """Scores of samples that give this table: a row for each true class."""
    pairs = [(true, taken) for true, row in enumerate(table) for taken, n in enumerate(row) for _ in range(n)]
    labels, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return Scores.of(predicted, labels, len(table))


def test_by_hand():
    # Two readers of 50 proposals, a textbook example: they agree on 20 and 15, kappa is (0.7 - 0.5) / (1 - 0.5) = 0.4.
    found = of([[20, 5], [10, 15]])
    assert found.confusion.tolist() == [[20, 5], [10, 15]] and found.confusion.dtype == torch.int64
    assert found.overall == 0.7 and found.per_class == [0.8, 0.6]
    assert found.average == pytest.approx(0.7, rel=1e-15) and found.kappa == pytest.approx(0.4, rel=1e-14)
    # The same share of agreement, but by chance more of it: 0.6 x 0.7 + 0.4 x 0.3 = 0.54, so that 0.06 / 0.46 is left.
    assert of([[45, 15], [25, 15]]).kappa == pytest.approx(3 / 23, rel=1e-14)
    assert of([[25, 35], [5, 35]]).kappa == pytest.approx(0.14 / 0.54, rel=1e-14)


def test_large_and_small_classes_count_alike_in_the_average():
    found = of([[98, 2, 0], [1, 1, 0], [3, 0, 1]])
    assert found.overall == 100 / 106 and found.per_class == [0.98, 0.5, 0.25]
    assert found.average == pytest.approx((0.98 + 0.5 + 0.25) / 3, rel=1e-15)


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=80))
def test_against_a_literal_count(pairs):
    labels, predicted = zip(*pairs, strict=True)
    n, K = len(pairs), 5
    found = Scores.of(torch.tensor(predicted), torch.tensor(labels), K)
    assert found.confusion.tolist() == [[sum(pair == (i, j) for pair in pairs) for j in range(K)] for i in range(K)]
    right = Fraction(sum(a == b for a, b in pairs), n)
    assert found.overall == float(right)
    shares = []
    for k in range(K):
        own = [b for a, b in pairs if a == k]
        shares.append(sum(b == k for b in own) / len(own) if own else None)
    assert found.per_class == shares
    there = [share for share in shares if share is not None]
    assert found.average == pytest.approx(sum(there) / len(there), rel=1e-14)
    chance = sum(Fraction(labels.count(k), n) * Fraction(predicted.count(k), n) for k in range(K))
    kappa = 1.0 if chance == 1 else float((right - chance) / (1 - chance))
    assert found.kappa == pytest.approx(kappa, rel=1e-12, abs=1e-14)
    assert -1 <= found.kappa <= 1


def test_degenerate_cases():
    # All of one class, all right, all wrong, nothing but chance, and classes that nobody has or that are never named.
    one = of([[7, 0], [0, 0]])
    assert (one.overall, one.average, one.kappa, one.per_class) == (1.0, 1.0, 1.0, [1.0, None])
    wrong = of([[0, 4], [4, 0]])
    assert (wrong.overall, wrong.average, wrong.kappa) == (0.0, 0.0, -1.0)
    assert of([[0, 9], [0, 0]]).kappa == 0.0
    assert of([[3, 3], [5, 5]]).kappa == 0.0
    alone = Scores.of(torch.tensor([0]), torch.tensor([0]), 1)
    assert (alone.overall, alone.kappa) == (1.0, 1.0)
    assert of([[2, 0, 0], [0, 0, 0], [1, 0, 1]]).per_class == [1.0, None, 0.5]


def test_many_samples_do_not_round():
    labels = torch.arange(3_000_000) % 3
    found = Scores.of((labels + (torch.arange(3_000_000) == 7)) % 3, labels, 3)
    assert found.overall == 2_999_999 / 3_000_000


def test_the_dictionary_is_json():
    found = of([[20, 5, 0], [10, 15, 0], [0, 0, 0]])
    assert json.loads(json.dumps(found.as_dict())) == {
        "overall_accuracy": found.overall,
        "average_accuracy": found.average,
        "kappa": found.kappa,
        "class_accuracy": [0.8, 0.6, None],
    }


@pytest.mark.parametrize(
    ("predicted", "labels", "error", "message"),
    [
        ([0, 1], [0], ValueError, r"predicted.shape=\(2,\) and labels.shape=\(1,\) must be the same \(B,\)"),
        ([], [], ValueError, r"predicted.shape=\(0,\) and labels.shape=\(0,\) must be the same \(B,\), B at least 1"),
        ([[0]], [[0]], ValueError, r"predicted.shape=\(1, 1\) and labels"),
        ([0, 3], [0, 1], ValueError, r"predicted holds 0 \.\. 3, must lie in 0 \.\. num_classes - 1 = 2"),
        ([0, 1], [0, 3], ValueError, r"labels holds 0 \.\. 3, must lie in 0 \.\. num_classes - 1 = 2"),
        ([-1, 1], [0, 1], ValueError, r"predicted holds -1 \.\. 1, must"),
        ([0, 1], [-1, 1], ValueError, r"labels holds -1 \.\. 1, must"),
        ([0.0, 1.0], [0, 1], TypeError, r"predicted is torch.float32, must be int64; use predicted.long\(\)"),
        ([0, 1], [False, True], TypeError, r"labels is torch.bool, must be int64; use labels.long\(\)"),
    ],
)
def test_refused(predicted, labels, error, message):
    with pytest.raises(error, match="^" + message):
        Scores.of(torch.tensor(predicted), torch.tensor(labels), 3)
