"""Who owns which steps of a sequence, cut in windows, and what is done in all of them alike.

Shape letters: `L` steps, `n` of them in some stretch, `B` batch, `W` numbers of an output, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.solves import Solvers
from xbraid_py.layers.gated import GatedCell
from xbraid_py.layers.norm_dropout import Dropout, at_position
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.options import MGRIT


def padded(options: MGRIT, length: int) -> tuple[int, int]:
    """The least number of steps from `length` on that all coarsenings divide that `options` ask for, and the levels.

    Steps are added at the end where no factor divides a length; a level that would have fewer than `min_coarse` steps
    is not made.
    """
    steps, unit, level = length, 1, 0
    while True:
        if level == 0 and options.cycle == "lagged" and options.cfactor is None:
            # As many intervals as asked for, whatever the length.
            factor = options.cfactor_of(0, options.intervals * -(-steps // options.intervals))
        else:
            factor = options.cfactor_of(level, steps)
        if factor is None or -(-steps // factor) < options.min_coarse:
            return steps * unit, level + 1
        steps, unit, level = -(-steps // factor), unit * factor, level + 1


@dataclass(frozen=True)
class SequencePlan:
    """Who owns which steps of a sequence of `length` steps, cut in windows.

    Attributes
    ----------
    length : int
        Steps of the sequence.
    window : int
        Steps of a window, padding included; the last one may be padded by more.
    solvers : Solvers
        Of a window.
    """

    length: int
    window: int
    solvers: Solvers

    @classmethod
    def make(
        cls, options: MGRIT, adjoint: MGRIT, length: int, windows: int, dt: float, comm: Communicator
    ) -> SequencePlan:
        """The plan for `length` steps of size `dt` in so many windows, fewer if they would not have a step each."""
        wanted = -(-length // min(windows, length))
        window, levels = padded(options, wanted)
        options, adjoint = (replace(each, max_levels=levels) for each in (options, adjoint))
        return cls(length, window, Solvers(options, adjoint, LayerGrid(window, window * dt), comm))

    @property
    def partition(self) -> Partition:
        """Owners of the steps of a window."""
        return self.solvers.partition

    @cached_property
    def intervals(self) -> Partition:
        """Owners of the intervals of a window, or of the blocks of steps where there are none."""
        hierarchy = self.solvers.hierarchy
        return hierarchy.blocks if self.solvers.are_pipelined else hierarchy.intervals

    @property
    def num_windows(self) -> int:
        """Windows that have steps of the sequence."""
        return -(-self.length // self.window)

    def count(self, window: int) -> int:
        """Steps of the sequence in a window."""
        return min(self.window, self.length - window * self.window)

    def own(self, window: int, rank: int) -> range:
        """Steps of a window that belong to a rank and to the sequence."""
        first, last = self.partition.bounds[rank : rank + 2]
        count = self.count(window)
        return range(window * self.window + min(first, count), window * self.window + min(last, count))

    def steps(self, window: int, rank: int) -> range:
        """The same with those that pad the window, by the numbers that they would have."""
        first, last = self.partition.bounds[rank : rank + 2]
        return range(window * self.window + first, window * self.window + last)


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer in one direction, as torch has them; biases may be None."""

    of_input: Tensor
    of_state: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None


@dataclass(frozen=True)
class Masks:
    """Dropout between layers, by the rule of `xbraid_py.nn.Dropout`: a step has the mask that a layer of a stack has.

    It depends on the seed, the number of the update, of the step and of the layer in front, so it is the same on any
    number of ranks, in any windows and portions, and in all evaluations of an update.

    Attributes
    ----------
    p : float
        Probability of 0.
    seed, draw : int
    samples : int
        B, of the whole batch.
    """

    p: float
    seed: int
    draw: int
    samples: int

    def behind(self, layer: int, steps: range, like: Tensor) -> Tensor:
        """Factors (n, B, W) for the outputs of some steps of a layer; `like` (..., W) has their type."""
        drop = Dropout(self.p)
        drop.number = layer
        found = like.new_ones((len(steps), self.samples, like.shape[-1]))
        for row, step in zip(found, steps, strict=True):
            with at_position(self.seed, self.draw, step):
                row.copy_(drop(row))
        return found


@dataclass(frozen=True)
class How:
    """What is done in all windows and layers of a call alike.

    Attributes
    ----------
    cell : GatedCell
    dt : float
        Step size.
    coarse : {"compose", "euler"}
        See `GatedSteps`.
    exact : bool
        One step after the other.
    level : int
        Tightenings of the solvers.
    lengths : (B,) tensor or None
        Steps of each sample; None where all have as many.
    masks : Masks or None
        Between the layers.
    """

    cell: GatedCell
    dt: float
    coarse: str
    exact: bool = False
    level: int = 0
    lengths: Tensor | None = None
    masks: Masks | None = None

    def sizes(self, steps: range, window: range, like: Tensor) -> Tensor:
        """Sizes (n,) of steps, or (n, B) where samples differ; those behind a window or a sample are 0."""
        numbers = torch.arange(steps.start, steps.stop, device=like.device)
        inside = numbers < window.stop
        if self.lengths is not None:
            inside = inside[:, None] & (numbers[:, None] < self.lengths.to(like.device))
        return self.dt * inside.to(like.dtype)

    def of_state(self, slopes: Tensor) -> Tensor:
        """The gradient of states (n, B, S) from that of outputs (n, B, H), which are their first part."""
        more = self.cell.state_size - slopes.shape[-1]
        return torch.nn.functional.pad(slopes, (0, more)) if more else slopes
