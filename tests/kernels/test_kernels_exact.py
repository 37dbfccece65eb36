"""What the kernels give to the last bit: results over arguments, alone or together, not-a-number, tanh.

Shape letters: `m` layers or intervals, `c` steps of an interval, `C` width, `B` samples.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import inf, nan

import numpy as np
import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    DTYPES,
    NAMES,
    SCHEMES,
    SETS,
    equal,
    needs_native,
    normal,
    placed,
    problem,
    public_on,
)

from xbraid_py.layers.dense import DenseLayer

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=NAMES)
def kernels(request):
    """The public functions on each implementation."""
    with public_on(request.param) as public:
        yield public


@pytest.fixture(params=[pytest.param(name, marks=needs_native) for name in SETS or ["native"]])
def native(request):
    """The public functions on native code with each instruction set."""
    with public_on(request.param) as public:
        yield public


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1, 2, 4, 5, 6, 8, 12, 16, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_over_arguments(kernels, width, dtype, scheme):
    """Widths of one register tile and of several, more samples than go in a block."""
    layer, theta, u, v, add = problem(width, 300, dtype=dtype)
    how = {"h": 0.3, "scheme": scheme}
    plain = kernels.step(layer, theta, u, add=add, **how)
    own, more = u.clone(), add.clone()
    assert equal(kernels.step(layer, theta, own, add=add, out=own, **how), plain)
    assert equal(kernels.step(layer, theta, u, add=more, out=more, **how), plain)
    both = u.clone()
    assert equal(
        kernels.step(layer, theta, both, add=both, out=both, **how), kernels.step(layer, theta, u, add=u, **how)
    )

    slopes, found = torch.empty_like(theta), torch.empty_like(theta)
    back = kernels.adjoint(layer, theta, u, v, add=add, gradient=slopes, **how)
    for over in ("u", "v", "add"):
        arrays = {"u": u.clone(), "v": v.clone(), "add": add.clone()}
        target = arrays[over]
        kernels.adjoint(layer, theta, **arrays, out=target, gradient=found, **how)
        assert equal(target, back) and equal(found, slopes)
    assert kernels.adjoint(layer, theta, u, v, gradient=found, back=False, **how) is None
    assert equal(found, slopes)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [4, 5, 6, 12, 17, 64])
def test_intervals_over_arguments(kernels, width, scheme, parts):
    m, c = 2, 3
    layer, theta, states, tau, _ = problem(width, 300, m, c * parts)
    tau, points = tau[: m * c], normal(m, width, 300, seed=9)
    how = {"h": 0.2, "scheme": scheme, "parts": parts, "tau": tau}
    record, slopes = torch.empty_like(tau), torch.empty_like(theta)
    ends = kernels.relax(layer, theta, points, c, inputs=record, **how)
    over = points.clone()
    assert kernels.relax(layer, theta, over, c, ends=over, **how) is over and equal(over, ends)
    inputs = torch.full_like(tau, nan)
    inputs[::c] = points
    assert equal(kernels.relax(layer, theta, inputs[::c], c, inputs=inputs, **how), ends) and equal(inputs, record)

    ends = kernels.relax_adjoint(layer, theta, states, points, c, inputs=record, gradient=slopes, **how)
    over, found = points.clone(), torch.empty_like(theta)
    kernels.relax_adjoint(layer, theta, states, over, c, ends=over, gradient=found, **how)
    assert equal(over, ends) and equal(found, slopes)
    inputs = torch.full_like(tau, nan)
    inputs[c - 1 :: c] = points
    found = kernels.relax_adjoint(layer, theta, states, inputs[c - 1 :: c], c, inputs=inputs, **how)
    assert equal(found, ends) and equal(inputs, record)


@pytest.mark.parametrize("width", [1, 3, 8, 12, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_layers_in_one_call_or_in_many(native, width, dtype):
    """Rows alone, as steps alone, and one number off where arrays begin: the same bits."""
    m, c = 3, 2
    layer, theta, u, v, tau = problem(width, 133, m, c, dtype)
    slopes = torch.empty_like(theta)
    after, before = native.step(layer, theta, u, h=0.3), native.adjoint(layer, theta, u, v, h=0.3, gradient=slopes)
    ends = native.relax(layer, theta, u[::c], c, h=0.3, tau=tau)
    interval_slopes = torch.empty_like(theta)
    starts = native.relax_adjoint(layer, theta, u, v[::c], c, h=0.3, tau=tau, gradient=interval_slopes)
    for i in range(m * c):
        one, found = slice(i, i + 1), torch.empty_like(theta[:1])
        assert equal(native.step(layer, theta[one], u[one], h=0.3), after[one])
        assert equal(native.adjoint(layer, theta[one], u[one], v[one], h=0.3, gradient=found), before[one])
        assert equal(found, slopes[one])
    for k in range(m):
        x, y, found = u[k * c : k * c + 1], v[k * c : k * c + 1], torch.empty_like(theta[:1])
        for i in range(k * c, (k + 1) * c):
            x = native.step(layer, theta[i : i + 1], x, h=0.3, add=tau[i : i + 1])
        for i in reversed(range(k * c, (k + 1) * c)):
            y = native.adjoint(layer, theta[i : i + 1], u[i : i + 1], y, h=0.3, add=tau[i : i + 1], gradient=found)
            assert equal(found[0], interval_slopes[i])
        assert equal(x[0], ends[k]) and equal(y[0], starts[k])

    places = [placed(each, "shifted") for each in (theta, u, v, tau)]
    assert all(each.data_ptr() % 16 for each in places if dtype == torch.float64)
    found, out = placed(slopes, "shifted"), placed(u, "shifted")
    assert equal(native.step(layer, *places[:2], h=0.3, out=out), after)
    assert equal(native.adjoint(layer, *places[:3], h=0.3, out=out, gradient=found), before) and equal(found, slopes)
    assert equal(native.relax(layer, places[0], places[1][::c], c, h=0.3, tau=places[3]), ends)
    back = native.relax_adjoint(layer, *places[:2], places[2][::c], c, h=0.3, tau=places[3], gradient=found)
    assert equal(back, starts) and equal(found, interval_slopes)
    assert equal(native.distances(places[1], places[2]), native.distances(u, v))


@pytest.mark.parametrize("width", [3, 8, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_layers_cut_anywhere(native, width, dtype):
    """All layers in one interval, in two calls, in intervals of any length: states, adjoints, gradients bit for bit."""
    num, batch = 48, 601
    layer, theta, u, v, tau = problem(width, batch, 1, num, dtype)
    how, record, behind, slopes = {"h": 0.1}, torch.empty_like(u), torch.empty_like(u), torch.empty_like(theta)
    end = native.relax(layer, theta, u[:1], num, tau=tau, inputs=record, **how)
    start = native.relax_adjoint(layer, theta, record, v[:1], num, tau=tau, inputs=behind, gradient=slopes, **how)
    one = torch.empty_like(theta)
    assert equal(native.relax_adjoint(layer, theta, record, v[:1], num, tau=tau, gradient=one, **how), start)
    assert equal(one, slopes)

    for length in (1, 4, 16, 24):
        inputs, back, found = torch.empty_like(u), torch.empty_like(u), torch.empty_like(theta)
        ends = native.relax(layer, theta, record[::length], length, tau=tau, inputs=inputs, **how)
        assert equal(inputs, record) and equal(ends, torch.cat([record[length::length], end]))
        points = behind[length - 1 :: length]
        ends = native.relax_adjoint(layer, theta, record, points, length, tau=tau, inputs=back, gradient=found, **how)
        assert equal(ends, torch.cat([start, behind[length - 1 : -1 : length]]))
        assert equal(back, behind) and equal(found, slopes)

    x, y, found = u[:1], v[:1], torch.empty_like(theta)
    for half in (slice(0, 24), slice(24, 48)):
        x = native.relax(layer, theta[half], x, 24, tau=tau[half], **how)
    for half in (slice(24, 48), slice(0, 24)):
        options = {"tau": tau[half], "gradient": found[half], **how}
        y = native.relax_adjoint(layer, theta[half], record[half], y, 24, **options)
    assert equal(x, end) and equal(y, start) and equal(found, slopes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch(native, activation, dtype):
    """Nor on its place: a batch is cut anywhere, and the last samples, which fill no vector, round like the others."""
    cuts = [(0, 16), (16, 128), (128, 640), (640, 1000), (512, 784), (0, 1), (1, 3), (5, 12), (13, 270), (999, 1000)]
    for width, scheme in ((3, "euler"), (8, "midpoint"), (12, "euler")):
        layer, theta, u, v, add = problem(width, 1000, 1, 2, dtype, activation)
        how = {"h": 0.3, "scheme": scheme}
        after, before = native.step(layer, theta, u, add=add, **how), native.adjoint(layer, theta, u, v, add=add, **how)
        for cut in (slice(*cut) for cut in cuts):
            some = [each[:, :, cut].contiguous() for each in (u, v, add)]
            assert equal(native.step(layer, theta, some[0], add=some[2], **how), after[:, :, cut])
            assert equal(native.adjoint(layer, theta, *some[:2], add=some[2], **how), before[:, :, cut])


@needs_native
def test_calls_in_several_threads():
    """Calls of different sizes at the same time, some of them the first of their thread."""
    problems = [problem(width, 300, 2, 20, dtype) for width in (3, 16, 33, 64) for dtype in DTYPES]

    def run(case):
        layer, theta, u, v, tau = case
        slopes = torch.empty_like(theta)
        ends = module.relax(layer, theta, u[::20], 20, h=0.1, tau=tau)
        return ends, module.relax_adjoint(layer, theta, u, v[::20], 20, h=0.1, gradient=slopes), slopes

    with public_on(SETS[0]) as module:
        alone = [run(case) for case in problems]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(run, problems * 4))
    assert all(
        equal(a, b) for found, kept in zip(together, alone * 4, strict=True) for a, b in zip(found, kept, strict=True)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_what_is_not_finite_stays_with_its_sample(kernels, activation, scheme, bad):
    for width, batch, place in ((3, 9, 8), (8, 140, 5), (12, 140, 139)):
        layer, theta, u, v, _ = problem(width, batch, 1, 1, activation=activation)
        how, others = {"h": 0.3, "scheme": scheme}, torch.arange(batch) != place
        spoilt = u.clone()
        spoilt[:, 1, place] = bad
        plain, found = (kernels.step(layer, theta, each, **how) for each in (u, spoilt))
        assert equal(found[:, :, others], plain[:, :, others])
        assert not found[:, 1, place].isfinite().any()
        assert bad == bad or found[:, :, place].isnan().all()
        for x, y in ((spoilt, v), (u, torch.where(spoilt.isfinite(), v, bad))):
            slopes = torch.zeros_like(theta)
            plain, found = (
                kernels.adjoint(layer, theta, u, v, **how),
                kernels.adjoint(layer, theta, x, y, gradient=slopes, **how),
            )
            assert equal(found[:, :, others], plain[:, :, others])
            if bad != bad and (x is u or activation != "identity"):
                assert slopes.isnan().any() and found[:, :, place].isnan().any()
            elif bad != bad:  # the slope of the identity does not depend on u, the gradient does
                assert slopes.isnan().any() and found.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nonfinite_numbers_as_in_torch(native, activation, dtype):
    """Zeros, denormal numbers, infinities and NaN anywhere: the same ones come out, and the rest is close."""
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, torch.finfo(dtype).smallest_normal / 8], dtype=dtype)
    chosen = torch.Generator().manual_seed(5)
    counts = dict.fromkeys((nan, inf, 0), 0)
    for width in (1, 3, 8, 12):
        layer, theta, u, v, _ = problem(width, 37, 4, 1, dtype, activation)
        for array, share in ((theta, 0.02), (u, 0.05), (v, 0.05)):
            where = torch.rand(array.shape, generator=chosen) < share
            array[where] = special[torch.randint(len(special), (int(where.sum()),), generator=chosen)]
        slopes, expected_slopes = torch.empty_like(theta), torch.empty_like(theta)

        def found_by(public, slopes, given=(layer, theta, u), v=v):
            step = public.step(*given, h=0.3), public.step(*given, residual=False)
            return (*step, public.adjoint(*given, v, h=0.3, gradient=slopes), slopes)

        own = found_by(native, slopes)
        with public_on("torch") as public:
            pairs = zip(own, found_by(public, expected_slopes), strict=True)
        eps = torch.finfo(dtype).eps
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=300 * eps, atol=300 * eps, equal_nan=True)
            counts[nan] += int(found.isnan().sum())
            counts[inf] += int(found.isinf().sum())
            counts[0] += int(found.isfinite().sum())
    assert counts[nan] and counts[0] and (counts[inf] or activation == "tanh")


def test_infinite_weights_with_finite_results(kernels):
    """Whatever lies behind the last sample must not come in."""
    for activation, value in (("relu", 0.0), ("smooth_relu", 0.0), ("tanh", -1.0)):
        layer = DenseLayer(3, 3, activation)
        theta = torch.full((1, layer.num_parameters), -inf, dtype=torch.float64)
        for batch in (1, 5, 13, 129):
            u = torch.full((1, 3, batch), 0.5, dtype=torch.float64)
            assert equal(kernels.step(layer, theta, u, h=0.5), u + 0.5 * value)


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float64, 4.0), (torch.float32, 4.0)])
def test_tanh(native, dtype, ulps):
    """Within 4 units in the last place (3.0 were measured, 0.8 for torch); odd; exact at the ends."""
    layer = DenseLayer(1, 1, "tanh")
    theta = torch.tensor([[1.0, -0.0]], dtype=dtype)  # minus zero is what leaves zeros as they are

    def tanh(x):
        return native.step(layer, theta, x.reshape(1, 1, -1), residual=False).flatten()

    info = torch.finfo(dtype)
    tiny = torch.logspace(np.log10(info.tiny), 0, 20001, dtype=torch.float64).to(dtype)
    x = torch.cat([torch.linspace(-50, 50, 200001, dtype=dtype), torch.linspace(-1, 1, 50001, dtype=dtype), tiny])
    exact = np.tanh(x.numpy().astype(np.longdouble))
    spacing = np.spacing(np.abs(exact).astype(x.numpy().dtype)).astype(np.longdouble)
    worst = float(np.max(np.abs(tanh(x).numpy().astype(np.longdouble) - exact) / spacing))
    assert worst <= ulps, f"{worst:.2f} units in the last place"
    assert torch.equal(tanh(-x), -tanh(x)) and tanh(x).abs().max() == 1
    small = torch.tensor([info.tiny, info.tiny / 4, info.tiny * info.eps, info.eps / 8], dtype=dtype)
    assert torch.equal(tanh(small), small)
    edges = torch.tensor([inf, -inf, info.max, -info.max, 0.0, nan], dtype=dtype)
    assert equal(tanh(edges), torch.tensor([1, -1, 1, -1, 0, nan], dtype=dtype))
