"""The public Darcy set, on synthetic files of its format, and on the real ones where they are."""

import io
import logging
import re
import zipfile

import numpy as np
import pytest
import torch

from xbraid_py.data.darcy import FILES, load_public
from xbraid_py.data.dataset import data_folder

SIZES = {"darcy_train_16.npz": (6, 4), "darcy_test_16.npz": (3, 4), "darcy_test_32.npz": (2, 8)}


def arrays_of(name):
    samples, n = SIZES[name]
    random = np.random.default_rng(samples)
    # In the memory order of the published files.
    x = np.asfortranarray(random.random((samples, n, n)) > 0.5)
    return {"x": x, "y": np.asfortranarray(random.random((samples, n, n), dtype=np.float32))}


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        np.savez_compressed(tmp_path / name, **arrays_of(name))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_arrays_come_as_tensors(folder, dtype, caplog):
    with caplog.at_level(logging.WARNING):
        found = load_public(folder, dtype)
    assert [record.getMessage().split()[0] for record in caplog.records] == [str(folder / name) for name in FILES]
    for name, part in zip(FILES, (found.train, found.test, found.test_fine), strict=True):
        arrays = arrays_of(name)
        assert part.inputs.dtype == part.targets.dtype == dtype and part.channels == ("phase",)
        assert np.array_equal(part.inputs[:, 0].numpy(), arrays["x"]) and part.inputs.is_contiguous()
        assert np.array_equal(part.targets.numpy(), arrays["y"]) and part.targets.is_contiguous()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder, name, monkeypatch):
    (folder / name).unlink()
    for given in (folder, None):
        monkeypatch.setenv("XBRAID_DATA", str(folder.parent / "elsewhere"))
        with pytest.raises(FileNotFoundError, match="not found. It comes from https://doi.org") as caught:
            load_public(given)
        place = folder if given else folder.parent / "elsewhere" / "darcy"
        assert str(place) in str(caught.value) and "--data_dir" in str(caught.value)
        assert "XBRAID_DATA" in str(caught.value) and (name in str(caught.value)) == (
            given is not None or "train" in name
        )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 4, 4))}, "lacks an array: .*y.npy.*; it must hold x, y"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros((2, 4, 4))}, r"holds x \(3, 4, 4\) and y \(2, 4, 4\); both must be"),
        ({"x": np.zeros((3, 4, 5)), "y": np.zeros((3, 4, 5))}, r"both must be \(B, n, n\), as in \(1000, 16, 16\)"),
        ({"x": np.zeros((4, 4)), "y": np.zeros((4, 4))}, r"both must be \(B, n, n\)"),
        ({"x": np.zeros((0, 4, 4)), "y": np.zeros((0, 4, 4))}, r"both must be \(B, n, n\)"),
        ({"x": np.zeros((3, 4, 4)), "y": np.full((3, 4, 4), np.nan)}, "targets holds a value that is not finite"),
        ({"x": np.zeros((3, 4, 4)), "y": np.zeros((3, 4, 4), dtype=complex)}, "x is boolean or numbers, y is numbers"),
        ({"x": np.full((3, 4, 4), "a"), "y": np.zeros((3, 4, 4))}, "x is boolean or numbers"),
        ({"x": np.full((3, 4, 4), None), "y": np.zeros((3, 4, 4))}, "is no npz archive of numbers, or damaged"),
        ({"x": np.zeros((3, 5, 5)), "y": np.zeros((3, 5, 5))}, r"the meshes \[4, 5, 8\] must be two of one size"),
    ],
)
def test_other_arrays_are_refused(folder, arrays, message):
    path = folder / "darcy_test_16.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_public(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x y z\n", "a single array"])
def test_no_archive(folder, content):
    path = folder / "darcy_train_16.npz"
    if isinstance(content, str):
        stream = io.BytesIO()
        np.save(stream, np.zeros((3, 4, 4)))
        content = stream.getvalue()
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(path))} is no npz archive of numbers, or damaged.*get it anew"
    ):
        load_public(folder)


def test_headers_that_promise_more_than_there_is(folder):
    path = folder / "darcy_train_16.npz"
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**20, 4)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", stream.getvalue())
        archive.writestr("y.npy", stream.getvalue())
    with pytest.raises(ValueError, match="which its 128 bytes do not hold"):
        load_public(folder)


def test_damage_is_refused_or_harmless(folder):
    path = folder / "darcy_test_16.npz"
    content, expected = path.read_bytes(), load_public(folder).test
    refused = 0
    for number, at in enumerate(range(0, len(content), 3)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << number % 8
        path.write_bytes(damaged[:at] if number % 5 == 0 else damaged)
        try:
            found = load_public(folder).test
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.targets, expected.targets)
    assert refused > len(content) // 6


def test_a_type_that_is_none(folder):
    with pytest.raises(TypeError, match="dtype=torch.int64 is no floating-point type; use torch.float32"):
        load_public(folder, torch.int64)


@pytest.mark.skipif(not (data_folder("darcy") / "darcy_train_16.npz").is_file(), reason="the public files are not here")
def test_the_public_files(caplog):
    with caplog.at_level(logging.WARNING):
        found = load_public()
    assert not caplog.records
    parts = (found.train, found.test, found.test_fine)
    assert [tuple(part.targets.shape) for part in parts] == [(1000, 16, 16), (50, 16, 16), (50, 32, 32)]
    assert all(part.inputs.unique().tolist() == [0, 1] for part in parts)
    # The coarser test samples are every second point of the finer ones.
    assert torch.equal(found.test.inputs, found.test_fine.inputs[:, :, ::2, ::2])
