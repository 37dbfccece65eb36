"""Data sets, one file each; all of them end up as a `Dataset`."""

from xbraid_py.data import peaks
from xbraid_py.data.dataset import Dataset

__all__ = ["Dataset", "peaks"]
