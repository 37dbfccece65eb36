"""What every run is told, and which options may differ between a run and its continuation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


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
    patience
        Seconds that a rank waits for others, before it says where all of them are, and ends the job.
    """

    out: Path = free(Path("runs/run"))
    resume: str | None = free(None)
    record_every: int = free(1)
    checkpoint_every: int = free(20)
    checkpoint_best: bool = free(False)
    keep: int = free(3)
    tensorboard: bool = free(False)
    patience: float = free(300.0)

    def __post_init__(self):
        self.require_least(5, record_every=1, checkpoint_every=1, keep=1)
        self.require_least(300, patience=1)

    def require_least(self, good: int, **least: int) -> None:
        """Raise `ValueError` for an option, if it is given, that is less than this; `good` is a value that works."""
        for name, bound in least.items():
            if getattr(self, name) is not None and getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}; use {good}")

    def require_most(self, good: int, **most: int) -> None:
        """Raise `ValueError` for an option, if it is given, that is more than this; `good` is a value that works."""
        for name, bound in most.items():
            if getattr(self, name) is not None and getattr(self, name) > bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {bound}; use {good}")

    @property
    def free(self) -> set[str]:
        """Names of the options, or groups of them, that may differ between a run and its continuation."""
        return {each.name for each in fields(self) if each.metadata.get("free")}

    @property
    def instead(self) -> dict[str, str]:
        """What may be given instead of the same value, by the name of the option."""
        return {each.name: each.metadata["instead"] for each in fields(self) if "instead" in each.metadata}
