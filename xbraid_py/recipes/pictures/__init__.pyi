from .curves import (
    accuracy_over_work as accuracy_over_work,
    convergence as convergence,
    wall_work_units as wall_work_units,
)
from .style import class_map as class_map, scene_map as scene_map
