"""MG/OPT in depth for models with layer-parallel stacks: a V-cycle for each minibatch of a training loop of one's own.

Shape letters: `L` levels, `N` layers of a window, `n` of them owned here, `p` weights of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm.base import present
from xbraid_py.comm.partition import require_multiple
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.ends import clip_grad_norm_
from xbraid_py.layer_parallel.minibatch.state import weights_by_name
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.refine import check_places, on_grid
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.transfer import check_transfer, doubled_rows, halved_rows
from xbraid_py.multilevel.schedule import MOST_LEVELS, Schedule
from xbraid_py.multilevel.stochastic import LossOfModule
from xbraid_py.multilevel.vcycle import Damping, Transfer, VCycle
from xbraid_py.optim import Armijo
from xbraid_py.optim.levels import Point
from xbraid_py.optim.objective import Evaluation, Objective

# `loss(network)`: the mean over the samples of a minibatch, for the network of any level.
LevelLoss = Callable[[nn.Module], Tensor]
_EVALUATION = 1 / 3  # of a gradient: a pass forwards of three passes' work


class DepthCycle(nn.Module):
    """MG/OPT in depth for a model with `LayerParallel` stacks: a V-cycle for each minibatch of a training loop.

    The method of "Multilevel Minimization for Deep Residual Networks" (L. Gaedke-Merzhäuser, A. Kopaničáková,
    R. Krause, 2020); its levels are copies of the model whose stacks have 1/2, 1/4, ... of the layers.

    A step is a cycle on one minibatch, the same on all levels (algorithm 3). On each level it makes steps of the
    optimizer, restricts the weights, and goes on with the coarser network, whose layers have twice the step size and
    whose loss has the coupling term <dg, x> more: its gradient begins as the restricted one (eq. 9). What the coarse
    weights have changed by is prolonged and added. Whatever lies around the stacks is trained on all levels, and
    carried from one to the next as it is.

    The paper adds the correction as it is. On a minibatch all levels see one function, so that a line search along the
    correction means something: with `line_search` it is halved until the loss of this minibatch falls (Armijo), and
    left out where it is no descent; `correction` scales it. Neither knows of other minibatches.

    Parameters
    ----------
    model : nn.Module
        A `LayerParallel`, or a module that holds some; on any number of ranks. It is level 0, and remains in use.
    levels : int
        L; the numbers of layers must be multiples of 2^(L - 1).
    schedule : str, optional
        Steps on each level in the paper's notation, as "[(1), 1, {2}]", instead of `levels`; by default the paper's.
    interpolation : {"constant", "linear"}
        Of corrections in depth.
    restriction : {"inject", "average", "transpose"}
        Of weights: those of every other layer, means of two, or the paper's transpose of the interpolation, which
        doubles them.
    coupling, correction : float
        Factors of the coupling term and of the correction, from 0 to 1.
    line_search : bool
    clip : float, optional
        2-norm above which the gradient of a step is scaled down, on each level.
    mgrit : MGRIT, optional
        Solver of the coarse stacks; by default that of the stack.
    grid : ProcessGrid, optional
        For replicas: losses are those of this one's samples, and gradients are averaged.

    Attributes
    ----------
    models : nn.ModuleList
        The networks, the finest first.
    schedule : Schedule

    Raises
    ------
    ValueError
        If there is no stack, one has no coarser level, or an option is none of those.

    Notes
    -----
    Optimizers must leave weights without a gradient alone, as those of torch do: a step of a level is one of these.
    Weight decay of the optimizer is not a part of the loss, and acts in the steps of all levels. Masks of dropout are
    others in each evaluation. `save_checkpoint(path, cycle, optimizer)` keeps all levels, with what the optimizer knows
    of them; `model.state_dict()` is that of the network alone.

    Examples
    --------
    >>> cycle = DepthCycle(LayerParallel(lambda: nn.Linear(4, 4), 8), levels=2)
    >>> optimizer = torch.optim.SGD(cycle.parameters(), lr=0.1)
    >>> u = torch.ones(3, 4)
    >>> losses = [cycle.step(optimizer, lambda network: network(u).square().mean()) for _ in range(2)]
    >>> losses[1] < losses[0], cycle.work
    (True, 6.0)
    """

    counts: Tensor

    def __init__(
        self,
        model: nn.Module,
        levels: int = 3,
        *,
        schedule: str | None = None,
        interpolation: Literal["constant", "linear"] = "constant",
        restriction: Literal["inject", "average", "transpose"] = "inject",
        coupling: float = 1.0,
        correction: float = 1.0,
        line_search: bool = False,
        clip: float | None = None,
        mgrit: MGRIT | None = None,
        grid: ProcessGrid | None = None,
    ):
        super().__init__()
        if not 1 <= levels <= MOST_LEVELS:
            raise ValueError(f"levels={levels} must be at least 1 and at most {MOST_LEVELS}; use 3")
        if clip is not None and not 0.0 < clip < float("inf"):
            raise ValueError(f"clip={clip} must be positive and finite; use 1.0")
        self.schedule = Schedule.of_paper(levels) if schedule is None else Schedule.parse(schedule)
        damping = Damping(coupling=coupling, correction=correction)
        check_transfer(interpolation, restriction)
        _check(model, self.schedule.levels)
        models = [model]
        for _ in range(self.schedule.levels - 1):
            models.append(coarsened(models[-1], mgrit))
        self.models = nn.ModuleList(models)
        # Of each level: gradients, and evaluations, the former's among them. A checkpoint has them too.
        self.register_buffer("counts", torch.zeros(len(models), 2, dtype=torch.int64))
        self._objectives = [_LevelObjective(each, grid) for each in models]
        layouts = [objective.layout for objective in self._objectives]
        self._smoothers = [_Steps(each, clip) for each in self._objectives]
        self._cycle = VCycle(
            self._objectives,
            [StackTransfer(*pair, interpolation, restriction) for pair in zip(layouts, layouts[1:], strict=False)],
            self._smoothers,
            self.schedule.pre,
            self.schedule.post,
            self.schedule.coarse,
            line_search=Armijo() if line_search else None,
            damping=damping,
        )

    @property
    def work(self) -> float:
        """Work units so far: gradients on the finest level, on the next one halves of one, and so on (eq. 10).

        What the paper has not, evaluations of a line search, are thirds of these.
        """
        gradients, evaluations = self.counts.T.tolist()
        pairs = zip(gradients, evaluations, strict=True)
        return sum((g + _EVALUATION * (e - g)) * 0.5**level for level, (g, e) in enumerate(pairs))

    def step(self, optimizer: torch.optim.Optimizer, loss: LevelLoss) -> float:
        """One V-cycle on a minibatch, in place of the loss, its gradient and `optimizer.step()`; collective.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
            Of `cycle.parameters()`, in any groups: those of `cycle.models[1]` may have a rate of their own.
        loss : callable
            `loss(network)`, the mean over the samples of the minibatch; called with the network of each level.

        Returns
        -------
        float
            The loss before the cycle.

        Raises
        ------
        ValueError
            If the optimizer has not the weights of all levels.
        """
        have = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for level, objective in enumerate(self._objectives):
            if not all(id(p) in have for p in objective.layout.parameters):
                raise ValueError(
                    f"optimizer={type(optimizer).__name__} has not all weights of level {level}; make it of "
                    f"cycle.parameters()"
                )
            objective.use(loss)
            self._smoothers[level].optimizer = optimizer
        optimizer.zero_grad()
        finest = self._objectives[0]
        point = self._cycle.run(Point(finest.layout.vector()))
        finest.load(point.x)
        made = [[each.gradients, each.evaluations] for each in self._objectives]
        self.counts += self.counts.new_tensor(made)
        return present(finest.loss_first)


def coarsened(model: nn.Module, mgrit: MGRIT | None = None) -> nn.Module:
    """A copy of a model whose stacks have every other layer, each of twice the step size; collective."""
    stacks = [part for part in model.modules() if isinstance(part, LayerParallel)]
    return copy.deepcopy(model, {id(stack): _half(stack, mgrit) for stack in stacks})


@torch.no_grad()
def _half(stack: LayerParallel, mgrit: MGRIT | None) -> LayerParallel:
    before, behind = stack.cut.serial_ends
    coarse = on_grid(stack, stack.grid.coarsen(2), (before // 2, behind // 2), mgrit)
    check_places(stack, coarse, stack, 2)
    for fine, window in zip(stack.windows, coarse.windows, strict=True):
        weights, target = fine.layers, window.layers
        have = dict(weights.named_parameters()) | dict(weights.named_buffers())
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            rows = halved_rows(weights.comm, have[name], weights.partition, target.partition, "inject")
            tensor.copy_(rows)
            tensor.requires_grad_(have[name].requires_grad)
    return coarse.train(stack.training)


def _check(model: nn.Module, levels: int) -> None:
    """Raise `ValueError` for a model without coarser levels."""
    parts = list(model.modules())
    stacks = [part for part in parts if isinstance(part, LayerParallel)]
    if not stacks:
        raise ValueError(f"model={type(model).__name__} holds no LayerParallel; there are no layers to leave out")
    if any(isinstance(part, PipelineParallel) for part in parts):
        raise ValueError("model holds a PipelineParallel, whose modules have no step size; use LayerParallel")
    for stack in stacks:
        if stack.form == "map":
            raise ValueError(
                "form='map': a block that gives the next state has no step size to be doubled; use form='increment', "
                "and a block without its sum"
            )
        if stack.output == "last":
            raise ValueError('output="last" leaves the gradients around a stack on some ranks alone; use output="all"')
        if stack.windows[0].layers.splines is not None:
            raise ValueError("splines in depth have no coarser level; leave splines out")
        require_multiple("num_layers", stack.grid.num_layers, 2 ** (levels - 1), "2^(levels - 1)")
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    if len(kinds) != 1:
        raise ValueError(f"weights of {len(kinds)} types; a cycle takes them as one vector: use one type for all")


class _Layout:
    """Where the trainable weights of a model are in a flat vector: in the order of its parameters."""

    def __init__(self, model: nn.Module):
        owners = weights_by_name(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.windows: list[StackedWeights] = list(dict.fromkeys(owners[name] for name, _ in named if name in owners))
        self._window = [self.windows.index(owners[name]) if name in owners else None for name, _ in named]
        self._sizes = [p.numel() for p in self.parameters]
        self._widths = [prod(p.shape[1:]) for p in self.parameters]

    def vector(self) -> Tensor:
        """The weights as they are, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def split(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The rows (n, p) of the layers of each window, and what lies around them, piece by piece."""
        columns: list[list[Tensor]] = [[] for _ in self.windows]
        around = []
        for part, width, window in zip(x.split(self._sizes), self._widths, self._window, strict=True):
            if window is None:
                around.append(part)
            else:
                columns[window].append(part.view(len(part) // width, width))
        return [torch.cat(parts, 1) for parts in columns], around

    def join(self, rows: Sequence[Tensor], around: Sequence[Tensor]) -> Tensor:
        """The opposite of `split`."""
        rest, taken, found = iter(around), [0] * len(rows), []
        for width, window in zip(self._widths, self._window, strict=True):
            if window is None:
                found.append(next(rest))
                continue
            start = taken[window]
            taken[window] += width
            found.append(rows[window][:, start : start + width].reshape(-1))
        return torch.cat(found)


class StackTransfer(Transfer):
    """Prolongation and restriction between models that are alike but for the depth of their stacks.

    Parameters
    ----------
    fine, coarse : _Layout
    interpolation, restriction : str
        As of `DepthCycle`.
    """

    def __init__(self, fine: _Layout, coarse: _Layout, interpolation: str, restriction: str):
        self.fine, self.coarse = fine, coarse
        self.interpolation = interpolation
        self.restriction = interpolation if restriction == "transpose" else restriction

    def prolong(self, x: Tensor) -> Tensor:
        rows, around = self.coarse.split(x)
        moved = []
        for own, coarse, fine in zip(rows, self.coarse.windows, self.fine.windows, strict=True):
            both = doubled_rows(coarse.comm, own, coarse.partition, self.interpolation)
            moved.append(coarse.comm.redistribute(both, coarse.partition.refine(2), fine.partition))
        return self.fine.join(moved, around)

    def restrict(self, x: Tensor) -> Tensor:
        return self._restricted(x, self.restriction)

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        return self._restricted(gradient, self.interpolation)

    def _restricted(self, x: Tensor, how: str) -> Tensor:
        rows, around = self.fine.split(x)
        windows = zip(rows, self.fine.windows, self.coarse.windows, strict=True)
        moved = [halved_rows(fine.comm, own, fine.partition, coarse.partition, how) for own, fine, coarse in windows]
        return self.coarse.join(moved, around)


class _LevelObjective(LossOfModule):
    """The loss of a level's network on the minibatch of a cycle.

    Attributes
    ----------
    loss_first : float or None
        Where it was evaluated first on this minibatch.
    gradients, evaluations : int
        On this minibatch.
    """

    def __init__(self, model: nn.Module, grid: ProcessGrid | None):
        super().__init__(model, grid)
        self.layout = _Layout(model)

    def use(self, loss: LevelLoss) -> None:
        self.loss: LevelLoss = loss
        self.loss_first: float | None = None
        self.gradients = self.evaluations = 0

    def _loss_of(self, module: nn.Module) -> Tensor:
        return self.loss(module)

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        found = super().evaluate(x)
        self.evaluations += 1
        if self.loss_first is None:
            self.loss_first = found.loss
        return found

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        self.gradients += 1
        return super().gradient(x)

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products over all ranks, what lies around the stacks counted once; the same bits on any number."""
        return torch.tensor([[self._dot(u, v) for v in b] for u in a], dtype=torch.float64)

    def _dot(self, u: Tensor, v: Tensor) -> float:
        (rows, around), (others, rest) = self.layout.split(u), self.layout.split(v)
        total = sum(float(torch.dot(one, other)) for one, other in zip(around, rest, strict=True))
        for window, one, other in zip(self.layout.windows, rows, others, strict=True):
            # A summand for each layer, whoever owns it.
            own = (one.double() * other.double()).sum(1, keepdim=True)
            total += float(window.comm.ordered_sum(own, window.partition.counts))
        return total


class _Steps:
    """Steps of the optimizer on the weights of one level."""

    momentum: Tensor | None = None
    takes_momentum = False
    optimizer: torch.optim.Optimizer

    def __init__(self, objective: _LevelObjective, clip: float | None):
        self.objective, self.clip = objective, clip

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        """So many steps on the level's loss, coupled or not; what the optimizer keeps it keeps for the next cycle."""
        parameters = self.objective.layout.parameters
        for _ in range(steps):
            point = point.complete(objective)
            x, gradient = point.x.clone(), present(point.gradient).clone()
            model = self.objective.load(x)
            for p, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view(p.shape)
            if self.clip is not None:
                clip_grad_norm_(model, self.clip)
            self.optimizer.step()
            for p in parameters:
                p.grad = None
            point = Point(x)
        return point
