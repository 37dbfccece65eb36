"""Files of samples: what is stored comes back, and everything else is refused with the file and what to do."""

import re

import h5py
import numpy as np
import pytest
import torch
from refusal import refusal

from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.darcy import Darcy
from xbraid_py.data.elliptic import Poisson
from xbraid_py.data.pde_samples import KIND, file_name, generate, load, obtain
from xbraid_py.run.store.read import load as open_file
from xbraid_py.run.store.write import Shard, save

SERIAL = SerialCommunicator()
HELP = "delete it to have the samples generated anew, or name another folder or file"
SMALL = Poisson(mesh=4)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def good(tmp_path):
    """A file of 5 samples."""
    obtain(SMALL, 5, 1, tmp_path, SERIAL)
    return tmp_path / file_name(SMALL, 5, 1)


def rewritten(path, **changes):
    """The file at `path` anew, with other meta data or arrays."""
    samples = load(path)
    with open_file(path) as file:
        meta = file.meta | {key: value for key, value in changes.items() if key not in samples.arrays}
    arrays = samples.arrays | {key: value for key, value in changes.items() if key in samples.arrays}
    save(path, SERIAL, {name: Shard(rows, 0, len(rows)) for name, rows in arrays.items()}, meta)
    return path


def test_names_say_what_is_inside():
    assert file_name(Poisson(), 10_000, 0) == "poisson-mesh32-seed0-samples10000-v1.h5"
    assert file_name(Darcy(mesh=16, variance=2), 5, 3) == (
        "darcy-mesh16-correlation_length0.2-variance2.0-smoothness1.0-seed3-samples5-v1.h5"
    )


@pytest.mark.parametrize("problem", [SMALL, Darcy(mesh=3)], ids=lambda problem: problem.name)
def test_stored_once_and_loaded_again(spmd, shared_tmp_path, problem):
    folder = shared_tmp_path / "new" / "folder"
    path = folder / file_name(problem, 4, 2)

    def body(comm):
        first = obtain(problem, 4, 2, folder, comm)
        comm.barrier()
        written = path.stat().st_mtime_ns
        comm.barrier()
        second = obtain(problem, 4, 2, folder, comm)
        kept = path.stat().st_mtime_ns == written
        alone = load(path)
        equal = [same(found.arrays, generate(problem, 4, 2, SERIAL).arrays) for found in (first, second, alone)]
        return kept, equal, (alone.problem, alone.seed) == (problem, 2)

    assert all(found == (True, [True] * 3, True) for found in spmd(body))
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_other_parameters_are_other_files(tmp_path):
    for problem, number, seed in ((SMALL, 2, 0), (SMALL, 2, 1), (SMALL, 3, 0), (Poisson(mesh=5), 2, 0)):
        obtain(problem, number, seed, tmp_path, SERIAL)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("problem", "number", "seed", "message"),
    [
        (SMALL, 5, 2, "holds samples of seed=1, not of seed=2 as its name says"),
        (SMALL, 4, 1, "holds samples of num_samples=5, not of num_samples=4"),
        (Poisson(mesh=5), 5, 1, r"holds samples of settings=\{'mesh': 4\}, not of settings=\{'mesh': 5\}"),
        (Darcy(mesh=4), 5, 1, "holds samples of problem=poisson, not of problem=darcy"),
    ],
)
def test_a_renamed_file_is_refused(spmd, shared_tmp_path, problem, number, seed, message):
    def body(comm):
        obtain(SMALL, 5, 1, shared_tmp_path, comm)
        comm.barrier()
        path = shared_tmp_path / file_name(problem, number, seed)
        if comm.rank == 0:
            (shared_tmp_path / file_name(SMALL, 5, 1)).rename(path)
        comm.barrier()
        return refusal(ValueError, obtain, problem, number, seed, shared_tmp_path, comm)

    assert all(re.search(f"{message}.*; {HELP}", found) for found in spmd(body))


def test_truncated_anywhere(good):
    content = good.read_bytes()
    for size in np.linspace(0, len(content) - 1, 25).astype(int):
        good.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"^{good}: .*; {HELP}"):
            obtain(SMALL, 5, 1, good.parent, SERIAL)


