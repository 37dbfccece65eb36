"""Inputs for fuzzing: good ones that are changed here and there, and what parsers are known to stumble over.

The variable XBRAID_FUZZ_INPUTS is the number of inputs in all; XBRAID_FUZZ_COUNT names a file for how many they were.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# In all, over all readers. The short run takes the same inputs every time.
INPUTS = int(os.environ.get("XBRAID_FUZZ_INPUTS", "500"))
IS_LONG = "XBRAID_FUZZ_INPUTS" in os.environ

tried = [0]

NASTY = (
    *("!!python/object/apply:os.system [touch fuzzed]", "!!python/name:os.system", "!!python/tuple [1]", "!!binary x"),
    *("&a [*a]", "*a", "<<: 1", "<<: [*a]", "? ", "- - -", "[" * 4000, "{a: " * 2000, "a:\n b:\n" * 9, "{}{0}%s"),
    *("2020-13-99", "2020-01-01", "12:61:61", "0b2", "0o9", "0x", "1e999", "-.inf", ".nan", "NaN", "Infinity", "1_0"),
    *("9" * 5000, "-" + "9" * 400, "1e-400", "--- %YAML 9", "%TAG ! !", "\x00", "\ufeff", "\u2028", "\x85", "\ud800"),
    *("null", "~", "true", "''", "\n\n", ": ", "--", *"{}[]\"'\\\t\r\n#:,=-%é"),
    *("--config", "--help", "--print_config=1", "--no_", "--config=/dev/null", "--config=.", "__class__"),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from((0, -1, 2**63, 2**64, 10**400, True)), st.sampled_from((1e308, -0.0))
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
_NASTY_BYTES = st.sampled_from([word.encode("utf-8", "surrogatepass") for word in NASTY])


@st.composite
def changed(draw, good: bytes | str, most: int = 4):
    """A good input with up to `most` changes: bits flipped, parts cut out, doubled, or overwritten."""
    text = isinstance(good, str)
    found = bytearray(good.encode("utf-8") if text else good)
    for _ in range(draw(st.integers(1, most))):
        first = draw(st.integers(0, len(found)))
        size = draw(st.integers(0, min(40, len(found) - first)))
        kind = draw(st.sampled_from(("flip", "cut", "end", "double", "insert", "overwrite")))
        part = bytes(found[first : first + size])
        if kind == "flip" and first < len(found):
            found[first] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del found[first : first + size]
        elif kind == "end":
            del found[first:]
        elif kind == "double":
            found[first:first] = part * draw(st.integers(1, 3))
        elif kind == "insert":
            found[first:first] = draw(_NASTY_BYTES if text else st.binary(max_size=8))
        elif kind == "overwrite":
            new = draw(_NASTY_BYTES if text else st.binary(max_size=8))
            found[first : first + len(new)] = new
    return bytes(found)


def near(good: bytes | str) -> st.SearchStrategy[bytes]:
    """Bytes: mostly changed ones of a good input, some at random."""
    return st.one_of(changed(good), changed(good), changed(good), st.binary(max_size=60))


def fuzzed(share: float, **others) -> settings:
    """Settings of a test that takes so large a share of the inputs."""
    return settings(
        max_examples=max(5, round(share * INPUTS)),
        derandomize=not IS_LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Nothing is explained: that takes as long as all the rest.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        **others,
    )


def working_folder(tmp_path_factory) -> Iterator[Path]:
    """For a fixture: a folder for all inputs of a file of tests, where they run; counts the inputs.

    Nothing may appear in it by itself.
    """
    folder = tmp_path_factory.mktemp("fuzz")
    tried[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(os, "fsync", lambda handle: None)  # thousands of files that nobody will miss
        yield folder
    assert not (folder / "fuzzed").exists(), "something in an input was executed"
    if "XBRAID_FUZZ_COUNT" in os.environ:
        # One line from each process that runs a part of the tests.
        with open(os.environ["XBRAID_FUZZ_COUNT"], "a") as file:
            file.write(f"{tried[0]}\n")


@contextlib.contextmanager
def only(*errors):
    """What is tried with an input: it may fail by these errors."""
    tried[0] += 1
    with contextlib.suppress(*errors):
        yield


# What else is tried with the same input, which counts once.
also = contextlib.suppress
