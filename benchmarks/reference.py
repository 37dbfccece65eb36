"""Reproduces published optimization histories: every NAME.cfg of a folder against its NAME.optim.dat.

    python benchmarks/reference.py FOLDER [--mgrit [CYCLE]] [--quick]
    mpirun -n 3 python benchmarks/reference.py FOLDER --mgrit

A configuration describes a dense network on peaks, its objective, the optimizer and the propagation, in the keys
of the C++ code that wrote the history. The network is propagated sequentially, or, with `braid_maxlevels` above 1
or `--mgrit`, by MGRIT to a relative residual of 1e-13. Printed are the largest relative deviations of a file's
objectives, losses and gradient norms, and whether all accuracies agree.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from xbraid_py.comm import Communicator, world
from xbraid_py.data import peaks
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.optim import Armijo, OneShot, OneShotOptions
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.regularization import Regularization

ACTIVATIONS = {"SmoothReLu": "smooth_relu", "ReLu": "relu", "tanh": "tanh"}
METHODS = {"Identity": "steepest", "L-BFGS": "lbfgs"}
COLUMNS = {"objective": 3, "loss": 4, "grad": 5, "train_accuracy": 8, "val_accuracy": 9}


def read_config(path: Path) -> dict[str, str]:
    """The `key = value` lines of a configuration file."""
    lines = (line.split("#")[0] for line in path.read_text().splitlines())
    return {key.strip(): value.strip() for key, value in (line.split("=", 1) for line in lines if "=" in line)}


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history; accuracies in per cent."""
    rows = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [{name: float(row[i].rstrip("%")) for name, i in COLUMNS.items()} for row in rows]


def dividing(num_steps: int, cfactor: int) -> int:
    """The largest factor up to `cfactor` that divides the steps; a converged solve does not depend on it."""
    return next((c for c in range(cfactor, 1, -1) if num_steps % c == 0), 0)


def mgrit_options(config: dict[str, str], num_layers: int, forced: str | None) -> MGRIT:
    """The solver that the configuration asks for, to tight tolerance; sequential with one level."""
    levels = max(int(config["braid_maxlevels"]), 3 if forced else 1)
    factors, steps = [], num_layers
    while len(factors) + 1 < levels and (c := dividing(steps, int(config["braid_cfactor" + ("" if factors else "0")]))):
        factors.append(c)
        steps //= c
    if not factors:
        return MGRIT(max_levels=1)
    nrelax0 = int(config["braid_nrelax0"])
    return MGRIT(
        cycle=forced or "V",
        cfactor=tuple(factors),
        max_levels=len(factors) + 1,
        min_coarse=2,
        nrelax=int(config["braid_nrelax"]),
        nrelax0=nrelax0 if nrelax0 >= 0 else None,
        max_iter=num_layers,
        tol=1e-13,
    )


def initial_weights(network: DenseResNet, config: dict[str, str]) -> torch.Tensor:
    """C's rand() from srand(1), one number a parameter: opening, layers, classification; scaled."""
    libc = ctypes.CDLL(None)
    libc.srand(1)
    flat = network.layout.zeros()
    rows = network.layout.rows(flat)
    for stack, key in zip(
        network.layout.stacks, ("weights_open_init", "weights_init", "weights_class_init"), strict=True
    ):
        for i in range(stack.total):
            row = [libc.rand() / 2147483647 for _ in range(stack.row_size)]
            if stack.first <= i < stack.first + stack.count:
                rows[stack.name][i - stack.first] = float(config[key]) * torch.tensor(row, dtype=flat.dtype)
    return flat


