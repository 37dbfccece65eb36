"""Blocks that exist, with weights of their own: in what two of them differ, and how often a pattern of them repeats.

Shape letters: `N` blocks, `p` of them in a pattern.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, zip_longest
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from xbraid_py.layers.norm_dropout import DropPath
from xbraid_py.layers.trees import flatten

# Numbers of layers that many libraries keep in their blocks, most for what they record and not for what they compute.
COUNTERS = ("layer_idx", "layer_index", "layer_id")
_BATCH_NORMS = nn.modules.batchnorm._NormBase
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_MODULES_OWN = frozenset(vars(nn.Module())) - {"training"}
_MISSING = object()
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Counter:
    """A number of the layer that a part of each block keeps.

    Attributes
    ----------
    part : str
        Name of the part.
    name : str
        Of its attribute.
    values : tuple of int or float
        One for each block.
    """

    part: str
    name: str
    values: tuple[float, ...]


class Step(nn.Module):
    """One step by a block that exists: what it gives, an entry of that, or u + h F(u).

    Parameters
    ----------
    block : nn.Module
    returns : int or str, optional
        Which entry of what the block gives is the state.
    h : float, optional
        Step size of an increment.
    t : float, optional
        Time of the layer, of a block that asks for it.
    """

    def __init__(
        self, block: nn.Module, returns: int | str | None = None, h: float | None = None, t: float | None = None
    ):
        super().__init__()
        self.block, self.returns, self.h, self.t = block, returns, h, t

    def forward(self, u, *inputs, **named):
        """The next state."""
        return next_state(self.block, self.t, u, inputs, named, self.returns, self.h)


class Pattern(nn.Module):
    """Several blocks one behind the other, as one layer that gives the next state.

    Parameters
    ----------
    blocks : sequence of nn.Module
        None of which asks for the time of its layer.
    returns, h
        As of `Step`.
    """

    def __init__(self, blocks: Sequence[nn.Module], returns: int | str | None = None, h: float | None = None):
        super().__init__()
        self.blocks, self.returns, self.h = nn.ModuleList(blocks), returns, h

    def forward(self, u, *inputs, **named):
        """The state behind all of them."""
        for block in self.blocks:
            u = next_state(block, None, u, inputs, named, self.returns, self.h)
        return u


class TimedPattern(Pattern):
    """The same of blocks of which some ask for the time, a block taking `dt` of it."""

    def __init__(self, blocks: Sequence[nn.Module], returns: int | str | None, h: float | None, dt: float):
        super().__init__(blocks, returns, h)
        self.dt = dt

    def forward(self, u, *inputs, t, **named):
        """The state behind all of them, from the one at t."""
        for number, block in enumerate(self.blocks):
            time = t + number * self.dt if takes_time(block) else None
            u = next_state(block, time, u, inputs, named, self.returns, self.h)
        return u


def steps_of(blocks: Sequence[nn.Module], returns: int | str | None, h: float | None, T: float) -> list[nn.Module]:
    """Blocks as modules that give the next state, if need be within a `Step`; those that ask for it get their time."""
    timed = [takes_time(block) for block in blocks]
    if returns is None and h is None and not any(timed):
        return list(blocks)
    times = [0.0, *accumulate([T / len(blocks)] * len(blocks))]
    return [Step(b, returns, h, t if asks else None) for b, t, asks in zip(blocks, times, timed, strict=False)]


def patterns_of(
    blocks: Sequence[nn.Module], period: int, returns: int | str | None, h: float | None, T: float
) -> list[nn.Module]:
    """Every `period` blocks as one layer."""
    parts = [blocks[i : i + period] for i in range(0, len(blocks), period)]
    if any(takes_time(block) for block in parts[0]):
        return [TimedPattern(part, returns, h, T / len(blocks)) for part in parts]
    return [Pattern(part, returns, h) for part in parts]


def takes_time(block: nn.Module) -> bool:
    """Whether a block asks for the time of its layer, by a parameter `t` of its `forward`."""
    return "t" in inspect.signature(block.forward).parameters


def at_time(block: nn.Module, t: float | None, u: Any, inputs: Sequence[Any] = (), named: Mapping[str, Any] = _NOTHING):
    """What a block gives for a state and further inputs at a time, which may stand first; None for one without."""
    if t is None:
        return block(u, *inputs, **named)
    if next(iter(inspect.signature(block.forward).parameters)) == "t":
        return block(t, u, *inputs, **named)
    return block(u, *inputs, **{"t": t, **named})


def next_state(block, t: float | None, u: Any, inputs, named, returns: int | str | None, h: float | None) -> Any:
    """The state behind a block."""
    end = at_time(block, t, u, inputs, named)
    end = end if returns is None else end[returns]
    if h is None:
        return end
    (before, structure), (change, other) = flatten(u), flatten(end)
    if len(before) != len(change):
        raise ValueError(
            f"block={type(block).__name__} makes {other} of a state {structure}; an increment must have the structure "
            f"of its state"
        )
    return structure.build([x + h * y for x, y in zip(before, change, strict=True)])


class Existing:
    """Like blocks that exist: the layers of a stack, which takes copies of their weights.

    Parameters
    ----------
    blocks : sequence of nn.Module
        N, like each other.

    Attributes
    ----------
    blocks : list of nn.Module
    counters : tuple of Counter
        In what they are allowed to differ beside their weights.
    rates : tuple of Counter
        The probabilities of their `DropPath`, where these differ: those of the layer that is evaluated.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = list(blocks)
        first = self.blocks[0]
        places = [
            (name, key)
            for name, part in first.named_modules()
            for key in COUNTERS
            if isinstance(vars(part).get(key), int)
        ]
        found = (Counter(n, k, tuple(getattr(b.get_submodule(n), k) for b in self.blocks)) for n, k in places)
        self.counters = tuple(each for each in found if len(set(each.values)) > 1)
        paths = [name for name, part in first.named_modules() if isinstance(part, DropPath)]
        rates = (
            Counter(name, "p", tuple(cast(DropPath, b.get_submodule(name)).p for b in self.blocks)) for name in paths
        )
        self.rates = tuple(each for each in rates if len(set(each.values)) > 1)


