from .equations import Adjoint as Adjoint, AdjointTrajectory as AdjointTrajectory, Forward as Forward
from .grid import LayerGrid as LayerGrid
from .hierarchy import Hierarchy as Hierarchy, Level as Level
from .lagged import COARSE_RELAXATIONS as COARSE_RELAXATIONS
from .levels import Monitor as Monitor, Solution as Solution
from .options import MGRIT as MGRIT
from .pipeline import follow as follow
from .protocols import Propagator as Propagator, StateTransfer as StateTransfer, Steps as Steps
from .solver import Solver as Solver
