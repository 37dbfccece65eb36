"""How a run of the study of multi-level residual networks is made."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from studies.multi_level.case import Case
from studies.multi_level.outcome import read_result
from studies.multi_level.tables import result_of
from studies.study import key
from xbraid_py.comm import as_communicator
from xbraid_py.recipes.images import prepare, training_of
from xbraid_py.recipes.options.images import ImageRunOptions, MultiLevelOptions
from xbraid_py.run.engine import rows_of
from xbraid_py.run.options import from_dict

CIFAR = Path(__file__).parents[2] / "cifar.py"  # goes on with a run by its options


def train(settings: Mapping[str, Any], folder: Path | None = None, checkpoint_every: int = 0) -> dict:
    """Run a `Case`, given as a mapping.

    Parameters
    ----------
    settings : mapping
    folder : Path, optional
        Where the run has a folder of its own, named by its settings.
    checkpoint_every : int
        Epochs between two checkpoints there, from the last of which the run goes on; with 0 it is made in memory.

    Returns
    -------
    dict
        See `result_of`.

    Raises
    ------
    RunError
        If the loss is not finite.
    """
    case = from_dict(Case, settings)
    if folder is None or not checkpoint_every:
        return result_of(list(rows_of(training_of(case, case.model, case.seed, case.samples()))))
    options = {each.name: getattr(case, each.name) for each in fields(MultiLevelOptions)}
    options |= {"models": (case.model,), "seeds": (case.seed,), "resume": "auto", "keep": 1}
    out = folder / sha256(key(settings).encode()).hexdigest()[:12]
    (run,) = ImageRunOptions(**options, checkpoint_every=checkpoint_every, out=out).runs
    out.mkdir(parents=True, exist_ok=True)
    with (out / "screen.txt").open("a", encoding="utf-8") as screen, redirect_stdout(screen):
        prepare(run, run.samples(), as_communicator(None), driver=CIFAR)()
    return read_result(run.out)
