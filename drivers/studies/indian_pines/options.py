"""The study of nested iteration on Indian Pines: its options, and its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from indian_pines import Options as PinesOptions

from studies.nested.options import PAPER
from studies.study import Settings, StudyOptions
from xbraid_py import data
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions

# Options that every run has as they are.
NAMES = ("source", "num_train", "num_layers", "width", "dtype", "validate_every")
# Layer after layer; the cycle of this project; and that of the paper, 2 iterations, and 10 after a refinement.
SOLVERS = {"exact": MGRIT(max_levels=1), "lagged": MGRIT(), "V": PAPER.mgrit}
SPLITS = ("random", "published")


@dataclass(frozen=True, kw_only=True)
class PinesStudyOptions(StudyOptions):
    """The study.

    Parameters
    ----------
    data_dir, source, num_train, dtype, validate_every
        As of drivers/indian_pines.py.
    num_layers
        Of the finest network.
    width
        Channels.
    schedules
        Updates on the three levels, one schedule after the other.
    propagations
        Exact is serial, lagged and V are layer-parallel and inexact: this project's cycle, and the paper's.
    splits
        Num_train pixels drawn at random, or the published ones.
    first_seed
        Of the seeds. The settings were chosen on seeds 0 and 1.
    workers
        Runs at the same time on one rank; several ranks make each run together.
    """

    out: Path = Path("runs/indian_pines_study")
    data_dir: Path | None = None
    source: Literal["auto", "files", "tensorly"] = "auto"
    num_train: int = 1000
    num_layers: int = 128
    width: int = 220
    schedules: tuple[int, ...] = (200, 100, 50, 200, 200, 200)
    dtype: Literal["float64", "float32"] = "float32"
    validate_every: int = 10
    propagations: tuple[Literal["exact", "lagged", "V"], ...] = ("exact",)
    splits: tuple[Literal["random", "published"], ...] = ("random",)
    first_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not self.schedules or len(self.schedules) % 3:
            raise ValueError(f"schedules={list(self.schedules)} must be updates on three levels; use 200,100,50")
        if min(self.schedules) < 0:
            raise ValueError(f"schedules={list(self.schedules)} must all be at least 0; use 200,100,50")
        for name, known in (("propagations", SOLVERS), ("splits", SPLITS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or set(values) - {*known}:
                raise ValueError(
                    f"{name}={list(values)} must be different ones of {', '.join(known)}; use {[*known][:1]}"
                )
        if self.first_seed < 0:
            raise ValueError(f"first_seed={self.first_seed} must be at least 0; use 10")
        for settings in self.settings():
            options_of(settings)

    def settings(self) -> list[Settings]:
        """All runs: of every seed in turn, the longest first."""
        schedules = [list(self.schedules[k : k + 3]) for k in range(0, len(self.schedules), 3)]
        common = {name: getattr(self, name) for name in NAMES}
        common |= {"data_dir": None if self.data_dir is None else str(self.data_dir)}
        runs = [{"run": "non-nested", "updates": max(schedules, key=sum)}]
        runs += [{"run": "nested", "updates": updates} for updates in sorted(schedules, key=sum, reverse=True)]
        # What is as it was before there was a choice is not said.
        usual = {"propagation": "exact", "split": "random"}
        kinds = [{"propagation": each, "split": split} for split in self.splits for each in self.propagations]
        kinds = [{name: value for name, value in kind.items() if value != usual[name]} for kind in kinds]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [{**run, **common, **kind, "seed": seed} for seed in seeds for kind in kinds for run in runs]

    def scene(self) -> data.indian_pines.Scene:
        """The pixels of the runs of one seed; each split is read, so that what is wrong with its files is said."""
        found = [
            data.indian_pines.load(self.data_dir, source=self.source, split=split, num_train=self.num_train)
            for split in self.splits
        ]
        return found[0]


def options_of(settings: Settings) -> PinesOptions:
    """The options of the job that the settings of a run stand for."""
    folder: str | None = settings["data_dir"]
    updates: Sequence[int] = settings["updates"]
    names = ("source", "num_train", "num_layers", "dtype", "validate_every", "seed")
    return PinesOptions(
        data_dir=folder and Path(folder),
        network=replace(PinesOptions.network, width=settings["width"]),
        nested=NestedOptions(updates=tuple(updates)),
        split=settings.get("split", "random"),
        mgrit=SOLVERS[settings.get("propagation", "exact")],
        **{name: settings[name] for name in names},
    )
