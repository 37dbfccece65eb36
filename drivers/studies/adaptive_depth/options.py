"""The study of adaptive depth: its options, and its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from studies.study import Settings
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import AdaptiveOptions, NestedOptions
from xbraid_py.problem.options import DenseResNetOptions
from xbraid_py.run.options import to_dict


@dataclass(frozen=True, kw_only=True)
class AdaptiveStudyOptions:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the table and the pictures.
    data
        Points of peaks, or digits of MNIST.
    data_dir
        Folder of the files of MNIST.
    seeds
        Runs of each kind.
    first_seed
        Of the seeds, which are those of the initial weights, and of the points of peaks.
    num_layers
        Of the uniform runs at their end.
    width
        Channels.
    num_train
        Training samples.
    num_val
        Validation samples.
    validate_every
        Updates between two validations.
    nested
        Schedule of all runs, and what the adaptive ones cut.
    mgrit
        Solver of all runs.
    """

    out: Path = Path("runs/adaptive_depth")
    data: Literal["peaks", "mnist"] = "peaks"
    data_dir: Path | None = None
    seeds: int = 5
    first_seed: int = 0
    num_layers: int = 64
    width: int = 8
    num_train: int = 5000
    num_val: int = 5000
    validate_every: int = 5
    nested: NestedOptions = NestedOptions(adaptive=AdaptiveOptions())
    mgrit: MGRIT = MGRIT()

    def __post_init__(self):
        for name in ("seeds", "num_train", "num_val", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")
        if self.nested.adaptive is None:
            raise ValueError("nested.adaptive=None leaves nothing to compare; use nested.adaptive.indicator=richardson")
        self.nested.depths(self.num_layers)
        DenseResNetOptions(width=self.width)

    def runs(self, seed: int, make: Callable[[Settings], dict]) -> list[dict]:
        """The rows of the runs of a seed, each of which `make` makes."""
        names = ("data", "num_layers", "width", "num_train", "num_val", "validate_every")
        common = {name: getattr(self, name) for name in names} | {"seed": seed, "unit": self.num_layers}
        common |= {"data_dir": self.data_dir and str(self.data_dir), "mgrit": to_dict(self.mgrit)}
        nested, uniform = self.nested, replace(self.nested, adaptive=None)

        def made(kind: str, schedule: NestedOptions, num_layers: int = self.num_layers) -> dict:
            return make({**common, "run": kind, "num_layers": num_layers, "nested": to_dict(schedule)})

        rows = [made("uniform", uniform), made("adaptive", nested)]
        if "result" in rows[-1]:
            last, cut = rows[-1]["result"]["num_layers"], 2**nested.refinements
            share = (last * cut / self.num_layers) ** (1 / max(1, nested.refinements)) - 1
            if share > 0:
                even = AdaptiveOptions(indicator="even", marking="share", fraction=min(1.0, share), max_layers=last)
                rows.append(made("even", replace(nested, adaptive=even)))
            rows.append(made("fewer", uniform, max(cut, cut * round(last / cut))))
        alone = replace(uniform, refinements=0, updates=(sum(nested.updates),))
        rows.append(made("coarsest", alone, self.num_layers >> nested.refinements))
        return rows
