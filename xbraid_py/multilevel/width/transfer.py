"""Transfers between a network and one of about half its width, for FAS in width (paper 002, sections 5 and 7).

Weights are (O, I, B), see `layout`. The pi and P of a layer act on O of its weights and, the other way round, on
I of the next layer's, whatever the entries of a convolution kernel or the positions of a flattened channel are.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Self, TypeGuard

import torch
from torch import Tensor, nn

from xbraid_py.multilevel.width.matching import LayerMatrices, Matching, match_rows
from xbraid_py.multilevel.width.options import WidthOptions


@dataclass(frozen=True, eq=False)
class WidthTransfer:
    """Pi, P and R = P^T between the flat vectors of a network and of a narrower one; see `Transfer`.

    `matrices` are for each hidden layer; None leaves it as it is.
    """

    fine: WidthLayout
    coarse: WidthLayout
    matrices: tuple[LayerMatrices | None, ...]
    options: WidthOptions

    @classmethod
    def of(
        cls, fine: WidthLayout, matchings: Sequence[Matching | None], x: Tensor, options: WidthOptions | None = None
    ) -> Self:
        """The transfer with given matchings, one for each hidden layer, and the norms of the weights x.

        Raises `ValueError` if x or a matching is not of this network, or the scaling does not go with an activation.
        """
        options = options or WidthOptions()
        fine.check(x)
        sizes = tuple(width if m is None else m.num_fine for m, width in zip(matchings, fine.widths, strict=False))
        if len(matchings) != len(fine.widths) or sizes != fine.widths:
            raise ValueError(f"matchings are of {sizes} neurons, must be of {fine.widths}; use match_layers")
        matrices: list[LayerMatrices | None] = []
        for number, (layer, matching) in enumerate(zip(fine.layers, matchings, strict=False)):
            if matching is None:
                matrices.append(None)
            elif options.scaling == "mean" or not layer.inhomogeneous:
                matrices.append(LayerMatrices.of(matching, options.scaling, layer.norms(x, options.with_bias), x.dtype))
            else:
                raise ValueError(
                    f"scaling={options.scaling!r} needs activations with phi(a z) = a phi(z) for a > 0, hidden layer "
                    f"{number} has {layer.inhomogeneous}; use mean"
                )
        widths = [width if m is None else m.num_coarse for m, width in zip(matchings, fine.widths, strict=True)]
        return cls(fine, fine.narrowed(widths), tuple(matrices), options)

    @property
    def matchings(self) -> tuple[Matching | None, ...]:
        """Those of the hidden layers."""
        return tuple(each and each.matching for each in self.matrices)

    def renewed(self, x: Tensor) -> WidthTransfer:
        """The same matchings with the norms of other weights x, which "mean" does not use."""
        return self if self.options.scaling == "mean" else WidthTransfer.of(self.fine, self.matchings, x, self.options)

    def restrict(self, x: Tensor) -> Tensor:
        """Pi x: weights pi_{k+1} W_k P_k and pi_{k+1} b_k of the coarse network (eq. 25)."""
        return self._restricted(x, "pi", "P")

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g with R = P^T: P_{k+1}^T W_k pi_k^T and P_{k+1}^T b_k (eq. 28)."""
        return self._restricted(gradient, "P", "pi")

    def prolong(self, x: Tensor) -> Tensor:
        """P x: weights P_{k+1} W_k pi_k and P_{k+1} b_k of the fine network (eq. 27)."""
        self.coarse.check(x)
        out = x.new_empty(self.fine.size)
        for before, after, fine, coarse in self._layers():
            weight, bias = coarse.weight(x), coarse.bias(x)
            if before is not None:
                weight = before.spread(weight, 1, before.pi)
            if after is not None:
                weight = after.spread(weight, 0, after.P)
                bias = None if bias is None else after.spread(bias, 0, after.P)
            _put(fine, out, weight, bias)
        return out

    def _restricted(self, x: Tensor, left: str, right: str) -> Tensor:
        """Rows joined with the entries `left` of the layer's matrices, columns with `right` of those before."""
        self.fine.check(x)
        out = x.new_empty(self.coarse.size)
        for before, after, fine, coarse in self._layers():
            weight, bias = fine.weight(x), fine.bias(x)
            if after is not None:
                weight = after.joined(weight, 0, getattr(after, left))
                bias = None if bias is None else after.joined(bias, 0, getattr(after, left))
            if before is not None:
                weight = before.joined(weight, 1, getattr(before, right))
            _put(coarse, out, weight, bias)
        return out

    def _layers(self):
        """The matrices before and behind each layer, and the layer of the fine and of the coarse network."""
        return zip((None, *self.matrices), (*self.matrices, None), self.fine.layers, self.coarse.layers, strict=True)


