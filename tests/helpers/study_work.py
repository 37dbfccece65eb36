"""Runs of the studies in test_study.py, for other processes to import."""

import os
import time
from pathlib import Path

import torch

from xbraid_py.comm.agreement import RunError


def square(settings):
    """Leaves a file for every time that it is called."""
    number = settings["number"]
    calls = Path(settings["calls"])
    (calls / f"{number}-{len(list(calls.glob(f'{number}-*')))}").touch()
    time.sleep(settings.get("seconds", 0.0))
    if number == 13:
        raise RunError("the number 13 is not squared")
    return {"square": number**2, "threads": torch.get_num_threads()}


def die(settings):
    """Ends its process."""
    os._exit(9)
