"""What tests of adaptive depth share: options, grids, and nested iteration that cuts chosen layers."""

from __future__ import annotations

from dataclasses import replace

from small_runs import MIXED, ONE_SHOT, SEQUENTIAL, nested

from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.options import AdaptiveOptions
from xbraid_py.problem.options import InitialScales

SCALES = InitialScales(1.0, 1.0, 1.0)
# Both solves to the end, so that the indicators do not depend on how they are made.
CONVERGED = replace(MIXED, max_iter=12, tol=1e-14)
HALF = AdaptiveOptions(indicator="goal", marking="share", fraction=0.5)
CYCLES = {"V": MIXED, "lagged": ONE_SHOT, "sequential": SEQUENTIAL, "intervals": MGRIT(intervals=4)}
UNEVEN = LayerGrid.of_lengths([1, 1, 2, 4] * 4, 2.0)


def adaptive_run(comm, updates, options=HALF, mgrit=MIXED, num_layers=64, **others):
    """As `small_runs.nested`, with chosen layers cut."""
    run = nested(comm, updates, mgrit, num_layers, **others)
    chosen = replace(run.options, adaptive=options)
    how = {"options": chosen, "one_shot": run.one_shot_options, "scales": run.scales, "seed": run.seed}
    return type(run)(run.problem, num_layers, **how)
