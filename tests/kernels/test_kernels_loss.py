"""Softmax and cross entropy in one call, against sums of Python's own exponentials and logarithms.

Shape letters: `K` classes, `I` inputs, `B` samples.
"""

from __future__ import annotations

from math import exp, inf, isnan, log, nan

import pytest
import torch
from kernel_cases import DTYPES, NAMES, SETS, NoFallback, equal, needs_native, normal, placed, public_on, weights

from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer

# Less than a vector of each instruction set, one, more than one; a block of samples, less and more.
BATCHES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300, 517]


@pytest.fixture(params=NAMES)
def kernels(request):
    """The public functions on each implementation."""
    with public_on(request.param) as public:
        yield public


def outputs(layer: DenseLayer, theta, u) -> list[list[float]]:
    """W u + b of each sample, in double precision."""
    weight, bias = layer.unpack(theta.double())
    return (weight[0] @ u[0].double() + bias[0]).T.tolist()


def literal(z: list[float], label: int) -> tuple[float, bool, list[float]]:
    """Loss of one sample, whether it is classified rightly, and softmax less one-hot."""
    top = max(z)
    shares = [exp(x - top) for x in z]
    total = sum(shares)
    slope = [share / total - (k == label) for k, share in enumerate(shares)]
    return log(total) - (z[label] - top), z.index(top) == label, slope


def problem(classes: int, inputs: int, batch: int, dtype, bias: str = "vector", size: float = 3.0):
    layer = DenseLayer(inputs, classes, "identity", bias)
    theta = weights(layer, 1, 1, dtype) * size
    labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(batch))
    return layer, theta, normal(1, inputs, batch, seed=2, dtype=dtype), labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 16, 17, 64, 65])
@pytest.mark.parametrize("bias", ["vector", "scalar"])
def test_against_the_definition(kernels, classes, bias, dtype):
    for batch in BATCHES if classes in (3, 10) else (1, 9, 257):
        layer, theta, u, labels = problem(classes, 5, batch, dtype, bias)
        slope = placed(torch.full((classes, batch), nan, dtype=dtype), "columns")
        around = slope._base.clone()
        loss, right = kernels.cross_entropy(layer, theta, u, labels, slope=slope)
        assert kernels.cross_entropy(layer, theta, u, labels) == (loss, right)
        samples = [literal(z, k) for z, k in zip(outputs(layer, theta, u), labels.tolist(), strict=True)]
        eps = torch.finfo(dtype).eps
        assert type(loss) is float and type(right) is int
        assert loss == pytest.approx(sum(each[0] for each in samples), rel=20 * eps, abs=20 * eps * batch)
        assert right == sum(each[1] for each in samples)
        expected = torch.tensor([each[2] for each in samples], dtype=torch.float64).reshape(batch, classes).T
        assert not batch or (slope - expected).abs().max() <= 30 * eps
        around[:, 1:-2] = slope
        assert torch.equal(around, slope._base), "nothing around the slopes is written"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_derivatives_are_those_of_autograd(kernels, dtype):
    layer, theta, u, labels = problem(10, 8, 257, dtype)
    slope, gradient = torch.empty(10, 257, dtype=dtype), torch.empty_like(theta)
    kernels.cross_entropy(layer, theta, u, labels, slope=slope)
    back = kernels.adjoint(layer, theta, u, slope[None], h=1 / 257, residual=False, gradient=gradient)
    x, y = theta.double().requires_grad_(), u.double().requires_grad_()
    weight, bias = layer.unpack(x)
    torch.nn.functional.cross_entropy((weight[0] @ y[0] + bias[0]).T, labels).backward()
    eps = torch.finfo(dtype).eps
    assert (gradient - x.grad).abs().max() <= 100 * eps and (back - y.grad).abs().max() <= 20 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_any_size(kernels, dtype):
    """Far apart, equal, without bounds, not numbers: what torch's own functions give, sample by sample."""
    huge, eps = torch.finfo(dtype).max / 8, torch.finfo(dtype).eps
    rows = [
        [0.0, 0.0, 0.0, 0.0],
        [huge, -huge, 0.0, huge],
        [-huge, -huge, -huge, -huge / 2],
        [1.0, -inf, 2.0, -inf],
        [-inf, -inf, -inf, -inf],
        [-inf, 700.0, -700.0, 80.0],
        [inf, 1.0, 2.0, 3.0],
        [-inf, inf, inf, 3.0],
        [5.0, nan, 7.0, nan],
        [nan, 1.0, 2.0, inf],
        [inf, 1.0, 2.0, nan],
        [-80.0, 8.0, 8.0, 1.0],
        [1e-30, -1e-30, 0.0, -0.0],
        [-88.0, 0.0, -87.0, -100.0],
        [-745.0, 0.0, -708.0, -1e5],
    ]
    logits = torch.tensor(rows, dtype=dtype).T.contiguous()
    # Weights of the identity would make NaN of 0 * inf: one output at a time, and each a layer of its own.
    layer = DenseLayer(1, 4, "identity")
    for z in logits.T:
        theta = torch.cat([torch.zeros(4, dtype=dtype), z])[None]
        for label in range(4):
            slope = torch.empty(4, 9, dtype=dtype)
            labels, u = torch.full((9,), label), torch.ones(1, 1, 9, dtype=dtype)
            loss, right = kernels.cross_entropy(layer, theta, u, labels, slope=slope)
            own = torch.nn.functional.cross_entropy(z[None], labels[:1]).double() * 9
            close = {"rtol": 20 * eps, "atol": 20 * eps, "equal_nan": True}
            torch.testing.assert_close(torch.tensor(loss, dtype=torch.float64), own, **close)
            assert right == (9 if z.max(0).indices == label else 0)
            expected = torch.softmax(z, 0) - torch.nn.functional.one_hot(labels[0], 4)
            torch.testing.assert_close(slope, expected[:, None].expand(4, 9), rtol=0, atol=4 * eps, equal_nan=True)


