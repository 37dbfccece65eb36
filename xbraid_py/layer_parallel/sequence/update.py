"""One update of a recurrent network: a forward and a backward pass, and how good the gradient of the weights is.

Shape letters: `L` steps, `B` batch, `F` inputs of a step, `S` numbers of a state, `D` layers times directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from xbraid_py.layer_parallel.accuracy import Controller
from xbraid_py.layer_parallel.sequence.run import Pass
from xbraid_py.mgrit.levels import Solution

_SMALL = 1e-30  # no gradient

# Makes a forward pass: exactly or not, so many tightenings, of the first samples only, and whether to keep it.
MakePass = Callable[[bool, int, int | None, bool], Pass]

SizeOf = Callable[[Tensor | None, Tensor | None], float]


@dataclass(frozen=True)
class SequenceRecord:
    """What the solves of one call did; tuples have a place for each window of each layer (see `ParallelRecurrent`).

    Attributes
    ----------
    forward_sweeps, adjoint_sweeps : tuple of int
        Relaxations of the finest level; the latter empty before the backward pass.
    forward_residuals, adjoint_residuals : tuple of float
        Relative residuals, 0 for a sequential sweep.
    update : int
        Number of the backward pass, from 1; 0 before it.
    mode : str
        "mgrit", or "exact": step after step.
    level : int
        Tightenings in force; where the noise of minibatches allows for less, minus the loosenings.
    gradient_error : float or None
        Estimate of the relative error (2-norm) of the gradient of all weights, for the given gradient of the output;
        None before the backward pass, NaN if the solver has met NaN, 0 of exact propagation.
    measured : bool
        Whether it is no estimate, but the error measured against the exact gradient (which was then used).
    event : str
        What was changed after this update; empty if nothing was.
    noise : float
        Relative noise of the minibatch, where it was last estimated; 0 if nobody asked for it.
    """

    forward_sweeps: tuple[int, ...]
    forward_residuals: tuple[float, ...]
    adjoint_sweeps: tuple[int, ...] = ()
    adjoint_residuals: tuple[float, ...] = ()
    update: int = 0
    mode: str = "mgrit"
    level: int = 0
    gradient_error: float | None = None
    measured: bool = False
    event: str = ""
    noise: float = 0.0

    def as_dict(self) -> dict:
        """For a record of the run."""
        return asdict(self)


class Update:
    """One call, and the backward pass that belongs to it.

    Parameters
    ----------
    controller : Controller
        Says how exactly to solve, and gets to know what came of it.
    make : callable
    samples : int
        B.
    watched : bool
        Whether there is a coarse level for such sequences; without one all is exact.
    keep : bool
        Whether there will be a backward pass.
    """

    def __init__(self, controller: Controller, make: MakePass, samples: int, watched: bool, keep: bool):
        self.controller, self.make, self.samples, self.watched = controller, make, samples, watched
        self.exact, self.level = controller.exact or not watched, controller.level if watched else 0
        self.checks = keep and watched and controller.checks_now
        self.done = self._pass(self.exact, keep=keep)

    @property
    def record(self) -> SequenceRecord:
        """What the forward pass did."""
        return self._record(self.done.solutions, [])

    def _pass(self, exact: bool, samples: int | None = None, keep: bool = True) -> Pass:
        return self.make(exact, self.level, samples, keep)

    def _record(self, forward: list[Solution], adjoint: list[Solution], **more) -> SequenceRecord:
        mode = "exact" if self.exact else "mgrit"
        return SequenceRecord(*_summary(forward), *_summary(adjoint), mode=mode, level=self.level, **more)

    def backward(
        self, number: int, slope: Tensor | None, of_end: Tensor | None, with_input: bool, size_of: SizeOf
    ) -> tuple[Tensor | None, Tensor, list[Tensor], SequenceRecord]:
        """Gradients of the input (L, B, F), if asked for, of the start (D, B, S) and of the weights, and the record.

        Parameters
        ----------
        number : int
            Of the backward pass.
        slope, of_end : tensor or None
            Gradients of output and states behind the sequence.
        with_input : bool
        size_of : callable
            Norm of these two gradients, on all ranks alike; collective.
        """
        found = self.done.backward(slope, of_end, with_input)
        solved = self.done.solutions, found[3]
        measured = noise = None
        if self.checks:
            # The same once more, the other way; the exact gradient is the one that is used.
            other = self._pass(not self.exact)
            again = other.backward(slope, of_end, with_input)
            if self.exact:
                solved = other.solutions, again[3]
            else:
                found, again = again, found
            measured = _distance(again[2], found[2])
            noise = self._noise(slope, of_end, found[2])
        error, event = 0.0, ""
        if self.watched:
            residuals = sum(map(_residual, solved))
            forward, adjoint = (max(s.sweeps for s in each) for each in solved)
            if self.controller.accuracy.check:
                # What residuals leave is an error of the sum over the samples, whose parts may cancel: then the
                # gradient is small beside the slopes that it comes from, and its relative error is large.
                residuals *= size_of(slope, of_end) / max(_norm(found[2]), _SMALL)
            error, event = self.controller.observe(residuals, measured, (forward, adjoint), noise)
        told = {"update": number, "gradient_error": error, "measured": measured is not None, "event": event}
        record = self._record(*solved, **told, noise=self.controller.noise)
        return *found[:3], record

    def _noise(self, slope: Tensor | None, of_end: Tensor | None, gradient: Sequence[Tensor]) -> float | None:
        """Relative noise of an exact gradient; None where nobody asks for it, or there is a single sample.

        With a share w of the samples in the first half, and g_1 and g_2 the mean gradients of both, the variance of
        g = w g_1 + (1 - w) g_2 is estimated by w (1 - w) |g_1 - g_2|^2; and w g_1 is the gradient of the first half by
        its part of the slope.
        """
        half = self.samples // 2
        if not half or not self.controller.accuracy.noise:
            return None
        share = half / self.samples
        first, last = (None if each is None else each[:, :half] for each in (slope, of_end))
        part = self._pass(True, half).backward(first, last, False)[2]
        return _distance([each / share for each in part], gradient) * (share / (1.0 - share)) ** 0.5


def _summary(solutions: list[Solution]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(s.sweeps for s in solutions), tuple(s.residual for s in solutions)


def _residual(solutions: list[Solution]) -> float:
    """Of all solves of a direction, their root mean square."""
    return (sum(s.residual**2 for s in solutions) / len(solutions)) ** 0.5


def _norm(tensors: Sequence[Tensor]) -> float:
    """2-norm of all together; the same on all ranks, which have the same tensors."""
    return torch.stack([each.square().sum() for each in tensors]).sum().sqrt().item()


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """|a - b| / |b|."""
    difference, size = _norm([x - y for x, y in zip(a, b, strict=True)]), _norm(b)
    return difference / size if size != 0.0 else 0.0  # NaN where there is one
