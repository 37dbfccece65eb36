"""Propagators: one layer step for all owned intervals at once, forwards and backwards."""

from xbraid_py.propagator.protocols import Propagator, StateTransfer, Steps
from xbraid_py.propagator.residual_steps import ResidualSteps
from xbraid_py.propagator.rows import coarse_rows
from xbraid_py.propagator.solves import Adjoint, Forward

__all__ = ["Adjoint", "Forward", "Propagator", "ResidualSteps", "StateTransfer", "Steps", "coarse_rows"]
