"""Propagators: one layer step for all owned intervals at once, forwards and backwards."""

from xbraid_py.propagator.protocols import Propagator, StateTransfer, Steps
from xbraid_py.propagator.residual_steps import ResidualSteps
from xbraid_py.propagator.richardson import error_norms, halved, local_errors, output_error
from xbraid_py.propagator.rows import coarse_rows, sums
from xbraid_py.propagator.solves import Adjoint, AdjointTrajectory, Forward

__all__ = [
    "Adjoint",
    "AdjointTrajectory",
    "Forward",
    "Propagator",
    "ResidualSteps",
    "StateTransfer",
    "Steps",
    "coarse_rows",
    "error_norms",
    "halved",
    "local_errors",
    "output_error",
    "sums",
]