def match_layers(layout: WidthLayout, x: Tensor, options: WidthOptions | None = None) -> list[Matching | None]:
    """Match the neurons of every hidden layer by their rows in the weights x; None for layers that opt out.

    Raises `ValueError` if `coarsen` has not one entry for each hidden layer, or the weights are not finite.
    """
    options = options or WidthOptions()
    layout.check(x)
    hidden = len(layout.widths)
    chosen = (True,) * hidden if options.coarsen is None else tuple(options.coarsen)
    if len(chosen) != hidden:
        raise ValueError(
            f"coarsen={chosen} must have one entry for each of {hidden} hidden layers; use {(True,) * hidden}"
        )
    return [
        match_rows(layer.rows(x, options.with_bias), options.threshold, options.matching) if wanted else None
        for layer, wanted in zip(layout.layers, chosen, strict=False)
    ]


def coarsen(layout: WidthLayout, x: Tensor, options: WidthOptions | None = None) -> tuple[WidthTransfer, WidthLayout]:
    """Make a network narrower by one level; the flat weights x decide on pairs and norms. A layer without a pair keeps
    its width.

    The coarse weights are `transfer.restrict(x)`. Raises `ValueError` if no layer has a pair, the weights are not
    finite, or the options do not go with the network.
    """
    transfer = hierarchy(layout, x, 2, options)[0]
    return transfer, transfer.coarse


def hierarchy(layout: WidthLayout, x: Tensor, levels: int, options: WidthOptions | None = None) -> list[WidthTransfer]:
    """Transfers between `levels` networks, the finest first; each is matched by the weights restricted to it.

    Raises `ValueError` if `levels` is below 1, a level has no two neurons to be paired, or as `coarsen`.
    """
    options = options or WidthOptions()
    if levels < 1:
        raise ValueError(f"levels={levels} must be at least 1; use 2")
    transfers: list[WidthTransfer] = []
    for level in range(1, levels):
        matchings = match_layers(layout, x, options)
        if not any(matching and matching.num_pairs for matching in matchings):
            raise ValueError(
                f"levels={levels}: the hidden layers of level {level}, of widths {layout.widths}, have no pair with "
                f"threshold={options.threshold} and coarsen={options.coarsen}; use levels={level} or a lower threshold"
            )
        transfers.append(WidthTransfer.of(layout, matchings, x, options))
        layout, x = transfers[-1].coarse, transfers[-1].restrict(x)
    return transfers


def renewed(transfers: Sequence[WidthTransfer], x: Tensor) -> list[WidthTransfer]:
    """The same matchings on all levels with the norms of other weights x of the finest one."""
    found = []
    for transfer in transfers:
        found.append(transfer.renewed(x))
        x = found[-1].restrict(x)
    return found


