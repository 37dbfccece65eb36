from .depth.adaptive import AdaptiveOptions as AdaptiveOptions
from .depth.mgopt import (
    CycleRecord as CycleRecord,
    LevelOptions as LevelOptions,
    MGOpt as MGOpt,
    MGOptOptions as MGOptOptions,
)
from .depth.nested import NestedIteration as NestedIteration, NestedOptions as NestedOptions, Record as Record
from .depth.state import Snapshot as Snapshot
from .depth.transfer import DepthTransfer as DepthTransfer, prolong_depth as prolong_depth
from .resnet.refinement import CosineCycles as CosineCycles, refine as refine
from .resnet.training import (
    EpochRecord as EpochRecord,
    ResNetTraining as ResNetTraining,
    ResNetTrainingOptions as ResNetTrainingOptions,
)
from .stochastic import Minibatches as Minibatches, StochasticCycle as StochasticCycle
from .vcycle import (
    ComposedTransfer as ComposedTransfer,
    Damping as Damping,
    Schedule as Schedule,
    Transfer as Transfer,
    VCycle as VCycle,
)
from .width.matching import StateWidthTransfer as StateWidthTransfer
from .width.training import (
    WidthRecord as WidthRecord,
    WidthTraining as WidthTraining,
    WidthTrainingOptions as WidthTrainingOptions,
)
from .width.transfer import WidthLayout as WidthLayout, WidthOptions as WidthOptions, WidthTransfer as WidthTransfer
