"""Images ahead of training: standardization, and crops and flips that depend on seed, epoch and index alone."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.data.images import Augmentation, random_bits, standardize


def splitmix(state):
    """Literal SplitMix64 in Python's integers: a stream of 64-bit numbers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        number = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        yield number ^ number >> 31


def nth(seed, number):
    """The number at one place of the stream; the state grows by the same step at each number."""
    return next(splitmix((seed + number * 0x9E3779B97F4A7C15) % 2**64))


def slowly(options, image, index, epoch):
    """One image augmented as the documentation says, with numpy's own slices."""
    bits = nth(nth(options.seed, epoch), index)
    row, column = (part * (2 * options.pad + 1) // 2**24 for part in (bits >> 40, (bits >> 16) % 2**24))
    padded = np.pad(image, ((0, 0), (options.pad,) * 2, (options.pad,) * 2))
    crop = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return crop[:, :, ::-1] if options.flip and bits % 2 else crop


def noise(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def test_published_numbers_of_splitmix():
    # The first numbers for the seed 1234567, as implementations in many languages give them.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(itertools.islice(splitmix(1234567), 4)) == expected
    assert random_bits(1234567, np.arange(4, dtype=np.uint64)).tolist() == expected
    assert [nth(1234567, number) for number in range(4)] == expected


@given(
    shape=st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(5, 9), st.integers(5, 9)),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40),
    data=st.data(),
)
def test_equals_the_slow_way(shape, pad, flip, seed, epoch, data):
    options = Augmentation(pad=pad, flip=flip, seed=seed)
    pixels = noise(shape)
    before = pixels.clone()
    indices = data.draw(st.lists(st.integers(0, 2**62), min_size=shape[0], max_size=shape[0]))
    found = options(pixels, torch.tensor(indices, dtype=torch.int64), epoch)
    assert found.dtype == torch.uint8 and found.shape == shape and torch.equal(pixels, before)
    for image, index, result in zip(pixels.numpy(), indices, found.numpy(), strict=True):
        assert np.array_equal(result, slowly(options, image, index, epoch))


def test_the_same_in_any_batch():
    augment = Augmentation(seed=5)
    pixels = noise((30, 3, 32, 32))
    indices = torch.arange(30) + 1000
    whole = augment(pixels, indices, 7)
    # Dealt to three ranks, in batches of four, shuffled.
    for part in (torch.arange(rank, 30, 3) for rank in range(3)):
        for batch in part.flip(0).split(4):
            assert torch.equal(augment(pixels[batch], indices[batch], 7), whole[batch])
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    assert torch.equal(augment(pixels, indices, 7), whole)
    # Any other epoch, seed or index is another draw: about 1 image in 162 has the same one.
    for other in (
        augment(pixels, indices, 8),
        Augmentation(seed=6)(pixels, indices, 7),
        augment(pixels, indices + 1, 7),
    ):
        assert sum(torch.equal(one, two) for one, two in zip(whole, other, strict=True)) < 4


