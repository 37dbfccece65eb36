"""Pictures of runs, drawn from their records, and maps of classes."""

from xbraid_py.recipes.pictures.curves import accuracy_over_work, convergence, wall_work_units
from xbraid_py.recipes.pictures.style import class_map, scene_map

__all__ = ["accuracy_over_work", "class_map", "convergence", "scene_map", "wall_work_units"]