def checked(blocks: Any) -> list[nn.Module]:
    """Blocks as a list.

    Raises
    ------
    TypeError
        If they are no modules, or none at all.
    ValueError
        If two of them share weights.
    """
    if isinstance(blocks, nn.Module) and not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise TypeError(
            f"blocks={type(blocks).__name__} must be several modules: an nn.ModuleList, an nn.Sequential or a list; "
            f"use from_blocks(model.layers)"
        )
    if not isinstance(blocks, Iterable) or isinstance(blocks, dict | nn.ModuleDict):
        raise TypeError(
            f"blocks={type(blocks).__name__} must be an nn.ModuleList, an nn.Sequential or a list of modules"
        )
    found = list(blocks)
    if not found:
        raise TypeError("blocks=[] must be at least one module")
    for number, block in enumerate(found):
        if not isinstance(block, nn.Module):
            raise TypeError(f"blocks[{number}]={type(block).__name__} must be an nn.Module")
    owners: dict[int, int] = {}
    for number, block in enumerate(found):
        for name, parameter in block.named_parameters():
            other = owners.setdefault(id(parameter), number)
            if other != number:
                what = "are the same module" if found[other] is block else f"share their weight {name}"
                raise ValueError(
                    f"blocks[{other}] and blocks[{number}] {what}, and a stack would train copies apart; for one set "
                    f"of weights in all layers use LayerParallel(lambda: MyBlock(), {len(found)}, splines="
                    f"Splines(1, 0)), for layers of their own copy.deepcopy(block)"
                )
    return found


def period_of(blocks: Sequence[nn.Module]) -> int | None:
    """The least p, at most N / 2, so that each block is like the one p before it and p divides N; 1 of a single block.

    None if there is none.
    """
    count = len(blocks)
    if count == 1:
        return 1
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(difference(blocks[i - period], blocks[i]) is None for i in range(period, count)):
            return period
    return None


def first_difference(blocks: Sequence[nn.Module]) -> str:
    """Which block is unlike the first one, and in what."""
    for number, block in enumerate(blocks):
        found = difference(blocks[0], block)
        if found is not None:
            return f"blocks[0] and blocks[{number}] differ: {found}"
    return "all blocks are alike"


