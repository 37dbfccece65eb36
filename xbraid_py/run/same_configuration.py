"""Whether a checkpoint was written with the options of the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xbraid_py.run.store.read import CheckpointError


def check_configuration(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    free: tuple[str, ...],
    also: Mapping[str, str] | None = None,
) -> None:
    """Raise an error that names the first option in which two runs differ.

    Parameters
    ----------
    path : Path
        The checkpoint, for the message.
    theirs, ours : mapping
        JSON-able; groups of options are mappings in them.
    free : tuple of str
        Names of options, or groups of them, that may differ.
    also : mapping of str to str, optional
        What may be given instead of the same value, by the name of the option.

    Raises
    ------
    CheckpointError
    """
    theirs, ours = flat(theirs), flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if name.split(".")[0] not in free and theirs.get(name) != ours.get(name):
            other = f", or {also[name]}" if also and name in also else ""
            raise CheckpointError(
                f"{path} was written with {name}={theirs.get(name)}, but this run has {name}={ours.get(name)}; "
                f"give --{name} {theirs.get(name)}{other}, or start without --resume"
            )


def flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options of all groups under names such as "mgrit.cfactor"."""
    found: dict[str, Any] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
