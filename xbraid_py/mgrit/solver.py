"""The solver: forwards and backwards alike, by the cycle that its options name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xbraid_py.comm import as_communicator
from xbraid_py.mgrit.cycles import Cycles
from xbraid_py.mgrit.hierarchy import Hierarchy
from xbraid_py.mgrit.lagged import LaggedCycle
from xbraid_py.mgrit.levels import Levels, Monitor, Solution
from xbraid_py.mgrit.norms import Stop
from xbraid_py.mgrit.options import MGRIT
from xbraid_py.mgrit.protocols import Propagator


class Solver:
    """Solves u_{n+1} = Phi(u_n) on a hierarchy of levels over a communicator.

    Parameters
    ----------
    options : MGRIT
    hierarchy : Hierarchy
        Planned for `comm.size` ranks.
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        None for a serial run.
    """

    def __init__(self, options: MGRIT, hierarchy: Hierarchy, comm: Any):
        comm = as_communicator(comm)
        if hierarchy.partition.num_ranks != comm.size:
            raise ValueError(
                f"the hierarchy is planned for {hierarchy.partition.num_ranks} ranks, the communicator has {comm.size}"
            )
        self.options, self.hierarchy, self.comm = options, hierarchy, comm

    def solve(
        self,
        propagator: Propagator,
        start: Tensor | None,
        warm: tuple[Tensor, ...] | None = None,
        *,
        max_iter: int | None = None,
        exact: bool = False,
        monitor: Monitor | None = None,
    ) -> Solution:
        """Solve with the given first state; the last sweep is recorded by the propagator.

        Parameters
        ----------
        propagator : Propagator
            The steps of the finest level owned here.
        start : (*S) tensor
            Input of the first step, on the rank that owns it; ignored elsewhere.
        warm : tuple of Tensor, optional
            `Solution.warm` of an earlier solve; the lagged cycle overwrites it. Without it the solve starts from the
            coarsest level.
        max_iter : int, optional
            Make up to this many iterations if the options ask for fewer.
        exact : bool
            Make all of these iterations, whatever the tolerance.
        monitor : Monitor, optional
            Measures the output; the lagged cycle iterates until it is content.
        """
        arguments = (self.options, self.hierarchy, self.comm, propagator, start, monitor)
        if len(self.hierarchy.levels) == 1:
            return Levels(*arguments).sequential()
        cycle = LaggedCycle if self.options.cycle == "lagged" else Cycles
        max_iter = max(self.options.iterations, max_iter or 0)
        stop = Stop(0.0) if exact else Stop(self.options.tolerance, self.options.atol)
        return cycle(*arguments).run(warm, max_iter, stop)
