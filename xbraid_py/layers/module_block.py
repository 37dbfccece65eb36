"""A torch module as the F of u + h F(u, theta), or as the next state, its weights taken from rows of numbers.

Shape letters: `n` layers, `m` of them evaluated at once, `p` numbers of a row, `S` shape of a state.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.layers.autocast import as_state, block_context, current_cast
from xbraid_py.layers.compiled import Compiled
from xbraid_py.layers.existing import Counter
from xbraid_py.layers.norm_dropout import (
    Dropout,
    Moments,
    MovingNorm,
    MultiheadAttention,
    NormInputs,
    at_position,
    changes_by_itself,
    within,
)
from xbraid_py.layers.random_numbers import own_random_numbers

_BATCH_NORMS = nn.modules.batchnorm._NormBase
_DROPOUTS = nn.modules.dropout._DropoutNd
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Column:
    """One parameter of the block, of that shape in a layer: a stretch of the row of every layer.

    The name is that of the module's `named_parameters`, or of a buffer that differs from layer to layer: statistics of
    a batch normalization (not `is_parameter`).
    """

    name: str
    shape: torch.Size
    is_parameter: bool

    @property
    def size(self) -> int:
        """Numbers in a row."""
        return prod(self.shape)


class ModuleBlock:
    """F(u) of a torch module, or the next state, with weights from outside.

    Parameters
    ----------
    module : nn.Module
        Maps a state to a tensor of the same shape. It is used for all layers in turn; its own weights are not read.
    seed : int
        Of the masks of `Dropout`.
    form : {"increment", "map"}, optional
        Whether the module gives F(u), or the next state, its own sum included. Without, it is taken for an increment,
        and `check_state` refuses a module that seems to be a map.
    returns : int or str, optional
        Of a module that gives several things: which of them is the one that counts.
    counters : sequence of Counter
        Numbers that the blocks which exist keep of their layers; `check_state` refuses those that change the result.
    rates : sequence of Counter
        Probabilities of `DropPath` that differ by layer; each evaluation has those of its layer.
    torch_random : bool
        Let the module draw random numbers of torch's own: all evaluations of a layer in an update draw the same ones.

    Attributes
    ----------
    columns : tuple of Column
        What a row of weights consists of.
    takes_time : bool
        Whether the module asks for the time of its layer, by a parameter `t` of its `forward`.
    times : sequence of float or None
        These times, by the numbers of the layers.
    compiled : Compiled or None
        What evaluates the module in its place.
    is_cast : bool
        Whether the module has made a shorter type than that of its state, as under an autocast.
    frozen : dict of str to Module
        Batch normalizations that came in evaluation mode, by their names: their statistics stay as they are.

    Raises
    ------
    ValueError
        If its weights have several types, or none.
    """

    def __init__(
        self,
        module: nn.Module,
        seed: int = 0,
        form: str | None = None,
        returns: int | str | None = None,
        counters: Sequence[Counter] = (),
        rates: Sequence[Counter] = (),
        torch_random: bool = False,
    ):
        self.module, self.seed, self.form, self.returns, self.counters = module, seed, form, returns, counters
        self.torch_random, self._rates = torch_random, [(module.get_submodule(r.part), r.values) for r in rates]
        statistics = {
            f"{name}.{key}" if name else key
            for name, part in module.named_modules()
            if isinstance(part, _BATCH_NORMS)
            # Where they do not move, nobody asks how many batches they have met.
            for key in _STATISTICS[: 3 if isinstance(part, MovingNorm) else 2]
            if getattr(part, key) is not None
        }
        found = [Column(name, p.shape, True) for name, p in module.named_parameters()]
        found += [Column(name, b.shape, False) for name, b in module.named_buffers() if name in statistics]
        self.columns = tuple(found)
        # A module that depends on the time gets that of its layer: (number of layers) of them, if they are set.
        self.times: Sequence[float] | None = None
        names = list(inspect.signature(module.forward).parameters)
        self.takes_time, self._time_first = "t" in names, names[:1] == ["t"]
        if not self.columns:
            raise ValueError(f"block={type(module).__name__} has no weights; its layers could not differ")
        types = {p.dtype for p in module.parameters()}
        if len(types) > 1:
            raise ValueError(f"block={type(module).__name__} mixes {sorted(map(str, types))}; use one type")
        self.row_size = sum(column.size for column in self.columns)
        # Where each tensor is kept in the module; more than one place for weights that are shared within it.
        self._places = [self._places_of(column) for column in self.columns]
        self._dropouts = [part for part in module.modules() if isinstance(part, Dropout | MultiheadAttention)]
        for number, part in enumerate(self._dropouts):
            part.number = number
        named = [(name, part) for name, part in module.named_modules() if isinstance(part, MovingNorm)]
        for number, (_, part) in enumerate(named):
            part.number = number
        self._norms = dict(named)
        self.is_cast = False
        self.compiled: Compiled | None = None
        self.frozen = {
            name: part for name, part in module.named_modules() if isinstance(part, _BATCH_NORMS) and not part.training
        }

    @property
    def moving(self) -> dict[str, MovingNorm]:
        """Norms whose statistics move in the mode that the module is in, by their names."""
        return {name: part for name, part in self._norms.items() if part.training}

    def moments(self, num_rows: int, start: bool = False) -> Moments | None:
        """Room for what moves them, for so many layers; None if there are none. `start` as of `NormInputs`."""
        norms = {part.number: part for part in self.moving.values()}
        return Moments(norms, num_rows, start) if norms else None

    def train(self, mode: bool) -> None:
        """Training or evaluation mode of the module; frozen statistics stay frozen."""
        self.module.train(mode)
        for part in self.frozen.values():
            part.eval()

    @property
    def is_map(self) -> bool:
        """Whether the module gives the next state."""
        return self.form == "map"

    @property
    def is_random(self) -> bool:
        """Whether masks depend on the layer."""
        if self.torch_random and self.module.training:
            return True
        return any(part.training and max(self.rates_of(part)) > 0.0 for part in self._dropouts)

    def rates_of(self, part: Any) -> Sequence[float]:
        """The probabilities of a part in all layers; a single one where they have the same."""
        return next((values for each, values in self._rates if each is part), (part.p,))

    def split(self, theta: Tensor) -> list[Tensor]:
        """Views (n, *shape) of the columns of rows (n, p)."""
        parts = theta.split([column.size for column in self.columns], dim=1)
        return [part.view(-1, *column.shape) for part, column in zip(parts, self.columns, strict=True)]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Rows (n, p) of columns (n, *shape)."""
        return torch.cat([tensor[:, None].flatten(1) for tensor in tensors], 1)  # a parameter may be one number

    def tensors_of(self, module: nn.Module) -> list[Tensor]:
        """The columns of one layer as another module of the same kind has them."""
        have = dict(module.named_parameters()) | dict(module.named_buffers())
        return [have[column.name].detach() for column in self.columns]

    def __call__(
        self,
        tensors: Sequence[Tensor],
        u: Tensor,
        draw: int = 0,
        layer: int = 0,
        norm_inputs: NormInputs | None = None,
        inputs: tuple = (),
        named: Mapping[str, Any] = _NOTHING,
    ) -> Tensor:
        """F(u), or the next state, (*S), with these columns of a layer; `norm_inputs` gets what its norms are given."""
        if self.compiled is not None:
            with block_context():
                end = self.compiled(tensors, u, inputs, named)
            return self._state_of(end, u)
        # `torch.func.functional_call` takes twice as long as a small block.
        kept = [places[0][0][places[0][1]] for places in self._places]
        masks = at_position(self.seed, draw, layer) if self._dropouts else nullcontext()
        part: Any
        for part, values in self._rates:
            part.p = values[layer]
        if self.torch_random and self.module.training:
            masks = own_random_numbers(hash((self.seed, draw, layer)) & (2**63 - 1), masks)
        norms = within(norm_inputs or NormInputs()) if self._norms else nullcontext()
        try:
            self._put(tensors)
            with masks, norms, block_context():
                if self.times is None:
                    end = self.module(u, *inputs, **named)
                elif self._time_first:
                    end = self.module(self.times[layer], u, *inputs, **named)
                else:
                    end = self.module(u, *inputs, **{"t": self.times[layer], **named})
            return self._state_of(end, u)
        finally:
            self._put(kept)

    def _state_of(self, end: Any, u: Any) -> Any:
        """Of what the module gives for u the entry that counts, in the type of a state."""
        end = end if self.returns is None else end[self.returns]
        found = as_state(end, u)
        self.is_cast = self.is_cast or (found is not end and isinstance(end, Tensor))
        return found

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the weights of a layer makes it different from another, as masks, norms or times do."""
        differ = self._dropouts or self._norms or self.compiled or self.torch_random or current_cast()
        return not differ and self.times is None and self.returns is None

    def compile(self, backend: str) -> None:
        """Evaluate the module by `torch.compile` from now on.

        Raises
        ------
        ValueError
            If it asks for more than its weights and its state: the layer's masks, its statistics, or its time.
        """
        what = "the time of its layer" if self.takes_time else None
        asking = [part for part in self._dropouts if max(self.rates_of(part)) > 0.0] or [*self._norms.values()]
        if asking:
            what = f"{type(asking[0]).__name__}, which asks for its layer"
        if self.torch_random:
            what = "random numbers of its layer (torch_random=True)"
        if what is not None:
            raise ValueError(
                f"compile={backend!r}: block={type(self.module).__name__} has {what}, and compiled code is the same "
                f"for all layers; leave compile out"
            )
        self.compiled = Compiled(self.module, [column.name for column in self.columns], backend)

    @contextmanager
    def not_compiled(self) -> Iterator[None]:
        """What is evaluated within, once or twice, is not worth the minute that compiling takes."""
        kept, self.compiled = self.compiled, None
        try:
            yield
        finally:
            self.compiled = kept

    def along(self, rows: Sequence[Sequence[Tensor]], u: Tensor, h: float) -> Tensor:
        """u (*S) through the layers with these columns, one after the other; of a plain module.

        The same as to call it for each, without what that does for modules of other kinds: a layer of an MLP takes
        little longer.
        """
        module, is_map, put = self.module, self.is_map, self._put
        is_whole = is_map and h == 1.0
        kept = [places[0][0][places[0][1]] for places in self._places]
        try:
            for tensors in rows:
                put(tensors)
                end = as_state(module(u), u)
                u = end if is_whole else u + h * (end - u if is_map else end)
        finally:
            put(kept)
        return u

    def batched(self, tensors: Sequence[Tensor], u: Tensor, norm_inputs: NormInputs | None = None) -> Tensor:
        """F(u) of m layers at once: columns (m, *shape), states (m, *S); `norm_inputs` as above."""

        def one(tensors, u):
            found = NormInputs()
            with within(found) if self._norms else nullcontext():
                change = self.functional(tensors, u)
            return change, found.inputs

        change, inputs = torch.func.vmap(one)(tuple(tensors), u)
        if norm_inputs is not None:
            norm_inputs.inputs.update(inputs)
        return change

    def functional(
        self, tensors: Sequence[Tensor], u: Tensor, inputs: tuple = (), named: Mapping[str, Any] = _NOTHING
    ) -> Tensor:
        """The same of one layer, as `torch.func` wants it."""
        weights = {column.name: tensor for column, tensor in zip(self.columns, tensors, strict=False)}
        end = torch.func.functional_call(self.module, weights, (u, *inputs), dict(named))
        return end if self.returns is None else end[self.returns]

    def check_mode(self) -> None:
        """Raise `ValueError` if a part of the module would change from one evaluation of a layer to the next."""
        for name, part in self.module.named_modules():
            if isinstance(part, MovingNorm):
                continue
            if (message := changes_by_itself(name, part, self.torch_random)) is not None:
                raise ValueError(message)
            if isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None):
                kind = type(part).__name__
                ours = f"Moving{kind}" if kind in ("BatchNorm1d", "BatchNorm3d") else "MovingBatchNorm2d"
                raise ValueError(
                    f"block has {kind} ({name}) with statistics of the batch, which would change with every sweep of "
                    f"the solver; use xbraid_py.nn.{ours}, whose statistics move once per update, or use GroupNorm or "
                    f"LayerNorm, or freeze it: eval() before the block is handed over"
                )
            if isinstance(part, _DROPOUTS) and part.training and part.p > 0.0 and not self.torch_random:
                raise ValueError(
                    f"block has {type(part).__name__} ({name}): another mask in every sweep of the solver is another "
                    f"network; use xbraid_py.nn.Dropout({part.p}), whose mask depends on the layer and the update "
                    f"alone, or LayerParallel(..., torch_random=True)"
                )

    def check_state(self, shape: torch.Size, like: Tensor) -> None:
        """Raise `ValueError` unless the module maps states of that shape to such states, always to the same ones.

        `like` has their type and device. The same on all ranks: the state is made up.
        """
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
        name = type(self.module).__name__
        tensors = self.tensors_of(self.module)
        with torch.no_grad():
            before = u.clone()
            norm_inputs = NormInputs()
            try:
                first = self(tensors, u, norm_inputs=norm_inputs)
            except (KeyError, IndexError) as error:
                if self.returns is None:
                    raise
                raise ValueError(
                    f"returns={self.returns!r}: block={name} gives nothing of that number or name ({error!r}); use "
                    f"returns=0 for the first entry of a tuple"
                ) from error
            idle = [part for part in self.moving.items() if part[1].number not in norm_inputs.inputs]
            if idle:
                kind = type(idle[0][1]).__name__
                raise ValueError(f"block={name} has {kind} ({idle[0][0]}), which it does not use; leave it out")
            if not isinstance(first, Tensor) or first.shape != u.shape or first.dtype != u.dtype:
                got = f"{tuple(first.shape)} {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
                several = "; use returns=0 if its first entry is the one that counts"
                what = "the next state, sum included" if self.is_map else "F of u + h F(u), without the sum"
                raise ValueError(
                    f"block={name} makes {got} of a state {tuple(u.shape)} {u.dtype}; it must keep shape and type "
                    f"(form={self.form or 'increment'!r}: {what}){several * isinstance(first, Sequence | Mapping)}"
                )
            if not torch.equal(u, before):
                raise ValueError(f"block={name} overwrites its input; use a form not in place, as ReLU(inplace=False)")
            if not torch.equal(first, self(tensors, u)) and not torch.isnan(first).any():
                raise ValueError(
                    f"block={name} gives two results for one state; a layer must be a function of its state and its "
                    f"weights: use xbraid_py.nn.Dropout for dropout, also where functional.dropout or dropout_p stand, "
                    f"or torch_random=True, by which all evaluations of a layer in an update draw the same numbers"
                )

            self._check_counters(tensors, u, first)
        if self.form is None and self._seems_map(tensors, u):
            raise ValueError(
                f"block={name} gives its state back where its matrices are 0, so it seems to contain its own sum, and "
                f"u + h F(u) would add the state twice; use form='map' for a block that gives the next state, or "
                f"form='increment' if this is the F that you mean"
            )
        self._check_gradient(tensors, u)

    def _check_counters(self, tensors: Sequence[Tensor], u: Tensor, first: Tensor) -> None:
        """Raise `ValueError` if the number of the layer changes what the module makes of u (*S), which is `first`."""
        for counter in self.counters:
            part = self.module.get_submodule(counter.part)
            kept = getattr(part, counter.name)
            try:
                for layer in (1, len(counter.values) - 1):
                    setattr(part, counter.name, counter.values[layer])
                    if not torch.equal(first, self(tensors, u)) and not torch.isnan(first).any():
                        where = f"{counter.part}.{counter.name}".lstrip(".")
                        raise ValueError(
                            f"{where} is {counter.values[0]} in blocks[0] and {counter.values[layer]} in "
                            f"blocks[{layer}], and changes what a block gives; a coarse layer stands for like ones: "
                            f"use PipelineParallel(blocks), which keeps each block as it is"
                        )
            finally:
                setattr(part, counter.name, kept)

    def _seems_map(self, tensors: Sequence[Tensor], u: Tensor) -> bool:
        """Whether, with all weights but those of norms set to 0, the module gives what points along its state."""
        norms = {
            f"{name}.{key}" if name else key
            for name, part in self.module.named_modules()
            if "Norm" in type(part).__name__
            for key, _ in part.named_parameters(recurse=False)
        }
        kept = [not column.is_parameter or column.name in norms for column in self.columns]
        if all(kept):
            return False
        with torch.no_grad():
            quiet = [each if keep else torch.zeros_like(each) for each, keep in zip(tensors, kept, strict=True)]
            end = self(quiet, u)
            # Of a norm behind the sum: what it gives is close to a multiple of its input.
            cosine = (end * u).sum() / (end.norm() * u.norm())
        return bool(cosine > 0.7)  # a norm over few channels takes a good part of a random state away

    def _check_gradient(self, tensors: Sequence[Tensor], u: Tensor) -> None:
        """Raise `ValueError` if the backward pass evaluates the module again, with other weights than forwards."""
        # Not the weights that the module has itself.
        tensors = [tensor + 0.5 * tensor.abs() + 0.01 if tensor.is_floating_point() else tensor for tensor in tensors]
        x = u.requires_grad_()
        kept = [places[0][0][places[0][1]] for places in self._places]
        found = []
        try:
            with torch.enable_grad():
                end = self(tensors, x)
                if not end.requires_grad:
                    return
                found.append(torch.autograd.grad(end, x, torch.ones_like(end), allow_unused=True)[0])
                end = self(tensors, x)
                self._put(tensors)
                found.append(torch.autograd.grad(end, x, torch.ones_like(end), allow_unused=True)[0])
        except RuntimeError as error:
            reason = error
        else:
            reason = None
            # Not bit by bit: on a GPU sums may be made in any order. Other weights are far off.
            if found[0] is None or not (found[0] - found[1]).norm() > 1e-3 * found[1].norm():
                return
        finally:
            self._put(kept)
        name = type(self.module).__name__
        raise ValueError(
            f"block={name} is evaluated again in the backward pass, as by torch.utils.checkpoint: "
            f"by then it has the weights of another layer; leave that out, and use LayerParallel(..., recompute=True)"
        ) from reason

    def _places_of(self, column: Column) -> list[tuple[dict, str]]:
        wanted = _get(self.module, column.name)
        found = []
        for part in self.module.modules():
            keep = part._parameters if column.is_parameter else part._buffers
            found += [(keep, key) for key, value in keep.items() if value is wanted]
        return found

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for places, tensor in zip(self._places, tensors, strict=True):
            for keep, key in places:
                keep[key] = tensor


def _get(module: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, last)
