"""Models that exist: the run of like blocks in one is propagated in parallel, whatever lies around it stays.

Shape letters: `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xbraid_py.layer_parallel.runs import (
    Run,
    check_weights,
    find_run,
    give_weights,
    put_back,
    replace_dropout,
    take_weights,
)
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layers.existing import first_difference

Form = Literal["increment", "map"]
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_RECORDED = ("output_hidden_states", "output_attentions")


def parallelize(
    model: nn.Module,
    comm: Any = None,
    blocks: str | None = None,
    *,
    form: Form | None = None,
    returns: int | None = None,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Put one layer-parallel stack in place of the longest run of like blocks of a model; the rest stays as it is.

    The container of the blocks, an `nn.ModuleList` or `nn.Sequential`, keeps its class and its place. The run in it is
    one module then, which calls the stack and returns what a block returns, so that the model's own loop `for block in
    self.h: hidden = block(hidden, mask)` runs once. Blocks of another kind before or behind the run stay beside it.
    What the model hands to its blocks beside the state is handed to all layers. A block's output has to go into the
    next block and nowhere else.

    `nn.Dropout` within the blocks becomes `xbraid_py.nn.Dropout`, stochastic depth
    `xbraid_py.nn.DropPath`, each block with its rate. A cache of keys and values is switched off, with a
    warning. Make the optimizer afterwards: the parameters of the blocks are others, one for all layers owned here.
    `to_sequential` gives the model back with its own classes and names.

    Parameters
    ----------
    model : nn.Module
        Is changed; the same on every rank.
    comm : Communicator or mpi4py.MPI.Comm, optional
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
    run = find_run(model, blocks)
    is_sequential = isinstance(run.container, nn.Sequential)
    if is_sequential and form == "increment":
        raise ValueError("form='increment': an nn.Sequential hands on what a block gives; use form='map'")
    check_weights(model, run)
    before = None if example is None else _evaluated(model, example)
    dropouts = replace_dropout(run.blocks)
    if form == "increment":
        options = {"T": float(len(run.blocks))} | options
    try:
        stack = LayerParallel.from_blocks(run.blocks, comm, form=form or "map", returns=returns, **options)
        if not isinstance(stack, LayerParallel) or stack.period > 1:
            raise ValueError(
                f"{run.path}: {first_difference(run.blocks)}; the layers of a stack in a model must be alike: build "
                f"the model with the same value for all, or use PipelineParallel for its parts"
            )
    except (TypeError, ValueError):
        for block, parts in zip(run.blocks, dropouts, strict=True):
            put_back(block, parts)
        raise
    part = ParallelBlocks(run, stack, form, returns, dropouts, _switch_off_cache(model), _random_options(model))
    part.is_sure = form is not None or is_sequential
    run.put(part)
    for name, above in model.named_modules():
        if hasattr(above, "config") and f"{run.path}.".startswith(f"{name}." if name else ""):
            above.register_forward_pre_hook(refuse_records, with_kwargs=True)
    if before is not None:
        _check_example(before, _evaluated(model, example), run.path)
    return model


class ParallelBlocks(nn.Module):
    """What stands in the place of a run of blocks: called like one of them, it goes through all.

    Parameters
    ----------
    run : Run
        Its blocks lose their weights, and tell what else there is of each layer.
    stack : LayerParallel
        With their weights.
    form : {"map", "increment"}, optional
        As of `parallelize`.
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
        stack: LayerParallel,
        form: Form | None,
        returns: int | None,
        dropouts: list[dict[str, nn.Module]],
        was_cached: bool,
        random_options: str,
    ):
        super().__init__()
        self.random_options = random_options
        self.stack, self.form, self.returns = stack, form or "map", returns
        self.names, self.was_cached, self.is_sure = run.names, was_cached, False
        blocks = run.blocks
        self.first_argument = next(iter(_parameters(blocks[0])), None)
        self._handed_on: dict[tuple, tuple] = {}
        # A tuple is no child: these have no weights, and appear in no state dict.
        self._plain = tuple(zip(blocks, dropouts, strict=True))
        for block in blocks:
            take_weights(block)
        # Loops look at a block before they call it, as at `block.attention_type`.
        for name, value in (*vars(blocks[0]).items(), *blocks[0]._modules.items()):
            if not name.startswith("_") and not hasattr(self, name):
                self.__dict__[name] = value

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
        if self.form == "increment":
            end = (end - u) / self.stack.sizes[0]
        if self.returns is None:
            return end
        values = dict(enumerate(more)) | named
        found = [None if key is None else values[key] for key in others]
        return (*found[: self.returns], end, *found[self.returns + 1 :])

    def restored(self) -> list[nn.Module]:
        """The blocks with the weights of the stack, as they were before; collective."""
        found = [copy.deepcopy(block) for block, _ in self._plain]
        rows = iter(found)
        for window in self.stack.windows:
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
                module.train(self.stack.training)
                for name in window.block.frozen:
                    module.get_submodule(name).eval()
        for module, (_, dropouts) in zip(found, self._plain, strict=True):
            put_back(module, {name: copy.deepcopy(part).train(module.training) for name, part in dropouts.items()})
        return found

    # ---- What a block does, looked at before the first call

    @torch.no_grad()
    def _once(self, u: Tensor, more: Sequence[Any], named: Mapping[str, Any], scale: float = 1.0) -> Any:
        """What a block returns in evaluation mode, its matrices scaled; the same on every rank."""
        block = self.stack.windows[0].block.module
        modes = [(part, part.training) for part in block.modules()]
        weights = {name: p * scale if p.dim() > 1 else p for name, p in block.named_parameters()}
        try:
            block.eval()
            return torch.func.functional_call(block, weights, (u, *more), dict(named))
        finally:
            for part, mode in modes:
                part.training = mode

    def _check_form(self, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the block keeps the state where its matrices are zero."""
        generator = torch.Generator().manual_seed(0)
        first, second = (torch.randn(u.shape, generator=generator, dtype=u.dtype).to(u.device) for _ in range(2))
        ends = [self._once(each, more, named, 0.0) for each in (first, second)]
        ends = [end if self.returns is None else end[self.returns] for end in ends]
        name = type(self._plain[0][0]).__name__
        if not isinstance(ends[0], Tensor):
            raise ValueError(
                f"block={name} returns a {type(ends[0]).__name__}; say which entry of it is the next state, as "
                f"returns=0"
            )
        if ends[0].shape != u.shape:
            return  # which the stack says
        way, change = first - second, ends[0] - ends[1]
        if change.norm() <= 1e-6 * way.norm():
            raise ValueError(
                f"block={name} forgets its state where its matrices are zero, so it seems to be F of u + F(u); if the "
                f"model adds the state itself, u = u + block(u), use form='increment'; if the model goes on with what "
                f"the block gives, u = block(u), use form='map'"
            )
        likeness = float((way * change).sum() / (way.norm() * change.norm()))
        if not likeness > 0.3:
            raise ValueError(
                f"block={name} makes something else of its state where its matrices are zero (cosine {likeness:.2f}), "
                f"so it is in doubt what it gives: use form='map' for u = block(u), or form='increment' for u = u + "
                f"block(u)"
            )

    def _others(self, u: Tensor, more: Sequence[Any], named: Mapping[str, Any]) -> tuple:
        """Of all entries that a block returns, the input that each is, or None."""
        values = dict(enumerate(more)) | dict(named)
        key = tuple((name, value is None) for name, value in values.items())
        if key not in self._handed_on:
            ends = self._once(u.detach(), more, named)
            name = type(self._plain[0][0]).__name__
            if not isinstance(ends, tuple | list):
                raise ValueError(f"block={name} returns a {type(ends).__name__}, no tuple; leave returns out")
            found: list[Any] = []
            for number, end in enumerate(ends):
                same = [name for name, value in values.items() if value is end]
                if end is not None and number != self.returns and not same:
                    raise ValueError(
                        f"block={name} returns a {type(end).__name__} as entry {number}, which is neither None nor an "
                        f"input handed on; a stack has no other output than the state: make the block leave it out "
                        f"(such as output_attentions=False), or give it a state of several tensors"
                    )
                found.append(same[0] if same and end is not None and number != self.returns else None)
            self._handed_on[key] = tuple(found)
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


def _switch_off_cache(model: nn.Module) -> bool:
    """Switch off `use_cache` of the configurations of a model, with a warning; whether there was any."""
    configs = [getattr(part, key, None) for part in model.modules() for key in ("config", "generation_config")]
    found = {id(config): config for config in configs if getattr(config, "use_cache", False) is True}
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
