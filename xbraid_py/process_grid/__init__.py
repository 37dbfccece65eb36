"""Data-parallel times layer-parallel: a grid of ranks, and a batch on all of them."""

from xbraid_py.process_grid.grid import ProcessGrid
from xbraid_py.process_grid.share import share

__all__ = ["ProcessGrid", "share"]