def run(config: dict[str, str], comm: Communicator, forced: str | None, quick: bool) -> list[dict[str, float]]:
    """Our history for a configuration."""
    for key, known in (("type_openlayer", "activate"), ("network_type", "dense"), ("batch_type", "deterministic")):
        if config.get(key, known) != known:
            raise ValueError(f"{key}={config[key]} is not known here; use {known}")
    # "data/peaks" means the folder of the data sets at hand, see `peaks.load`.
    folder = None if Path(config["datafolder"]).name == "peaks" else config["datafolder"]
    train, validation = peaks.load(folder)
    width, activation = int(config["nchannels"]), ACTIVATIONS[config["activation"]]
    grid = LayerGrid(int(config["nlayers"]) - 2, float(config["T"]))
    options = mgrit_options(config, grid.num_layers, forced)
    hierarchy = Hierarchy.plan(options, grid, comm.size)
    network = DenseResNet(
        DenseLayer(int(config["nfeatures"]), width, activation, "scalar"),
        DenseLayer(width, width, activation, "scalar"),
        DenseLayer(width, int(config["nclasses"]), "identity"),
        grid,
        hierarchy.partition,
        comm,
    )
    gammas = [float(config[key]) for key in ("gamma_tik", "gamma_ddt", "gamma_class")]
    solver = Solver(options, hierarchy, comm)
    objective = NetworkObjective(
        network,
        train.features[:, : int(config["ntraining"])],
        train.labels[: int(config["ntraining"])],
        Regularization(*gammas, measure="sum"),
        solver,
        solver,
    )
    one_shot = OneShot(
        objective,
        OneShotOptions(
            method=METHODS[config["hessian_approx"]],
            memory=int(config["lbfgs_stages"]),
            curvature_check=False,
            fixed_step=float(config["stepsize"]) if config["stepsize_type"] == "fixed" else None,
            line_search=Armijo(factor=float(config["ls_factor"]), max_backtracks=int(config["ls_maxiter"])),
            boost_updates=0,
            gtol=float(config["gtol"]),
        ),
        initial_weights(network, config),
    )
    history = []
    held_out = slice(int(config["nvalidation"]))
    for update in one_shot.run(5 if quick else int(config["optim_maxiter"])):
        predicted = network.predict(one_shot.x, validation.features[:, held_out])
        history.append(
            {
                "objective": update.evaluation.value,
                "loss": update.evaluation.loss,
                "grad": update.grad_norm,
                "train_accuracy": 100 * update.evaluation.accuracy,
                "val_accuracy": 100 * float((predicted == validation.labels[held_out]).double().mean()),
            }
        )
    return history


def deviations(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """Largest relative deviation of each column over all rows; of the accuracies the largest difference."""
    found = {}
    for name in COLUMNS:
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=False)]
        if name.endswith("accuracy"):
            found[name] = max(abs(round(a, 2) - b) for a, b in pairs)
        else:
            found[name] = max(abs(a - b) / abs(b) for a, b in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of NAME.cfg and NAME.optim.dat")
    parser.add_argument(
        "--mgrit",
        nargs="?",
        const="V",
        choices=["V", "F", "lagged"],
        help="propagate by MGRIT even where a file asks for serial, by this cycle (V)",
    )
    parser.add_argument("--quick", action="store_true", help="the first 5 rows of each file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    comm = world()
    configs = sorted(arguments.folder.glob("*.cfg"))
    if not configs:
        raise SystemExit(f"error: no *.cfg in {arguments.folder}: give the folder of the reference runs")
    figures = {}
    if comm.rank == 0:
        print(f"{'file':36s} {'rows':>5s} {'objective':>10s} {'loss':>10s} {'grad':>10s}  accuracies")
    for path in configs:
        theirs = read_history(path.with_suffix(".optim.dat"))
        ours = run(read_config(path), comm, arguments.mgrit, arguments.quick)
        found = deviations(ours, theirs)
        if len(ours) < len(theirs) and not arguments.quick:
            raise SystemExit(f"error: {path.name}: {len(ours)} rows instead of {len(theirs)}")
        same = max(found.pop("train_accuracy"), found.pop("val_accuracy")) < 1e-9
        figures[path.stem] = found
        if comm.rank == 0:
            numbers = " ".join(f"{found[name]:10.2e}" for name in ("objective", "loss", "grad"))
            print(f"{path.stem:36s} {len(ours):5d} {numbers}  {'the same' if same else 'differ'}", flush=True)
        figures[path.stem]["accuracies_agree"] = same
    if comm.rank == 0:
        print(json.dumps({"benchmark": "reference", "figures": figures}))


if __name__ == "__main__":
    main()
