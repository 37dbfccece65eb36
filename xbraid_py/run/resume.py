"""What every run is told, where it goes on, and which options may then be others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from xbraid_py.run.folder import CHECKPOINTS
from xbraid_py.run.options import flat, to_dict
from xbraid_py.run.store.read import Checkpoint, CheckpointError, load, newest_good, no_state


def free(default: Any) -> Any:
    """A field of options that may differ between a run and its continuation: where things are, how often it looks."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every run is told.

    Parameters
    ----------
    out
        Folder of the record, the checkpoints and the pictures.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one).
    record_every
        Updates between two rows of the record; the first, the last and those with a validation or an event are there
        in any case.
    checkpoint_every
        Updates between two checkpoints.
    checkpoint_best
        Write one whenever a validation is the best so far as well.
    keep
        Newest checkpoints to keep, besides the best.
    tensorboard
        Write event files for TensorBoard as well, into the folder tensorboard of the out folder.
    """

    out: Path = free(Path("runs/run"))
    resume: str | None = free(None)
    record_every: int = free(1)
    checkpoint_every: int = free(20)
    checkpoint_best: bool = free(False)
    keep: int = free(3)
    tensorboard: bool = free(False)

    def __post_init__(self):
        for name in ("record_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")

    @property
    def free(self) -> set[str]:
        """Names of the options, or groups of them, that may differ between a run and its continuation."""
        return {each.name for each in fields(self) if each.metadata.get("free")}

    @property
    def instead(self) -> dict[str, str]:
        """What may be given instead of the same value, by the name of the option."""
        return {each.name: each.metadata["instead"] for each in fields(self) if "instead" in each.metadata}


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes
    ----------
    path : Path
        The checkpoint.
    row : dict
        The last row of the record that is made already.
    """

    path: Path
    row: dict[str, Any]

    @property
    def update(self) -> int:
        """Updates made."""
        return self.row["update"]


def find_start(kind: str, options: RunOptions) -> Start | None:
    """What the option `--resume` asks for; None if there is nothing to go on from. No message.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of other options.
    """
    path = checkpoint_of(options.resume, options.out)
    if path is None:
        return None
    with load(path) as checkpoint:
        meta = state_of(checkpoint)
    if meta["run"] != kind:
        raise no_state(path, f"its run is {meta['run']!r}, not {kind}")
    check_configuration(path, meta["configuration"], to_dict(options), options.free, options.instead)
    return Start(path, meta["row"])


def checkpoint_of(resume: str | None, out: Path) -> Path | None:
    """The file that `--resume` names, or the newest good one of an out folder; None without either."""
    if resume is None:
        return None
    return newest_good(out / CHECKPOINTS) if resume == "auto" else Path(resume)


def state_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Meta data of a checkpoint that the engine has written.

    Raises
    ------
    CheckpointError
        If it is a file of something else.
    """
    meta, kinds = checkpoint.meta, {"run": str, "update": int, "row": dict, "state": dict, "configuration": dict}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise no_state(checkpoint.path, f"no {name}" if name not in meta else f"{name}={meta[name]!r}")
    update, final = meta["row"].get("update"), meta["row"].get("final")
    if type(update) is not int or update < 0 or update != meta["update"] or not isinstance(final, bool):
        raise no_state(checkpoint.path, f"update={update!r}, final={final!r}")
    return meta


def resumed_configuration(options: RunOptions) -> dict | None:
    """The configuration of the run that `--resume` goes on with; None if there is nothing to go on from."""
    path = checkpoint_of(options.resume, options.out)
    if path is None:
        return None
    with load(path) as checkpoint:
        return dict(state_of(checkpoint)["configuration"])


def check_configuration(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    free: set[str],
    instead: Mapping[str, str] | None = None,
) -> None:
    """Raise an error that names the first option in which two runs differ.

    Parameters
    ----------
    path : Path
        The checkpoint, for the message.
    theirs, ours : mapping
        JSON-able; groups of options are mappings in them.
    free : set of str
        Names of options, or groups of them, that may differ.
    instead : mapping of str to str, optional
        What may be given instead of the same value, by the name of the option.

    Raises
    ------
    CheckpointError
    """
    theirs, ours = flat(theirs), flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if name.split(".")[0] not in free and theirs.get(name) != ours.get(name):
            other = f", or {instead[name]}" if instead and name in instead else ""
            raise CheckpointError(
                f"{path} was written with {name}={theirs.get(name)}, but this run has {name}={ours.get(name)}; "
                f"give --{name} {theirs.get(name)}{other}, or start without --resume"
            )
