"""What a job of several runs leaves beside their folders: the table and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from studies.multi_level.case import Case
from studies.multi_level.tables import CURVE, result_of
from xbraid_py.comm import Communicator
from xbraid_py.comm.errors import RunError
from xbraid_py.recipes.images_checkpoint import NAME
from xbraid_py.run.folder import METRICS
from xbraid_py.run.record import read


def folder_of(case: Case, out: Path) -> Path:
    """Where a run of a job is: below its folder, or there if that is the run's own, as `xbraid-py resume` gives it."""
    name = f"{case.model}_{case.seed}"
    return out if out.name == name else out / name


def write_outcome(cases: Sequence[Case], out: Path, comm: Communicator) -> None:
    """Write `tables.md` (tables 3 and 4) and `figure6.png` of finished runs, and print the table; collective.

    Raises
    ------
    RunError
        On all ranks, if a record cannot be read or a file not be written.
    """
    problem = None
    if comm.rank == 0:
        # matplotlib takes its time to load: on one rank only
        from studies.multi_level import curves as multi_level_curves
        from studies.multi_level import tables as multi_level_tables

        try:
            rows = [{"settings": asdict(case), "result": read_result(folder_of(case, out))} for case in cases]
            text = multi_level_tables.page(rows)
            (out / "tables.md").write_text(text, encoding="utf-8")
            multi_level_curves.figure6(rows, out / "figure6.png")
        except (OSError, ValueError) as error:
            problem = f"the table in {out} could not be made: {error}; start again with --resume auto"
        else:
            print(text, flush=True)
    problem = comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def read_result(out: Path) -> dict:
    """The result of a finished run from its record, see `result_of`.

    Raises
    ------
    OSError, ValueError
        If the record cannot be read, or holds no epoch.
    """
    rows = [row for row in read(out / METRICS) if row.get("kind") == "update" and row.get("run") == NAME]
    if not rows:
        raise ValueError(f"the record {out / METRICS} holds no epoch; give the folder of a run")
    return result_of([{name: row[name] for name in CURVE} for row in rows])
