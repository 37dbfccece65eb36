"""Files and texts that may hold anything: each is refused by one error, at once and in little memory."""

import json
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import program
from processes import run_job

from xbraid_py.run.documents import load_json, load_yaml, read_regular
from xbraid_py.run.options import OptionError, parse

# Ten lists of the list before: a billion words.
BOMB = "[&a [1,1,1,1,1,1,1,1,1,1], " + ", ".join(
    f"&{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
EVIL = {
    "bomb": f"num_layers: {BOMB}]",
    "bomb_in_a_group": f"nested: {{updates: {BOMB}]}}",
    "itself": "num_layers: &a [*a]",
    "merged": "<<: &a {seed: 1}",
    "digits": f"seed: {'9' * 5000}",
    "hexadecimal": f"seed: 0x{'f' * 5000}",
    "sixties": f"seed: {':'.join(['1'] * 3000)}.5",
    "deep": "nested: " + "[" * 5000 + "]" * 5000,
    "deeper": "nested: " + "{a: " * 20000,
    "long": "seed: 1\n" * 60000,
    "date": "seed: 2020-13-99",
}


@pytest.mark.parametrize("name", EVIL)
def test_options_of_a_file_and_of_a_word(name, tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text(EVIL[name])
    group = EVIL[name].partition(":")[2].strip()
    words = [f"--config={file}", f"--nested={{updates: {group}}}", f"--nested.updates={group}", f"--seed={group}"]
    for word in words if name != "long" else words[:1]:
        with pytest.raises(OptionError) as caught:
            parse(program("peaks").Options, [word], presets=program("peaks").PRESETS)
        message = str(caught.value)
        assert len(message) < 800 and "use " in message and "\n" not in message


@pytest.mark.job
def test_the_driver_says_it(tmp_path):
    """One sentence, and the status of wrong input."""
    (tmp_path / "evil.yaml").write_text(EVIL["bomb"])
    os.mkfifo(tmp_path / "pipe.yaml")
    for file, reason in (("evil", "is not YAML: line 1 has an anchor"), ("pipe", "cannot be read: no regular file")):
        done = run_job(["drivers/peaks.py", f"--config={tmp_path / file}.yaml", f"--out={tmp_path / 'run'}"])
        said = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(said) <= 2 and f"{file}.yaml {reason}" in said[0], done.stderr


@pytest.mark.parametrize(
    "content", [yaml.safe_dump({"a": [1, 2.5, None, "x"], "b": {"c": True}}), "a: 1e-3", "", "- 1"]
)
def test_plain_yaml_is_read_as_before(content):
    assert load_yaml(content) == yaml.safe_load(content)
    assert load_yaml(content, words=True) == yaml.load(content, Loader=yaml.BaseLoader)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
@settings(max_examples=60, deadline=None)
def test_what_options_are_written_as_comes_back(value):
    written = yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False)
    assert load_yaml(written) == yaml.safe_load(written)


def test_json_is_shallow():
    assert load_json(b'{"a": [{"b": [1]}]}') == {"a": [{"b": [1]}]}
    for evil in ("[" * 60 + "]" * 60, '{"a":' * 900 + "1" + "}" * 900, "[" * 100000, "9" * 5000, "{"):
        with pytest.raises(ValueError):
            load_json(evil)


def test_only_regular_files_are_read(tmp_path):
    file, pipe, link = tmp_path / "file", tmp_path / "pipe", tmp_path / "link"
    file.write_bytes(b"12345")
    os.mkfifo(pipe)
    link.symlink_to(file)
    assert read_regular(file) == read_regular(link) == b"12345" == read_regular(file, 5)
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(file, 4)
    with pytest.raises(OSError):
        read_regular(link, follow=False)
    for strange in (pipe, "/dev/zero"):
        with pytest.raises(OSError, match="no regular file"):
            read_regular(strange)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")
