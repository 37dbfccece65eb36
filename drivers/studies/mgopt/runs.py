"""How a run of the study of MG/OPT in depth is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.mgopt.case import options_of
from studies.mgopt.rows import CURVE
from xbraid_py.comm import as_communicator
from xbraid_py.recipes.mgopt import training_of
from xbraid_py.run.engine import rows_of


def train(settings: Mapping[str, Any]) -> dict:
    """Make one of `runs` on one rank, in memory.

    Returns
    -------
    dict
        "reached", whether its goal is; `CURVE` at the end; and a "curve" of lists of them for each validation.

    Raises
    ------
    RunError
        If the objective is not finite.
    """
    training = training_of(options_of(settings), as_communicator(None))
    rows = [row for row in rows_of(training) if "val_accuracy" in row]
    curve = [[row["cycle"], *(round(row[name], 5) for name in CURVE[1:])] for row in rows]
    return {"reached": training.has_reached(rows[-1]), **dict(zip(CURVE, curve[-1], strict=True)), "curve": curve}
