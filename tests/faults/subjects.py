"""The jobs that are disturbed: one of each kind of run, some seconds long, with a checkpoint every few updates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cifar_files import write_cifar10
from processes import PROJECT

# Numbers of ranks and the rank that is hit, so that each is hit in turn.
ANY_RANKS = ((2, 0), (3, 1), (4, 3), (2, 1), (3, 0), (4, 2), (3, 2), (1, 0), (4, 1), (4, 0))
TWO_RANKS = ((2, 0), (2, 1))


@dataclass(frozen=True)
class Subject:
    """A job that is disturbed.

    Parameters
    ----------
    name : str
        Of the driver.
    words : tuple of str
        Its options.
    every : int
        Updates between two checkpoints.
    hits : tuple of (int, int)
        Numbers of ranks on which it has the same bits, and the rank that is hit.
    folder : str
        Name of the run's folder, where it has to have one.
    """

    name: str
    words: tuple[str, ...]
    every: int = 5
    hits: tuple[tuple[int, int], ...] = ANY_RANKS
    folder: str = ""

    @property
    def driver(self) -> Path:
        """The program."""
        return PROJECT / "drivers" / f"{self.name}.py"


def subjects(scratch: Path) -> dict[str, Subject]:
    """All of them, by kind; the files that they read are made in a folder."""
    scratch.mkdir(exist_ok=True)
    write_cifar10(scratch)
    found = {
        "nested": Subject(
            "peaks",
            (
                *("--num_layers=32", "--num_train=500", "--num_val=500", "--nested.refinements=1"),
                *("--nested.updates=60,60", "--validate_every=5"),
            ),
        ),
        "mgopt": Subject(
            "circles",
            ("--num_layers=512", "--num_train=1000", "--mgopt.levels=4", "--max_cycles=60", "--sampling=square"),
        ),
        "width": Subject("poisson", ("--smoke", "--max_work=1400", "--num_train=400", "--batch_size=40"), 5, TWO_RANKS),
        "images": Subject(
            "cifar",
            (
                *("--models=multilevel", "--filters=4,8", "--blocks=1,2", "--epochs=12,8,8", "--batch_size=25"),
                f"--data_dir={scratch}",
            ),
            2,
            TWO_RANKS,
            "multilevel_0",
        ),
        "text": Subject("transformer", ("--smoke", "--updates=60", "--exact=true"), 5, TWO_RANKS),
    }
    every = {kind: f"--checkpoint_every={subject.every}" for kind, subject in found.items()}
    return {
        kind: Subject(subject.name, (*subject.words, every[kind]), subject.every, subject.hits, subject.folder)
        for kind, subject in found.items()
    }
