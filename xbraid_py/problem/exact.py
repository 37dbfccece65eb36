"""Exact propagation: portions of the samples through the layers of a stage and back, in arrays that stay in place.

Shape letters: `n` layers of the stage, `F` features, `C` width, `K` classes, `b` samples of a portion, `B` of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.comm.tree import TreeSum
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.mgrit.pipeline import follow
from xbraid_py.problem.network import DenseResNet


class ExactPropagation:
    """The portions of a stage, and what is computed for them.

    All arrays are made here once, so that the calls of the kernels can be, too: on small networks it is the making
    of calls that takes the time.

    Parameters
    ----------
    stage : DenseResNet
        With free weights, on the ranks of one replica.
    samples : int
        B, of all replicas.
    """

    def __init__(self, stage: DenseResNet, samples: int):
        self.stage, self.samples = stage, samples
        self.layers = stage.partition.count(stage.comm.rank)
        self.weights = stage.layout.zeros()
        self.rows = stage.layout.rows(self.weights)
        self.portions: list[_Portion] = []

    def use(self, portions: Sequence[tuple[int, Tensor, Tensor, Tensor, Tensor]]) -> None:
        """Take these portions: number, features (F, b), labels (b,), states (n, C, b) and slopes (K, b) of each."""
        self.portions = [_Portion(self, *each) for each in portions]

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the losses of each portion, and samples classified rightly, (portions, 2); only on the last rank."""
        stage = self.stage
        self.weights.copy_(x)
        found: list[tuple[float, int]] = []
        follow(
            stage.comm,
            stage.partition,
            +1,
            self.portions,
            begin=_Portion.begin,
            template=_Portion.first,
            through=_Portion.through,
            end=lambda portion, _: found.append(portion.loss()),
        )
        return torch.tensor(found, dtype=torch.float64).view(-1, 2)

    def backward(self, sums: TreeSum) -> None:
        """Add the gradients of the mean loss, at the weights of the last `forward`, of all portions here."""
        stage = self.stage

        def through(portion: _Portion, _: Tensor) -> Tensor:
            portion.back_through()
            if not stage.is_first:
                sums.add(portion.index, portion.gradient, take=True)
            return portion.back

        def end(portion: _Portion, _: Tensor) -> None:
            portion.at_start()
            sums.add(portion.index, portion.gradient, take=True)

        follow(
            stage.comm,
            stage.partition,
            -1,
            self.portions,
            begin=_Portion.begin_back,
            template=_Portion.behind,
            through=through,
            end=end,
        )
        if not self.layers:
            for portion in self.portions:
                sums.add(portion.index, portion.gradient)


class _Portion:
    """One portion, with the calls that take it through the stage.

    Attributes
    ----------
    index : int
        Its number among those of all replicas.
    end, back : (1, C, b) tensor
        Its state behind the last layer; its adjoint behind it, and then before the first one.
    gradient : Tensor
        A flat vector of the stage, overwritten by every backward pass.
    """

    def __init__(
        self, owner: ExactPropagation, index: int, features: Tensor, labels: Tensor, states: Tensor, slope: Tensor
    ):
        stage, rows, count = owner.stage, owner.rows, owner.layers
        self.index, self.states = index, states
        self.end, self.back = (states.new_empty((1, *states.shape[1:])) for _ in range(2))
        self.gradient = stage.layout.zeros()
        out, how = stage.layout.rows(self.gradient), {"h": stage.sizes}
        if not count:
            return
        first = states[:1]
        self.relax = kernels.prepared(
            kernels.relax, stage.block, rows["layers"], first, count, inputs=states, ends=self.end, **how
        )
        self.back_through = kernels.prepared(
            *(kernels.relax_adjoint, stage.block, rows["layers"], states, self.back, count),
            **(how | {"ends": self.back, "gradient": out["layers"]}),
        )
        if stage.is_first:
            self.open, self.at_start = _ends_of(stage.opening, rows, features, first, self.back, out["opening"])
        if stage.is_last:
            layer, row = stage.classification, rows["classification"]
            self.loss = kernels.prepared(kernels.cross_entropy, layer, row, self.end, labels, slope=slope)
            # d(mean cross entropy)/d(logits) = (softmax - one-hot) / B
            how = {"h": 1.0 / owner.samples, "residual": False, "gradient": out["classification"], "out": self.back}
            self.at_end = kernels.prepared(kernels.adjoint, layer, row, self.end, slope[None], **how)

    def first(self) -> Tensor:
        """Where its state before the first layer is to be."""
        return self.states[:1]

    def behind(self) -> Tensor:
        """Where its adjoint behind the last layer is to be."""
        return self.back

    def begin(self) -> Tensor:
        self.open()
        return self.states[:1]

    def through(self, _: Tensor) -> Tensor:
        self.relax()
        return self.end

    def begin_back(self) -> Tensor:
        self.at_end()
        return self.back


def _ends_of(
    opening, rows: dict[str, Tensor], features: Tensor, first: Tensor, back: Tensor, gradient: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of the opening layer: into the first state, and into its gradient from the adjoint there."""
    row, features = rows["opening"], features[None]
    how = {"residual": False, "gradient": gradient, "back": False}
    if isinstance(opening, DenseLayer):
        return (
            kernels.prepared(kernels.step, opening, row, features, residual=False, out=first),
            kernels.prepared(kernels.adjoint, opening, row, features, back, **how),
        )
    return (
        lambda: first.copy_(opening.forward(row, features)),
        lambda: gradient.copy_(opening.vjp(row, features, back, True, back=False)[1]),
    )
