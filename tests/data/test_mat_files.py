"""MAT files: arrays of all types in both byte orders against scipy, damage of every kind, and what is refused."""

import itertools
import struct
import zlib
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mat_writer import KINDS, SHAPES, element, header, matrix, packed, values
from scipy.io import loadmat, savemat
from scipy.sparse import csc_array

from xbraid_py.data import mat_files
from xbraid_py.data.mat_files import read_array

ONE = matrix("<", "it", values((2, 3), "u2"), 4, 11)


@pytest.fixture
def write(tmp_path):
    """`write(content)` is a file of it."""

    def body(content):
        (tmp_path / "arrays.mat").write_bytes(content)
        return tmp_path / "arrays.mat"

    return body


@pytest.fixture
def read(monkeypatch):
    """`read(content)` is the array of a file of it, without the file: damage is tried thousands of times."""

    def body(content):
        monkeypatch.setattr(mat_files, "Path", lambda path: SimpleNamespace(read_bytes=lambda: bytes(content)))
        return read_array("arrays.mat", "it")

    return body


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[2])
def test_all_types_and_shapes_as_scipy_writes_and_reads_them(tmp_path, kind, compressed):
    path = tmp_path / "arrays.mat"
    for shape in SHAPES:
        true = values(shape, kind[2])
        savemat(path, {"before": np.ones((2, 5)), "it": true, "c": np.eye(2)}, do_compression=compressed)
        found = read_array(path, "it")
        assert found.dtype == kind[2] and np.array_equal(found, true)
        other = loadmat(path)["it"]
        assert found.dtype == other.dtype and np.array_equal(found, other)


@pytest.mark.parametrize(("order", "compressed"), list(itertools.product("<>", (False, True))))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[2])
def test_both_byte_orders_byte_by_byte(write, kind, order, compressed):
    for shape, small in itertools.product(SHAPES, (True, False)):
        true = values(shape, kind[2])
        content = header(order)
        for name in ("it", "longer"):
            one = matrix(order, name, true, *kind[:2], small)
            content += packed(order, one) if compressed else one
        path = write(content)
        assert np.array_equal(read_array(path, "it"), true) and np.array_equal(read_array(path, "longer"), true)
        assert np.array_equal(loadmat(path)["it"], true)


def test_values_may_be_written_in_a_smaller_type(write):
    # As MATLAB writes whole numbers.
    for code, number, dtype in ((2, 6, "u1"), (3, 6, "i2"), (5, 6, "i4"), (4, 7, "u2"), (2, 12, "u1"), (1, 10, "i1")):
        true = values((2, 3), dtype)
        assert np.array_equal(read_array(write(header("<") + matrix("<", "it", true, code, number)), "it"), true)


@pytest.mark.parametrize(
    ("code", "number", "dtype"),
    [
        (13, 6, "u8"),
        (12, 6, "i8"),
        (6, 7, "u4"),
        (3, 11, "i2"),
        (2, 8, "u1"),
        (9, 7, "f8"),
        (7, 12, "f4"),
        (1, 15, "i1"),
    ],
)
def test_values_of_another_type_are_damage(write, code, number, dtype):
    path = write(header("<") + matrix("<", "it", values((2, 3), dtype), code, number))
    with pytest.raises(ValueError, match=r"damaged: an array of \w+ written as \w+; get it anew"):
        read_array(path, "it")


OTHERS = {
    "struct": {"a": np.ones((2, 2)), "b": 1.0},
    "cell": np.array([np.ones(2), "x"], dtype=object),
    "complex": np.ones((2, 3), dtype=complex),
    "char": "some text",
    "sparse": csc_array(np.eye(3)),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_arrays_are_refused(tmp_path, name, compressed):
    path = tmp_path / "arrays.mat"
    savemat(path, {"it": OTHERS[name]}, do_compression=compressed)
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value) == (
        f"{path} is no MAT file of version 5 with arrays of real numbers, or damaged: an array that is not of real "
        f"numbers; get it anew, or save it with -v7 or by scipy.io.savemat"
    )


