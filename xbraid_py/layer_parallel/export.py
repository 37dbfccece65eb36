"""Export: layer-parallel stacks and training checkpoints as plain torch modules, for processes without MPI.

Shape letters: `N` layers, `B` batch, `S` shape of a state.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import agree, together
from xbraid_py.kernels.activation import ACTIVATIONS, activation
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.parallelize import ParallelBlocks, refuse_records
from xbraid_py.layer_parallel.runs import fill
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.window import Window
from xbraid_py.layers.existing import next_state
from xbraid_py.layers.norm_dropout import Dropout
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit.grid import LayerGrid

Model = TypeVar("Model", bound=nn.Module)
_STACKS = ("opening", "layers", "classification")
_MOST_LAYERS = 1000  # for each coefficient of splines


class ResidualStep(nn.Module):
    """u + h F(u).

    Parameters
    ----------
    block : nn.Module
        F; maps a state to a tensor of the same shape.
    h : float
        Step size.
    frozen : sequence of str
        Names of parts of the block that `train()` leaves in evaluation mode: batch normalizations with frozen
        statistics.

    Attributes
    ----------
    returns : int, str or None
        Which entry of what the block gives counts, if it gives several.
    t : float or None
        Time of the layer, for a block that asks for it.
    """

    returns: int | str | None = None
    t: float | None = None

    def __init__(self, block: nn.Module, h: float, frozen: Sequence[str] = ()):
        super().__init__()
        self.block, self.h, self.frozen = block, float(h), tuple(frozen)

    def forward(self, u: Any, *inputs: Any, **named: Any) -> Any:
        """u (*S), or a tree of tensors, to the next state; further inputs go to the block."""
        return next_state(self.block, self.t, u, inputs, named, self.returns, self.h)

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.frozen:
            self.block.get_submodule(name).eval()
        return self

    def extra_repr(self) -> str:
        return f"h={self.h:g}"


class MapStep(nn.Module):
    """B(u), for a block that gives the next state, its own sum included.

    Parameters
    ----------
    block : nn.Module
        B; maps a state, and further inputs, to the next state.
    frozen : sequence of str
        As of `ResidualStep`.

    Attributes
    ----------
    returns, t
        As of `ResidualStep`.
    """

    returns: int | str | None = None
    t: float | None = None

    def __init__(self, block: nn.Module, frozen: Sequence[str] = ()):
        super().__init__()
        self.block, self.frozen = block, tuple(frozen)

    def forward(self, u: Any, *inputs: Any, **named: Any) -> Any:
        """u (*S), or a tree of tensors, to the next state; further inputs go to the block."""
        return next_state(self.block, self.t, u, inputs, named, self.returns, None)

    def train(self, mode: bool = True):
        super().train(mode)
        for name in self.frozen:
            self.block.get_submodule(name).eval()
        return self


class Chain(nn.Sequential):
    """An `nn.Sequential` whose modules get further inputs, all of them the same."""

    def forward(self, u: Any, *inputs: Any, **named: Any) -> Any:
        """What the last module makes of the state u of the first one."""
        for module in self:
            u = module(u, *inputs, **named)
        return u


class PlainDense(nn.Module):
    """sigma(W u + b) on the last axis of u (*, inputs).

    Parameters
    ----------
    weight : (outputs, inputs) tensor
    bias : (outputs or 1,) tensor
        One bias for each output, or one number for all of them.
    activation : str
        One of `kernels.activation.ACTIVATIONS`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: str):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.activation = activation

    def forward(self, u: Tensor) -> Tensor:
        """u (*, inputs) to (*, outputs)."""
        bias = self.bias.expand(len(self.weight))
        return activation(self.activation).value(nn.functional.linear(u, self.weight, bias))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, activation={self.activation!r}"


