"""Networks of several depths or widths: transfers, nested iteration, multi-level ResNets, MG/OPT, FAS in width."""

from xbraid_py.multilevel.adaptive import AdaptiveOptions
from xbraid_py.multilevel.cosine_cycles import CosineCycles
from xbraid_py.multilevel.depth import DepthTransfer
from xbraid_py.multilevel.mgopt import CycleRecord, MGOpt
from xbraid_py.multilevel.mgopt_options import LevelOptions, MGOptOptions
from xbraid_py.multilevel.nested import NestedIteration, NestedOptions
from xbraid_py.multilevel.record import Record, Snapshot
from xbraid_py.multilevel.resnet_refinement import refine
from xbraid_py.multilevel.resnet_training import ResNetTraining
from xbraid_py.multilevel.resnet_training_options import EpochRecord, ResNetTrainingOptions
from xbraid_py.multilevel.schedule import Schedule
from xbraid_py.multilevel.state_width import ComposedTransfer, StateWidthTransfer
from xbraid_py.multilevel.stochastic import Minibatches, StochasticCycle
from xbraid_py.multilevel.transfer import prolong_depth
from xbraid_py.multilevel.vcycle import Damping, Transfer, VCycle
from xbraid_py.multilevel.width import WidthOptions, WidthTransfer
from xbraid_py.multilevel.width_layout import Layout
from xbraid_py.multilevel.width_training import WidthRecord, WidthTraining
from xbraid_py.multilevel.width_training_options import WidthTrainingOptions

__all__ = [
    "AdaptiveOptions",
    "ComposedTransfer",
    "CosineCycles",
    "CycleRecord",
    "Damping",
    "DepthTransfer",
    "EpochRecord",
    "Layout",
    "LevelOptions",
    "MGOpt",
    "MGOptOptions",
    "Minibatches",
    "NestedIteration",
    "NestedOptions",
    "Record",
    "ResNetTraining",
    "ResNetTrainingOptions",
    "Schedule",
    "Snapshot",
    "StateWidthTransfer",
    "StochasticCycle",
    "Transfer",
    "VCycle",
    "WidthOptions",
    "WidthRecord",
    "WidthTraining",
    "WidthTrainingOptions",
    "WidthTransfer",
    "prolong_depth",
    "refine",
]
