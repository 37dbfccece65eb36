"""Which kernels are used, what they run on, and how they refuse arguments that do not fit.

Shape letters: `m` intervals, `c` steps of each, `C` width, `B` samples, `p` parameters of a layer.
"""

from __future__ import annotations

import re
import sys

import pytest
import torch
from kernel_cases import SETS, kernels_of, needs_native, normal, public_on, weights

from xbraid_py import kernels
from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer

# Stands before the import where a test asks for an installation without the extension.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "xbraid_py.kernels._native":
            raise ImportError("it was left out")
sys.meta_path.insert(0, Block())
"""
USE = "from xbraid_py import kernels; print(kernels.BACKEND); print(kernels.implementation.__name__)"


@pytest.fixture
def no_extension(monkeypatch):
    """As if the extension module had not been built."""
    monkeypatch.setitem(sys.modules, "xbraid_py.kernels._native", None)
    monkeypatch.delitem(sys.modules, "xbraid_py.kernels.native", raising=False)
    for name in ("native", "_native"):
        monkeypatch.delattr(kernels, name, raising=False)


def test_torch_by_choice_or_for_want_of_anything_else(no_extension):
    assert kernels.choose("torch") == (fallback, "torch")
    module, name = kernels.choose("")
    assert module is fallback and name == "torch (no native kernels in this installation)"


@pytest.mark.parametrize("wish", ["native", "avx2"])
def test_native_kernels_that_are_not_there(no_extension, wish):
    with pytest.raises(ImportError, match=rf"XBRAID_KERNELS={wish}: .*no native kernels.*or use XBRAID_KERNELS=torch"):
        kernels.choose(wish)


@needs_native
@pytest.mark.parametrize("wish", ["", "native", SETS[0] if SETS else ""])
def test_native_kernels_of_an_older_build(monkeypatch, wish):
    """An extension module left over from before its functions changed is refused, and never called."""
    from xbraid_py.kernels import _native

    monkeypatch.delattr(_native, "INTERFACE")
    monkeypatch.delitem(sys.modules, "xbraid_py.kernels.native")
    monkeypatch.delattr(kernels, "native")
    said = r"_native\..* was built from other sources .*interface 1, not \d.*install xbraid_py again, or use XBRAID"
    with pytest.raises(ImportError, match=said):
        kernels.choose(wish)
    assert kernels.choose("torch") == (fallback, "torch")


@needs_native
def test_choices():
    with kernels_of(SETS[0]) as module:
        assert SETS[-1] == "baseline", "what any processor can run comes last"
        for wish in ("", "native"):
            assert kernels.choose(wish) == (module, f"native ({SETS[0]})")
        for wish in SETS:
            assert kernels.choose(wish) == (module, f"native ({wish})")
            assert module.active() == wish
        choices = ", ".join(["native", "torch", *SETS])
        with pytest.raises(ImportError, match=f"XBRAID_KERNELS=sse9 is not to be had here; use one of {choices}"):
            kernels.choose("sse9")
        assert module.active() == SETS[-1], "a refused choice changes nothing"
        with pytest.raises(ValueError, match=f"'sse9' are not to be had here; use one of {', '.join(SETS)}"):
            module.use("sse9")


@needs_native
def test_width_up_to_which_native_code_is_faster():
    for name in SETS:
        with kernels_of(name) as module:
            assert module.max_width() == (16 if name == "baseline" else 64)


@pytest.mark.job
@pytest.mark.parametrize(
    ("wish", "script", "said"),
    [
        ("torch", USE, ["torch", "xbraid_py.kernels.fallback"]),
        ("", BLOCK + USE, ["torch (no native kernels in this installation)", "xbraid_py.kernels.fallback"]),
        pytest.param("baseline", USE, ["native (baseline)", "xbraid_py.kernels.native"], marks=needs_native),
    ],
)
def test_the_environment_chooses(run_job, wish, script, said):
    done = run_job(["-c", script], env={"XBRAID_KERNELS": wish})
    assert done.returncode == 0 and done.stdout.split("\n")[:-1] == said, done.stderr


@pytest.mark.job
@pytest.mark.parametrize("script", [USE, BLOCK + USE])
def test_a_choice_that_cannot_be_had_ends_the_import(run_job, script):
    done = run_job(["-c", script], env={"XBRAID_KERNELS": "nonsense"})
    assert done.returncode != 0
    assert "ImportError: XBRAID_KERNELS=nonsense" in done.stderr and "torch" in done.stderr


# ---- Arguments that do not fit.

LAYER, M, CFACTOR, BATCH, P = DenseLayer(3, 3), 2, 2, 5, 12


def arguments(function: str) -> dict:
    """Fitting arguments, all of them given."""
    rows = {"step": M, "adjoint": M}.get(function, M * CFACTOR)
    theta, states = weights(LAYER, rows, 1), normal(rows, 3, BATCH, seed=2)
    if function == "step":
        return {"theta": theta, "u": states, "add": states + 1, "out": states.clone()}
    if function == "adjoint":
        more = {"add": states + 1, "out": states.clone(), "gradient": theta.clone()}
        return {"theta": theta, "u": states, "v": states + 2, **more}
    common = {"points": states[:M].clone(), "cfactor": CFACTOR, "h": 0.1, "ends": states[:M].clone()}
    common |= {"theta": theta, "tau": states + 1, "inputs": states.clone()}
    return common if function == "relax" else {**common, "states": states + 2, "gradient": theta.clone()}


@pytest.fixture(params=["torch", *SETS[:1]])
def chosen(request):
    """The public functions on both kinds of kernels."""
    with public_on(request.param) as public:
        yield public


FUNCTIONS = ("step", "adjoint", "relax", "relax_adjoint")
ARRAYS = [
    (function, name) for function in FUNCTIONS for name, array in arguments(function).items() if torch.is_tensor(array)
]


@pytest.mark.parametrize(("function", "name"), ARRAYS)
def test_every_array_has_its_shape_and_type(chosen, function, name):
    """Too few rows, numbers or samples, and too many; another type: refused by name, before anything is written."""
    fitting = arguments(function)
    getattr(chosen, function)(LAYER, **fitting)
    array = fitting[name]
    more = [torch.cat([array, array[:1]]), torch.cat([array, array[:, :1]], 1), array[None], array[0]]
    wrong = [array[1:], array[:, 1:], array[..., :-1], torch.cat([array, array], -1), *more]
    for other in wrong:
        given = arguments(function) | {name: other}
        before = {key: value.clone() for key, value in given.items() if torch.is_tensor(value)}
        with pytest.raises(ValueError, match=r"\w+\.shape=\(.*; use \(.*\)") as refused:
            getattr(chosen, function)(LAYER, **given)
        if name not in ("u", "points"):  # the sizes of all others are told by these
            assert str(refused.value).startswith(f"{name}.shape={tuple(other.shape)} ")
            assert str(refused.value).endswith(f"use {tuple(array.shape)}")
        assert all(torch.equal(given[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match=r"\.dtype=torch\.float\d\d is not that of theta; use torch\.float") as refused:
        getattr(chosen, function)(LAYER, **arguments(function) | {name: array.float()})
    assert name == "theta" or str(refused.value).startswith(f"{name}.dtype=torch.float32")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_step_sizes_of_too_few_or_too_many_rows(chosen, function):
    """One for each row of theta, of its type: anything else is refused before anything is written."""
    rows = len(arguments(function)["theta"])
    sizes = torch.full((rows,), 0.1, dtype=torch.float64)
    getattr(chosen, function)(LAYER, **arguments(function) | {"h": sizes})
    for other in (sizes[1:], torch.cat([sizes, sizes]), sizes[:, None], sizes[0], sizes[:0]):
        given = arguments(function) | {"h": other}
        before = {key: value.clone() for key, value in given.items() if torch.is_tensor(value)}
        said = re.escape(f"h.shape={tuple(other.shape)} does not fit the other arrays; use ({rows},)")
        with pytest.raises(ValueError, match=said):
            getattr(chosen, function)(LAYER, **given)
        assert all(torch.equal(given[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match=r"h\.dtype=torch\.float32 is not that of theta; use torch\.float64"):
        getattr(chosen, function)(LAYER, **arguments(function) | {"h": sizes.float()})


@pytest.mark.parametrize(("function", "name"), [("adjoint", "v"), ("relax_adjoint", "states")])
def test_arrays_that_have_to_be_there(chosen, function, name):
    with pytest.raises(ValueError, match=rf"{name}=None must be a tensor; use one of shape \(\d, 3, 5\)"):
        getattr(chosen, function)(LAYER, **arguments(function) | {name: None})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_methods_that_there_are_not(chosen, function):
    with pytest.raises(ValueError, match="scheme='heun' must be euler or midpoint; use euler"):
        getattr(chosen, function)(LAYER, **arguments(function), scheme="heun")
    if "relax" in function:
        for changes, said in (({"cfactor": 0}, "cfactor=0"), ({"parts": -1}, "parts=-1")):
            with pytest.raises(ValueError, match=f"{said} must be at least 1; use 1"):
                getattr(chosen, function)(LAYER, **arguments(function) | changes)


def test_layers_whose_inputs_cannot_be_added(chosen):
    layer = DenseLayer(3, 4)
    theta, u, v = weights(layer, 2, 1), normal(2, 3, 5, seed=1), normal(2, 4, 5, seed=2)
    assert chosen.step(layer, theta, u, residual=False).shape == v.shape
    for options in ({}, {"residual": False, "scheme": "midpoint"}):
        with pytest.raises(ValueError, match=r"layer\.outputs=4 is not layer\.inputs=3, .*; use outputs=3, or"):
            chosen.step(layer, theta, u, **options)
        with pytest.raises(ValueError, match=r"layer\.outputs=4 is not layer\.inputs=3, .*; use outputs=3, or"):
            chosen.adjoint(layer, theta, u, v, **options)
    with pytest.raises(ValueError, match=r"layer\.outputs=4 is not layer\.inputs=3"):
        chosen.relax(layer, theta, u, 1, h=0.1)


def test_distances_of_rows_that_do_not_match(chosen):
    a = normal(2, 3, 5, seed=1)
    for b in (a[:1], a[:, :2], a[0], a.float()):
        with pytest.raises(ValueError, match=r"b\.shape=.*not those of a; use b of shape \(2, 3, 5\) and type torch"):
            chosen.distances(a, b)
        for given in ({"b": b}, {"b": a, "c": b}, {"b": a, "difference": b}):
            (name,) = [name for name, each in given.items() if each is b]
            with pytest.raises(ValueError, match=rf"{name}\.shape=.*not those of a; use {name} of shape \(2, 3, 5\)"):
                chosen.move(a.clone(), **given)


@pytest.mark.parametrize("activation", ["smooth_relu", "relu", "tanh", "identity"])
@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
def test_autograd_through_arrays_that_need_a_slope(chosen, activation, scheme):
    layer = DenseLayer(2, 2, activation)
    theta, u = weights(layer, 2, 1).requires_grad_(), normal(2, 2, 3, seed=2).requires_grad_()
    how = {"h": 0.3, "scheme": scheme}
    assert torch.autograd.gradcheck(lambda theta, u: chosen.step(layer, theta, u, **how), (theta, u))
    assert torch.autograd.gradcheck(lambda theta, u: chosen.relax(layer, theta, u[:1], 2, **how), (theta, u))


@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
@pytest.mark.parametrize("slopes", [True, False])
def test_autograd_through_step_sizes(chosen, scheme, slopes):
    layer, h = DenseLayer(2, 2, "tanh"), torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    theta, u = weights(layer, 2, 1).requires_grad_(slopes), normal(2, 2, 3, seed=2).requires_grad_(slopes)
    assert torch.autograd.gradcheck(lambda h: chosen.step(layer, theta, u, h=h, scheme=scheme), h)
    assert torch.autograd.gradcheck(lambda h: chosen.relax(layer, theta, u[:1], 2, h=h, scheme=scheme), h)