def _put(layer, out: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight(out).copy_(weight)
    if bias is not None:
        layer.bias(out).copy_(bias)


_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for d in (1, 2, 3)
)
# phi(a z) = a phi(z) for a > 0: a neuron's scale can move from its own weights to those of the next layer.
_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)
_OTHERS = (
    *(nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.ReLU6, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
)


@dataclass(frozen=True)
class WeightLayer:
    """A dense or convolutional layer within the flat vector.

    Attributes
    ----------
    outputs, inputs, block : int
        O, I, B.
    has_bias : bool
    offset : int
        Where its weight begins; the bias follows.
    inhomogeneous : str
        The activation behind it that does not satisfy phi(a z) = a phi(z), "" if all do.
    """

    outputs: int
    inputs: int
    block: int
    has_bias: bool
    offset: int
    inhomogeneous: str = ""

    @property
    def weight_size(self) -> int:
        """Numbers of the weight."""
        return self.outputs * self.inputs * self.block

    @property
    def size(self) -> int:
        """Numbers of weight and bias."""
        return self.weight_size + self.has_bias * self.outputs

    def weight(self, x: Tensor) -> Tensor:
        """View (O, I, B) of the weight in a flat vector."""
        return x[self.offset : self.offset + self.weight_size].view(self.outputs, self.inputs, self.block)

    def bias(self, x: Tensor) -> Tensor | None:
        """View (O,) of the bias in a flat vector; None without one."""
        return x[self.offset + self.weight_size : self.offset + self.size] if self.has_bias else None

    def rows(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """What makes a neuron or channel: its weights (O, I B), and its bias in a last column."""
        rows, bias = self.weight(x).flatten(1), self.bias(x)
        return rows if bias is None or not with_bias else torch.cat([rows, bias[:, None]], 1)

    def norms(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """Lengths (O,) of the rows, as float64."""
        norms, bias = torch.linalg.vector_norm(self.weight(x), dim=(1, 2), dtype=torch.float64), self.bias(x)
        return norms if bias is None or not with_bias else torch.hypot(norms, bias.double())


@dataclass(frozen=True)
class WidthLayout:
    """The layers of a network, in the order of `network.parameters()`; all but the last are hidden: they can be made
    narrower.

    `names` are those of the modules, `parts` the modules, those with weights without their numbers.
    """

    layers: tuple[WeightLayer, ...]
    names: tuple[str, ...]
    parts: tuple[nn.Module, ...]

    @classmethod
    def of(cls, network: nn.Sequential) -> WidthLayout:
        """The layout of a network of dense and convolutional layers, activations, pooling and `Flatten`.

        Raises `ValueError` if a module is of another kind, mixes channels, or does not fit the one before it; it names
        the module.
        """
        if type(network) is not nn.Sequential:
            raise ValueError(f"network={type(network).__name__} must be a torch.nn.Sequential; use nn.Sequential(...)")
        reader = _Reader()
        for number, part in enumerate(network):
            reader.read(f"network[{number}]={type(part).__name__}", part)
        if not reader.layers:
            raise ValueError("network has no layer with weights; use nn.Sequential(nn.Linear(2, 4), nn.ReLU(), ...)")
        layers = _placed(reader.layers)
        if sum(p.numel() for p in network.parameters()) != sum(layer.size for layer in layers):
            raise ValueError("network uses the same weights twice, must have them once; use a module for each layer")
        names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
        return cls(layers, tuple(names), tuple(reader.parts))

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(layer.size for layer in self.layers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of the hidden layers."""
        return tuple(layer.outputs for layer in self.layers[:-1])

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless x is a flat vector of this network."""
        if x.shape != (self.size,):
            raise ValueError(f"x has the shape {tuple(x.shape)}, must be flat and of this network; use ({self.size},)")

    def narrowed(self, widths: Sequence[int]) -> WidthLayout:
        """The same network with these outputs of the hidden layers; its inputs and outputs remain."""
        outputs = (*widths, self.layers[-1].outputs)
        inputs = (self.layers[0].inputs, *widths)
        layers = [replace(layer, outputs=o, inputs=i) for layer, o, i in zip(self.layers, outputs, inputs, strict=True)]
        return replace(self, layers=_placed(layers))

    def module(self, x: Tensor) -> nn.Sequential:
        """A network with a copy of the weights x, of its type and on its device."""
        self.check(x)
        layers = iter(self.layers)
        parts = (
            _unfilled(part, next(layers), x.dtype) if _has_weights(part) else copy.deepcopy(part) for part in self.parts
        )
        network = nn.Sequential(OrderedDict(zip(self.names, parts, strict=True))).to_empty(device=x.device)
        self.load(network, x)
        return network

    def load(self, network: nn.Sequential, x: Tensor) -> None:
        """Copy the weights x into a network of this layout."""
        self.check(x)
        parameters = list(network.parameters())
        with torch.no_grad():
            for parameter, values in zip(parameters, x.split([p.numel() for p in parameters]), strict=True):
                parameter.copy_(values.view_as(parameter))

    def vector(self, network: nn.Sequential) -> Tensor:
        """The weights of a network of this layout as a flat vector."""
        x = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        self.check(x)
        return x


class _Reader:
    """Reads the modules of a network one by one, and remembers what the next one depends on."""

    def __init__(self):
        self.layers: list[WeightLayer] = []
        self.parts: list[nn.Module] = []
        self.channels = True  # values still have positions: nothing was dense or flattened before
        self.flattened = self.reshaped = False

    def read(self, label: str, part: nn.Module) -> None:
        kind = type(part)
        if _has_weights(part):
            self._read_layer(label, part)
            part = _unfilled(part, self.layers[-1], torch.float32)
        elif kind is nn.Flatten:
            if (part.start_dim, part.end_dim) != (1, -1):
                raise ValueError(f"{label} has start_dim={part.start_dim}, end_dim={part.end_dim}; use nn.Flatten()")
            self.channels, self.flattened = False, self.flattened or self.channels
        elif kind is nn.Unflatten:
            self.reshaped = True
        elif kind in _POOLS:
            if not self.channels:
                raise ValueError(f"{label} would pool neurons, must stand among convolutions; use it before Flatten")
        elif kind in _OTHERS:
            if self.layers:
                self.layers[-1] = replace(self.layers[-1], inhomogeneous=kind.__name__)
        elif kind not in _HOMOGENEOUS:
            raise ValueError(
                f"{label} is none of the modules of which neurons can be paired; use Linear, Conv1d to Conv3d, "
                "activations without weights, pooling, Flatten and, at the end, Unflatten"
            )
        self.parts.append(part)

    def _read_layer(self, label: str, part: _Weighted) -> None:
        last = self.layers[-1] if self.layers else None
        dense = isinstance(part, nn.Linear)
        foreign = sorted({name for name, _ in part.named_parameters()} - {"weight", "bias"})
        if foreign:
            raise ValueError(f"{label} has the parameters {foreign}, must have weight and bias; use it without them")
        if self.reshaped:
            raise ValueError(f"{label} stands behind Unflatten, which must be at the end; use it without Unflatten")
        if dense and last and self.channels:
            raise ValueError(f"{label} acts on one axis of the channels before it; use nn.Flatten() in between")
        if not dense and not self.channels:
            raise ValueError(f"{label} stands behind a dense layer or Flatten; use convolutions first")
        if not dense and part.groups != 1:
            raise ValueError(f"{label} has groups={part.groups}, must have every channel in one; use groups=1")
        inputs, block = (part.in_features, 1) if dense else (part.in_channels, prod(part.kernel_size))
        if last and dense and self.flattened and inputs % last.outputs == 0:
            inputs, block = last.outputs, inputs // last.outputs
        if last and inputs != last.outputs:
            raise ValueError(f"{label} takes {inputs} inputs, must fit {last.outputs} outputs before it; use these")
        outputs = part.out_features if dense else part.out_channels
        self.layers.append(WeightLayer(outputs, inputs, block, part.bias is not None, 0))
        self.channels, self.flattened = not dense, False


def _has_weights(part: nn.Module) -> TypeGuard[_Weighted]:
    return type(part) is nn.Linear or type(part) in _CONVOLUTIONS


def _placed(layers: Sequence[WeightLayer]) -> tuple[WeightLayer, ...]:
    """The layers one behind the other in the flat vector."""
    offsets = accumulate((layer.size for layer in layers), initial=0)
    return tuple(replace(layer, offset=offset) for layer, offset in zip(layers, offsets, strict=False))


def _unfilled(part: nn.Module, layer: WeightLayer, dtype: torch.dtype) -> nn.Module:
    """A module as `part`, with the numbers of outputs and inputs of `layer` and no memory for its weights."""
    kept = {"bias": layer.has_bias, "dtype": dtype, "device": "meta"}
    if isinstance(part, nn.Linear):
        return nn.Linear(layer.inputs * layer.block, layer.outputs, **kept)
    for option in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        kept[option] = getattr(part, option)
    return type(part)(layer.inputs, layer.outputs, **kept)
