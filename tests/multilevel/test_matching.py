"""Heavy-edge matching against algorithm 1 of paper 002 taken literally, on random and on adversarial input."""

import math

import numpy as np
import pytest
import torch

from xbraid_py.multilevel.width import matching as module
from xbraid_py.multilevel.width.matching import Matching, cosines, match, match_rows
from xbraid_py.multilevel.width.options import METHODS

THRESHOLDS = (-1.0, -0.5, 0.0, 0.3, 0.9, 1.0)


def literal(S, theta: float) -> tuple[list[int], list[int], int]:
    """Algorithm 1 line by line, from 1: partners (0 for none yet), aggregates, number of aggregates."""
    n = len(S)
    partner, zeta, aggregates = [0] * (n + 1), [0] * (n + 1), 0
    for i in range(1, n + 1):
        if partner[i] == 0:
            free = [j for j in range(1, n + 1) if j != i and partner[j] == 0]
            best = max((S[i - 1][j - 1] for j in free), default=-math.inf)
            chosen = [j for j in free if S[i - 1][j - 1] == best and best > theta]
            aggregates += 1
            if chosen:
                j = chosen[0]
                partner[i], partner[j] = j, i
                zeta[i] = zeta[j] = aggregates
            else:
                partner[i], zeta[i] = i, aggregates
    return partner[1:], zeta[1:], aggregates


def literal_rounds(S, theta: float) -> list[int]:
    """Partners from 0: in each round everybody names the nearest free one, and who name each other are paired."""
    free, partner = list(range(len(S))), list(range(len(S)))
    while True:
        named = {}
        for i in free:
            edges = [(S[i][j], -j) for j in free if j != i and S[i][j] > theta]
            if edges:
                named[i] = -max(edges)[1]
        pairs = [i for i in named if named.get(named[i]) == i]
        if not pairs:
            return partner
        for i in pairs:
            partner[i] = named[i]
            free.remove(i)


def assert_literal(found: Matching, S, theta: float) -> None:
    partner, zeta, aggregates = literal(S, theta)
    assert (found.partner + 1).tolist() == partner
    assert (found.aggregate + 1).tolist() == zeta
    assert found.num_coarse == aggregates and found.num_fine == len(S)
    assert found.num_pairs == sum(p != i for i, p in enumerate(partner, 1)) // 2
    for number, (a, b) in enumerate(zip(found.first.tolist(), found.second.tolist(), strict=True), 1):
        assert [i for i, z in enumerate(zeta) if z == number] == sorted({a, b}) and a <= b


def symmetric(n: int, seed: int, levels: int = 0) -> np.ndarray:
    """Random similarities; with `levels` only so many different ones, so that they tie."""
    numbers = np.random.default_rng(seed)
    S = numbers.integers(0, levels, (n, n)) / levels * 2 - 1 if levels else numbers.uniform(-1, 1, (n, n))
    S = np.triu(S, 1)
    S = S + S.T
    np.fill_diagonal(S, 1)
    return S


def chain(n: int) -> np.ndarray:
    """Neuron i likes i + 1 better the greater i is: what the neurons of low numbers want is taken, round by round."""
    S = np.full((n, n), -1.0)
    for i in range(n - 1):
        S[i, i + 1] = S[i + 1, i] = (i + 1) / n
    return S


MATRICES = {
    "one": np.ones((1, 1)),
    "two": symmetric(2, 0),
    "three": symmetric(3, 1),
    "odd": symmetric(31, 2),
    "even": symmetric(40, 3),
    "all tie": np.ones((9, 9)),
    "all opposed": 2 * np.eye(9) - 1,
    "two values": symmetric(33, 4, 2),
    "four values": symmetric(50, 5, 4),
    "no edges": np.where(np.eye(8) > 0, 1.0, -np.inf),
    "some without edges": np.where(symmetric(24, 6) < -0.6, -np.inf, symmetric(24, 6)),
    "star": np.where(np.arange(12)[:, None] * np.arange(12) == 0, 0.9, 0.1),
    "chain": chain(20),
    "chain backwards": chain(21)[::-1, ::-1].copy(),
}


@pytest.mark.parametrize("theta", THRESHOLDS)
@pytest.mark.parametrize("name", MATRICES)
def test_matching_is_algorithm_1(name, theta, monkeypatch):
    S = MATRICES[name]
    assert_literal(match(torch.from_numpy(S), theta), S, theta)
    assert_literal(match(torch.from_numpy(S).float(), np.float32(theta)), S.astype("f4"), np.float32(theta))
    monkeypatch.setattr(module, "_BLOCK", 3)  # pairs within and across blocks
    assert_literal(match(torch.from_numpy(S), theta), S, theta)


@pytest.mark.parametrize("theta", THRESHOLDS)
@pytest.mark.parametrize("name", MATRICES)
def test_mutual_matching_is_the_literal_rounds(name, theta):
    S = MATRICES[name]
    found = match(torch.from_numpy(S), theta, "mutual")
    assert found.partner.tolist() == literal_rounds(S.tolist(), theta)
    # Nobody is left alone beside a neighbor that is alone too.
    alone = [i for i, p in enumerate(found.partner.tolist()) if p == i]
    assert all(not S[i, j] > theta for i in alone for j in alone if i != j)


def test_the_two_methods_differ_where_the_first_neuron_is_not_the_nearest_of_its_nearest():
    S = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.9], [0.0, 0.9, 1.0]])
    assert match(S).partner.tolist() == [1, 0, 2]
    assert match(S, method="mutual").partner.tolist() == [0, 2, 1]
    assert match(S).aggregate.tolist() == [0, 0, 1]


