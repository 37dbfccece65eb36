"""Transfers between a network and one of about half its width, for FAS in width (paper 002, sections 5 and 7).

Weights are (O, I, B), see `layout`. The pi and P of a layer act on O of its weights and, the other way round, on
I of the next layer's, whatever the entries of a convolution kernel or the positions of a flattened channel are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from xbraid_py.multilevel.width.layout import WidthLayout
from xbraid_py.multilevel.width.matching import METHODS, SCALINGS, LayerMatrices, Matching, match_rows


@dataclass(frozen=True, kw_only=True)
class WidthOptions:
    """How neurons are paired and joined.

    Parameters
    ----------
    threshold : float
        theta, between -1 and 1: neurons of which the cosine is not above it are not paired.
    matching : {"greedy", "mutual"}
        Algorithm 1, or rounds of mutually nearest pairs; see `match`.
    with_bias : bool
        Whether the bias belongs to a neuron's row, in the cosines and in the norms.
    scaling : {"norms", "mean", "sums"}
        Eq. 34, eq. 32, or eq. 34 with the norms in P alone.
    coarsen : tuple of bool, optional
        For each hidden layer whether it is made narrower; all are by default.

    Raises
    ------
    ValueError
        If a value is none of these.
    """

    threshold: float = 0.0
    matching: str = "greedy"
    with_bias: bool = True
    scaling: str = "norms"
    coarsen: tuple[bool, ...] | None = None

    def __post_init__(self):
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be between -1 and 1, as cosines are; use 0")
        if self.matching not in METHODS:
            raise ValueError(f"matching={self.matching!r} must be {' or '.join(METHODS)}; use greedy")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use norms")


@dataclass(frozen=True, eq=False)
class WidthTransfer:
    """Pi, P and R = P^T between the flat vectors of a network and of a narrower one; see `Transfer`.

    Attributes
    ----------
    fine, coarse : WidthLayout
    matrices : tuple of LayerMatrices or None
        For each hidden layer; None leaves it as it is.
    options : WidthOptions
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

        Raises
        ------
        ValueError
            If x or a matching is not of this network, or the scaling does not go with an activation.
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

    Raises
    ------
    ValueError
        If `coarsen` has not one entry for each hidden layer, or the weights are not finite.
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
    """Make a network narrower by one level.

    A layer without a pair, such as one of one neuron, keeps its width.

    Parameters
    ----------
    layout : WidthLayout
    x : Tensor
        Flat weights, which decide on pairs and norms.
    options : WidthOptions, optional

    Returns
    -------
    WidthTransfer, WidthLayout
        The coarse weights are `transfer.restrict(x)`.

    Raises
    ------
    ValueError
        If no layer has a pair, the weights are not finite, or the options do not go with the network.
    """
    transfer = hierarchy(layout, x, 2, options)[0]
    return transfer, transfer.coarse


def hierarchy(layout: WidthLayout, x: Tensor, levels: int, options: WidthOptions | None = None) -> list[WidthTransfer]:
    """Transfers between `levels` networks, the finest first; each is matched by the weights restricted to it.

    Raises
    ------
    ValueError
        If `levels` is below 1, a level has no two neurons to be paired, or as `coarsen`.
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