def test_one_sample_that_is_no_number_spoils_the_loss_alone(kernels):
    layer, theta, u, labels = problem(3, 5, 257, torch.float64)
    plain, slope, other = (torch.empty(3, 257, dtype=torch.float64) for _ in range(3))
    loss, right = kernels.cross_entropy(layer, theta, u, labels, slope=plain)
    for place in (0, 63, 100, 256):
        spoilt = u.clone()
        spoilt[0, 1, place] = nan
        bad, _ = kernels.cross_entropy(layer, theta, spoilt, labels, slope=slope)
        assert isnan(bad) and not isnan(loss)
        assert slope[:, place].isnan().all()
        others = torch.arange(257) != place
        assert equal(slope[:, others], plain[:, others])
    assert kernels.cross_entropy(layer, theta, u, labels, slope=other) == (loss, right) and equal(other, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_equal_outputs_fit_in_one_logarithm(kernels, dtype):
    """Each sample's sum is K, the largest there is."""
    layer = DenseLayer(2, 64, "identity")
    theta, u = torch.zeros(1, layer.num_parameters, dtype=dtype), torch.zeros(1, 2, 500, dtype=dtype)
    loss, right = kernels.cross_entropy(layer, theta, u, torch.arange(500) % 64)
    assert loss == pytest.approx(500 * log(64), rel=1e-6) and right == 8, "of equal outputs the first one counts"


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_of_a_sample_do_not_depend_on_its_batch(monkeypatch, name, dtype):
    with public_on(name) as public:
        monkeypatch.setattr(public.implementation, "fallback", NoFallback())
        layer, theta, u, labels = problem(10, 8, 400, dtype)
        slope = torch.empty(10, 400, dtype=dtype)
        public.cross_entropy(layer, theta, u, labels, slope=slope)
        for cut in (slice(0, 16), slice(16, 128), slice(128, 400), slice(63, 320), slice(5, 6)):
            own = torch.empty(10, len(labels[cut]), dtype=dtype)
            public.cross_entropy(layer, theta, u[:, :, cut].contiguous(), labels[cut], slope=own)
            assert equal(own, slope[:, cut])


@pytest.mark.parametrize("wrong", [-1, 3, 2**40, -(2**62)])
def test_labels_that_are_no_classes(kernels, wrong):
    layer, theta, u, labels = problem(3, 5, 70, torch.float64)
    labels[41] = wrong
    slope = torch.full((3, 70), 7.0, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"labels\[41\]={wrong} is not a class; use 0 to 2"):
        kernels.cross_entropy(layer, theta, u, labels, slope=slope)
    assert (slope == 7.0).all()


def test_arguments_that_do_not_fit(kernels):
    layer, theta, u, labels = problem(3, 5, 7, torch.float64)
    slope = torch.empty(3, 7, dtype=torch.float64)
    for change, said in (
        ({"theta": theta[:, :-1]}, r"theta\.shape=\(1, 17\) does not fit the other arrays; use \(1, 18\)"),
        ({"u": u[:, :4]}, r"u\.shape=\(1, 4, 7\) does not fit the other arrays; use \(1, 5, 7\)"),
        ({"u": torch.cat([u, u])}, r"u\.shape=\(2, 5, 7\) is not of one linear layer; use u of shape \(1, 5, 7\)"),
        ({"u": u.float()}, r"u\.dtype=torch\.float32 is not that of theta; use torch\.float64"),
        ({"labels": labels[1:]}, r"labels\.shape=\(6,\) and .* are not a class for each sample; use \(7,\)"),
        (
            {"labels": labels.int()},
            r"labels\.shape=\(7,\) and labels\.dtype=torch\.int32 .*; use \(7,\) and torch",
        ),
        ({"slope": slope.T}, r"slope\.shape=\(7, 3\) does not fit the other arrays; use \(3, 7\)"),
        ({"slope": slope.float()}, r"slope\.dtype=torch\.float32 is not that of theta"),
        ({"layer": DenseLayer(5, 3, "tanh")}, r"layer\.activation='tanh' is not of one linear layer; .* identity"),
    ):
        given = {"layer": layer, "theta": theta, "u": u, "labels": labels, "slope": slope} | change
        with pytest.raises(ValueError, match=said):
            kernels.cross_entropy(**given)


@needs_native
@pytest.mark.parametrize("kind", ["wide", "slope", "labels", "half"])
def test_torch_does_what_native_code_does_not(monkeypatch, kind):
    with public_on(SETS[0]) as public:
        native = public.implementation
        layer, theta, u, labels = problem(65 if kind == "wide" else 3, 5, 8, torch.float64)
        slope = torch.empty(layer.outputs, 8, dtype=torch.float64)
        if kind == "half":
            theta, u, slope = (each.bfloat16() for each in (theta, u, slope))
        if kind == "slope":
            slope = slope.T.contiguous().T
        if kind == "labels":
            labels = labels.repeat_interleave(2)[::2]
        found = public.cross_entropy(layer, theta, u, labels, slope=slope)
        expected = torch.empty_like(slope)
        assert found == fallback.cross_entropy(layer, theta, u, labels, expected) and torch.equal(slope, expected)
        monkeypatch.setattr(native, "fallback", NoFallback())
        with pytest.raises(AssertionError, match="cross_entropy went to torch"):
            public.cross_entropy(layer, theta, u, labels, slope=slope)
