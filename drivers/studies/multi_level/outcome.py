"""What a job of several runs leaves beside their folders: the table and the picture."""

from __future__ import annotations

from pathlib import Path

from studies.multi_level.tables import result_of
from studies.study import settings_of
from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.recipes.options.images import KIND, ImageRunOptions
from xbraid_py.run.folder import METRICS
from xbraid_py.run.record import read


def write_outcome(options: ImageRunOptions, comm: Communicator) -> None:
    """Write `tables.md` (tables 3 and 4) and `figure6.png` of finished runs, and print the table; collective.

    Nothing is written for a run that goes on alone in its own folder: this belongs beside the folders of runs.

    Raises
    ------
    RunError
        On all ranks, if a record cannot be read or a file not be written.
    """
    problem, out = None, options.out
    if comm.rank == 0:
        # matplotlib takes its time to load: on one rank only
        from studies.multi_level import curves as multi_level_curves
        from studies.multi_level import tables as multi_level_tables

        try:
            rows = [row_of(one) for one in options.runs]
            text = multi_level_tables.page(rows)
            if options.runs[0].out != out:
                (out / "tables.md").write_text(text, encoding="utf-8")
                multi_level_curves.figure6(rows, out / "figure6.png")
        except (OSError, ValueError) as error:
            problem = f"the table in {out} could not be made: {error}; start again with --resume auto"
        else:
            print(text, flush=True)
    problem = comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def row_of(options: ImageRunOptions) -> dict:
    """A finished run alone from its record as a row of a study: its settings, and its result (see `result_of`).

    Raises
    ------
    OSError, ValueError
        If the record cannot be read, or holds no epoch.
    """
    settings = dict(settings_of(options))
    (settings["model"],), (settings["seed"],) = settings.pop("models"), settings.pop("seeds")
    return {"settings": settings, "result": read_result(options.out)}


def read_result(out: Path) -> dict:
    """The result of a finished run from its record, see `result_of`.

    Raises
    ------
    OSError, ValueError
        If the record cannot be read, or holds no epoch.
    """
    rows = [row for row in read(out / METRICS) if row.get("kind") == "update" and row.get("run") == KIND]
    if not rows:
        raise ValueError(f"the record {out / METRICS} holds no epoch; give the folder of a run")
    return result_of(rows)
