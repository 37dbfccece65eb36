"""What is made of a run: it hands on its network (`export`) or its record (`events`)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbraid_py.cli.reader import CHECKPOINTS, RECORD, command_parser, printable, read_run
from xbraid_py.run.record import replacing

if TYPE_CHECKING:
    from torch import nn

    from xbraid_py.run.store.read import Checkpoint

_BEST = "best.h5"


def main(words: Sequence[str]) -> int:
    """Write the module, and say how to load it."""
    usage = "DIR OUT.pt [--best] [--force] [--driver FILE]"
    parser = command_parser("export", usage, "The network of a checkpoint as a plain torch module.")
    parser.add_argument("DIR", type=Path, help="Folder of the run, or one of its checkpoints.")
    parser.add_argument("OUT", type=Path, help="File for the module.")
    parser.add_argument("--best", action="store_true", help="The best checkpoint instead of the newest good one.")
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")
    parser.add_argument(
        "--driver",
        type=Path,
        help="A program of your own that trained on minibatches, whose `build` makes the network.",
    )
    options = parser.parse_args(words)
    out = options.OUT
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise ValueError(f"OUT={out} {what}; use {(out if out.is_dir() else Path()) / 'network.pt'}")
    if out.exists() and not options.force:
        raise ValueError(f"OUT={out} exists; give another name, or --force to replace it")
    source = checkpoint_of(options.DIR, options.best)
    layers = export(source, out, options.driver)
    print(f"{out}: the network of {printable(source)}, {layers} residual layers; load it with")
    print(f"  model = torch.load({str(out)!r}, weights_only=False)")
    print("where xbraid_py is installed (MPI is not needed); `weights_only=False` since it holds a module, so load it")
    print("from a trusted place only. model(inputs) maps inputs (B, ...) to what the network was trained to give.")
    return 0


def checkpoint_of(folder: Path, best: bool) -> Path:
    """The newest good checkpoint of a run, or its best one; a file is taken as it is.

    Raises `ValueError` if there is no such checkpoint, or it is damaged.
    """
    from xbraid_py.run.store.read import newest_good, verify  # loads torch and HDF5

    if folder.is_file():
        verify(folder)
        return folder
    checkpoints = read_run(folder).path / CHECKPOINTS
    if best:
        if not (checkpoints / _BEST).exists():
            raise ValueError(f"{checkpoints} holds no {_BEST}; leave out --best for the newest good checkpoint")
        verify(checkpoints / _BEST)
        return checkpoints / _BEST
    found = newest_good(checkpoints)
    if found is None:
        raise ValueError(f"{checkpoints} holds no good checkpoint, so there is nothing to export yet")
    return found


def export(source: Path, out: Path, driver: Path | None = None) -> int:
    """Write the network of a checkpoint to a file, at once; the number of its residual layers.

    Raises `ValueError` if there is none, or its weights are not finite: nobody has a use for such a network.
    """
    import torch

    from xbraid_py import recipes
    from xbraid_py.layer_parallel.export import ResidualStep
    from xbraid_py.layers.image_resnet import ResidualBlock
    from xbraid_py.run.store.read import load

    with load(source) as checkpoint:
        module = recipes.network(checkpoint) if driver is None else built_by(driver, checkpoint)
    for name, values in module.state_dict().items():
        if not torch.isfinite(values).all():
            raise ValueError(f"{source} holds weights that are not finite, in {name}; give an earlier checkpoint of it")
    with replacing(out) as temporary:
        torch.save(module, temporary)
    return sum(isinstance(part, ResidualStep | ResidualBlock) for part in module.modules())


def built_by(driver: Path, checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint of training on minibatches as a plain module, made by the program that trained it.

    The program has `Options`, and `build(options, None, **sizes)`, which makes the network. Only one that is named on
    the command line is taken: what a file says is not run. Raises `ValueError` if there is no such program, or its
    network is another one.
    """
    from xbraid_py.layer_parallel.export import to_sequential
    from xbraid_py.layer_parallel.minibatch.state import load_weights
    from xbraid_py.run.engine import state_of
    from xbraid_py.run.options import from_dict

    if not driver.is_file():
        raise ValueError(f"driver={driver} is no file; use --driver=FILE with the program that trained the network")
    program = module_of(driver)
    if not hasattr(program, "Options") or not hasattr(program, "build"):
        raise ValueError(f"driver={driver} has no Options and build; use the program that trained the network")
    meta = state_of(checkpoint)
    try:
        options = from_dict(program.Options, meta["configuration"])
    except TypeError as error:
        raise ValueError(f"driver={driver} has other options than {checkpoint.path}: {error}") from error
    model = program.build(options, None, **meta.get("sizes", {}))
    load_weights(checkpoint, model)
    plain = to_sequential(model).eval()
    own = sorted({type(part).__name__ for part in plain.modules() if type(part).__module__ == program.__name__})
    if own:
        # They could not be found again when the file is loaded.
        raise ValueError(f"driver={driver} defines parts of the network, {', '.join(own)}; put them into a module")
    return plain


def module_of(path: Path) -> Any:
    """A program as a module; it is not run as one."""
    name = f"_xbraid_py_driver_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def events(words: Sequence[str]) -> int:
    """Write the record of a run as TensorBoard event files, and say how to look at them."""
    from xbraid_py.run.progress import require_tensorboard, write_events  # loads torch

    usage = "DIR [--out FOLDER]"
    parser = command_parser("events", usage, "The record of a run as TensorBoard event files.")
    parser.add_argument("DIR", type=Path, help="Folder of the run.")
    parser.add_argument("--out", type=Path, help="Folder of the event files; tensorboard in that of the run.")
    options = parser.parse_args(words)
    run = read_run(options.DIR, most=None)
    if not run.rows:
        raise ValueError(f"{run.path / RECORD} holds no rows yet; try again when the run is under way")
    require_tensorboard()
    out = options.out or run.path / "tensorboard"
    header = {"kind": "header", "configuration": run.configuration}
    count = write_events([header, *run.rows], out)
    print(f"{count} rows of {printable(run.path)} are in {out}; see them with\n  tensorboard --logdir {out}")
    return 0
