"""Pictures of runs, drawn from their records, and maps of classes."""

from xbraid_py.recipes.pictures.curves import accuracy_over_work, convergence
from xbraid_py.recipes.pictures.maps import class_map, scene_map
from xbraid_py.recipes.pictures.records import wall_work_units

__all__ = ["accuracy_over_work", "class_map", "convergence", "scene_map", "wall_work_units"]
