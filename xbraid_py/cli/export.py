"""`xbraid-py export DIR OUT.pt`: the network of a checkpoint as a plain torch module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import CHECKPOINTS, read_run
from xbraid_py.cli.summary import printable

_BEST = "best.h5"


def main(words: Sequence[str]) -> int:
    """Write the module, and say how to load it."""
    usage = "DIR OUT.pt [--best] [--force]"
    parser = command_parser("export", usage, "The network of a checkpoint as a plain torch module.")
    parser.add_argument("DIR", type=Path, help="Folder of the run, or one of its checkpoints.")
    parser.add_argument("OUT", type=Path, help="File for the module.")
    parser.add_argument("--best", action="store_true", help="The best checkpoint instead of the newest good one.")
    parser.add_argument("--force", action="store_true", help="Replace a file that is there.")
    options = parse(parser, words)
    out = options.OUT
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, which is no folder"
        raise ValueError(f"OUT={out} {what}; use {(out if out.is_dir() else Path()) / 'network.pt'}")
    if out.exists() and not options.force:
        raise ValueError(f"OUT={out} exists; give another name, or --force to replace it")
    source = checkpoint_of(options.DIR, options.best)
    layers = export(source, out)
    print(f"{out}: the network of {printable(source)}, {layers} layers; load it with")
    print(f"  model = torch.load({str(out)!r}, weights_only=False)")
    print("where xbraid_py is installed (MPI is not needed); `weights_only=False` since it holds a module, so load it")
    print("from a trusted place only. model(features) maps features (B, F) to logits (B, classes).")
    return 0


def checkpoint_of(folder: Path, best: bool) -> Path:
    """The newest good checkpoint of a run, or its best one; a file is taken as it is.

    Raises
    ------
    ValueError
        If there is no such checkpoint, or it is damaged.
    """
    from xbraid_py.io.checkpoint_read import newest_good, verify  # loads torch and HDF5

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


def export(source: Path, out: Path) -> int:
    """Write the network of a checkpoint to a file, at once; the number of its residual layers."""
    import torch

    from xbraid_py.export import ResidualStep, to_sequential

    module = to_sequential(source)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        torch.save(module, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return sum(isinstance(part, ResidualStep) for part in module.modules())
