"""The published optimization histories, reproduced by benchmarks/reference.py, serially and by MGRIT."""

import importlib.util
import os
import threading
from functools import cache
from pathlib import Path

import pytest
from processes import PROJECT

from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import peaks

GOLDEN = Path(os.environ.get("XBRAID_GOLDEN", PROJECT / "../shared/golden"))
CONFIGS = sorted(GOLDEN.glob("*.cfg"))
NUMBERS = ("objective", "loss", "grad")
MGRIT_ROWS = 8  # of a history; the whole is what the script itself is for

if not CONFIGS:
    pytest.skip(f"NO REFERENCE RUNS: there is no *.cfg in {GOLDEN}; set XBRAID_GOLDEN", allow_module_level=True)


@cache
def load_script():
    spec = importlib.util.spec_from_file_location("reference_benchmark", PROJECT / "benchmarks" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The C library has one random state for all threads that stand in for ranks: one of them at a time.
    lock, initial_weights = threading.Lock(), module.initial_weights

    def one_at_a_time(*args):
        with lock:
            return initial_weights(*args)

    module.initial_weights = one_at_a_time
    return module


script = load_script()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_serially_every_row_is_reproduced(path):
    config, theirs = script.read_config(path), script.read_history(path.with_suffix(".optim.dat"))
    ours = script.run(config, SerialCommunicator(), forced=None, quick=False)
    assert len(ours) == len(theirs) == int(config["optim_maxiter"])
    found = script.deviations(ours, theirs)
    assert max(found[name] for name in NUMBERS) <= 1e-11, found
    assert max(found["train_accuracy"], found["val_accuracy"]) < 1e-9, found


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("cycle", ["V", "lagged"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_by_mgrit_rows_are_reproduced(spmd, path, cycle):
    config = {**script.read_config(path), "optim_maxiter": str(MGRIT_ROWS)}
    theirs = script.read_history(path.with_suffix(".optim.dat"))[:MGRIT_ROWS]
    for ours in spmd(lambda comm: script.run(config, comm, forced=cycle, quick=False)):
        assert len(ours) == MGRIT_ROWS
        found = script.deviations(ours, theirs)
        assert max(found[name] for name in NUMBERS) <= 1e-8, found
        assert max(found["train_accuracy"], found["val_accuracy"]) < 1e-9, found


def variant(**changes) -> dict[str, str]:
    """A configuration of our own: another network, and L-BFGS with backtracking."""
    own = dict(nlayers=26, nchannels=4, ntraining=300, T=2.0, optim_maxiter=20, lbfgs_stages=4)
    words = dict(hessian_approx="L-BFGS", stepsize_type="backtrackingLS", activation="tanh")
    config = {**script.read_config(CONFIGS[0]), **{key: str(value) for key, value in own.items()}, **words}
    return {**config, **{key: str(value) for key, value in changes.items()}}


@cache
def serial_variant():
    return script.run(variant(), SerialCommunicator(), forced=None, quick=False)


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("changes", [dict(), dict(braid_nrelax0=-1, braid_nrelax=0)], ids=["F_then_FCF", "F"])
def test_20_updates_of_lbfgs_by_mgrit_are_those_with_serial_propagation(spmd, changes):
    expected = serial_variant()
    assert len(expected) == 20 and expected[-1]["objective"] < 0.9 * expected[0]["objective"]
    config = variant(braid_maxlevels=3, **changes)
    assert script.mgrit_options(config, 24, forced=None).cfactor == (2, 2)
    for ours in spmd(lambda comm: script.run(config, comm, forced=None, quick=False)):
        found = script.deviations(ours, expected)
        assert len(ours) == 20 and max(found[name] for name in NUMBERS) <= 1e-8, found
        for name in ("train_accuracy", "val_accuracy"):
            assert [row[name] for row in ours] == [row[name] for row in expected]


def test_the_optimizer_is_the_one_asked_for():
    def rows(**changes):
        return script.run(variant(optim_maxiter=8, **changes), SerialCommunicator(), forced=None, quick=False)

    expected = serial_variant()[:8]
    assert rows() == expected
    # The second pair is the first one that a memory of one pair does without.
    assert rows(lbfgs_stages=1)[:3] == expected[:3] and rows(lbfgs_stages=1)[3] != expected[3]
    assert rows(hessian_approx="Identity")[:2] == expected[:2] and rows(hessian_approx="Identity")[2] != expected[2]
    assert rows(stepsize_type="fixed", stepsize=1e-3)[1] != expected[1]
    assert len(rows(gtol=1.01 * expected[4]["grad"])) <= 5


def test_the_solver_is_the_one_asked_for():
    config = {**variant(), "braid_nrelax0": "-1"}
    assert script.mgrit_options(config, 8, forced=None).max_levels == 1
    found = script.mgrit_options({**config, "braid_maxlevels": "3", "braid_cfactor0": "4"}, 24, forced=None)
    assert (found.cfactor, found.max_levels, found.tol) == ((4, 2), 3, 1e-13)
    assert (found.nrelax, found.nrelax0) == (1, None)
    # 15 steps have no factor 2: the coarsening ends there.
    assert script.mgrit_options(config, 30, forced="V").cfactor == (2,)
    assert script.mgrit_options({**config, "braid_nrelax0": "0"}, 30, forced="V").nrelax0 == 0


def test_deviations_see_every_column():
    # Accuracies are rounded to the two digits that a file has.
    row = {"objective": 2.0, "loss": 2.0, "grad": 2.0, "train_accuracy": 33.33, "val_accuracy": 50.0}
    theirs = [row] * 3
    assert script.deviations([{**row, "train_accuracy": 33.3333}] * 3, theirs) == dict.fromkeys(script.COLUMNS, 0.0)
    for name in script.COLUMNS:
        found = script.deviations([row, {**row, name: row[name] - 0.5}, row], theirs)
        expected = 0.5 if name.endswith("accuracy") else 0.25
        assert found == pytest.approx({**dict.fromkeys(script.COLUMNS, 0.0), name: expected})


def test_unknown_configurations_are_refused():
    for key, known in (("type_openlayer", "activate"), ("network_type", "dense"), ("batch_type", "deterministic")):
        with pytest.raises(ValueError, match=f"^{key}=other is not known here; use {known}$"):
            script.run(variant(**{key: "other"}), SerialCommunicator(), forced=None, quick=True)


def test_the_data_are_the_published_ones():
    train, validation = peaks.load()
    assert train.features.shape == (2, 5000) and validation.features.shape == (2, 200)
