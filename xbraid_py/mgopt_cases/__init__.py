"""The problems that MG/OPT in depth is tried on, circles, MNIST and peaks, and the runs of its study."""

from xbraid_py.mgopt_cases.case import Case, train
from xbraid_py.mgopt_cases.follow import Following, follow
from xbraid_py.mgopt_cases.job import Job, MnistSamples, perceptron_problem
from xbraid_py.mgopt_cases.parts import METHOD_PARTS, METHODS, PARTS, Bases, competitors

__all__ = [
    "METHODS",
    "METHOD_PARTS",
    "PARTS",
    "Bases",
    "Case",
    "Following",
    "Job",
    "MnistSamples",
    "competitors",
    "follow",
    "perceptron_problem",
    "train",
]
