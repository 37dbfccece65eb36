"""Layer-parallel training of deep residual networks.

The layers of a residual network are time steps; `Solver` propagates states and adjoints through all of them at once
by multigrid in time (`MGRIT`), over the ranks of a `Communicator`. `NestedIteration` trains networks of growing depth
with it. See README.md, and `drivers/peaks.py` for a complete program.
"""

import os

__version__ = "0.1.0"

# The same bits from a matrix product wherever its operands lie in memory and however many go in one call: without it
# results depend on the partition of the layers. Costs nothing measurable; has to be set before MKL is first used.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from xbraid_py.allocation import keep_freed_memory
from xbraid_py.comm import Communicator, LaunchError, wrap
from xbraid_py.errors import RunError
from xbraid_py.export import ResidualStep, to_sequential
from xbraid_py.grid import LayerGrid, Partition
from xbraid_py.layer_parallel import Accuracy, LayerParallel, SolveRecord, clip_grad_norm_, share_loss
from xbraid_py.mgrit import MGRIT, Hierarchy, Solution, Solver
from xbraid_py.multilevel import NestedIteration, NestedOptions, prolong_depth
from xbraid_py.network import InitialScales, ResidualNetwork
from xbraid_py.networks.dense import DenseLayer
from xbraid_py.networks.dense_block import DenseBlock
from xbraid_py.networks.dropout import Dropout
from xbraid_py.objective import Evaluation, NetworkObjective, Objective, Regularization
from xbraid_py.optim import Armijo, OneShot, OneShotOptions, QuasiNewton
from xbraid_py.problem import Architecture, Problem
from xbraid_py.process_grid import ProcessGrid, share
from xbraid_py.propagator import Adjoint, Forward, Propagator, ResidualSteps
from xbraid_py.threads import run_threads

keep_freed_memory()

__all__ = [
    "MGRIT",
    "Accuracy",
    "Adjoint",
    "Architecture",
    "Armijo",
    "Communicator",
    "DenseBlock",
    "DenseLayer",
    "Dropout",
    "Evaluation",
    "Forward",
    "Hierarchy",
    "InitialScales",
    "LaunchError",
    "LayerGrid",
    "LayerParallel",
    "NestedIteration",
    "NestedOptions",
    "NetworkObjective",
    "Objective",
    "OneShot",
    "OneShotOptions",
    "Partition",
    "Problem",
    "ProcessGrid",
    "Propagator",
    "QuasiNewton",
    "Regularization",
    "ResidualNetwork",
    "ResidualStep",
    "ResidualSteps",
    "RunError",
    "Solution",
    "SolveRecord",
    "Solver",
    "clip_grad_norm_",
    "prolong_depth",
    "run_threads",
    "share",
    "share_loss",
    "to_sequential",
    "wrap",
]
