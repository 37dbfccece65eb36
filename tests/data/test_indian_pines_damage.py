"""Indian Pines: what is no scene and what is no option, and files that are damaged in any way."""

import warnings

import numpy as np
import pytest
from scenes import scene, write, write_split

from xbraid_py.data import indian_pines
from xbraid_py.data.indian_pines import CUBE, SPLIT_FILES, TRUTH

SMALL = {"num_train": 40}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, *scene())


def changed(**changes):
    """Cube and ground truth with some values replaced: an array by a function of it."""
    cube, truth = scene()
    return changes.get("cube", lambda x: x)(cube), changes.get("truth", lambda x: x)(truth)


def with_values(array, index, value):
    array = array.astype(np.float64)
    array[index] = value
    return array


BAD_SCENES = {
    "flat cube": (
        dict(cube=lambda x: x[:, :, 0]),
        "{cube} holds uint16 of shape (20, 17); a scene is (rows, col",
    ),
    "4 axes": (dict(cube=lambda x: x[:, :, :, None].repeat(2, 3)), "{cube} holds uint16 of shape (20, 17, 6, 2); a"),
    "no bands": (dict(cube=lambda x: x[:, :, :0]), "{cube} holds uint16 of shape (20, 17, 0); a scene is"),
    "another scene": (
        dict(truth=lambda x: x[:, :16]),
        "{cube} has 20 x 17 pixels, but its ground truth is uint8 of shape (20, 16); use the two files of one scene",
    ),
    "transposed": (
        dict(truth=lambda x: x.T),
        "{cube} has 20 x 17 pixels, but its ground truth is uint8 of shape (17, ",
    ),
    "a truth of 3 axes": (
        dict(truth=lambda x: x[:, :, None].repeat(6, 2)),
        "{cube} has 20 x 17 pixels, but its ground truth is uint8 of shape (20, 17, 6)",
    ),
    "no number": (dict(cube=lambda x: with_values(x, (3, 4, 5), np.nan)), "{cube} holds numbers that are not finite"),
    "infinite": (dict(cube=lambda x: with_values(x, (3, 4, 5), -np.inf)), "{cube} holds numbers that are not finite"),
    "too large": (
        dict(cube=lambda x: x * 1e300),
        "{cube} holds numbers too large or too small to be standardized; use 1e-100 to 1e100",
    ),
    "too small": (dict(cube=lambda x: x * 1e-300), "{cube} holds numbers too large or too small to be standardized"),
    "fractions": (
        dict(truth=lambda x: x / 2),
        "the ground truth of {cube} must hold whole numbers, 0 for no label and classes from 1 to 255, 2 at least",
    ),
    "negative": (dict(truth=lambda x: x.astype(int) - 1), "the ground truth of {cube} must hold whole numbers, 0 for"),
    "too many": (dict(truth=lambda x: 64 * x.astype(int)), "the ground truth of {cube} must hold whole numbers, 0 for"),
    "NaN label": (
        dict(truth=lambda x: with_values(x, (0, 0), np.nan)),
        "the ground truth of {cube} must hold whole numbers, 0 for",
    ),
    "unlabeled": (dict(truth=lambda x: 0 * x), "the ground truth of {cube} must hold whole numbers, 0 for"),
    "one class": (dict(truth=lambda x: x // x.clip(1)), "the ground truth of {cube} must hold whole numbers, 0 for"),
    "few pixels": (
        dict(truth=lambda x: with_values(x, (slice(0, 2), slice(None)), [[5] + 16 * [1], 17 * [2]])),
        "class 5 of the ground truth has 1 pixel(s), too few for a split; it needs at least 2",
    ),
    "a class left out": (
        dict(truth=lambda x: np.where(x == 3, 9, x)),
        "class 3 of the ground truth has 0 pixel(s), too few for a split; it needs at least 2",
    ),
    "a constant band": (
        dict(cube=lambda x: with_values(x, (..., 2), 17)),
        "{cube}: band 3 of 6 is the same at all 40 training pixels; leave such bands out, or use more pixels",
    ),
    "a constant band that is no binary number": (
        dict(cube=lambda x: with_values(x, (..., 5), 0.1)),
        "{cube}: band 6 of 6 is the same at all 40 training pixels; leave such bands out, or use more pixels",
    ),
}


@pytest.mark.parametrize("name", BAD_SCENES)
def test_what_is_no_scene_is_refused(tmp_path, name):
    changes, message = BAD_SCENES[name]
    write(tmp_path, *changed(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            indian_pines.load(tmp_path, **SMALL)
    assert str(caught.value).startswith(message.format(cube=tmp_path / CUBE))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_train": 0}, ValueError, "num_train=0 must be at least 1; use 1000"),
        ({"num_train": 40.0}, TypeError, "num_train=40.0 must be an integer; use 1000"),
        (
            {"num_train": 3},
            ValueError,
            "num_train=3 must leave each of the 4 classes a pixel for training and one for ",
        ),
        ({"num_train": 4000}, ValueError, "num_train=4000 must leave each of the 4 classes a pixel for training"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0; use 0"),
        ({"source": "web"}, ValueError, "source='web' must be one of auto, files, tensorly; use auto"),
        ({"split": "half"}, ValueError, "split='half' must be one of random, published; use random"),
    ],
)
def test_options_that_are_refused(folder, options, error, message):
    with pytest.raises(error) as caught:
        indian_pines.load(folder, **{**SMALL, **options})
    assert str(caught.value).startswith(message)


def test_files_with_each_other_s_contents(folder):
    (folder / CUBE).write_bytes((folder / TRUTH).read_bytes())
    with pytest.raises(ValueError) as caught:
        indian_pines.load(folder)
    expected = f"{folder / CUBE} holds the arrays ['indian_pines_gt']; one must be indian_pines_corrected"
    assert str(caught.value) == expected


def damaged(content, other, random):
    """A version of a file with something wrong in it."""
    changed = bytearray(content)
    kind = random.integers(6)
    start, length = int(random.integers(len(content))), int(random.integers(1, 40))
    if kind == 0:
        del changed[start:]
    elif kind == 1:
        for place in random.integers(len(content), size=random.integers(1, 5)):
            changed[place] ^= 1 << random.integers(8)
    elif kind == 2:
        changed[start : start + length] = random.bytes(length)
    elif kind == 3:
        del changed[start : start + length]
    elif kind == 4:
        changed[start:start] = random.bytes(length)
    else:
        changed[start:] = other[start:]
    return bytes(changed)


@pytest.mark.parametrize("name", [CUBE, TRUTH, *SPLIT_FILES])
def test_damaged_files_are_refused_or_a_scene(tmp_path, name):
    random = np.random.default_rng(3)
    cube, truth = scene(12, 12, 3)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for trial in range(300):
            if trial in (0, 150):
                cube = cube if trial else cube.astype(float)
                write(tmp_path, cube, truth, compressed=bool(trial))
                write_split(tmp_path, truth, 40, 20)
                content = (tmp_path / name).read_bytes()
                other = (tmp_path / (TRUTH if name == CUBE else CUBE)).read_bytes()
            (tmp_path / name).write_bytes(damaged(content, other, random))
            try:
                found = indian_pines.load(
                    tmp_path, num_train=30, split="published" if name.endswith("dat") else "random"
                )
            except (ValueError, OSError) as error:
                assert len(str(error)) < 600
                outcomes.append(False)
            else:
                assert found.pixels.isfinite().all() and found.train.num_samples + found.validation.num_samples > 0
                outcomes.append(True)
    # Both happen: some damage is none, or in a value.
    assert len(outcomes) == 300 and 100 < outcomes.count(False) < 300
