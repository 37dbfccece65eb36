"""`xbraid-py events DIR`: the record of a run as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import RECORD, read_run
from xbraid_py.run.tensorboard import require_tensorboard, write_events


def main(words: Sequence[str]) -> int:
    """Write the files, and say how to look at them."""
    usage = "DIR [--out FOLDER]"
    parser = command_parser("events", usage, "The record of a run as TensorBoard event files.")
    parser.add_argument("DIR", type=Path, help="Folder of the run.")
    parser.add_argument("--out", type=Path, help="Folder of the event files; tensorboard in that of the run.")
    options = parse(parser, words)
    run = read_run(options.DIR)
    if not run.rows:
        raise ValueError(f"{run.path / RECORD} holds no rows yet; try again when the run is under way")
    require_tensorboard()
    out = options.out or run.path / "tensorboard"
    header = {"kind": "header", "configuration": run.configuration}
    count = write_events([header, *run.rows], out)
    print(f"{count} rows of {run.path} are in {out}; see them with\n  tensorboard --logdir {out}")
    return 0