@overload
def to_sequential(
    source: LayerParallel | PipelineParallel | str | os.PathLike, device: torch.device | str = "cpu"
) -> nn.Sequential: ...
@overload
def to_sequential(source: Model, device: torch.device | str = "cpu") -> Model: ...
def to_sequential(source: nn.Module | str | os.PathLike, device: torch.device | str = "cpu") -> nn.Module:
    """The same network as a plain torch module with all its layers, that knows nothing of ranks.

    A stack becomes an `nn.Sequential` of N `ResidualStep`s, or of `MapStep`s with form="map", whose outputs are those
    of exact propagation, and a `PipelineParallel` one of its modules; both take further inputs as the source does. What
    comes out shares nothing with the source; it can be copied, pickled, and loaded where there is no MPI. `Dropout` in
    it is plain dropout.

    A model that `parallelize` has changed becomes what it was, with its own classes and the names of its weights, so
    that the original loads its `state_dict()`.

    Parameters
    ----------
    source : LayerParallel, PipelineParallel, nn.Module, str or path
        A stack; a module that holds stacks, of which a copy is made with each stack replaced; or a checkpoint of nested
        iteration, such as `drivers/peaks.py` writes. Modules: collective, every rank passes its own.
        A file: every rank reads it for itself.
    device : torch.device or str
        Where the result is to be.

    Returns
    -------
    nn.Module
        The same on every rank, with the source's types, modes and `requires_grad`: an `nn.Sequential` for a stack,
        otherwise a module of the source's class. From a checkpoint `nn.Sequential(opening, layers, classification)`,
        which maps features (B, features) to logits (B, classes).

    Raises
    ------
    ValueError
        If a module holds no stack, or keeps a communicator outside of its stacks; if a file is no such checkpoint.
    TypeError
        If `source` is neither a module nor a path.
    """
    if isinstance(source, nn.Module):
        return _of_module(source).to(device)
    if isinstance(source, str | os.PathLike):
        return _of_checkpoint(source).to(device)
    raise TypeError(
        f"source={type(source).__name__} must be a LayerParallel, a module that holds one, or the path of a checkpoint"
    )


def _of_module(source: nn.Module) -> nn.Module:
    stacks = [part for part in source.modules() if isinstance(part, LayerParallel)]
    pipelines = [part for part in source.modules() if isinstance(part, PipelineParallel)]
    if not stacks and not pipelines:
        raise ValueError(
            f"source={type(source).__name__} holds no LayerParallel, so it is a plain module already; "
            f"use copy.deepcopy(source)"
        )
    runs = [part for part in source.modules() if isinstance(part, ParallelBlocks)]
    inside = {id(part) for stack in (*stacks, *pipelines, *runs) for part in stack.modules()}
    for name, part in source.named_modules():
        for key, value in vars(part).items() if id(part) not in inside else ():
            if isinstance(value, Communicator):
                path = f"{name}.{key}".lstrip(".")
                raise ValueError(f"source.{path} is a communicator, which has no copy; keep it outside of the module")
    for stack in stacks:
        agree(stack.comm, None, "", "to_sequential()")
    # What is in the memo is not copied again: each stack comes out as its plain form, wherever it is referred to.
    within = {id(run.stack) for run in runs}
    plain: dict[int, nn.Module] = {id(stack): _of_stack(stack) for stack in stacks if id(stack) not in within}
    plain |= {id(pipeline): _of_pipeline(pipeline) for pipeline in pipelines if id(pipeline) not in within}
    # Several blocks are no copy of one module: they take its place behind.
    restored = {id(run): _Restored(run) for run in runs}
    found = copy.deepcopy(source, plain | restored)
    return _unfolded(found) if restored else found


class _Restored(nn.Module):
    """The blocks of a run, until they are in their container again; making it is collective."""

    def __init__(self, run: ParallelBlocks):
        super().__init__()
        self.was_cached = run.was_cached
        self.blocks = nn.ModuleDict(dict(zip(run.names, run.restored(), strict=True)))


def _unfolded(model: nn.Module) -> nn.Module:
    """Put the blocks of all runs back into their containers, and let the model be used as before."""
    if isinstance(model, _Restored):
        return nn.Sequential(*model.blocks.values())
    was_cached = False
    for container in list(model.modules()):
        children: dict[str, nn.Module | None] = {}
        for name, child in container._modules.items():
            if isinstance(child, _Restored):
                was_cached |= child.was_cached
                children |= child.blocks.items()
            else:
                # Those behind a run in a list have been numbered anew.
                children[f"{name} behind" if name in children else name] = child
        if any(isinstance(child, _Restored) for child in container.children()):
            fill(container, children)
        for key, hook in list(container._forward_pre_hooks.items()):
            if hook is refuse_records:
                del container._forward_pre_hooks[key], container._forward_pre_hooks_with_kwargs[key]
    for part in model.modules() if was_cached else ():
        for key in ("config", "generation_config"):
            if getattr(getattr(part, key, None), "use_cache", None) is False:
                getattr(part, key).use_cache = True
    return model


def _of_stack(stack: LayerParallel) -> Chain:
    found = Chain(*(step for window in stack.windows for step in _of_window(window)))
    # Parts of a block may have modes of their own.
    for part in (found, *found):
        part.training = stack.training
    return found


