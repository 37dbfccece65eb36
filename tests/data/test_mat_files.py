"""MAT files: what scipy writes is read, and damage of every kind and other formats are refused, by an error."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mat_writer import header, matrix, packed, values
from scipy.io import savemat
from scipy.sparse import csc_array

from xbraid_py.data import indian_pines
from xbraid_py.data.indian_pines import read_array

ONE = matrix("<", "it", values((2, 3), "u2"), 4, 11)
REFUSED = "{} is no MAT file of version 5 with arrays of real numbers, or damaged: "
SHAPES = [(1, 1), (2, 3), (0, 4), (1, 2, 1, 2, 3)]


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
        monkeypatch.setattr(indian_pines, "Path", lambda path: SimpleNamespace(read_bytes=lambda: bytes(content)))
        return read_array("arrays.mat", "it")

    return body


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8", "u8"])
def test_all_types_and_shapes_as_scipy_writes_them(tmp_path, dtype, compressed):
    path = tmp_path / "arrays.mat"
    for shape in SHAPES:
        true = values(shape, dtype)
        savemat(path, {"before": np.ones((2, 5)), "it": true, "c": np.eye(2)}, do_compression=compressed)
        found = read_array(path, "it")
        assert found.dtype == dtype and np.array_equal(found, true)


@pytest.mark.parametrize(
    ("code", "number", "dtype"), [(2, 6, "u1"), (3, 6, "i2"), (5, 6, "i4"), (4, 7, "u2"), (2, 12, "u1"), (1, 10, "i1")]
)
def test_values_may_be_written_in_a_smaller_type_in_both_byte_orders(write, code, number, dtype):
    # As MATLAB writes whole numbers.
    true = values((2, 3), dtype)
    for order in "<>":
        assert np.array_equal(read_array(write(header(order) + matrix(order, "it", true, code, number)), "it"), true)


# Of another type than the class says, and of types that there are none of: scipy alone would crash on the last two.
@pytest.mark.parametrize(
    ("code", "number", "dtype", "message"),
    [
        (13, 6, "u8", "float64 written as uint64"),
        (6, 7, "u4", "float32 written as uint32"),
        (3, 11, "i2", "uint16 written as int16"),
        (9, 7, "f8", "float32 written as float64"),
        (1, 15, "i1", "uint64 written as int8"),
        (8, 11, "u2", "not of real numbers"),
        (4000, 11, "u2", "not of real numbers"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_values_of_another_type_are_damage(write, code, number, dtype, message, compressed):
    one = matrix("<", "it", values((2, 3), dtype), code, number)
    path = write(header("<") + (packed("<", one) if compressed else one))
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value).startswith(REFUSED.format(path)) and message in str(caught.value)


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
        f"{REFUSED.format(path)}an array that is not of real numbers; get it anew, or save it with -v7 or by "
        f"scipy.io.savemat"
    )


def hdf5(path):
    """A file of version 7.3: HDF5 behind a header."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["it"] = np.ones((2, 3))
    with path.open("r+b") as file:
        file.write(header("<", 0x0200))


@pytest.mark.parametrize(
    "make",
    [
        hdf5,
        lambda path: savemat(path, {"it": np.ones((2, 3))}, format="4"),
        # Big-endian version 4, as far as its first bytes say.
        lambda path: path.write_bytes(b"\0\0\x03\xe8" + header(">")[4:] + ONE),
        lambda path: path.write_bytes(header("<", 0x0300)),
        lambda path: path.write_bytes(b"0.5 0.25\n" * 30),
        lambda path: path.write_bytes(b"MAT"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_other_formats_are_refused(tmp_path, make):
    path = tmp_path / "arrays.mat"
    make(path)
    with pytest.raises(ValueError) as caught:
        read_array(path, "it")
    assert str(caught.value).startswith(f"{REFUSED.format(path)}no header of version 5 (7.3 is HDF5); get it anew")


def test_compressed_data_of_another_size_than_they_say(write):
    whole = matrix("<", "it", np.zeros((10, 10)), 9, 6)
    for content in (whole[:-1], whole + b"\0", whole + bytes(2**20)):
        path = write(header("<") + packed("<", content))
        with pytest.raises(ValueError, match="compressed data break off, or are more than they say"):
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
