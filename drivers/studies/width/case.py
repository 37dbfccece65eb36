"""A run of the study of multilevel training in width: its settings are those of the recipe's options, and its problem.

Work units of a run are those without tau, so that runs can be compared in either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from studies.study import Settings, of_seeds
from studies.width.rows import CURVE
from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.data.pde_samples import PdeSource
from xbraid_py.recipes.width import ERRORS, PROBLEMS, WidthRun, WidthRunOptions
from xbraid_py.run.engine import rows_of
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


def train(settings: Mapping[str, Any], data_dir: str | os.PathLike | None = None, device: str = "cpu") -> dict:
    """Make a run on one rank, in memory.

    Parameters
    ----------
    settings : mapping
        One of `runs`.
    data_dir : path-like, optional
        See `WidthRunOptions`.
    device : {"cpu", "cuda"}
        The same.

    Returns
    -------
    dict
        A "curve" of lists of `CURVE` for each validation; "best", the least of each of `ERRORS` (None without an
        auxiliary network); "mean_l2", the validation error of the mean training target; "seconds" and
        "matching_seconds"; and the "widths" of the levels.

    Raises
    ------
    RunError
        If the loss is not finite.
    """
    options = replace(options_of(settings, data_dir), device=device)
    training = WidthRun(options, *_loaded(options.samples, options.torch_dtype))
    rows = [row for row in rows_of(training) if row.get("val_l2") is not None]
    curve = [[_rounded(row[name]) for name in CURVE] for row in rows]
    columns = dict(zip(CURVE, zip(*curve, strict=True), strict=True))
    return {
        "best": {name: min((v for v in columns[name] if v is not None), default=None) for name in ERRORS},
        "mean_l2": _rounded(training.mean_error()),
        "seconds": round(rows[-1]["seconds"], 3),
        "matching_seconds": round(rows[-1]["matching_seconds"], 4),
        "widths": rows[-1]["widths"],
        "curve": curve,
    }


@lru_cache(maxsize=2)
def _loaded(source: PdeSource, dtype: torch.dtype) -> tuple[PdeDataset, PdeDataset]:
    """The last samples are kept: the next run of a process often has the same."""
    return source.load(dtype=dtype)


def _rounded(value: float | None) -> float | None:
    """Six digits are more than any table shows."""
    return None if value is None else float(f"{value:.6g}")
