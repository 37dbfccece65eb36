"""Bad input to the peaks driver: the words, how the job ends, the message, and the files that are wrong."""

from pathlib import Path

import h5py
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.store.write import Shard, save

ANOTHER = "give another file, or `--resume auto` for the newest good one"
# Name: words, exit status and message. FOLDER is where the cases run; ... may be anything.
BAD = {
    "option": ("--num_layer=8", 2, "unknown option --num_layer; did you mean --num_layers?"),
    "key": (
        "--config=FOLDER/bad.yaml",
        2,
        "unknown option mgrit.cfacter in FOLDER/bad.yaml; did you mean mgrit.cfactor?",
    ),
    "depth": ("--num_layers=9", 2, "num_layers=9 is not a multiple of 2^refinements=2; use 8 or 10"),
    "cfactor": ("--mgrit.cfactor=3", 2, "num_layers=16 is not a multiple of cfactor * 2^refinements=6; use 12 or 18"),
    "tol": (
        "--mgrit.tol=-0.1",
        2,
        "tol=-0.1 must be at least 0 and finite; use 1e-6, or 0 for a fixed number of iterations",
    ),
    "adjoint": (
        "--adjoint_tol=-0.1",
        2,
        "adjoint_tol=-0.1 must be at least 0; use 1e-6, or 0 for a fixed number of iterations",
    ),
    "gtol": ("--optim.gtol=-1", 2, "gtol=-1.0 must be at least 0; use 1e-9"),
    "every": ("--checkpoint_every=0", 2, "checkpoint_every=0 must be at least 1; use 5"),
    "updates": (
        "--nested.updates=3",
        2,
        "updates=[3] must have refinements + 1 = 2 numbers, the coarsest level first; use [100, 100]",
    ),
    "missing": ("--resume=FOLDER/no.h5", 2, f"checkpoint FOLDER/no.h5: No such file or directory; {ANOTHER}"),
    "cut": (
        "--resume=FOLDER/cut.h5",
        2,
        f"checkpoint FOLDER/cut.h5: truncated, damaged or no HDF5 file (...); {ANOTHER}",
    ),
    "foreign": (
        "--resume=FOLDER/foreign.h5",
        2,
        f"checkpoint FOLDER/foreign.h5: no xbraid_py checkpoint: ...; {ANOTHER}",
    ),
    "no_run": (
        "--resume=FOLDER/no_run.h5",
        2,
        "FOLDER/no_run.h5 holds no state of a training run (no run); give one of a run's checkpoints folder",
    ),
    "other": (
        "--resume=FOLDER/smoke_1/checkpoints/update_000010.h5",
        2,
        "FOLDER/smoke_1/checkpoints/update_000010.h5 was written with mgrit.intervals=8, but this run has "
        "mgrit.intervals=4; give --mgrit.intervals 8, or start without --resume",
    ),
    "row": (
        "--data_dir=FOLDER/row",
        2,
        "FOLDER/row/features_training.dat, line 2: found '1.5': 1 number(s) where every row holds 2; "
        "a good row is '0.5 -1.25'",
    ),
    "word": (
        "--data_dir=FOLDER/word",
        2,
        "FOLDER/word/features_validation.dat, line 3: found 'x 0.75': 'x' is not a finite number; "
        "a good row is '0.5 -1.25'",
    ),
    "nan": (
        "--initial.layers=1e29",
        1,
        "the norm of the gradient is inf at update 0: it must be finite. The last checkpoint holds the weights before; "
        "start with smaller weights (initial.layers=1e-2) or a shorter time (network.T=1.0)",
    ),
}


def make_inputs(folder: Path) -> None:
    """Files that are wrong in one place."""
    (folder / "bad.yaml").write_text("num_layers: 8\nmgrit: {cfacter: 4}\n")
    for name in ("no_run", "cut"):
        save(folder / f"{name}.h5", SerialCommunicator(), {"w": Shard(torch.zeros(999), 0, 999)}, {})
    (folder / "cut.h5").write_bytes((folder / "cut.h5").read_bytes()[:-100])
    with h5py.File(folder / "foreign.h5", "w", libver="latest") as file:
        file["weights"] = [1.0, 2.0]
    rows = ["0.5 -1.25", "1.5 0.25", "-2.5 0.75"]
    for name, file, number, bad in (("row", "training", 1, "1.5"), ("word", "validation", 2, "x 0.75")):
        (folder / name).mkdir()
        for kind in ("training", "validation"):
            content = [bad if (kind, k) == (file, number) else row for k, row in enumerate(rows)]
            (folder / name / f"features_{kind}.dat").write_text("\n".join(content))
            (folder / name / f"labels_{kind}.dat").write_text("1 0 0 0 0\n0 0 1 0 0\n0 0 0 0 1\n")
