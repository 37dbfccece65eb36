"""Indian Pines: the two splits of its labeled pixels, stratified and published."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import classes_of, column_major, real, scene, write, write_split

from xbraid_py.data import indian_pines
from xbraid_py.data.indian_pines import SPLIT_FILES, SPLIT_PLACES, SPLIT_TRAIN, SPLIT_VALIDATION, stratified

SMALL = {"num_train": 40}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, *scene())


def shares_in_proportion(counts, total):
    """Largest remainders in whole numbers, for shares of which none is below one or takes all of its class."""
    whole, rest = zip(*(divmod(each * total, sum(counts)) for each in counts), strict=True)
    order = sorted(range(len(counts)), key=lambda k: -rest[k])
    return [whole[k] + (k in order[: total - sum(whole)]) for k in range(len(counts))]


CLASSES = st.lists(st.integers(2, 60), min_size=1, max_size=20)


@given(counts=CLASSES, unlabeled=st.integers(0, 50), part=st.floats(0, 1), seed=st.integers(0, 2**70))
def test_a_stratified_split(counts, unlabeled, part, seed):
    classes = classes_of(counts, unlabeled, 1)
    K, most = len(counts), sum(counts) - len(counts)
    num_train = K + round(part * (most - K))
    train, validation = stratified(classes, num_train, seed)
    assert train.dtype == validation.dtype == np.int64
    # Ascending, disjoint, and together all labeled pixels.
    assert np.all(np.diff(train) > 0) and np.all(np.diff(validation) > 0)
    assert sorted([*train.tolist(), *validation.tolist()]) == np.flatnonzero(classes >= 0).tolist()
    shares = [int(np.sum(classes[train] == k)) for k in range(K)]
    assert sum(shares) == len(train) == num_train
    assert all(1 <= share <= number - 1 for share, number in zip(shares, counts, strict=True))
    exact = [number * num_train / sum(counts) for number in counts]
    if all(1 <= each and np.ceil(each) <= number - 1 for each, number in zip(exact, counts, strict=True)):
        assert all(abs(share - each) < 1 for share, each in zip(shares, exact, strict=True))
        # Up to which of equal remainders is rounded up.
        differ = [k for k, each in enumerate(shares_in_proportion(counts, num_train)) if shares[k] != each]
        assert len({round(exact[k] % 1, 9) for k in differ}) <= 1
    else:
        # What others must have too much is taken from classes that are not at their limit, and taken evenly.
        off = [share - each for share, each in zip(shares, exact, strict=True)]
        free = [off[k] for k in range(K) if 1 < shares[k] < counts[k] - 1]
        assert not free or max(free) - min(free) < 1 + 1e-9
    again = stratified(classes, num_train, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(validation, again[1])


def test_a_split_depends_on_its_seed_only(folder):
    classes = classes_of([200, 300, 100], 50, 0)
    splits = []
    for seed in (0, 1, 2):
        splits.append(stratified(classes, 120, seed)[0].tolist())
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
    for seed in (0, 1, 2):
        assert stratified(classes, 120, seed)[0].tolist() == splits[seed]
    # Two random ones have a fifth of their pixels in common: 24.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(set(splits[one]) & set(splits[other])) < 50
    assert not torch.equal(*(indian_pines.load(folder, seed=seed, **SMALL).train_places for seed in (0, 1)))


def test_every_pixel_of_a_class_is_as_likely_as_any_other():
    classes = classes_of([10, 5], 3, 0)
    drawn = np.zeros(len(classes))
    for seed in range(600):
        drawn[stratified(classes, 6, seed)[0]] += 1
    # 240 of 600 for both classes, standard deviation 12.
    assert np.all(drawn[classes < 0] == 0) and np.all(np.abs(drawn[classes >= 0] - 240) < 60)


def test_the_least_and_the_most_training_pixels(folder):
    _, truth = scene()
    labeled = int((truth > 0).sum())
    for num_train in (4, labeled - 4):
        assert indian_pines.load(folder, num_train=num_train).train.num_samples == num_train
    for num_train in (3, labeled - 3):
        with pytest.raises(ValueError, match=f"; use 4 to {labeled - 4}$"):
            indian_pines.load(folder, num_train=num_train)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_published_split_pixel_by_pixel(folder, shuffled):
    cube, truth = scene()
    write_split(folder, truth, 60, 30, shuffled)
    found = indian_pines.load(folder, split="published")
    lines = {name: [int(line) for line in (folder / name).read_text().split()] for name in SPLIT_FILES}
    for name, part in ((SPLIT_TRAIN, found.train), (SPLIT_VALIDATION, found.validation)):
        expected = set()
        for number in lines[name]:
            # Down the first column, down the second, and so on, until the place is reached.
            counted, wanted = 0, lines[SPLIT_PLACES][number - 1]
            for column in range(truth.shape[1]):
                for row in range(truth.shape[0]):
                    counted += 1
                    if counted == wanted:
                        expected.add(row * truth.shape[1] + column)
        places = sorted(expected)
        assert len(places) == len(lines[name]) == part.num_samples
        assert torch.equal(part.features, found.pixels[:, places])
        assert part.labels.tolist() == [int(truth.reshape(-1)[place]) - 1 for place in places]
        if name == SPLIT_TRAIN:
            assert found.train_places.tolist() == places
            bands = cube.reshape(-1, 6)[places].astype(float)
    expected = (cube.reshape(-1, 6) - bands.mean(0)) / bands.std(0)
    assert torch.allclose(found.pixels, torch.from_numpy(expected.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SPLIT_FILES)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, " not found. It comes from the authors of a published split of the scene"),
        ("", " is empty; it holds whole numbers from 1 on"),
        ("1\n2.5\n", ", number 2: found '2.5'; it holds whole numbers from 1 on"),
        ("1 0", ", number 2: found '0'; it holds whole numbers from 1 on"),
        ("-1", ", number 1: found '-1'; it holds whole numbers from 1 on"),
        ("\xb2", ", number 1: found '\xb2'; it holds whole numbers from 1 on"),
        ("9" * 30, f", number 1: found '{'9' * 20}'; it holds whole numbers from 1 on"),
    ],
)
def test_a_bad_file_of_a_split(folder, name, text, message):
    write_split(folder, scene()[1], 60, 30)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        indian_pines.load(folder, split="published")
    assert str(caught.value).startswith(f"{folder / name}{message}")
    assert text is not None or all(part in str(caught.value) for part in ("--split random", "--data_dir", *SPLIT_FILES))


def test_a_split_that_does_not_fit(folder):
    truth = scene()[1]
    places = column_major(truth)

    def refused(message, **numbers):
        write_split(folder, truth, 60, 30)
        for name, values in numbers.items():
            (folder / f"{name}.dat").write_text(" ".join(map(str, values)))
        with pytest.raises(ValueError) as caught:
            indian_pines.load(folder, split="published")
        assert str(caught.value).replace(f"{folder}/", "") == message

    fits = " does not name the labeled pixels of this ground truth; use those of one scene"
    refused(SPLIT_PLACES + fits, idmap_color_to_global=places[:-1])
    refused(SPLIT_PLACES + fits, idmap_color_to_global=[*places[:-1], places[0]])
    rows = [1 + k for k in np.flatnonzero(truth)]  # row after row
    refused(SPLIT_PLACES + fits, idmap_color_to_global=rows)
    differ = f" must hold different numbers from 1 to {len(places)}"
    refused(SPLIT_TRAIN + differ, id_training=[1, 2, 1])
    refused(SPLIT_VALIDATION + differ, id_validation=[1, len(places) + 1])
    common = f"{SPLIT_TRAIN} and {SPLIT_VALIDATION} have pixels in common; a split has none"
    refused(common, id_training=range(1, 50), id_validation=range(49, 60))
    labels = truth.reshape(-1, order="F")[np.array(places) - 1]
    without = (np.flatnonzero(labels != 2) + 1)[:100]
    left = (np.flatnonzero(labels == 2) + 1)[:5]
    missing = f"{SPLIT_TRAIN} has no pixel of class 2; training needs one of each"
    refused(missing, id_training=without, id_validation=left)


def test_the_published_split_of_the_scene(caplog):
    found = real(split="published")
    assert not caplog.records
    assert (found.train.num_samples, found.validation.num_samples) == (4000, 2000)
    assert set(found.train.labels.tolist()) == set(found.validation.labels.tolist()) == set(range(16))
    truth = found.truth.numpy() + 1
    folder = indian_pines.data_folder("indian_pines")
    lines = {name: [int(line) for line in (folder / name).read_text().split()] for name in SPLIT_FILES}
    assert lines[SPLIT_PLACES] == column_major(truth)
    labeled = [(row, column) for column in range(145) for row in range(145) if truth[row, column]]
    for name, part in ((SPLIT_TRAIN, found.train), (SPLIT_VALIDATION, found.validation)):
        places = sorted(145 * row + column for row, column in (labeled[number - 1] for number in lines[name]))
        assert torch.equal(part.features, found.pixels[:, places])
