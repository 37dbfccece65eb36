"""The jobs that are disturbed: one of each kind of run, some seconds long, with a checkpoint every few updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cifar_files import write_cifar10
from digit_files import write_digits
from processes import PROJECT

# Numbers of ranks and the rank that is hit, so that each is hit in turn.
ANY_RANKS = ((2, 0), (3, 1), (4, 3), (2, 1), (3, 0), (4, 2), (3, 2), (1, 0), (4, 1), (4, 0))
TWO_RANKS = ((2, 0), (2, 1))
# A run is begun on any number of ranks, and the plan by rule may take another solver on more of them.
_SOLVER = "--mgrit.cycle=lagged"


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
    digits = _written(scratch)
    found = {
        "nested": Subject(
            "peaks",
            (
                *("--num_layers=32", "--num_train=500", "--num_val=500", "--nested.refinements=1"),
                *("--nested.updates=60,60", "--validate_every=5", _SOLVER),
            ),
        ),
        "mgopt": Subject(
            "circles",
            (
                *("--num_layers=512", "--num_train=1000", "--mgopt.levels=4", "--max_cycles=60", "--sampling=square"),
                _SOLVER,
            ),
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
        "digits": Subject("mnist", ("--smoke", "--max_updates=60", "--epochs=60", digits), 5, TWO_RANKS),
        "sequences": Subject("sequences", ("--smoke", "--max_updates=60", "--epochs=60", digits), 5, TWO_RANKS),
        "text": Subject("transformer", ("--smoke", "--updates=60", "--exact=true"), 5, TWO_RANKS),
    }
    return {kind: _with_interval(subject) for kind, subject in found.items()}


def soaked(scratch: Path) -> list[Subject]:
    """Longer jobs of four drivers, about a minute each."""
    scratch.mkdir(exist_ok=True)
    data = _written(scratch)
    peaks = ("--num_layers=32", "--num_train=500", "--num_val=500", "--nested.refinements=1", "--validate_every=50")
    circles = (
        "--num_layers=512",
        "--num_train=1000",
        "--mgopt.levels=4",
        "--sampling=square",
        "--goal=0.9999",
        _SOLVER,
    )
    digits = ("--smoke", "--max_updates=400", "--epochs=400", data)
    cifar = ("--models=multilevel", "--filters=4,8", "--blocks=1,2", "--batch_size=25", f"--data_dir={scratch}")
    found = (
        Subject("peaks", (*peaks, "--nested.updates=700,700", _SOLVER), 50),
        Subject("mnist", digits, 25, TWO_RANKS),
        Subject("circles", (*circles, "--max_cycles=400"), 25),
        Subject("cifar", (*cifar, "--epochs=60,40,40"), 10, TWO_RANKS, "multilevel_0"),
    )
    return [_with_interval(subject) for subject in found]


def _written(scratch: Path) -> str:
    """Write the files of images into a folder, those of digits below; the option that names the latter."""
    write_cifar10(scratch)
    digits = scratch / "digits"
    digits.mkdir(exist_ok=True)
    write_digits(digits, 200, 100)
    return f"--data_dir={digits}"


def _with_interval(subject: Subject) -> Subject:
    """The job with its checkpoints."""
    return replace(subject, words=(*subject.words, f"--checkpoint_every={subject.every}"))