def draws(augment, num_samples, epoch):
    """First row and column of each crop and whether it is mirrored, read off images with a single mark each."""
    size, middle = 2 * augment.pad + 3, augment.pad + 1
    pixels = torch.zeros(num_samples, 1, size, size, dtype=torch.uint8)
    # The longer arm of the mark points to the right: on the left after a flip.
    pixels[:, :, middle, middle] = 2
    pixels[:, :, middle, middle + 1] = 1
    found = augment(pixels, torch.arange(num_samples), epoch).flatten(1)
    mark = found.argmax(1)
    mirrored = found.roll(-1, 1).gather(1, mark[:, None])[:, 0] != 1
    return torch.stack((mark // size, mark % size, mirrored.long()))


def test_all_places_and_directions_are_equally_likely():
    number, places = 60000, 5
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        rows, columns, mirrored = draws(Augmentation(pad=2, seed=seed), number, epoch)
        counts = torch.bincount(((rows - 1) * places + columns - 1) * 2 + mirrored, minlength=2 * places**2)
        assert len(counts) == 2 * places**2
        # Chi squared with 49 degrees of freedom: mean 49, deviation 9.9.
        expected = number / len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * 9.9


def test_draws_are_independent():
    """Of neighboring images, epochs and seeds; a correlation of n pairs has the deviation 1/sqrt(n)."""
    number = 40000

    def standard(seed, epoch):
        bits = draws(Augmentation(pad=2, seed=seed), number, epoch).double()
        return (bits - bits.mean(1, keepdim=True)) / bits.std(1, keepdim=True)

    one = standard(0, 0)
    # Within an image: row, column and direction.
    within = one @ one.T / number - torch.eye(3)
    assert within.abs().max() < 5 / math.sqrt(number)
    for other in (one.roll(1, 1), standard(0, 1), standard(1, 0), standard(1, 1)):
        assert (one @ other.T / number).abs().max() < 5 / math.sqrt(number)


def test_crops_do_not_depend_on_flip():
    pixels, indices = noise((50, 3, 8, 8)), torch.arange(50)
    plain = Augmentation(flip=False)(pixels, indices, 0)
    mirrored = Augmentation()(pixels, indices, 0)
    same = [torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert 10 < sum(same) < 40
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(plain, mirrored, strict=True))
    copy = Augmentation(pad=0, flip=False)(pixels, indices, 0)
    assert torch.equal(copy, pixels) and copy.data_ptr() != pixels.data_ptr()


IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_standardize(dtype, accuracy):
    pixels = noise((5, 3, 6, 7))
    found = standardize(pixels, dtype)
    assert found.dtype == dtype and found.shape == pixels.shape
    for image, result in zip(pixels, found, strict=True):
        values = [int(value) for value in image.flatten()]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        expected = [(value - mean) / deviation for value in values]
        assert result.flatten().tolist() == pytest.approx(expected, rel=accuracy, abs=accuracy)


def test_standardize_nearly_empty_images():
    size = 3 * 4 * 4
    pixels = torch.full((2, 3, 4, 4), 77, dtype=torch.uint8)
    pixels[1, 0, 0, 0] = 78
    uniform, nearly = standardize(pixels, torch.float64)
    assert not uniform.any()
    # The true deviation is sqrt(1 - 1/size) / sqrt(size): a little below the least one.
    assert nearly[0, 0, 0].item() == pytest.approx((1 - 1 / size) * math.sqrt(size), rel=1e-13)
    assert nearly.square().mean().item() == pytest.approx(1 - 1 / size, rel=1e-13)


@pytest.mark.parametrize("size", [106, 200])
def test_standardize_images_whose_squares_need_wide_integers(size):
    # 3 x 105 x 105 white pixels are the most that 32 bits hold.
    pixels = torch.full((1, 3, size, size), 255, dtype=torch.uint8)
    pixels[0, 1, :2] = 0
    found = standardize(pixels, torch.float64)
    assert found.mean().abs() < 1e-12 and abs(found.square().mean().item() - 1) < 1e-12


def test_standardize_one_by_one_gives_the_same_bits():
    pixels = noise((40, 3, 32, 32), seed=3)
    together = standardize(pixels)
    assert all(torch.equal(standardize(pixels[k : k + 1])[0], together[k]) for k in range(40))
    assert standardize(pixels[:0]).shape == (0, 3, 32, 32)


def augmented(pixels, indices, epoch=0):
    return Augmentation()(pixels, indices, epoch)


TWO = torch.arange(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Augmentation(pad=-1), "ValueError: pad=-1 must be at least 0; use 4"),
        (lambda: Augmentation(flip=1), "TypeError: flip=1 must be True or False; use True"),
        (lambda: Augmentation(seed=2**64), f"ValueError: seed={2**64} must be below 2**64; use 0"),
        (lambda: Augmentation(seed=-1), "ValueError: seed=-1 must be at least 0; use 0"),
        (lambda: augmented(IMAGES.float(), TWO), "TypeError: pixels is torch.float32 of shape (2, 3, 8, 8), must be a"),
        (lambda: augmented(IMAGES[0], TWO), "ValueError: pixels.shape=(3, 8, 8) must be (B, C, H, W); use"),
        (lambda: augmented(IMAGES, [0, 1]), "TypeError: indices is list, must be an int64 tensor of shape (B,); use"),
        (lambda: augmented(IMAGES, TWO.int()), "TypeError: indices is torch.int32 of shape (2,), must be an int64"),
        (lambda: augmented(IMAGES, torch.arange(3)), "ValueError: indices.shape=(3,) must hold one index for each of"),
        (lambda: augmented(IMAGES, -TWO), "ValueError: indices holds -1, must hold no negative index"),
        (lambda: augmented(IMAGES, TWO, -1), "ValueError: epoch=-1 must be at least 0; use 0"),
        (lambda: augmented(IMAGES, TWO, 0.5), "TypeError: epoch=0.5 must be an integer; use 0"),
        (lambda: augmented(IMAGES[:, :, :4], TWO), "ValueError: pad=4 must be smaller than images of 4 x 8 pixels"),
        (lambda: standardize(IMAGES.float()), "TypeError: pixels is torch.float32 of shape (2, 3, 8, 8), must be a"),
        (lambda: standardize(IMAGES, torch.int64), "TypeError: dtype=torch.int64 is no floating-point type; use torch"),
        (lambda: standardize(IMAGES, "float32"), "TypeError: dtype=float32 is no floating-point type; use torch.float"),
        (lambda: standardize(IMAGES[:, :0]), "ValueError: pixels.shape=(2, 0, 8, 8) must be (B, C, H, W)"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(message)
