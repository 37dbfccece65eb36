"""Networks of several depths: transfers between them, and nested iteration."""

from xbraid_py.multilevel.nested import NestedIteration, NestedOptions
from xbraid_py.multilevel.record import Record, Snapshot
from xbraid_py.multilevel.transfer import prolong_depth

__all__ = ["NestedIteration", "NestedOptions", "Record", "Snapshot", "prolong_depth"]
