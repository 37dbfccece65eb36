"""The Indian Pines driver from the outside, on a small scene: ranks, pictures and scores, and how bad input ends."""

import json
import re

import pytest
import yaml
from processes import PROJECT, run_job
from scenes import scene, write, write_split
from test_driver import agree, updates_of

from xbraid_py.run.record import read

# The jobs of all tests are started by the first one.
pytestmark = [pytest.mark.job, pytest.mark.timeout(400)]

DRIVER = PROJECT / "drivers" / "indian_pines.py"
# Many runs in one job; what they leave is said in driver_cases.py.
RUNS = (
    f"import pathlib, sys; sys.path.insert(0, {str(PROJECT / 'tests' / 'helpers')!r}); import driver_cases as cases; "
    f"cases.DRIVER = pathlib.Path({str(DRIVER)!r}); sys.exit(cases.main(pathlib.Path(sys.argv[1])))"
)
TINY = ["--num_layers=8", "--nested.refinements=0", "--nested.updates=3", "--network.width=5", "--validate_every=1"]
COMPARE = ["--num_layers=8", "--nested.updates=2,2", "--network.width=5", "--compare"]

# Name: words, and message; FOLDER is where the cases run, and ... may be anything.
BAD = {
    "option": (["--num_trian=5"], "unknown option --num_trian; did you mean --num_train?"),
    "none": (["--num_train=0"], "num_train=0 must be at least 1; use 1000"),
    "many": (
        ["--num_train=1000"],
        "num_train=1000 must leave each of the 4 classes a pixel for training and one for validation; use 4 to ...",
    ),
    "source": (["--source=web"], "...source...web..."),
    "split": (["--split=half"], "...split...half..."),
    "nowhere": (
        ["--data_dir=/nowhere"],
        "/nowhere/Indian_pines_corrected.mat not found. It comes from https://doi.org/10.4231/R7RX991C (the corrected "
        "scene, Indian_pines_corrected.mat and Indian_pines_gt.mat; ...--source tensorly). Name the folder of the files "
        "with --data_dir FOLDER, or the folder that holds indian_pines/ with the variable XBRAID_DATA; without both it "
        "is looked for in ...indian_pines.",
    ),
    "no_split": (
        ["--data_dir=FOLDER/plain", "--split=published"],
        "FOLDER/plain/id_training.dat not found. It comes from the authors of a published split of the scene ...",
    ),
    "foreign": (
        ["--data_dir=FOLDER/foreign"],
        "FOLDER/foreign/Indian_pines_corrected.mat has 20 x 17 pixels, but its ground truth is uint8 of shape "
        "(20, 16); use the two files of one scene",
    ),
    "depth": (["--num_layers=9"], "num_layers=9 is not a multiple of 2^refinements=2; use 8 or 10"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder in which two jobs have run, on 1 and on 3 ranks, with the same cases."""
    folder = tmp_path_factory.mktemp("pines")
    cube, truth = scene()
    for name, other in (("data", truth), ("plain", truth), ("foreign", truth[:, :16])):
        (folder / name).mkdir()
        write(folder / name, cube, other)
    write_split(folder / "data", truth, 90, 60)
    for size in (1, 3):
        words = {"smoke": [], "published": [*TINY, "--split=published"]}
        words |= {"compare": COMPARE} if size == 1 else {}
        words |= {name: [word.replace("FOLDER", str(folder)) for word in bad] for name, (bad, _) in BAD.items()}
        common = ["--smoke", f"--data_dir={folder / 'data'}"]
        cases = [[name, [*common, f"--out={folder}/{name}_{size}", *rest]] for name, rest in words.items()]
        (folder / f"cases{size}.json").write_text(json.dumps(cases))
        job = run_job(["-c", RUNS, folder / f"cases{size}.json"], size, timeout=150)
        (folder / f"cases{size}.txt").write_text(f"{job.returncode} {job.stdout}{job.stderr}")
    return folder


def case(folder, name, size):
    """Status of a case on all ranks, and what rank 0 printed; the others must not have printed anything."""
    paths = [folder / f"{name}_{size}_{rank}" for rank in range(size)]
    assert paths[-1].with_suffix(".status").exists(), (folder / f"cases{size}.txt").read_text()
    statuses = {int(path.with_suffix(".status").read_text()) for path in paths}
    printed = [path.with_suffix(suffix).read_text() for path in paths for suffix in (".out", ".err")]
    assert len(statuses) == 1 and not any(printed[2:]), printed[2:]
    return statuses.pop(), printed[0], printed[1]


def summary_of(out):
    """The scores at the end of a record."""
    row = read(out / "metrics.jsonl")[-1]
    assert row.pop("kind") == "summary"
    return row


@pytest.mark.parametrize("size", [1, 3])
def test_a_smoke_run_leaves_scores_and_pictures(folder, size):
    status, out, err = case(folder, "smoke", size)
    left = folder / f"smoke_{size}"
    assert status == 0, err
    rows = updates_of(left)
    assert [row["update"] for row in rows] == list(range(21)) and {row["num_layers"] for row in rows} == {8, 16}
    # It has learned: the largest class has half of the pixels.
    scores = summary_of(left)
    assert scores["overall_accuracy"] == rows[-1]["val_accuracy"] > 0.7 and scores["kappa"] > 0.5
    shares = [share for share in scores["class_accuracy"] if share is not None]
    assert len(scores["class_accuracy"]) == 4
    assert scores["average_accuracy"] == pytest.approx(sum(shares) / len(shares), rel=1e-12)
    for name in ("accuracy.png", "convergence.png", "classes.png"):
        assert (left / "figures" / name).stat().st_size > 5000
    *per_class, totals, last = out.splitlines()[-6:]
    labeled = int((scene()[1] > 0).sum())
    assert (
        sum(int(re.fullmatch(r"class \d +(?:- *|[\d.]+ %) of (\d+)", line)[1]) for line in per_class) == labeled - 160
    )
    shown = [100 * scores["overall_accuracy"], 100 * scores["average_accuracy"], scores["kappa"]]
    assert totals == "overall {:.2f} %, average {:.2f} %, kappa {:.4f}".format(*shown)
    assert last == f"final validation accuracy: {100 * rows[-1]['val_accuracy']:.2f} %"


def test_a_run_is_the_same_on_3_ranks(folder):
    for name, number in (("smoke", 21), ("published", 4)):
        one, three = (updates_of(folder / f"{name}_{size}") for size in (1, 3))
        assert len(one) == number and agree(three, one)
        assert summary_of(folder / f"{name}_1") == summary_of(folder / f"{name}_3")
        # Accuracies are of counts: nothing is rounded.
        assert [row["val_accuracy"] for row in one] == [row["val_accuracy"] for row in three]
        assert case(folder, name, 1)[1].splitlines()[-6:] == case(folder, name, 3)[1].splitlines()[-6:]


@pytest.mark.parametrize("size", [1, 3])
def test_the_published_split(folder, size):
    status, out, err = case(folder, "published", size)
    left = folder / f"published_{size}"
    assert status == 0, err
    assert yaml.safe_load((left / "config.yaml").read_text())["split"] == "published"
    assert sum(int(line.split()[-1]) for line in out.splitlines()[-6:-2]) == 60
    assert (left / "figures" / "classes.png").exists()


def test_the_run_of_comparison_comes_after_the_scores_of_the_nested_one(folder):
    assert case(folder, "compare", 1)[0] == 0
    rows = updates_of(folder / "compare_1")
    nested = [row for row in rows if row["run"] == "nested"]
    assert summary_of(folder / "compare_1")["overall_accuracy"] == nested[-1]["val_accuracy"]
    assert {row["num_layers"] for row in rows if row["run"] == "non-nested"} == {8}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message_on_any_number_of_ranks(folder, name):
    status, out, err = case(folder, name, 1)
    message = re.escape(f"error: {BAD[name][1]}".replace("FOLDER", str(folder))).replace(r"\.\.\.", ".*")
    lines = [line for line in err.splitlines() if "is not the published file" not in line]
    assert (status, out) == (2, "") and re.fullmatch(message, lines[0]), err
    assert lines[1:] in ([], ["try indian_pines.py --help"])
    assert not (folder / f"{name}_1" / "metrics.jsonl").exists()
    assert case(folder, name, 3) == (status, out, err.replace(f"{name}_1", f"{name}_3"))
