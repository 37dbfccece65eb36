# The public names, for type checkers and for `__init__.py`, which loads each when it is asked for.

from .comm import (
    Communicator as Communicator,
    LaunchError as LaunchError,
    as_communicator as as_communicator,
    world as world,
)
from .comm.agreement import RunError as RunError
from .comm.partition import Partition as Partition
from .comm.replicas import ProcessGrid as ProcessGrid, broadcast_batch as broadcast_batch
from .layer_parallel import (
    GradientControl as GradientControl,
    LayerParallel as LayerParallel,
    PipelineParallel as PipelineParallel,
    SolveRecord as SolveRecord,
    broadcast_loss as broadcast_loss,
    check_replicas as check_replicas,
    clip_grad_norm_ as clip_grad_norm_,
    parallel_stages as parallel_stages,
)
from .layer_parallel.equation import Trajectory as Trajectory, solve as solve
from .layer_parallel.export import ResidualStep as ResidualStep, to_sequential as to_sequential
from .layer_parallel.minibatch.checkpoint import (
    load_checkpoint as load_checkpoint,
    save_checkpoint as save_checkpoint,
)
from .layer_parallel.parallelize import parallelize as parallelize
from .layer_parallel.rates import (
    GradScaler as GradScaler,
    layer_lr as layer_lr,
    layer_views as layer_views,
    param_groups as param_groups,
)
from .layer_parallel.refine import refine_depth as refine_depth
from .layer_parallel.replace import replace_modules as replace_modules
from .layer_parallel.sequence import (
    ParallelGRU as ParallelGRU,
    ParallelLSTM as ParallelLSTM,
    SequenceRecord as SequenceRecord,
)
from .layers.checking import PropagatorReport as PropagatorReport, check_propagator as check_propagator
from .layers.dense import DenseBlock as DenseBlock, DenseLayer as DenseLayer, ResidualSteps as ResidualSteps
from .layers.image_resnet import ImageResNet as ImageResNet
from .layers.pixels import SpatialCoarsening as SpatialCoarsening
from .layers.splines import Splines as Splines
from .layers.steps import (
    error_norms as error_norms,
    local_errors as local_errors,
    output_error as output_error,
)
from .layers.time_steps import TimeStepper as TimeStepper
from .mgrit import (
    Adjoint as Adjoint,
    Forward as Forward,
    Hierarchy as Hierarchy,
    LayerGrid as LayerGrid,
    MGRIT as MGRIT,
    Propagator as Propagator,
    Solution as Solution,
    Solver as Solver,
)
from .multilevel import (
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
from .multilevel.depth.cycle import DepthCycle as DepthCycle
from .multilevel.resnet.refinement import refine as refine
from .optim import (
    Armijo as Armijo,
    OneShot as OneShot,
    OneShotOptions as OneShotOptions,
    QuasiNewton as QuasiNewton,
)
from .optim.objective import Evaluation as Evaluation, Objective as Objective
from .planner.stacks import Advice as Advice, advise as advise
from .problem.network import DenseResNet as DenseResNet
from .problem.objective import NetworkObjective as NetworkObjective
from .problem.options import DenseResNetOptions as DenseResNetOptions, InitialScales as InitialScales
from .problem.problem import Problem as Problem
from .problem.regularization import Regularization as Regularization
from .run.signals import Stopped as Stopped
from .run.store.read import CheckpointError as CheckpointError

__version__: str

def keep_freed_memory() -> bool: ...
