"""Small files that would fill the memory when they are unpacked: refused at once, and what numbers may look like."""

import bz2
import gzip
import io
import lzma
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from mat_writer import element, header
from processes import PROJECT, job_environment

from xbraid_py.data.dataset import read_features, read_idx, read_labels

# In a process that may take 150 MB more than the libraries do: a file each line, with the function that reads it.
CHILD = """
import resource, sys
from pathlib import Path
from xbraid_py.data import darcy, indian_pines
from xbraid_py.data.dataset import read_idx

read_mat = lambda path: indian_pines.read_array(path, "it")
readers = {"npz": darcy.load_public, "mat": read_mat, "idx": read_idx}
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for kind, path in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        readers[kind](path)
        print("read")
    except ValueError as error:
        print("refused:", " ".join(str(error).split()))
    except BaseException as error:
        print(type(error).__name__)
"""
ZEROS = 2**31


def zeros(wbits, size, head=b""):
    """So many zeros behind a head: a piece that stands for itself, again and again; no sum at the end."""
    packer = zlib.compressobj(wbits=wbits)
    first = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + piece * (size // 2**20) + packer.flush()


def npy_header(shape, dtype="|b1"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def member(name, method, packed, size, crc=0):
    """A member of a zip archive, and its entry in the directory, whatever its data are."""
    fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(packed), size, len(name), 0)
    entry = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return b"PK\3\4" + fields + name + packed, entry


def archive(method, packed, size):
    """An npz archive of x and y with the same data."""
    pieces, entries, at = [], [], 0
    for name in (b"x.npy", b"y.npy"):
        piece, entry = member(name, method, packed, size)
        entries.append(entry[:42] + struct.pack("<I", at) + entry[46:])
        pieces.append(piece)
        at += len(piece)
    directory = b"".join(entries)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2, 2, len(directory), at, 0)
    return b"".join(pieces) + directory + end


def packed_by(method, size, head):
    """A member's data by one of the methods of zip archives."""
    if method == zipfile.ZIP_DEFLATED:
        return zeros(-15, size, head)
    content = head + bytes(size)
    if method == zipfile.ZIP_BZIP2:
        return bz2.compress(content)
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 2**16}]
    return b"\x09\x04\x05\x00\x5d\x00\x00\x01\x00" + lzma.compress(content, lzma.FORMAT_RAW, filters=filters)


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Files by their names: kind, path, and what is said of them."""
    folder, found = tmp_path_factory.mktemp("bombs"), {}

    def add(name, kind, content, said, file="file"):
        (folder / name).mkdir()
        path = folder / name / file
        path.write_bytes(content)
        found[name] = kind, folder / name if kind == "npz" else path, said

    head = npy_header((ZEROS // 256, 16, 16))
    names = {zipfile.ZIP_DEFLATED: "deflate", zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}
    small = npy_header((100, 16, 16))
    for method, name in names.items():
        size = ZEROS if name == "deflate" else 192 * 2**20
        packed = packed_by(method, size, head)
        assert len(packed) < 2**22
        add(f"{name}_told", "npz", archive(method, packed, len(head) + size), "claims", "darcy_train_16.npz")
        content = archive(method, packed, len(small) + 25600)
        add(f"{name}_hidden", "npz", content, "no npz archive", "darcy_train_16.npz")
    for name in list(found):
        for other in ("darcy_test_16.npz", "darcy_test_32.npz"):
            (folder / name / other).write_bytes(b"")
    # An idx file that states its zeros, one that has them behind its values, and one of 255 axes.
    shape = struct.pack(">BBBBIII", 0, 0, 8, 3, ZEROS // 784 + 1, 28, 28)
    add("idx_told", "idx", zeros(31, ZEROS, shape), "claims")
    add("idx_behind", "idx", zeros(31, ZEROS, struct.pack(">BBBBI", 0, 0, 8, 1, 100)), "surplus")
    add("idx_axes", "idx", zeros(31, 2**28, b"\0\0\x08\xff"), "surplus")
    # Arrays of a MAT file: one that states its zeros, and one that has them behind its values.
    content = zeros(15, ZEROS - 2**20, struct.pack("<II", 14, ZEROS - 2**20))
    add("mat_told", "mat", header("<") + struct.pack("<II", 15, len(content)) + content, "claims")
    content = zeros(15, ZEROS - 2**20, struct.pack("<II", 14, 1000))
    add("mat_behind", "mat", header("<") + struct.pack("<II", 15, len(content)) + content, "more than they say")
    halves = zlib.compress(element("<", 14, bytes(2**24 - 100)))
    add("mat_many", "mat", header("<") + 20 * (struct.pack("<II", 15, len(halves)) + halves), "no MAT file")
    return found


def test_bombs_are_refused(bombs):
    """Each with an error that names the file; the limit of the process stands for the memory."""
    words = [str(word) for kind, path, _ in bombs.values() for word in (kind, path)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *words], env=job_environment(), cwd=PROJECT, capture_output=True, text=True,
        timeout=20 + 5 * len(bombs),
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(bombs), done.stderr
    for (name, (_, path, said)), line in zip(bombs.items(), lines, strict=True):
        assert line.startswith("refused: ") and str(path) in line, (name, line)
        assert said in line, (name, line)


def test_what_is_packed_well_is_read(tmp_path):
    """Zeros are data too, as long as they are few, or beside others."""
    path = tmp_path / "zeros"
    path.write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 10**7) + bytes(10**7)))
    assert read_idx(path).shape == (10**7,)


@pytest.mark.parametrize("word", ["1_000", "٣", "１.５", "1e٣", "0_1.5"])
def test_digits_of_other_scripts_and_underscores(word, tmp_path):
    """Python reads them; in a file of numbers they are damage."""
    path = tmp_path / "points.dat"
    path.write_text(f"0.5 -1.25\n{word} 2\n", encoding="utf-8")
    for read in (read_features, read_labels):
        path.write_text(f"0 1\n{word} 0\n", encoding="utf-8")
        with pytest.raises(ValueError, match=f"{path}, line 2: found .*: '{word}' is not a finite number"):
            read(path)
