from .depth.mgopt import (
    CycleRecord as CycleRecord,
    MGOpt as MGOpt,
)
from .depth.nested import NestedIteration as NestedIteration, Record as Record
from .depth.options import AdaptiveOptions as AdaptiveOptions, LevelOptions as LevelOptions
from .depth.options import MGOptOptions as MGOptOptions, NestedOptions as NestedOptions
from .depth.state import Snapshot as Snapshot
from .depth.transfer import DepthTransfer as DepthTransfer, prolong_depth as prolong_depth
from .resnet.options import CosineCycles as CosineCycles, ResNetTrainingOptions as ResNetTrainingOptions
from .resnet.refinement import refine as refine
from .resnet.training import (
    EpochRecord as EpochRecord,
    ResNetTraining as ResNetTraining,
)
from .schedule import Schedule as Schedule
from .stochastic import Minibatches as Minibatches, StochasticCycle as StochasticCycle
from .vcycle import (
    ComposedTransfer as ComposedTransfer,
    Damping as Damping,
    Transfer as Transfer,
    VCycle as VCycle,
)
from .width.matching import StateWidthTransfer as StateWidthTransfer
from .width.options import WidthOptions as WidthOptions, WidthTrainingOptions as WidthTrainingOptions
from .width.training import (
    WidthRecord as WidthRecord,
    WidthTraining as WidthTraining,
)
from .width.transfer import WidthLayout as WidthLayout, WidthTransfer as WidthTransfer
