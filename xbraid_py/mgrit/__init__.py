"""MGRIT with FAS: a multigrid solver for u_{n+1} = Phi(u_n) over all n at once."""

from xbraid_py.mgrit.hierarchy import Hierarchy, Level
from xbraid_py.mgrit.levels import Monitor, Solution
from xbraid_py.mgrit.one_shot import COARSE_RELAXATIONS
from xbraid_py.mgrit.options import MGRIT
from xbraid_py.mgrit.solver import Solver

__all__ = ["COARSE_RELAXATIONS", "MGRIT", "Hierarchy", "Level", "Monitor", "Solution", "Solver"]
