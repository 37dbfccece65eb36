"""Networks of several depths or widths: transfers, nested iteration, multi-level ResNets, MG/OPT, FAS in width."""

from xbraid_py.multilevel.depth.adaptive import AdaptiveOptions
from xbraid_py.multilevel.depth.mgopt import CycleRecord, LevelOptions, MGOpt, MGOptOptions
from xbraid_py.multilevel.depth.nested import NestedIteration, NestedOptions, Record
from xbraid_py.multilevel.depth.state import Snapshot
from xbraid_py.multilevel.depth.transfer import DepthTransfer, prolong_depth
from xbraid_py.multilevel.resnet.refinement import CosineCycles, refine
from xbraid_py.multilevel.resnet.training import EpochRecord, ResNetTraining, ResNetTrainingOptions
from xbraid_py.multilevel.stochastic import Minibatches, StochasticCycle
from xbraid_py.multilevel.vcycle import ComposedTransfer, Damping, Schedule, Transfer, VCycle
from xbraid_py.multilevel.width.matching import StateWidthTransfer
from xbraid_py.multilevel.width.training import WidthRecord, WidthTraining, WidthTrainingOptions
from xbraid_py.multilevel.width.transfer import WidthLayout, WidthOptions, WidthTransfer

__all__ = [
    "AdaptiveOptions",
    "ComposedTransfer",
    "CosineCycles",
    "CycleRecord",
    "Damping",
    "DepthTransfer",
    "EpochRecord",
    "WidthLayout",
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
