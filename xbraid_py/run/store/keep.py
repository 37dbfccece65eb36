"""The checkpoints of a run in their folder: the newest few good ones, and the best of all."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run.store.files import publish
from xbraid_py.run.store.read import BEST, CheckpointError, file_name, load, newest_good, numbered, verify
from xbraid_py.run.store.write import Shard, save

log = logging.getLogger(__name__)

SCORE = "score"  # where the meta data of a file say how good it is


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a run was at a checkpoint.

    Parameters
    ----------
    accuracy : float, optional
        On the validation data: the larger, the better. It counts more than the objective.
    objective : float, optional
        The smaller, the better; compared where neither was validated.
    """

    accuracy: float | None = None
    objective: float | None = None

    def beats(self, other: Score) -> bool:
        """Whether this is better than another; of two equal ones neither beats the other."""
        for name, sign in (("accuracy", 1.0), ("objective", -1.0)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours is not None and (theirs is None or ours != theirs):
                return theirs is None or sign * ours > sign * theirs
            if theirs is not None and ours is None:
                return False
        return False


class CheckpointStore:
    """Writes the checkpoints of one run, and removes old ones once a new one is safely there.

    `update_000040.h5` and the like are the newest `keep` good files; damaged ones do not count. `best.h5` is the one
    with the best score, a second name of its file or, where the file system has no such thing, a copy.

    Parameters
    ----------
    folder : path-like
        Nobody else writes there.
    keep : int
        Number of files that stay.

    Raises
    ------
    ValueError
        If `keep` is less than 1.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1; use 3")
        self.folder, self.keep = Path(folder), keep
        self._good: dict[str, tuple[int, int]] = {}
        self._best: tuple[tuple[int, int], Score] | None = None

    def save(
        self,
        comm: Communicator,
        update: int,
        shards: Mapping[str, Shard],
        meta: Mapping,
        score: Score | None = None,
    ) -> Path:
        """Write a checkpoint, see `xbraid_py.run.store.write.save`; collective.

        Parameters
        ----------
        comm : Communicator
        update : int
            Number in the file's name.
        shards : mapping of str to Shard
        meta : mapping
            JSON-able; "score" is taken.
        score : Score, optional
            How good the run is; without one the file is never the best.

        Returns
        -------
        Path

        Raises
        ------
        RunError
            On all ranks, if the file cannot be written; the earlier ones are all there.
        """
        path = self.folder / file_name(update)
        score = score or Score()
        try:
            save(path, comm, shards, {**meta, SCORE: asdict(score)})
        except OSError as error:
            raise RunError(
                f"the checkpoint {path} could not be written: {error}; make room, or give another --out"
            ) from error
        if comm.rank == 0:
            # The new one is there: what goes wrong from here on loses nothing, so it is only said.
            with _only_said("not all old checkpoints in %s are removed", self.folder):
                self._good[path.name] = _identity(path)
                if score.beats(self.best_score()):
                    self._make_best(path)
                    self._best = _identity(self.best), score
                self._prune()
        return path

    def newest_good(self) -> Path | None:
        """The newest good checkpoint, see `xbraid_py.run.store.write.newest_good`."""
        return newest_good(self.folder)

    @property
    def best(self) -> Path:
        """Where the best one is, if there is one."""
        return self.folder / BEST

    def best_score(self) -> Score:
        """Score of the best checkpoint; an empty one if there is no good one."""
        if not self.best.exists():
            return Score()
        found = _identity(self.best)
        if self._best is None or self._best[0] != found:
            try:
                verify(self.best)
                self._best = found, score_of(self.best)
            except CheckpointError as error:
                log.warning("the best checkpoint is damaged: %s", error.reason)
                return Score()
        return self._best[1]

    def _make_best(self, path: Path) -> None:
        temporary = self.best.with_name(f"{BEST}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
            publish(temporary, self.best)
        finally:
            temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        good = 0
        for _, path in numbered(self.folder):
            if good == self.keep:
                path.unlink(missing_ok=True)
                self._good.pop(path.name, None)
            else:
                good += self._is_good(path)

    def _is_good(self, path: Path) -> bool:
        # What this has written itself, or read once, is read again only if it has changed since.
        with contextlib.suppress(FileNotFoundError):
            if self._good.get(path.name) == _identity(path):
                return True
            try:
                verify(path)
            except CheckpointError:
                return False
            self._good[path.name] = _identity(path)
            return True
        return False


def score_of(path: str | os.PathLike) -> Score:
    """How good the run was at a checkpoint, as far as the file says.

    Raises
    ------
    CheckpointError
        If the file is damaged.
    """
    with load(path) as checkpoint:
        said = checkpoint.meta.get(SCORE)
    said = said if isinstance(said, dict) else {}
    numbers = {name: said.get(name) for name in ("accuracy", "objective")}
    return Score(**{name: value for name, value in numbers.items() if isinstance(value, float | int)})


def clear_rest(folder: Path) -> None:
    """Remove what a writer that was killed has left half written; one rank, while no run writes there."""
    for path in folder.glob("*.h5.tmp") if folder.is_dir() else ():
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _only_said(text: str, folder: Path):
    try:
        yield
    except OSError as error:
        log.warning(f"{text}: %s", folder, error)
