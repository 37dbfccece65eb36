"""The optimizers of the levels, all through one method: so many steps on an objective, from a point.

A diagonal `scale` D turns an optimizer into the same one in the variables D^(-1/2) x: the gradient step becomes
x - a D g. D = 1/h on the residual layers takes the gradient in L2(0, T); D = 0 freezes weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xbraid_py.optim.line_search import Armijo, FixedStep
from xbraid_py.optim.objective import Evaluation, Objective
from xbraid_py.optim.quasi_newton import QuasiNewton

# What an optimizer carries from one visit of a level to the next: lists of flat vectors, and numbers, by their names.
Kept = tuple[dict[str, list[Tensor]], dict[str, float]]


@dataclass(frozen=True)
class Point:
    """Weights, and what is known of an objective there.

    Attributes
    ----------
    x : Tensor
        A flat vector.
    evaluation : Evaluation or None
        The objective at x. Where there is one and no gradient, x is where the objective was evaluated last.
    gradient : Tensor or None
        The gradient at x.
    """

    x: Tensor
    evaluation: Evaluation | None = None
    gradient: Tensor | None = None

    def complete(self, objective: Objective) -> Point:
        """The point with evaluation and gradient; what is known is not computed again."""
        if self.gradient is not None:
            return self
        evaluation = objective.evaluate(self.x) if self.evaluation is None else self.evaluation
        return Point(self.x, evaluation, objective.gradient(self.x))


class Smoother(Protocol):
    """What a cycle knows of the optimizer of a level.

    Attributes
    ----------
    momentum : Tensor or None
        What gradients have gathered into, as a vector of the weights: to be read, and to be set where it is not None
        or `takes_momentum`.
    takes_momentum : bool
        Whether momentum may be set.
    """

    @property
    def momentum(self) -> Tensor | None: ...

    @momentum.setter
    def momentum(self, value: Tensor) -> None: ...

    @property
    def takes_momentum(self) -> bool: ...

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        """So many steps from a point; one gradient a step, none where the point has it."""
        ...


class LevelOptimizer(Smoother, Protocol):
    """LevelOptimizer of paper 000: a smoother, and what a run knows of it."""

    def reset(self) -> None:
        """Forget earlier steps."""
        ...

    def kept(self) -> Kept:
        """What later visits depend on; for an optimizer that carries nothing from one to the next, nothing."""
        ...

    def restore(self, vectors: dict[str, list[Tensor]], numbers: dict[str, float]) -> None:
        """Go on as if what `kept` has given were of this optimizer; all ranks together."""
        ...


class GradientDescent:
    """x - a D g (paper 000, algorithm 2).

    Parameters
    ----------
    learning_rate : float
        a.
    scale : Tensor, optional
        D, a flat vector of numbers that are at least 0.
    """

    momentum: Tensor | None = None
    takes_momentum = False

    def __init__(self, learning_rate: float, scale: Tensor | None = None):
        self.learning_rate, self.scale = learning_rate, scale

    def reset(self) -> None:
        pass  # there is nothing to forget

    def kept(self) -> Kept:
        return {}, {}

    def restore(self, vectors: dict[str, list[Tensor]], numbers: dict[str, float]) -> None:
        pass

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        for _ in range(steps):
            point = point.complete(objective)
            assert point.gradient is not None
            gradient = point.gradient if self.scale is None else self.scale * point.gradient
            point = Point(point.x.sub(gradient, alpha=self.learning_rate))
        return point


class TorchOptimizer:
    """Steps of any optimizer of torch.optim that treats each weight for itself: momentum, Adam.

    Parameters
    ----------
    make : callable
        Makes it for a list of parameters, as in `lambda weights: torch.optim.SGD(weights, lr=0.1)`.
    scale : Tensor, optional
        As for `GradientDescent`.
    keep : bool
        Whether momentum is carried from one visit of the level to the next.
    """

    def __init__(
        self,
        make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        scale: Tensor | None = None,
        keep: bool = True,
    ):
        self.make, self.keep = make, keep
        self._root = None if scale is None else scale.sqrt()
        self.reset()

    def reset(self) -> None:
        # Made here and not at the first step: torch loads much of itself for the first optimizer.
        self._weights = torch.nn.Parameter(torch.empty(0))
        self._optimizer = self.make([self._weights])

    def kept(self) -> Kept:
        found = {name: each for name, each in self.state.items() if isinstance(each, Tensor) and self.keep}
        vectors = {name: [each.clone()] for name, each in found.items() if each.dim()}
        return vectors, {name: float(each) for name, each in found.items() if not each.dim()}

    def restore(self, vectors: dict[str, list[Tensor]], numbers: dict[str, float]) -> None:
        self.reset()
        self.state.update({name: each for name, (each,) in vectors.items()})
        self.state.update({name: torch.tensor(each) for name, each in numbers.items()})

    @property
    def takes_momentum(self) -> bool:
        # Without second moments of its own Adam would make steps of any size with the momentum of another level.
        name = self._momentum_name
        return name == "momentum_buffer" or (name is not None and name in self.state)

    @property
    def momentum(self) -> Tensor | None:
        """The momentum of SGD, the first moment of Adam; None before the first step."""
        found = self.state.get(self._momentum_name)
        return found if found is None or self._root is None else self._root * found

    @momentum.setter
    def momentum(self, value: Tensor) -> None:
        self.state[self._momentum_name] = _divided(value.clone(), self._root)

    @property
    def state(self) -> dict:
        """What torch keeps for the weights, by its own names: tensors, and for some optimizers the number of steps."""
        return self._optimizer.state[self._weights]

    @property
    def _momentum_name(self) -> str | None:
        if self._optimizer.defaults.get("momentum"):
            return "momentum_buffer"
        return "exp_avg" if "betas" in self._optimizer.defaults else None

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        if not self.keep:
            self.reset()
        for _ in range(steps):
            point = Point(self._step(point.complete(objective)))
        return point

    def _step(self, point: Point) -> Tensor:
        weights = self._weights
        assert point.gradient is not None
        if self._root is None:
            weights.data, weights.grad = point.x.clone(), point.gradient
        else:
            # In the scaled variables, seen from x: a step there times D^(1/2) is a step here.
            weights.data, weights.grad = torch.zeros_like(point.x), self._root * point.gradient
        self._optimizer.step()
        found, weights.grad = weights.data, None
        return found if self._root is None else torch.addcmul(point.x, self._root, found)


class QuasiNewtonOptimizer:
    """L-BFGS, BFGS or steepest descent, with a line search or a fixed step.

    The pairs are made from the gradients of the level's own objective, without the coupling term, at consecutive
    points on that level. So they hold from one cycle to the next, though the coupling term changes.

    Parameters
    ----------
    quasi_newton : QuasiNewton
    search : Armijo or FixedStep
    learning_rate : float
        Factor of the direction, where the line search begins.
    scale, keep
        As for `TorchOptimizer`; `keep` is for the pairs.
    """

    momentum: Tensor | None = None
    takes_momentum = False

    def __init__(
        self,
        quasi_newton: QuasiNewton,
        search: Armijo | FixedStep,
        learning_rate: float = 1.0,
        scale: Tensor | None = None,
        keep: bool = True,
    ):
        self.quasi_newton, self.search, self.learning_rate, self.keep = quasi_newton, search, learning_rate, keep
        self._root = None if scale is None else scale.sqrt()
        self.reset()

    def reset(self) -> None:
        self.quasi_newton.clear()
        self._last: tuple[Tensor, Tensor] | None = None

    def kept(self) -> Kept:
        if not self.keep or self._last is None:
            return {}, {}
        return {"s": list(self.quasi_newton.s), "y": list(self.quasi_newton.y), "last": [*self._last]}, {}

    def restore(self, vectors: dict[str, list[Tensor]], numbers: dict[str, float]) -> None:
        self.quasi_newton.restore(vectors.get("s", []), vectors.get("y", []))
        self._last = (vectors["last"][0], vectors["last"][1]) if vectors else None

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        if not self.keep:
            self.reset()
        for _ in range(steps):
            point = point.complete(objective)
            self._observe(objective, point)
            found = self._search(objective, point)
            if found is None and self.quasi_newton.s:
                self.quasi_newton.clear()  # the pairs may be what is wrong
                found = self._search(objective, point)
            if found is None:
                return point
            point = found
        return point

    def _observe(self, objective: Objective, point: Point) -> None:
        """Make a pair of the last point and this one."""
        assert point.gradient is not None
        gradient = point.gradient if objective.shift is None else point.gradient - objective.shift
        if self._last is not None:
            s, y = point.x - self._last[0], gradient - self._last[1]
            if self._root is not None:
                s, y = _divided(s, self._root), y * self._root
            self.quasi_newton.add(s, y)
        self._last = point.x, gradient

    def _search(self, objective: Objective, point: Point) -> Point | None:
        assert point.gradient is not None and point.evaluation is not None
        gradient = point.gradient if self._root is None else self._root * point.gradient
        direction, slope = self.quasi_newton.direction(gradient)
        direction = direction if self._root is None else self._root * direction
        trial = self.search.search(
            point.x,
            point.evaluation.value,
            direction * self.learning_rate,
            slope * self.learning_rate,
            lambda x, error: objective.evaluate(x, None, error),
        )
        return None if trial is None else Point(trial.x, trial.evaluation)


def _divided(vector: Tensor, root: Tensor | None) -> Tensor:
    """A vector in the scaled variables; nothing of it where weights are frozen."""
    return vector if root is None else torch.where(root > 0, vector / root, 0.0)