def difference(a: nn.Module, b: nn.Module, seen: set[tuple[int, int]] | None = None) -> str | None:
    """In what two blocks differ beside the values of their weights and their `COUNTERS`; None if in nothing.

    `seen` holds the pairs of objects that are compared already, which may hold each other.
    """
    seen = set() if seen is None else seen
    pairs = list(zip_longest(a.named_modules(), b.named_modules(), fillvalue=("", None)))
    seen.update((id(part), id(other)) for (_, part), (_, other) in pairs)
    for (name, part), (other_name, other) in pairs:
        if part is None or other is None or name != other_name:
            return f"one has a part {(other_name if part is None else name)!r}, and the other has not"
        if not _same_class(part, other):
            return f"{_place(name, 'class')} is {type(part).__name__} and {type(other).__name__}"
        found = _of_tensors(name, part, other, seen) or _of_attributes(name, part, other, seen)
        if found is not None:
            return found
    return None


def _of_tensors(name: str, a: nn.Module, b: nn.Module, seen: set) -> str | None:
    for mine, others in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        for key in dict.fromkeys([*mine, *others]):
            p, q, place = mine.get(key), others.get(key), _place(name, key)
            for what in ("shape", "dtype", "device", "requires_grad"):
                x, y = getattr(p, what, None), getattr(q, what, None)
                if x != y:
                    x, y = (tuple(each) if isinstance(each, torch.Size) else each for each in (x, y))
                    return f"{what} of {place} is {x} and {y}"
            if mine is a._parameters or (isinstance(a, _BATCH_NORMS) and key in _STATISTICS):
                continue
            if not _same(p, q, seen):
                return f"the buffer {place} is {_shown(p)} and {_shown(q)}"
    return None


def _of_attributes(name: str, a: nn.Module, b: nn.Module, seen: set) -> str | None:
    mine, others = vars(a), vars(b)
    for key in dict.fromkeys([*mine, *others]):
        x, y = mine.get(key, _MISSING), others.get(key, _MISSING)
        if key in _MODULES_OWN or (key in COUNTERS and isinstance(x, int) and isinstance(y, int)):
            continue
        if key == "p" and isinstance(a, DropPath):
            continue
        if not _same(x, y, seen):
            return f"{_place(name, key)} is {_shown(x)} and {_shown(y)}"
    return None


def _place(part: str, name: str) -> str:
    return f"{part}.{name}" if part else name


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "missing"
    if isinstance(value, Tensor):
        return f"{value.tolist()}" if value.numel() <= 8 else f"a tensor {tuple(value.shape)} of other values"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same_class(a: Any, b: Any) -> bool:
    # A parametrization makes a class for each module.
    x, y = type(a), type(b)
    return x is y or (x.__qualname__ == y.__qualname__ and x.__bases__ == y.__bases__)


def _same(a: Any, b: Any, seen: set[tuple[int, int]]) -> bool:
    """Whether two attributes are alike, as far as can be seen."""
    if a is b:
        return True
    if not _same_class(a, b):
        return False
    again: Callable[[Any, Any], bool] = lambda x, y: _same(x, y, seen)  # noqa: E731
    if isinstance(a, nn.Module):
        if (id(a), id(b)) in seen:
            return True
        seen.add((id(a), id(b)))
        return difference(a, b, seen) is None
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(again(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(again, a, b))
    if isinstance(a, MethodType):
        # Of the blocks themselves, or of their parts, which are compared elsewhere.
        return a.__func__ is b.__func__
    if isinstance(a, FunctionType):
        cells = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b))
        return a.__code__ is b.__code__ and all(map(again, *cells)) and again(a.__defaults__, b.__defaults__)
    if type(a).__eq__ is object.__eq__:
        if (id(a), id(b)) in seen:
            return True
        seen.add((id(a), id(b)))
        # What a copy would be made of.
        try:
            return again(a.__reduce_ex__(2), b.__reduce_ex__(2))
        except TypeError:
            return False
    found = a == b
    if hasattr(found, "all"):
        return a.shape == b.shape and bool(found.all())
    return bool(found)
