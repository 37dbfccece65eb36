"""MGRIT with FAS: a multigrid solver for u_{n+1} = Phi(u_n) over all n at once, and what it asks of Phi.

For layers of networks: S. Günther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger, "Layer-Parallel Training of
Deep Residual Neural Networks", SIAM Journal on Mathematics of Data Science 2, 2020; E. C. Cyr, S. Günther, J. B.
Schroder, "Multilevel Initialization for Layer-Parallel Deep Neural Network Training", 2019 ("paper 001" in the code).
"""

from xbraid_py.mgrit.equations import Adjoint, AdjointTrajectory, Forward
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.hierarchy import Hierarchy, Level
from xbraid_py.mgrit.lagged import COARSE_RELAXATIONS
from xbraid_py.mgrit.levels import Monitor, Solution
from xbraid_py.mgrit.options import MGRIT
from xbraid_py.mgrit.pipeline import follow
from xbraid_py.mgrit.protocols import Propagator, StateTransfer, Steps
from xbraid_py.mgrit.solver import Solver

__all__ = [
    "COARSE_RELAXATIONS",
    "MGRIT",
    "Adjoint",
    "AdjointTrajectory",
    "Forward",
    "Hierarchy",
    "LayerGrid",
    "Level",
    "Monitor",
    "Propagator",
    "Solution",
    "Solver",
    "StateTransfer",
    "Steps",
    "follow",
]
