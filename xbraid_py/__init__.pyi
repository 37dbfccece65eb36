# What type checkers see of the package: the names that `__init__.py` loads when they are asked for.
# tests/test_types.py holds the two against each other.

from xbraid_py.comm import (
    Communicator as Communicator,
    LaunchError as LaunchError,
    as_communicator as as_communicator,
    world as world,
)
from xbraid_py.comm.agreement import RunError as RunError
from xbraid_py.comm.partition import Partition as Partition
from xbraid_py.comm.replicas import ProcessGrid as ProcessGrid, broadcast_batch as broadcast_batch
from xbraid_py.layer_parallel import (
    GradientControl as GradientControl,
    LayerParallel as LayerParallel,
    PipelineParallel as PipelineParallel,
    SolveRecord as SolveRecord,
    broadcast_loss as broadcast_loss,
    check_replicas as check_replicas,
    clip_grad_norm_ as clip_grad_norm_,
    parallel_stages as parallel_stages,
)
from xbraid_py.layer_parallel.equation import Trajectory as Trajectory, solve as solve
from xbraid_py.layer_parallel.export import ResidualStep as ResidualStep, to_sequential as to_sequential
from xbraid_py.layer_parallel.minibatch.checkpoint import (
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from xbraid_py.layer_parallel.parallelize import parallelize as parallelize
from xbraid_py.layer_parallel.rates import (
    GradScaler as GradScaler,
    layer_lr as layer_lr,
    layer_views as layer_views,
    param_groups as param_groups,
)
from xbraid_py.layer_parallel.refine import refine_depth as refine_depth
from xbraid_py.layer_parallel.replace import replace_modules as replace_modules
from xbraid_py.layer_parallel.sequence import (
    ParallelGRU as ParallelGRU,
    ParallelLSTM as ParallelLSTM,
    SequenceRecord as SequenceRecord,
)
from xbraid_py.layers.checking import PropagatorReport as PropagatorReport, check_propagator as check_propagator
from xbraid_py.layers.dense import DenseBlock as DenseBlock, DenseLayer as DenseLayer, ResidualSteps as ResidualSteps
from xbraid_py.layers.image_resnet import ImageResNet as ImageResNet
from xbraid_py.layers.pixels import SpatialCoarsening as SpatialCoarsening
from xbraid_py.layers.splines import Splines as Splines
from xbraid_py.layers.steps import (
    error_norms as error_norms,
    local_errors as local_errors,
    output_error as output_error,
)
from xbraid_py.layers.time_steps import TimeStepper as TimeStepper
from xbraid_py.mgrit import (
    Adjoint as Adjoint,
    Forward as Forward,
    Hierarchy as Hierarchy,
    LayerGrid as LayerGrid,
    MGRIT as MGRIT,
    Propagator as Propagator,
    Solution as Solution,
    Solver as Solver,
)
from xbraid_py.multilevel import (
    AdaptiveOptions as AdaptiveOptions,
    MGOpt as MGOpt,
    MGOptOptions as MGOptOptions,
    NestedIteration as NestedIteration,
    NestedOptions as NestedOptions,
    ResNetTraining as ResNetTraining,
    ResNetTrainingOptions as ResNetTrainingOptions,
    VCycle as VCycle,
    WidthTraining as WidthTraining,
    WidthTrainingOptions as WidthTrainingOptions,
    prolong_depth as prolong_depth,
)
from xbraid_py.multilevel.depth.cycle import DepthCycle as DepthCycle
from xbraid_py.multilevel.resnet.refinement import refine as refine
from xbraid_py.optim import (
    Armijo as Armijo,
    OneShot as OneShot,
    OneShotOptions as OneShotOptions,
    QuasiNewton as QuasiNewton,
)
from xbraid_py.optim.objective import Evaluation as Evaluation, Objective as Objective
from xbraid_py.planner.stacks import Advice as Advice, advise as advise
from xbraid_py.problem.network import DenseResNet as DenseResNet, InitialScales as InitialScales
from xbraid_py.problem.objective import NetworkObjective as NetworkObjective
from xbraid_py.problem.problem import DenseResNetOptions as DenseResNetOptions, Problem as Problem
from xbraid_py.problem.regularization import Regularization as Regularization
from xbraid_py.run.signals import Stopped as Stopped
from xbraid_py.run.store.read import CheckpointError as CheckpointError

__version__: str

def keep_freed_memory() -> bool: ...