def test_a_flipped_bit(good):
    content = good.read_bytes()
    at = content.index(load(good).arrays["u"].numpy().tobytes()[40:80])
    good.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match=f"^{good}: the data of 'u' are damaged.*; {HELP}"):
        load(good)


def test_foreign_files(good):
    for content, message in ((b"", "truncated, damaged or no HDF5"), (b"kappa 1 2 3\n", "no HDF5 file")):
        good.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{good}: .*{message}.*; {HELP}"):
            load(good)
    with h5py.File(good, "w", libver=("v110", "v110")) as file:
        file["kappa"] = np.ones((5, 4, 4))
    with pytest.raises(ValueError, match=f"^{good}: no xbraid_py checkpoint.*; {HELP}"):
        load(good)
    good.unlink()
    with pytest.raises(ValueError, match=f"^{good}: No such file.*; {HELP}"):
        load(good)


@pytest.mark.parametrize("link", [h5py.SoftLink("/kappa"), h5py.ExternalLink("elsewhere.h5", "/u")])
def test_links_are_refused(good, link):
    with h5py.File(good, "a") as file:
        del file["u"]
        file["u"] = link
    with pytest.raises(ValueError, match=f"^{good}: .*is a link.*; {HELP}"):
        load(good)


def test_no_checksum_is_refused(good):
    with h5py.File(good, "a", libver=("v110", "v110")) as file:
        values = file["u"][:]
        del file["u"]
        file["u"] = values
    with pytest.raises(ValueError, match=f"^{good}: .*stored whole with checksums.*; {HELP}"):
        load(good)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "weights"}, f"holds no {KIND}, but "),
        ({"more": 1}, f"holds no {KIND}, but "),
        ({"problem": "heat"}, "holds samples of 'heat', version 1; known here are 'poisson', version 1, 'darcy'"),
        ({"problem": ["poisson"]}, r"holds samples of \['poisson'\], version 1"),
        ({"version": 2}, "holds samples of 'poisson', version 2; known here are 'poisson', version 1"),
        ({"settings": {}}, "was made with wrong settings .*are not all of Poisson"),
        ({"settings": {"mesh": 2}}, "was made with wrong settings .mesh=2 must be at least 3"),
        ({"settings": {"mesh": 4, "depth": 1}}, "was made with wrong settings .*depth"),
        ({"settings": 5}, "was made with wrong settings"),
        ({"seed": -1}, "was made with wrong settings .seed=-1"),
        ({"seed": "1"}, "was made with wrong settings .seed='1'"),
        ({"num_samples": 6}, r"holds arrays .*but those of Poisson\(mesh=4\) are"),
        ({"u": torch.zeros(5, 4, 3, dtype=torch.float64)}, "holds arrays .*but those of"),
        ({"u": torch.zeros(5, 4, 4)}, "'u' in it holds torch.float32 or values"),
        ({"u": torch.full((5, 4, 4), np.nan, dtype=torch.float64)}, "'u' in it holds .*not finite"),
    ],
)
def test_other_contents_are_refused(good, changes, message):
    with pytest.raises(ValueError, match=f"^{good}: {message}.*; {HELP}"):
        load(rewritten(good, **changes))


def test_a_disk_that_refuses_leaves_nothing(spmd, shared_tmp_path):
    place = shared_tmp_path / "occupied"

    def body(comm):
        if comm.rank == 0:
            place.write_text("a file where a folder should be")
        comm.barrier()
        return refusal(OSError, obtain, SMALL, 3, 0, place, comm)

    assert all("not written" in str(found) for found in spmd(body))
    assert [entry.name for entry in shared_tmp_path.iterdir()] == ["occupied"]


@pytest.mark.ranks(2, 3)
def test_ranks_must_agree_on_the_folder(spmd, shared_tmp_path):
    said = spmd(lambda comm: refusal(ValueError, obtain, SMALL, 3, 0, shared_tmp_path / str(comm.rank), comm))
    assert all(found.startswith("folder and name of the samples=") for found in said)


def test_problems_that_no_file_can_name(tmp_path):
    with pytest.raises(TypeError, match="^problem=5 must be a Poisson or a Darcy; use Poisson.mesh=32."):
        obtain(5, 3, 0, tmp_path, SERIAL)
