"""Networks of several depths: transfers between them, nested iteration, and multilevel minimisation (MG/OPT)."""

from xbraid_py.multilevel.depth import DepthTransfer
from xbraid_py.multilevel.mgopt import CycleRecord, MGOpt
from xbraid_py.multilevel.mgopt_options import LevelOptions, MGOptOptions
from xbraid_py.multilevel.nested import NestedIteration, NestedOptions
from xbraid_py.multilevel.record import Record, Snapshot
from xbraid_py.multilevel.schedule import Schedule
from xbraid_py.multilevel.transfer import prolong_depth
from xbraid_py.multilevel.vcycle import Transfer, VCycle

__all__ = [
    "CycleRecord",
    "DepthTransfer",
    "LevelOptions",
    "MGOpt",
    "MGOptOptions",
    "NestedIteration",
    "NestedOptions",
    "Record",
    "Schedule",
    "Snapshot",
    "Transfer",
    "VCycle",
    "prolong_depth",
]
