"""A run of the study of multilevel training in width: its settings are those of the recipe's options, and its problem.

Work units of a run are those without tau, so that runs can be compared in either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from studies.study import Settings, of_seeds
from xbraid_py.recipes.options.width import PROBLEMS, WidthRunOptions
from xbraid_py.run.options import from_dict


def changed(options: WidthRunOptions, **changes: Any) -> WidthRunOptions:
    """The same run with other options of the training."""
    return replace(options, training=replace(options.training, **changes))


def runs(cases: Iterable[WidthRunOptions], seeds: Iterable[int]) -> list[Settings]:
    """Settings of runs of one problem: every case with every seed. Where they are made is none of them."""
    cases = list(cases)
    found = of_seeds(cases, seeds, problem=cases[0].name)
    return [{name: value for name, value in each.items() if name != "device"} for each in found]


def options_of(settings: Mapping[str, Any], data_dir: str | os.PathLike | None = None) -> WidthRunOptions:
    """The options that the settings of a run are of, with a folder for its samples."""
    values = {name: value for name, value in settings.items() if name != "problem"}
    return replace(from_dict(PROBLEMS[settings["problem"]], values), data_dir=data_dir)
