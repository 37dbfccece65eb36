"""Adaptive depth: which layers of a network a refinement cuts in two.

Shape letters: `N` layers, `n` of them owned here, `p` parameters of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, lcm

import torch
from torch import Tensor

from xbraid_py.layers.steps import error_norms, local_errors
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.options import AdaptiveOptions
from xbraid_py.multilevel.depth.transfer import prolong_rows
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.problem import Problem


def layers_to_cut(
    options: AdaptiveOptions, problem: Problem, objective: NetworkObjective, x: Tensor, interpolation: str
) -> tuple[int, ...]:
    """The layers that a refinement is to cut, the same on all ranks; collective.

    Parameters
    ----------
    options : AdaptiveOptions
    problem : Problem
    objective : NetworkObjective
        Of the present network. Its work is counted there; its warm start and its states may change.
    x : Tensor
        The present weights.
    interpolation : {"constant", "linear"}
        Of the weights of layers that are cut.
    """
    grid = objective.network.grid
    fitting = [count for count in range(grid.num_layers + 1, 2 * grid.num_layers + 1) if suits(problem, grid, count)]
    return marked(options, indicator(options.indicator, objective, x, interpolation), fitting)


def indicator(kind: str, objective: NetworkObjective, x: Tensor, interpolation: str = "linear") -> list[float]:
    """A number for each layer, the larger the more is gained by cutting it; the same on all ranks, collective.

    Parameters
    ----------
    kind : {"goal", "richardson", "jump", "both", "even"}
        See `AdaptiveOptions`.
    objective : NetworkObjective
        All but "jump" and "even" solve for the states at x, "goal" for the adjoints too.
    x : Tensor
        Weights.
    interpolation : {"constant", "linear"}
        Of the weights of the halves of a layer, in Richardson's estimate.
    """
    network = objective.network
    partition, comm = network.partition, network.comm
    if kind == "even":
        return [_mirrored(layer + 1) for layer in range(network.grid.num_layers)]
    columns = []
    if kind in ("jump", "both"):
        columns.append(jumps(objective, x))
    if kind != "jump":
        objective.evaluate(x)
        steps = network.steps(x)
        errors = local_errors(steps, objective.states, prolonged(objective, x, interpolation))
        objective.work += 3.0 * network.grid.num_layers
        if kind == "goal":
            pairs = zip(objective.adjoints(x), errors, strict=True)
            # With the sum over the samples first, layers whose effects happen to cancel would never be cut.
            found = [(adjoint * error).sum(0).abs().sum() for adjoint, error in pairs]
            columns.append(torch.stack(found) if found else errors.new_empty(0))
        else:
            columns.append(error_norms(errors))
    gathered = comm.allgather(torch.stack(columns, 1), partition.counts)
    # The sums in the order of the layers, on every rank the same.
    rows = gathered.double().tolist()
    totals = [sum(column) or 1.0 for column in zip(*rows, strict=True)]
    return [sum(value / total for value, total in zip(row, totals, strict=True)) for row in rows]


def _mirrored(number: int) -> float:
    """Binary digits mirrored at the point: 1, 2, 3, 4 .. to 0.1, 0.01, 0.11, 0.001 .., evenly spread in (0, 1)."""
    return float(int(f"{number:b}"[::-1], 2)) / 2 ** number.bit_length()


def prolonged(objective: NetworkObjective, x: Tensor, interpolation: str) -> Tensor:
    """Weights (2n, p) of the halves of the layers owned here; collective."""
    network = objective.network
    theta, following = network.steps(x).theta, None
    if interpolation == "linear" and len(theta):
        following = network.comm.shift(theta[:1].contiguous(), network.partition, -1)
    return prolong_rows(theta, interpolation, following)


def jumps(objective: NetworkObjective, x: Tensor) -> Tensor:
    """h_n times the mean of |theta_n - theta_m| over the neighbors m, (n,); collective.

    The weights of a step are those where it begins: if they are smooth in depth, they are wrong by half the jump
    to the next ones in the mean, and the step by h times that.
    """
    network = objective.network
    comm, partition = network.comm, network.partition
    steps = network.steps(x)
    theta = steps.theta
    if not len(theta):
        return theta.new_empty(0)
    before = comm.shift(theta[-1:].contiguous(), partition, +1)
    after = comm.shift(theta[:1].contiguous(), partition, -1)
    rows = torch.cat([each for each in (before, theta, after) if each is not None])
    # One row after the other: the order of summation must not depend on their number.
    sizes = [float((b - a).square().sum().sqrt()) for a, b in zip(rows, rows[1:], strict=False)]
    low = [None] * (before is None) + sizes
    high = sizes[before is not None :] + [None] * (after is None)
    beside = [[each for each in pair if each is not None] for pair in zip(low, high, strict=False)]
    means = torch.tensor([sum(each) / len(each) if each else 0.0 for each in beside], dtype=theta.dtype)
    return means * steps.h


def suits(problem: Problem, grid: LayerGrid, num_layers: int) -> bool:
    """Whether the solvers work as well with so many layers as with those of a grid: a prime number has no coarse level.

    With a coarsening factor, whether all factors of the present levels divide it; with a number of intervals, whether
    there are at least half as many, and coarse steps with all their parts.
    """
    options = problem.forward
    if options.cycle != "lagged" or options.cfactor is not None or options.max_levels == 1:
        return (
            num_layers % lcm(*(grid.num_layers // each.levels[-1].num_steps for each in problem.hierarchies(grid))) == 0
        )
    factor = options.cfactor_of(0, num_layers)
    if factor is None:
        return num_layers <= 2 * options.intervals
    return 2 * num_layers >= options.intervals * factor and options.parts(factor) == options.parts(2 * factor)


def marked(options: AdaptiveOptions, values: Sequence[float], fitting: Sequence[int]) -> tuple[int, ...]:
    """The layers to cut, in their order.

    Parameters
    ----------
    options : AdaptiveOptions
    values : sequence of N floats
        The indicator. Where two are equal, the first layer comes first.
    fitting : sequence of int
        Numbers of layers that suit. That of these from N + 1 to 2 N and `max_layers` which is nearest to what the
        marking asks for, or the larger one of two, is the new one; nothing is cut if there is none.
    """
    number = len(values)
    order = sorted(range(number), key=lambda layer: (-values[layer], layer))
    if options.marking == "share":
        wanted = ceil(options.fraction * number)
    else:
        goal, wanted, reached = options.fraction * sum(values), 0, 0.0
        while wanted < number and (reached < goal or not wanted):
            reached += values[order[wanted]]
            wanted += 1
    most = min(2 * number, options.max_layers or 2 * number)
    possible = [count for count in fitting if number < count <= most]
    if not possible:
        return ()
    nearest = min(possible, key=lambda count: (abs(count - number - wanted), -count))
    return tuple(sorted(order[: nearest - number]))
