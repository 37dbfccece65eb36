"""How a run of the study of multilevel training in width is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from studies.width.case import options_of
from studies.width.rows import CURVE
from xbraid_py.data.pde_dataset import PdeDataset
from xbraid_py.data.pde_samples import PdeSource
from xbraid_py.recipes.options.width import ERRORS
from xbraid_py.recipes.width import WidthRun
from xbraid_py.run.engine import rows_of


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