def hdf5(path):
    """A file of version 7.3: HDF5 behind a header."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["it"] = np.ones((2, 3))
    with path.open("r+b") as file:
        file.write(header("<", 0x0200))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hdf5, "version 7.3, which is HDF5"),
        (lambda path: savemat(path, {"it": np.ones((2, 3))}, format="4"), "no text at the beginning, as in version 4"),
        # Big-endian version 4, as far as its first bytes say.
        (lambda path: path.write_bytes(b"\0\0\x03\xe8" + header(">")[4:] + ONE), "no text at the beginning, as in"),
        (lambda path: path.write_bytes(header("<", 0x0300)), "version 3"),
        (lambda path: path.write_bytes(b"0.5 0.25\n" * 30), "no header"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500)), "no header"),
        (lambda path: path.write_bytes(b"MAT"), "no text at the beginning"),
        (lambda path: path.write_bytes(b""), "no text at the beginning"),
    ],
)
def test_other_formats_are_refused(tmp_path, make, message):
    path = tmp_path / "arrays.mat"
    make(path)
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value).startswith(f"{path} is no MAT file of version 5") and f": {message}" in str(caught.value)
    assert "get it anew, or save it with -v7" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (element("<", 9, bytes(16)), "an element of type 9 where an array is expected"),
        (packed("<", ONE + ONE), "compressed data hold other than one array"),
        (packed("<", b""), "compressed data hold other than one array"),
        (packed("<", packed("<", ONE)), "an element of type 15 where an array is expected"),
        (struct.pack("<II", 15, 20) + zlib.compress(ONE)[:20], "compressed data break off"),
        (struct.pack("<II", 15, 20) + bytes(20), "Error -3 while decompressing data"),
        (struct.pack("<I", 5 << 16 | 14) + bytes(8), "a small element is too long"),
        (struct.pack("<II", 14, 2**32 - 1) + ONE, "an element is longer than the file"),
        (matrix("<", "it", np.empty((0,) + (1,) * 32, "u1"), 2, 9), "an array with a wrong number of axes"),
        (matrix("<", "it", np.ones(3, "u1"), 2, 9), "an array with a wrong number of axes"),
        (ONE.replace(struct.pack("<2i", 2, 3), struct.pack("<2i", -2, -3)), "do not fill its axes (-2, -3)"),
        (
            ONE.replace(struct.pack("<2i", 2, 3), struct.pack("<2i", 2**31 - 1, 2**31 - 1)),
            "do not fill its axes (21474",
        ),
    ],
)
def test_damaged_parts(write, body, message):
    path = write(header("<") + body)
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value).startswith(f"{path} is no MAT file of version 5 with arrays of real numbers, or damaged: ")
    assert message in str(caught.value)


def test_compressed_data_that_would_not_fit_in_memory(write, monkeypatch):
    monkeypatch.setattr(mat_files, "_LARGEST", 1000)
    path = write(header("<") + packed("<", matrix("<", "it", np.zeros((100, 100)), 9, 6)))
    with pytest.raises(ValueError, match="compressed data break off"):
        read_array(path, "it")


def test_another_name(tmp_path, write):
    path = tmp_path / "arrays.mat"
    savemat(path, {"cube": np.ones((2, 2)), "Cube": np.ones((2, 2))})
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value) == f"{path} holds the arrays ['cube', 'Cube']; one must be it"
    with pytest.raises(ValueError, match=r"holds the arrays \['it', 'it'\]; one must be it"):
        read_array(write(header("<") + ONE + ONE), "it")
    with pytest.raises(ValueError, match=r"holds the arrays \[\]; one must be it"):
        read_array(write(header("<")), "it")


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_array(tmp_path / "none.mat", "it")


def small_files():
    """Contents of small files, their array, and where in them its values lie, if anywhere in the clear."""
    halves, doubles = ((4, 11, "u2"), (2, 3, 2)), ((9, 6, "f8"), (3, 1))
    for order, compressed, (kind, shape) in (
        ("<", False, halves),
        (">", False, halves),
        ("<", True, halves),
        ("<", False, doubles),
    ):
        true = values(shape, kind[2])
        one = matrix(order, "it", true, *kind[:2])
        content = header(order) + (packed(order, one) if compressed else one)
        start = len(content) - true.nbytes - -true.nbytes % 8
        yield content, true, range(0) if compressed else range(start, start + true.nbytes)


def test_values_lie_where_these_tests_say(read):
    for content, true, places in small_files():
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1
            assert not np.array_equal(read(changed), true)


def test_every_truncation_is_found(read):
    for content, _, _ in small_files():
        padding = len(content) - len(content.rstrip(b"\0"))
        for length in range(len(content) - padding):
            with pytest.raises(ValueError):
                read(content[:length])


def test_no_flipped_bit_outside_the_values_changes_the_array(read):
    refused = 0
    for content, true, places in small_files():
        for place in set(range(len(content))) - set(places):
            # The text of the header says nothing: its first and last bytes stand for all.
            for bit in range(8) if place < 5 or place >= 123 else ():
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                try:
                    found = read(changed)
                except ValueError:
                    refused += 1
                else:
                    assert found.dtype == true.dtype.newbyteorder(">" if content[126:128] == b"MI" else "<")
                    assert np.array_equal(found, true), (place, bit)
    assert refused > 1500


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_a_value_error_or_an_array(read, data):
    content, _, _ = data.draw(st.sampled_from(list(small_files())))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(116, len(content)))
        content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    try:
        found = read(content)
    except ValueError:
        return
    assert isinstance(found, np.ndarray) and found.dtype.kind in "uif"
