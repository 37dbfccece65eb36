"""One small job of every kind of run, made by its driver, for the tests that hold for all of them."""

from __future__ import annotations

import atexit
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cifar_files import write_cifar10
from digit_files import write_digits
from matplotlib.figure import Figure
from processes import PROJECT
from scenes import scene, write

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.run.options import parse
from xbraid_py.run.record import read
from xbraid_py.run.store.read import load


@dataclass(frozen=True)
class Kind:
    """A job that takes a second or less."""

    driver: str  # name of the program in `drivers`
    words: tuple[str, ...]  # its options besides those of `EVERY`
    other: str  # a further option that makes it another run
    folder: str = "run"  # name of the run's folder
    above: int = 0  # how many folders above that of the run the driver's option --out is
    exact_ranks: bool = True  # whether another number of ranks makes the same run, up to rounding
    # Writes the files of its samples into a folder, the option data_dir, once in each process.
    data: Callable[[Path], object] | None = None


def _digits(folder: Path) -> None:
    write_digits(folder, 200, 103)


_IMAGES = (
    *("--train_images=24", "--test_images=10", "--filters=4,8", "--batch_size=7", "--stem_stride=2"),
    *("--norm=group", "--precision=float64"),  # batch normalization makes each number of ranks another run
)
EVERY = ("--smoke", "--checkpoint_every=1", "--keep=99")
KINDS = {
    "mgopt": Kind(
        "circles",
        (
            *("--num_layers=32", "--mgopt.levels=3", "--max_cycles=6", "--mgrit.cycle=lagged", "--mgrit.max_levels=2"),
            *("--mgopt.optim.method=momentum", "--mgopt.optim.learning_rate=0.03"),
        ),
        "--beta=0.5",
    ),
    "mgopt_mnist": Kind(
        "mgopt_mnist",
        (
            *("--num_layers=16", "--mgopt.levels=3", "--max_cycles=6", "--mgopt.optim.learning_rate=0.0003"),
            "--mgopt.optim.method=adam",
        ),
        "--scaling=unit",
        data=_digits,
    ),
    "nested": Kind(
        "peaks",
        ("--num_layers=16", "--num_train=50", "--num_val=40", "--mgrit.intervals=4", "--nested.updates=4,4"),
        "--regularization.tikhonov=0.5",
    ),
    "indian_pines": Kind(
        "indian_pines",
        ("--num_layers=8", "--num_train=160", "--network.width=5", "--nested.updates=3,3", "--validate_every=2"),
        "--regularization.tikhonov=0.5",
        data=lambda folder: write(folder, *scene()),
    ),
    "digits": Kind("mnist", ("--max_updates=5", "--validate_every=2"), "--width=4", data=_digits),
    "sequences": Kind("sequences", ("--max_updates=5", "--validate_every=2"), "--hidden_size=8", data=_digits),
    "text": Kind("transformer", ("--updates=5", "--validate_every=2"), "--warmup=1"),
    "images": Kind(
        "cifar",
        (*_IMAGES, "--models=multilevel", "--epochs=2,2,1", "--blocks=1,2", "--validate_every=2"),
        "--eta_max=0.3",
        "multilevel_0",
        data=write_cifar10,
    ),
    "lesion": Kind(
        "lesion",
        (*_IMAGES, "--depths=2", "--step_sizes=explicit", "--epochs=4", "--draws=1"),
        "--eta_max=0.3",
        "2-2_h1/first_0",
        2,
        data=write_cifar10,
    ),
    "width": Kind(
        "poisson", ("--mesh=8", "--num_train=40", "--num_val=10", "--max_work=84", "--dtype=float64"), "--batch_size=10"
    ),
}


@cache
def program(name: str) -> ModuleType:
    """A driver as a module; it is not run as one."""
    spec = importlib.util.spec_from_file_location(f"driver_{name}", PROJECT / "drivers" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def words_of(kind: Kind, out: Path, *words: str) -> list[str]:
    """The command line of a kind with further words, which win."""
    data = [] if kind.data is None else [f"--data_dir={_written(kind)}"]
    return [*EVERY, *kind.words, *data, f"--out={[out, *out.parents][kind.above]}", *words]


def options_of(kind: Kind, out: Path, *words: str) -> Any:
    """The options of a kind with further words."""
    module = program(kind.driver)
    return parse(module.Options, words_of(kind, out, *words), presets=module.PRESETS)


def run(kind: Kind, comm: Communicator, out: Path, *words: str) -> Any:
    """Set up and run the job of a kind in a folder, as its driver does."""
    torch.manual_seed(7)  # not what a run depends on
    comm.barrier()  # ranks that are threads share one generator: nobody draws before the last one has come here
    return program(kind.driver).setup(options_of(kind, out, *words), comm)()


@cache
def finished(name: str) -> Path:
    """The folder of an uninterrupted run of a kind on one rank, made once in each process, not to be written to."""
    out = _scratch() / KINDS[name].folder
    run(KINDS[name], SerialCommunicator(), out)
    return out


@cache
def _written(kind: Kind) -> Path:
    folder = _scratch()
    kind.data(folder)
    return folder


def _scratch() -> Path:
    """A folder that goes with the process."""
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    return Path(scratch.name)


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on pictures are files without a picture: most of the time of a small job goes into them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"\x89PNG"))


def updates_of(out: Path) -> list[dict]:
    """The updates of a record, without what a clock says."""
    return [
        {name: value for name, value in row.items() if "seconds" not in name}
        for row in read(out / "metrics.jsonl")
        if row["kind"] == "update"
    ]


def arrays_of(path: Path) -> dict[str, torch.Tensor]:
    """All arrays of a checkpoint."""
    with load(path) as checkpoint:
        return {name: checkpoint.rows(name) for name in checkpoint.names()}