def test_the_threshold_is_not_reached_by_what_equals_it():
    S = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    for method in METHODS:
        assert match(S, 0.5, method).num_pairs == 0
        assert match(S, 0.499, method).num_pairs == 1


def angles(rows: np.ndarray) -> np.ndarray:
    """Cosines one by one; -inf for rows of zeros."""
    n = len(rows)
    S = np.full((n, n), -np.inf)
    for i in range(n):
        for j in range(n):
            lengths = math.sqrt(float(rows[i] @ rows[i])) * math.sqrt(float(rows[j] @ rows[j]))
            if lengths:
                S[i, j] = min(1.0, round(float(rows[i] @ rows[j]) / lengths, 12))
    return S


def adversarial(n: int, d: int, seed: int) -> np.ndarray:
    """Rows of which some are multiples of others, some opposite, some zero."""
    numbers = np.random.default_rng(seed)
    rows = numbers.standard_normal((n, d))
    for i in range(n):
        other, kind = numbers.integers(n), numbers.integers(6)
        if kind < 3:
            rows[i] = rows[other] * (1.0, 2.5, -1.0)[kind]
        elif kind == 3 and numbers.integers(2):
            rows[i] = 0
    return rows


@pytest.mark.parametrize("theta", (-1.0, 0.0, 0.7))
@pytest.mark.parametrize("n, d, seed", [(1, 3, 0), (2, 1, 1), (2, 5, 2), (7, 1, 3), (40, 3, 4), (61, 8, 5), (64, 2, 6)])
def test_matching_rows_is_algorithm_1_on_their_cosines(n, d, seed, theta, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    for rows in (np.random.default_rng(seed).standard_normal((n, d)), adversarial(n, d, seed)):
        S = angles(rows)
        rows = torch.from_numpy(rows)
        assert_literal(match_rows(rows, theta), S, theta)
        assert match_rows(rows, theta, "mutual").partner.tolist() == literal_rounds(S.tolist(), theta)
        torch.testing.assert_close(cosines(rows), torch.from_numpy(S), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("method", METHODS)
def test_parallel_rows_tie_and_go_to_the_lowest_number(method, dtype, monkeypatch):
    """40 directions of 9 rows each, of many lengths: whatever the rounding, row r pairs with the next of its own."""
    monkeypatch.setattr(module, "_BLOCK", 16)
    torch.manual_seed(0)
    directions = torch.randn(40, 300, dtype=dtype)
    lengths = torch.logspace(-3, 3, 9, dtype=dtype)
    rows = (lengths[:, None, None] * directions).flatten(0, 1)  # row 40 r + s is of direction s
    found = match_rows(rows, 0.9, method).partner.tolist()
    assert found[:320] == [i + 40 if i // 40 % 2 == 0 else i - 40 for i in range(320)]
    assert found[320:] == list(range(320, 360))


def test_greedy_rows_of_several_blocks_are_the_matrix():
    torch.manual_seed(1)
    rows = torch.randn(700, 6, dtype=torch.float64)
    assert_literal(match_rows(rows, 0.2), cosines(rows).tolist(), 0.2)


def test_rows_of_zeros_remain_single_and_extreme_lengths_do_not_matter():
    rows = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1e30, 1e29], [0.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    for method in METHODS:
        for theta in (-1.0, 0.0):
            assert match_rows(rows, theta, method).partner.tolist() == [0, 2, 1, 3, 5, 4]
    assert match_rows(torch.zeros(3, 2)).num_coarse == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_same_rows_are_matched_alike(method):
    torch.manual_seed(2)
    rows = torch.randn(300, 20)
    kept = rows.clone()
    first = match_rows(rows, 0.1, method)
    assert torch.equal(rows, kept)
    for again in (match_rows(rows, 0.1, method), match_rows(rows.clone().requires_grad_(), 0.1, method)):
        assert torch.equal(first.partner, again.partner)
    assert torch.equal(first.aggregate, Matching.of(first.partner).aggregate)


def test_what_has_no_order_or_shape_is_refused():
    good = torch.ones(3, 3)
    for bad, method in ((math.nan, "greedy"), (math.inf, "greedy"), (math.nan, "mutual")):
        broken = good.clone()
        broken[0, 2] = bad
        with pytest.raises(ValueError, match="^similarity has NaN or inf in it, must be comparable; use -inf for no"):
            match(broken, 0, method)
    for bad in (math.nan, math.inf, -math.inf):
        rows = good.clone()
        rows[1, 2] = bad
        for method in METHODS:
            with pytest.raises(ValueError, match=r"^rows\[1\] has NaN or inf in it, must be finite"):
                match_rows(rows, 0, method)
    for shape in ((3,), (0, 3), (2, 3)):
        with pytest.raises(ValueError, match="^similarity has the shape .* must be square"):
            match(torch.ones(shape))
    for shape in ((3,), (0, 3), (3, 0)):
        with pytest.raises(ValueError, match=r"^rows has the shape .* must be \(n, d\)"):
            match_rows(torch.ones(shape))
    with pytest.raises(ValueError, match="^rows is of torch.int64, must be float32 or float64"):
        match_rows(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="^similarity is of torch.float16, must be float32 or float64"):
        match(good.half())
    for theta in (1.5, -1.01, math.nan):
        with pytest.raises(ValueError, match=f"^threshold={theta} must be between -1 and 1, as cosines are; use 0$"):
            match_rows(good, theta)
    with pytest.raises(ValueError, match="^method='best' must be greedy or mutual; use greedy$"):
        match(good, 0, "best")
    for partner in ([1, 2, 0], [0, 3, 1], [-1, 1]):
        with pytest.raises(ValueError, match=r"^partner=\[.* must pair neurons both ways; use \[0, 1"):
            Matching.of(torch.tensor(partner))
