"""Image sets that multi-level training of residual networks is tried on, and the runs of its study."""

from xbraid_py.image_cases.case import Case, train
from xbraid_py.image_cases.follow import Following, follow, read_result
from xbraid_py.image_cases.outcome import folder_of, write_outcome
from xbraid_py.image_cases.run_options import ImageOptions
from xbraid_py.image_cases.samples import Samples, load_samples

__all__ = [
    "Case",
    "Following",
    "ImageOptions",
    "Samples",
    "folder_of",
    "follow",
    "load_samples",
    "read_result",
    "train",
    "write_outcome",
]
