"""`xbraid-py export DIR OUT.pt`: the network of a checkpoint as a plain torch module."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import CHECKPOINTS, read_run
from xbraid_py.cli.resume import DRIVERS
from xbraid_py.cli.summary import printable

if TYPE_CHECKING:
    from torch import nn

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
        help="The program that trained on minibatches, whose `build` makes the network; if not given, that of the "
        "drivers folder which the checkpoint names.",
    )
    options = parse(parser, words)
    out = options.OUT
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise ValueError(f"OUT={out} {what}; use {(out if out.is_dir() else Path()) / 'network.pt'}")
    if out.exists() and not options.force:
        raise ValueError(f"OUT={out} exists; give another name, or --force to replace it")
    source = checkpoint_of(options.DIR, options.best)
    layers, call = export(source, out, options.driver)
    print(f"{out}: the network of {printable(source)}, {layers} layers; load it with")
    print(f"  model = torch.load({str(out)!r}, weights_only=False)")
    print("where xbraid_py is installed (MPI is not needed); `weights_only=False` since it holds a module, so load it")
    print(f"from a trusted place only. {call}")
    return 0


def checkpoint_of(folder: Path, best: bool) -> Path:
    """The newest good checkpoint of a run, or its best one; a file is taken as it is.

    Raises
    ------
    ValueError
        If there is no such checkpoint, or it is damaged.
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


def export(source: Path, out: Path, driver: Path | None = None) -> tuple[int, str]:
    """Write the network of a checkpoint to a file, at once: the number of its residual layers, and how it is called."""
    import torch

    from xbraid_py.layer_parallel.export import ResidualStep, to_sequential
    from xbraid_py.recipes.digits_resume import is_of_minibatches
    from xbraid_py.run.store.write import load

    with load(source) as checkpoint:
        meta = checkpoint.meta
    if is_of_minibatches(meta):
        module = trained_on_minibatches(source, meta, driver)
        call = "model(inputs) maps inputs such as the driver's batches to logits."
    else:
        module = to_sequential(source)
        call = "model(features) maps features (B, F) to logits (B, classes)."
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        torch.save(module, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return sum(isinstance(part, ResidualStep) for part in module.modules()), call


def trained_on_minibatches(source: Path, meta: Mapping[str, Any], driver: Path | None) -> nn.Module:
    """The network of a checkpoint as a plain module in evaluation mode: `build` of its driver, and its weights.

    Parameters
    ----------
    source : Path
        The checkpoint.
    meta : mapping
        Its meta data.
    driver : Path or None
        The program: `Options`, and `build(options, None, **sizes)`, which makes the network. Without one the checkpoint
        names it, but only the project's own are taken: what a file says is not run.

    Raises
    ------
    ValueError
        If there is no such program, or its network is another one.
    """
    import yaml

    from xbraid_py.layer_parallel.export import to_sequential
    from xbraid_py.layer_parallel.minibatch.state import load_weights
    from xbraid_py.run.options import parse as parse_options
    from xbraid_py.run.store.write import load

    path = driver or DRIVERS / Path(str(meta.get("driver"))).name
    if not path.is_file():
        raise ValueError(f"driver={path} is no file; use --driver=FILE with the program that trained the network")
    program = module_of(path)
    if not hasattr(program, "Options") or not hasattr(program, "build"):
        raise ValueError(f"driver={path} has no Options and build; use --driver={DRIVERS / 'mnist.py'}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(meta["configuration"]), encoding="utf-8")
        options = parse_options(program.Options, [f"--config={file}"])
    model = program.build(options, None, **meta.get("sizes", {}))
    with load(source) as checkpoint:
        load_weights(checkpoint, model)
    plain = to_sequential(model).eval()
    own = sorted({type(part).__name__ for part in plain.modules() if type(part).__module__ == program.__name__})
    if own:
        # They could not be found again when the file is loaded.
        raise ValueError(f"driver={path} defines parts of the network, {', '.join(own)}; put them into a module")
    return plain


def module_of(path: Path) -> Any:
    """A program as a module; it is not run as one."""
    name = f"_xbraid_py_driver_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