def _of_pipeline(pipeline: PipelineParallel) -> Chain:
    comm = pipeline.comm
    own = {int(number): module for number, module in pipeline.layers.items()}
    with together(comm):
        for number, module in own.items() if comm.size > 1 else ():
            try:
                pickle.dumps(module)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"module {number} ({type(module).__name__}) cannot be pickled, so that no other rank gets it "
                    f"({error}); load the state_dict() into modules that are made anew"
                ) from error
    every = {number: module for part in comm.bcast(comm.gather(own)) for number, module in part.items()}
    found = Chain(*(copy.deepcopy(every[number]) for number in range(len(every))))
    found.training = pipeline.training
    return found


def _of_window(window: Window) -> list[nn.Module]:
    block, weights = window.block, window.layers
    gathered = [weights.gathered(tensor) for tensor in weights.tensors()]
    steps = []
    for layer, h in enumerate(window.sizes):
        module = copy.deepcopy(block.module)
        for part, copied in zip(block.module.modules(), module.modules(), strict=True):
            if isinstance(part, Dropout) and isinstance(copied, Dropout):
                rates = block.rates_of(part)
                copied.p = rates[window.place.first_layer + layer] if len(rates) > 1 else rates[0]
        place = dict(module.named_parameters()) | dict(module.named_buffers())
        for column, rows, own in zip(block.columns, gathered, weights.tensors(), strict=True):
            with torch.no_grad():
                place[column.name].copy_(rows[layer])
            if column.is_parameter:
                place[column.name].requires_grad_(own.requires_grad)
        frozen = tuple(block.frozen)
        step = MapStep(module, frozen) if block.is_map else ResidualStep(module, h, frozen)
        step.returns = block.returns
        step.t = None if block.times is None else block.times[window.place.first_layer + layer]
        steps.append(step)
    return steps


def _of_checkpoint(path: str | os.PathLike) -> nn.Sequential:
    from xbraid_py.run.store.read import CheckpointError, load  # loads HDF5, which modules have no use for

    with load(path) as checkpoint:
        configuration = checkpoint.meta.get("configuration")
        network = configuration.get("network") if isinstance(configuration, dict) else None
        shape = network if isinstance(network, dict) else {}
        names = {f"weights/{stack}.weight" for stack in _STACKS} | {f"weights/{stack}.bias" for stack in _STACKS[1:]}
        known = {"T", "activation"} <= shape.keys() and shape["activation"] in ACTIVATIONS
        if not known or not names <= set(checkpoint.names()):
            raise CheckpointError(
                f"checkpoint {path} holds no dense network trained in depth; give a file of the checkpoints "
                f"folder of drivers/peaks.py, such as runs/peaks/checkpoints/update_000040.h5"
            )
        # Layers of different sizes are those of a run that has cut only some of them.
        snapshot = checkpoint.meta.get("state", {})
        lengths, splines = snapshot.get("lengths"), snapshot.get("splines")
        count = snapshot.get("num_layers") if splines else checkpoint.total("weights/layers.weight")
        if splines and count > _MOST_LAYERS * checkpoint.total("weights/layers.weight"):
            raise CheckpointError(f"checkpoint {path} says num_layers={count}, too many for its coefficients")
        grid = LayerGrid(count, shape["T"], lengths and tuple(lengths))
        middles = {"layers": (Splines(**splines), grid.middles())} if splines else {}
        (opening,), layers, (classification,) = (
            _layers(checkpoint, stack, shape["activation"], middles.get(stack)) for stack in _STACKS
        )
    sizes = grid.sizes()
    steps = (ResidualStep(layer, h) for layer, h in zip(layers, sizes, strict=True))
    return nn.Sequential(opening, nn.Sequential(*steps), classification)


def _layers(
    checkpoint, stack: str, activation: str, places: tuple[Splines, Sequence[float]] | None
) -> list[PlainDense]:
    weights = checkpoint.rows(f"weights/{stack}.weight")
    # The linear opening of MG/OPT's networks has none.
    is_affine = f"weights/{stack}.bias" in checkpoint.names()
    biases = checkpoint.rows(f"weights/{stack}.bias") if is_affine else weights.new_zeros(len(weights), 1)
    if stack == "classification" or not is_affine:
        activation = "identity"
    if places is not None:
        splines, times = places
        weights, biases = (
            splines.rows(times, rows.flatten(1)).unflatten(1, rows.shape[1:]) for rows in (weights, biases)
        )
    return [PlainDense(w.clone(), b.clone(), activation) for w, b in zip(weights, biases, strict=True)]
