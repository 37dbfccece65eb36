"""Products of flat vectors in parts, and their sums: against exact sums, and to the last bit against themselves.

Shape letters: `n` numbers of a vector.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import fsum, inf, isnan, nan

import pytest
import torch
from kernel_cases import (
    DTYPES,
    GUARD,
    NAMES,
    SETS,
    NoFallback,
    Recorder,
    around,
    equal,
    needs_native,
    normal,
    placed,
    public_on,
)

LENGTHS = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 255, 256, 257, 511, 513, 1025, 5000]


@pytest.fixture(params=NAMES)
def kernels(request):
    """The public functions on each implementation."""
    with public_on(request.param) as public:
        yield public


@pytest.fixture(params=[pytest.param(name, marks=needs_native) for name in SETS or ["native"]])
def native(request, monkeypatch):
    """The same on native code alone."""
    with public_on(request.param) as public:
        monkeypatch.setattr(public.implementation, "fallback", NoFallback())
        yield public


def vectors(count: int, n: int, dtype, seed: int = 1) -> list[torch.Tensor]:
    """Some of them begin anywhere in memory."""
    found = [normal(n, seed=seed * 100 + k, dtype=dtype) for k in range(count)]
    return [placed(x, "shifted") if k % 3 == 1 else x for k, x in enumerate(found)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_any_length(kernels, dtype):
    for n in LENGTHS:
        a, b = vectors(3, n, dtype), vectors(6, n, dtype, seed=2)
        b[4] = a[1]
        found = kernels.products(a, b, [0, n])
        assert found.shape == (3, 6, 1) and found.dtype == dtype
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                terms = (x.double() * y.double()).tolist()
                bound = (8 + n**0.5) * torch.finfo(dtype).eps * fsum(map(abs, terms))
                assert abs(float(found[i, j, 0]) - fsum(terms)) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_parts(kernels, dtype):
    """Parts of all lengths, empty ones too; what lies before the first and behind the last does not count."""
    bounds = [2, 2, 3, 10, 10, 18, 35, 600, 1200, 1201, 4000]
    a, b = vectors(2, 4321, dtype), vectors(5, 4321, dtype, seed=2)
    for x in (*a, *b):
        x[:2] = x[4000:] = nan
    found = kernels.products(a, b, bounds)
    assert found.shape == (2, 5, len(bounds) - 1) and found.is_contiguous()
    for part, (first, end) in enumerate(pairwise(bounds)):
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                terms = (x[first:end].double() * y[first:end].double()).tolist()
                bound = (8 + len(terms) ** 0.5) * torch.finfo(dtype).eps * fsum(map(abs, terms))
                assert abs(float(found[i, j, part]) - fsum(terms)) <= bound
    assert kernels.products(a, b, [7]).shape == (2, 5, 0)
    assert kernels.products(a, b, (7, 7)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_does_not_depend_on_the_others(kernels, dtype):
    """Nor on where a vector begins, nor on the numbers before and behind its part: the same bits."""
    a, b = vectors(5, 1500, dtype), vectors(9, 1500, dtype, seed=2)
    bounds = [0, 77, 700, 1500]
    all_of_them = kernels.products(a, b, bounds)
    assert equal(kernels.products(b, a, bounds), all_of_them.transpose(0, 1))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            assert equal(kernels.products([x], [y], bounds)[0, 0], all_of_them[i, j])
            assert equal(kernels.products([x, y], [y, y, x], bounds)[0, 1], all_of_them[i, j])
    for part, (first, end) in enumerate(pairwise(bounds)):
        some = [[placed(x[first:end], "shifted") for x in each] for each in (a, b)]
        assert equal(kernels.products(*some, [0, end - first])[:, :, 0], all_of_them[:, :, part])


def test_numbers_that_are_not_finite_stay_in_their_part(kernels):
    a, b = vectors(2, 300, torch.float64), vectors(5, 300, torch.float64, seed=2)
    plain = kernels.products(a, b, [0, 9, 299, 300])
    for place, bad in ((4, nan), (298, inf), (150, -inf)):
        b[3][place], kept = bad, float(b[3][place])
        found = kernels.products(a, b, [0, 9, 299, 300])
        part = 0 if place < 9 else 1
        assert not found[:, 3, part].isfinite().any() and (not isnan(bad) or found[:, 3, part].isnan().all())
        found[:, 3, part] = plain[:, 3, part]
        assert equal(found, plain)
        b[3][place] = kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations(kernels, dtype):
    """One term after the other: as sums of rounded products, or with one rounding for both, entry by entry."""
    for n in LENGTHS:
        for count in (1, 2, 3, 7, 22):
            xs = vectors(count, n, dtype)
            coefficients = normal(count, seed=3).tolist()
            found = kernels.combine(coefficients, xs)
            assert found.shape == (n,) and found.dtype == dtype
            factors = torch.tensor(coefficients, dtype=dtype).double()
            exact = sum(c * x.double() for c, x in zip(factors, xs, strict=True))
            scale = sum((c * x.double()).abs() for c, x in zip(factors, xs, strict=True))
            assert ((found - exact).abs() <= (count + 1) * torch.finfo(dtype).eps * scale).all()
            out = placed(torch.zeros(n, dtype=dtype), "shifted")
            assert kernels.combine(coefficients, xs, out) is out and equal(out, found) and around(out) == 0
            for over in range(0, count, 3):
                own = [x.clone() for x in xs]
                assert kernels.combine(coefficients, own, out=own[over]) is own[over] and equal(own[over], found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_of_a_combination_does_not_depend_on_its_place(native, dtype):
    """Bit for bit what the entries give as vectors of one; each term is rounded once or twice, but always alike."""
    xs, coefficients = vectors(5, 300, dtype), normal(5, seed=3).tolist()
    whole = native.combine(coefficients, xs)
    for i in range(300):
        assert equal(native.combine(coefficients, [x[i : i + 1] for x in xs]), whole[i : i + 1])
    if dtype == torch.float64:
        two, one = xs[0] * coefficients[0], []
        for c, x in zip(coefficients[1:], xs[1:], strict=True):
            two = two + c * x
        for entries in zip(*(x.tolist() for x in xs), strict=True):
            sum_ = entries[0] * coefficients[0]
            for c, entry in zip(coefficients[1:], entries[1:], strict=True):
                sum_ = float(Fraction(sum_) + Fraction(c) * Fraction(entry))
            one.append(sum_)
        assert equal(whole, two) or whole.tolist() == one


def test_a_combination_is_added_in_order(kernels):
    big, small = torch.full((40,), 1e16, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    assert torch.equal(kernels.combine([1.0, 1.0, -1.0], [big, small, big]), torch.zeros(40, dtype=torch.float64))
    assert torch.equal(kernels.combine([1.0, -1.0, 1.0], [big, big, small]), small)
    spoilt = small.clone()
    spoilt[[3, 39]] = nan
    found = kernels.combine([2.0, 0.0], [small, spoilt])
    assert found.isnan().nonzero().flatten().tolist() == [3, 39] and (found.nan_to_num(2.0) == 2.0).all()


@needs_native
@pytest.mark.parametrize("kind", ["strided", "half", "slope"])
def test_torch_does_the_rest(monkeypatch, kind):
    with public_on(SETS[0]) as public:
        module = public.implementation
        asked: list[str] = []
        xs = vectors(3, 20, torch.float64)
        expected = public.products(xs, xs, [0, 20]), public.combine([1.0, 2.0, 3.0], xs)
        if kind == "strided":
            xs[1] = xs[1].repeat_interleave(2)[::2]
        elif kind == "half":
            xs = [x.bfloat16() for x in xs]
        else:
            xs[2].requires_grad_()
        monkeypatch.setattr(module, "fallback", Recorder(asked))
        found = public.products(xs, xs, [0, 20]), public.combine([1.0, 2.0, 3.0], xs)
        assert asked == ["products", "combine"]
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == xs[0].dtype and x.requires_grad == (kind == "slope")
            assert torch.allclose(x.double(), y, rtol=1e-12 if x.dtype == torch.float64 else 0.1, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_code_reads_and_writes_nothing_else(native, dtype):
    """Guards around all that is read are not numbers."""
    for n in (1, 7, 8, 9, 31, 257):
        xs = [torch.full((n + 40,), nan, dtype=dtype)[20 : n + 20].copy_(x) for x in vectors(5, n, dtype)]
        assert native.products(xs, xs, [0, n]).isfinite().all() and native.combine([1.0] * 5, xs).isfinite().all()
        place = torch.full((n + 40,), GUARD, dtype=dtype)[20 : n + 20]
        native.combine([1.0] * 5, xs, place)
        assert around(place) == 0


def test_arguments_that_do_not_fit(kernels):
    xs = vectors(3, 7, torch.float64)
    for a, b, bounds, said in (
        ([], xs, [0, 7], r"a is empty; use at least one"),
        (xs, [], [0, 7], r"b is empty"),
        (xs, xs, [], r"bounds is empty"),
        (
            [xs[0], xs[1][1:]],
            xs,
            [0, 7],
            r"a\[1\]\.shape=\(6,\) and .* are not those of .*; use \(7,\) and torch",
        ),
        (xs, [xs[0].float()], [0, 7], r"b\[0\]\.shape=\(7,\) and b\[0\]\.dtype=torch\.float32 are not those"),
        ([xs[0][None]], xs, [0, 7], r"a\[0\]\.shape=\(1, 7\)"),
        (xs, xs, [-1, 7], r"bounds\[0\]=-1 is not between 0 and the length; use 0 to 7"),
        (xs, xs, [0, 8], r"bounds\[1\]=8 is not between 0 and the length; use 0 to 7"),
        (xs, xs, [0, 5, 4], r"bounds\[2\]=4 is not between 5 and the length; use 5 to 7"),
    ):
        with pytest.raises(ValueError, match=said):
            kernels.products(a, b, bounds)
    for coefficients, given, out, said in (
        ([], [], None, "there are 0 coefficients and 0 vectors; use 1 of both"),
        ([1.0], xs, None, "there are 1 coefficients and 3 vectors; use 3 of both"),
        ([1.0] * 3, [*xs[:2], xs[2][1:]], None, r"vectors\[2\]\.shape=\(6,\)"),
        ([1.0] * 3, xs, xs[0][1:], r"out\[0\]\.shape=\(6,\)"),
        ([1.0] * 3, xs, xs[0].float(), r"out\[0\]\.shape=\(7,\) and out\[0\]\.dtype=torch\.float32"),
    ):
        with pytest.raises(ValueError, match=said):
            kernels.combine(coefficients, given, out)
