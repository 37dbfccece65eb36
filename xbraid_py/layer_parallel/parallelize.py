"""Models that exist: the run of like blocks in one is propagated in parallel, whatever lies around it stays.

Shape letters: `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xbraid_py.comm.agreement import together
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.probes import check_form, handed_on
from xbraid_py.layer_parallel.replace import put_back, replace_dropout
from xbraid_py.layer_parallel.runs import (
    Run,
    check_weights,
    find_run,
    give_weights,
    take_weights,
    without_weights,
)
from xbraid_py.layer_parallel.stack import LayerParallel, needs_likeness, pipeline_options
from xbraid_py.layers.existing import COUNTERS, Step, first_difference, period_of

Form = Literal["increment", "map"]
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_LOOKED_AT = (bool, int, float, str)
_RECORDED = ("output_hidden_states", "output_attentions")
Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    comm: Any = None,
    blocks: str | None = None,
    *,
    form: Form | None = None,
    returns: int | None = None,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
    unlike: bool = False,
    **options: Any,
) -> Model:
    """Put one layer-parallel stack in place of the longest run of like blocks of a model; the rest stays as it is.

    The container of the blocks, an `nn.ModuleList` or `nn.Sequential`, keeps its class and its place. The run in it is
    one module then, which calls the stack and returns what a block returns, so that the model's own loop `for block in
    self.h: hidden = block(hidden, mask)` runs once. Blocks of another kind before or behind the run stay beside it.
    What the model hands to its blocks beside the state is handed to all layers. A block's output has to go into the
    next block and nowhere else.

    Blocks that differ, in their attributes or the shapes of their weights, are possible where no coarse level needs
    likeness, with `MGRIT(cycle="pipeline")` or `MGRIT(max_levels=1)`: the stack is a `PipelineParallel` then. A model
    must not look at what they differ in, to hand each of them something else: give an `example` where it may.

    `nn.Dropout` within the blocks becomes `xbraid_py.nn.Dropout`, stochastic depth
    `xbraid_py.nn.DropPath`, each block with its rate. A cache of keys and values is switched off, with a
    warning. Make the optimizer afterwards: the parameters of the blocks are others, one for all layers owned here.
    `to_sequential` gives the model back with its own classes and names.

    Parameters
    ----------
    model : nn.Module
        Is changed; the same on every rank.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        A serial run without.
    blocks : str, optional
        The name of the container, such as "transformer.h" or "encoder.layer"; by default that with the longest run, not
        counting those within a block of another run.
    form : {"map", "increment"}, optional
        What a block gives: the next state, so that the model has `u = block(u)`; or an increment, so that it has `u = u
        + h block(u)` with h = T / N, and T = N unless it is given. By default the next state; a call of the model
        refuses it if the block forgets the state as its matrices go to zero, as F of u + F(u) does.
    returns : int, optional
        Which entry of the tuple that a block returns is the state. Others have to be None, or inputs handed on.
    example : dict or tuple, optional
        Inputs of the model, of which the plain model and the one with the stack must make the same in evaluation mode;
        collective.
    unlike : bool
        Take the longest run of blocks of any kind that have weights, such as those of a model whose widths change from
        block to block.
    **options
        Of `LayerParallel`, such as `mgrit`.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    ValueError
        If there is no run of like blocks, or two as long; if they cannot be a stack; if the model makes something else
        of the example.
    TypeError
        If `model` is no module, or `blocks` no text.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be an nn.Module; use LayerParallel for a function")
    if blocks is not None and not isinstance(blocks, str):
        raise TypeError(f"blocks={type(blocks).__name__} must be the name of a container, as 'encoder.layer'")
    if form not in (None, "map", "increment"):
        raise ValueError(f"form={form!r} must be map or increment; leave it out")
    run = find_run(model, blocks, unlike)
    is_sequential = isinstance(run.container, nn.Sequential)
    if is_sequential and form == "increment":
        raise ValueError("form='increment': an nn.Sequential hands on what a block gives; use form='map'")
    check_weights(model, run, needs_likeness(options))
    _check_kinds(model)
    before = None if example is None else _evaluated(model, example)
    dropouts = replace_dropout(run.blocks)
    if form == "increment":
        options = {"T": float(len(run.blocks))} | options
    try:
        stack = _stack(run, comm, form or "map", returns, options)
    except (TypeError, ValueError):
        for block, parts in zip(run.blocks, dropouts, strict=True):
            put_back(block, parts)
        raise
    h = options["T"] / len(run.blocks) if form == "increment" else None
    part = ParallelBlocks(run, stack, h, returns, dropouts, _switch_off_cache(model), _random_options(model))
    part.is_sure = form is not None or is_sequential
    run.put(part)
    for name, above in model.named_modules():
        if hasattr(above, "config") and f"{run.path}.".startswith(f"{name}." if name else ""):
            above.register_forward_pre_hook(refuse_records, with_kwargs=True)
    if before is not None and example is not None:
        _check_example(before, _evaluated(model, example), run.path)
    return model


def _stack(
    run: Run, comm: Any, form: Form, returns: int | None, options: dict[str, Any]
) -> LayerParallel | PipelineParallel:
    """A stack with the weights of a run."""
    if period_of(run.blocks) == 1:
        return LayerParallel.from_blocks(run.blocks, comm, form=form, returns=returns, **options)
    if needs_likeness(options):
        raise ValueError(
            f"{run.path}: {first_difference(run.blocks)}; a coarse layer stands for like ones: build the model with "
            f"the same value for all, or use mgrit=MGRIT(cycle='pipeline')"
        )
    own = pipeline_options({name: value for name, value in options.items() if name != "T"})
    h = options["T"] / len(run.blocks) if form == "increment" else None
    # Without times: what a block asks for the model hands to it.
    is_plain = returns is None and h is None
    return PipelineParallel(run.blocks if is_plain else [Step(b, returns, h) for b in run.blocks], comm, **own)


class ParallelBlocks(nn.Module):
    """What stands in the place of a run of blocks: called like one of them, it goes through all.

    Parameters
    ----------
    run : Run
        Its blocks lose their weights, and tell what else there is of each layer.
    stack : LayerParallel or PipelineParallel
        With their weights.
    h : float, optional
        Step size of increments, which is what blocks give then.
    returns : int, optional
        As of `parallelize`.
    dropouts : list of dict of str to Module
        What dropout of this package has replaced in each block, by names.
    was_cached : bool
        Whether a cache was switched off.
    random_options : str
        Options of the model's configuration that make dropout.

    Attributes
    ----------
    is_sure : bool
        Whether the form needs no probe at the first call.
    """

    def __init__(
        self,
        run: Run,
        stack: LayerParallel | PipelineParallel,
        h: float | None,
        returns: int | None,
        dropouts: list[dict[str, nn.Module]],
        was_cached: bool,
        random_options: str,
    ):
        super().__init__()
        self.random_options = random_options
        self.stack, self.h, self.returns = stack, h, returns
        self.names, self.was_cached, self.is_sure = run.names, was_cached, False
        blocks = run.blocks
        self.first_argument = next(iter(_parameters(blocks[0])), None)
        self._handed_on: dict[tuple, tuple] = {}
        if isinstance(stack, PipelineParallel):
            # Which has the blocks themselves.
            blocks = [without_weights(block) for block in blocks]
        else:
            for block in blocks:
                take_weights(block)
        # A tuple is no child: these have no weights, and appear in no state dict.
        self._plain = tuple(zip(blocks, dropouts, strict=True))
        # Loops look at a block before they call it, as at `block.attention_type`.
        self._differing = {}
        for name, value in (*vars(blocks[0]).items(), *blocks[0]._modules.items()):
            if name.startswith("_") or hasattr(self, name):
                continue
            other = next((n for n, each in enumerate(blocks) if _differs(value, getattr(each, name, None))), None)
            if other is None or name in COUNTERS:
                self.__dict__[name] = value
            else:
                self._differing[name] = (other, value, getattr(blocks[other], name, None))

    def __getattr__(self, name: str) -> Any:
        differing = self.__dict__.get("_differing", {})
        if name in differing:
            other, a, b = differing[name]
            # No `AttributeError`, which is taken for an answer.
            raise ValueError(
                f"{name} is {a!r} in the first block and {b!r} in block {other}, and the model looks at it before it "
                f"calls a block, where one stands for all: build the model with the same value for all"
            )
        return super().__getattr__(name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the last block returns for the state that the first one is given; further inputs go to every layer.

        Collective.

        Raises
        ------
        ValueError
            If there is a cache of keys and values among the inputs, or the blocks are not of the form or return more
            than is known of.
        """
        if not inputs and self.first_argument in named:
            inputs = (named.pop(self.first_argument),)
        if not inputs:
            raise ValueError(f"the blocks are called without a state; hand {self.first_argument} over first")
        _check_caches(inputs[1:], named)
        u, *more = inputs
        if not self.is_sure:
            self._check_form(u, more, named)
            self.is_sure = True
        others = self._others(u, more, named) if self.returns is not None else ()
        try:
            end = self.stack(u, *more, **named)
        except ValueError as error:
            if self.random_options and "dropout" in str(error):
                raise ValueError(
                    f"{error}; of {self.random_options} use 0 for attention, or torch_random=True"
                ) from error
            raise
        if self.h is not None:
            end = (end - u) / self.h
        if self.returns is None:
            return end
        values = dict(enumerate(more)) | named
        found = [None if key is None else values[key] for key in others]
        return (*found[: self.returns], end, *found[self.returns + 1 :])

    def restored(self) -> list[nn.Module]:
        """The blocks with the weights of the stack, as they were before; collective."""
        found = [copy.deepcopy(block) for block, _ in self._plain]
        if isinstance(self.stack, PipelineParallel):
            self._restore_unlike(found)
        else:
            self._restore_like(self.stack, found)
        for module, (_, dropouts) in zip(found, self._plain, strict=True):
            put_back(module, {name: copy.deepcopy(part).train(module.training) for name, part in dropouts.items()})
        return found

    def _restore_like(self, stack: LayerParallel, found: list[nn.Module]) -> None:
        rows = iter(found)
        for window in stack.windows:
            weights, columns = window.layers, window.block.columns
            tensors = [(weights.gathered(each), each.requires_grad) for each in weights.tensors()]
            for layer in range(len(window.sizes)):
                module = next(rows)
                give_weights(
                    module,
                    {
                        column.name: (tensor[layer], wanted)
                        for column, (tensor, wanted) in zip(columns, tensors, strict=True)
                    },
                    window.block.module,
                )
                module.train(stack.training)
                for name in window.block.frozen:
                    module.get_submodule(name).eval()

    def _restore_unlike(self, found: list[nn.Module]) -> None:
        own = {
            number: (
                {key: (t.detach(), t.requires_grad) for key, t in (*each.named_parameters(), *each.named_buffers())},
                [part.training for part in each.modules()],
            )
            for number, each in self._own_blocks()
        }
        comm = self.stack.comm
        for number, (tensors, modes) in (each for part in comm.bcast(comm.gather(own)) for each in part.items()):
            give_weights(found[number], tensors, found[number])
            for part, mode in zip(found[number].modules(), modes, strict=True):
                part.training = mode

    def _own_blocks(self) -> list[tuple[int, nn.Module]]:
        """Blocks that can be evaluated here, with their numbers; like ones stand for each other."""
        if isinstance(self.stack, LayerParallel):
            return [(0, self.stack.windows[0].block.module)]
        pairs = self.stack.layers.items()
        return [(int(number), each.block if isinstance(each, Step) else each) for number, each in pairs]

    # ---- What a block does, looked at before the first call

    def _check_form(self, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Raise `ValueError`, on all ranks, unless the blocks keep the state where their matrices are zero."""
        with together(self.stack.comm):
            for _, block in self._own_blocks():
                check_form(block, self.returns, u, more, named)

    def _others(self, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> tuple:
        """Of all entries that a block returns, the input that each is, or None; collective at the first such call."""
        values = dict(enumerate(more)) | dict(named)
        key = tuple((name, value is None) for name, value in values.items())
        if key not in self._handed_on:
            comm = self.stack.comm
            with together(comm):
                here = [(n, handed_on(block, self.returns, u, more, named)) for n, block in self._own_blocks()]
            found = sorted((each for part in comm.bcast(comm.gather(here)) for each in part), key=lambda each: each[0])
            for number, entries in found:
                if entries != found[0][1]:
                    raise ValueError(
                        f"block {number} hands on {entries} of its inputs, the first block {found[0][1]}; one stands "
                        f"for all where they are called: leave block {number} out of the run, by unlike=False"
                    )
            self._handed_on[key] = found[0][1]
        return self._handed_on[key]


def refuse_records(model: nn.Module, inputs: tuple, named: Mapping[str, Any]) -> None:
    """A hook before `forward`: raise `ValueError` if a model is asked for what lies between the blocks."""
    for name in _RECORDED:
        asked = named.get(name)
        if asked is None:
            asked = getattr(model.config, name, False)
        if asked:
            raise ValueError(
                f"{name}={asked!r}: what lies between the blocks of a stack is not given out; use {name}=False, or "
                f"to_sequential(model) for a model without ranks"
            )


# ---- The model around it


def _parameters(block: nn.Module) -> list[str]:
    """Names of the parameters of a block's `forward`."""
    return list(inspect.signature(block.forward).parameters)


def _differs(a: Any, b: Any) -> bool:
    """Whether two attributes that a loop may look at differ; of what has no order or value it says nothing."""
    return isinstance(a, _LOOKED_AT) and isinstance(b, (*_LOOKED_AT, type(None))) and a != b


def _check_kinds(model: nn.Module) -> None:
    """Raise `ValueError` for a model that hands other inputs to some of its layers, as its configuration says."""
    for part in model.modules():
        kinds = getattr(getattr(part, "config", None), "layer_types", None)
        if kinds is not None and len(set(kinds)) > 1:
            raise ValueError(
                f"layer_types={sorted(set(kinds))} of the model's configuration: layers of several types get masks of "
                f"their own, and a stack hands on the same to all; build the model with one type for all"
            )


def _switch_off_cache(model: nn.Module) -> bool:
    """Switch off `use_cache` of the configurations of a model, with a warning; whether there was any."""
    configs = [getattr(part, key, None) for part in model.modules() for key in ("config", "generation_config")]
    held = (config for config in configs if config is not None)
    found = {id(config): config for config in held if getattr(config, "use_cache", False) is True}
    for config in found.values():
        config.use_cache = False
    if found:
        warnings.warn(
            "use_cache=True of the model's configuration is switched off: the layers of a stack share no cache of keys "
            "and values; build the model with use_cache=False to see no warning",
            stacklevel=3,
        )
    return bool(found)


def _random_options(model: nn.Module) -> str:
    """Options of the model's configuration that make dropout, as text."""
    options = vars(model.config) if hasattr(model, "config") else {}
    found = (f"config.{name}={p}" for name, p in options.items() if "drop" in name and isinstance(p, float) and p > 0)
    return ", ".join(found)


def _check_caches(inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a cache of keys and values among the inputs of a block."""
    cached = {name: value for name, value in named.items() if name in _CACHES and value is not None}
    cached |= {str(number): value for number, value in enumerate(inputs, 1) if hasattr(value, "get_seq_length")}
    if named.get("use_cache"):
        cached["use_cache"] = True
    for name, value in cached.items():
        raise ValueError(
            f"input {name}={type(value).__name__} of the blocks: the layers of a stack share no cache of keys and "
            f"values; call the model with use_cache=False, or use to_sequential(model) to generate"
        )


@torch.no_grad()
def _evaluated(model: nn.Module, example: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    """All tensors that a model makes of an example in evaluation mode."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        out = model(**example) if isinstance(example, Mapping) else model(*example)
    finally:
        for part, mode in modes:
            part.training = mode
    found = pytree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    return [each for each in found if isinstance(each, Tensor)]


def _check_example(before: list[Tensor], after: list[Tensor], path: str) -> None:
    """Raise `ValueError` unless the two are the same up to rounding."""
    if len(before) == len(after) > 0 and all(a.shape == b.shape for a, b in zip(before, after, strict=True)):
        bound = 1e-3 if before[0].dtype != torch.float64 else 1e-8
        distances = [
            float((a - b).double().norm() / b.double().norm().clamp_min(1e-30))
            for a, b in zip(after, before, strict=True)
        ]
        if max(distances) <= bound:
            return
        what = f"outputs that differ by {max(distances):.1e}"
    else:
        what = f"{len(after)} tensors instead of {len(before)}, or others"
    raise ValueError(
        f"blocks={path!r}: of the example the model makes {what}; what a block gives has to go into the next one and "
        f"nowhere else, and form has to be right: use form='increment' where the model adds the state"
    )
