"""TO BE DELETED: checkpoints of training runs: a snapshot of nested iteration as global arrays, and back on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.nested_state import (
    Snapshot,
    _read_snapshot,
)
from xbraid_py.run.resume import check_configuration
from xbraid_py.run.store.read import no_state, restoring
from xbraid_py.run.store.write import Checkpoint, CheckpointError, load, newest_good


def checkpoint_folder(out: Path, name: str) -> Path:
    """Where the checkpoints of a run of a job are: `checkpoints`, and folders in it for runs of comparison."""
    return out / "checkpoints" if name == "nested" else out / "checkpoints" / name


def read_resumed(
    resume: str | None,
    out: Path,
    runs: Mapping[str, NestedIteration],
    configuration: Mapping,
    free: tuple[str, ...],
    convert_dtype: bool = False,
) -> dict[str, Snapshot]:
    """What the option `--resume` asks for; sends no message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one of the out folder, if there is any.
    out : Path
    runs : mapping of str to NestedIteration
        The runs of the job, in their order.
    configuration : mapping
        Of this job, JSON-able.
    free : tuple of str
        Names of options that may differ from those of the checkpoint.
    convert_dtype : bool
        Go on from a checkpoint of the other floating-point type, whose numbers are converted.

    Returns
    -------
    dict of str to Snapshot
        Where to go on, by the name of the run: the ends of runs that are over, and then perhaps a run under way.

    Raises
    ------
    CheckpointError
        If a file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    snapshots: dict[str, Snapshot] = {}
    free = (*free, "dtype") if convert_dtype else free
    if resume is None:
        return snapshots
    given = None
    if resume != "auto":
        given = _read_meta(Path(resume), configuration, free)["run"]
        if given not in runs:
            raise CheckpointError(f"{resume} belongs to the {given} run, which this job has not; give --compare")
    for name, run in runs.items():
        path = Path(resume) if name == given else newest_good(checkpoint_folder(out, name))
        if path is not None:
            if name != given:
                _read_meta(path, configuration, free)
            snapshots[name] = _read_snapshot(path, run, convert_dtype)
        if name == given or name not in snapshots or not snapshots[name].is_final:
            break
    if given is not None and given not in snapshots:
        raise CheckpointError(f"{resume} follows a run whose end is not in {out}; give the --out folder of both")
    return snapshots


def resumed_configuration(resume: str | None, out: Path) -> dict | None:
    """The configuration of the job that `--resume` goes on with; None if there is nothing to go on from."""
    path = newest_good(checkpoint_folder(out, "nested")) if resume in ("auto", None) else Path(resume)
    if resume is None or path is None:
        return None
    with load(path) as checkpoint:
        found = checkpoint.meta.get("configuration")
    if not isinstance(found, dict | None):
        raise no_state(path)
    return found


def _read_meta(path: Path, configuration: Mapping, free: tuple[str, ...]) -> dict:
    """Meta data of a checkpoint, once its configuration is known to be that of this job."""
    with load(path) as checkpoint:
        meta = checkpoint.meta
    if not {"run", "update", "snapshot", "configuration"} <= meta.keys():
        raise no_state(path)
    if not (isinstance(meta["run"], str) and isinstance(meta["configuration"], dict)):
        raise no_state(path)
    also = {"dtype": "--convert_dtype"}
    check_configuration(path, meta["configuration"], configuration, free, also)
    return meta


@contextmanager
def resumed(
    resume: str | None, out: Path, name: str, configuration: Mapping, free: tuple[str, ...]
) -> Iterator[Checkpoint | None]:
    """The open checkpoint that the option `--resume` asks for, if it is of a run of this name and configuration."""
    path = newest_good(checkpoint_folder(out, name)) if resume in ("auto", None) else Path(resume)
    if resume is None or path is None:
        yield None
        return
    with load(path) as checkpoint, restoring(path):
        if checkpoint.meta.get("run") != name:
            raise no_state(path, f"its run is {checkpoint.meta.get('run')!r}, not {name}")
        check_configuration(path, checkpoint.meta["configuration"], configuration, free)
        yield checkpoint
