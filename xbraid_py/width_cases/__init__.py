"""The regression problems that multilevel training in width is tried on, and the runs of its study."""

from xbraid_py.width_cases.case import Case, train
from xbraid_py.width_cases.follow import Following, follow
from xbraid_py.width_cases.job import Job, cycles_of
from xbraid_py.width_cases.networks import WidthNetwork
from xbraid_py.width_cases.parts import FIXED, TUNED, Bases, competitors
from xbraid_py.width_cases.run_options import WidthRunOptions, set_up
from xbraid_py.width_cases.samples import SampleSource

__all__ = [
    "FIXED",
    "TUNED",
    "Bases",
    "Case",
    "Following",
    "Job",
    "SampleSource",
    "WidthNetwork",
    "WidthRunOptions",
    "competitors",
    "cycles_of",
    "follow",
    "set_up",
    "train",
]
