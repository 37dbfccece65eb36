"""Texts: alphabet and tokens, the sources, the entropy of generated text, splits and windows."""

import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.data import text

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)


@given(TEXTS)
def test_tokens_are_places_in_the_sorted_alphabet(content):
    corpus = text.from_text(content)
    assert list(corpus.characters) == sorted(set(corpus.text)) and len(corpus.characters) <= text.MAX_CHARACTERS
    tokens = corpus.encode(corpus.text)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [corpus.characters.index(character) for character in corpus.text]
    assert corpus.decode(tokens) == corpus.text
    if len(set(content)) <= text.MAX_CHARACTERS:
        assert corpus.text == content


def letters(number):
    return [chr(0x4E00 + k) for k in range(number)]


def test_rare_characters_become_one():
    # The k-th letter occurs k + 1 times, the last ones most often.
    content = "".join(letter * (k + 1) for k, letter in enumerate(letters(100)))
    corpus = text.from_text(content)
    assert corpus.characters == "".join(letters(100)[5:]) + text.UNKNOWN
    assert corpus.text == text.UNKNOWN * 15 + content[15:]
    assert corpus.decode(corpus.encode("abc" + content[-1])) == text.UNKNOWN * 3 + content[-1]
    # Equally rare ones by code point; the sign that is there already is not counted twice.
    for number, signs in ((98, ""), (100, text.UNKNOWN * 3)):
        content = "".join(letters(number))
        corpus = text.from_text(content + signs)
        assert corpus.characters == content[:95] + text.UNKNOWN == text.from_text(signs + content[::-1]).characters
        assert corpus.text == content[:95] + text.UNKNOWN * (number - 95) + signs


def test_96_characters_fit_and_a_stranger_is_refused():
    corpus = text.from_text("".join(letters(96)))
    assert corpus.text == "".join(letters(96)) == corpus.characters
    with pytest.raises(ValueError, match="text holds 'x', which is not in the alphabet; use some of"):
        corpus.encode(letters(1)[0] + "xy")


def test_empty_text_and_bad_tokens():
    corpus = text.from_text("banana")
    assert corpus.encode("").tolist() == [] and corpus.decode(torch.tensor([], dtype=torch.int64)) == ""
    for tokens, message in (
        (torch.tensor([0, 3]), "tokens holds 3, must lie in 0 .. 2"),
        (torch.tensor([-1]), "tokens holds -1, must lie in 0 .. 2"),
        (torch.zeros(2, 2, dtype=torch.int64), r"tokens.shape=\(2, 2\) must have one axis"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus.decode(tokens)
    with pytest.raises(ValueError, match="text='' must have at least one character"):
        text.from_text("")


def test_manual_of_python():
    corpus = text.load("python")
    assert len(corpus.text) > 300_000 and len(corpus.characters) <= text.MAX_CHARACTERS
    assert corpus.entropy_rate is None
    for phrase in ('The "assert" statement', "expression", "\n   "):
        assert phrase in corpus.text
    # Foldings are rare, and no paragraph comes twice.
    assert corpus.text.count(text.UNKNOWN) < 1e-3 * len(corpus.text)
    paragraphs = Counter(" ".join(paragraph.split()) for paragraph in corpus.text.split("\n\n"))
    assert [paragraph for paragraph, count in paragraphs.items() if count > 1 and text.UNKNOWN not in paragraph] == []
    assert text.load(num_characters=1000).text == corpus.text[:1000]


def test_python_without_its_manual(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match="source='python' needs pydoc_data/topics.py"):
        text.load()


def test_text_file(tmp_path, monkeypatch):
    path = tmp_path / "python"
    path.write_bytes("\ufeffGrüße,\r\nWelt\n".encode())
    for source in (path, str(path)):
        assert text.load(source).text == "Grüße,\nWelt\n"
    assert text.load(path, num_characters=4).text == "Grüß"
    monkeypatch.chdir(tmp_path)
    assert text.load("./python").text == text.load(Path("python")).text == "Grüße,\nWelt\n"


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "file"
    for content, said in (
        (b"", "file is empty; use a text file"),
        (b"\xef\xbb\xbf", "file is empty; use a text file"),
        (b"ab\xff\xfe", "file is no UTF-8 text: invalid start byte at byte 2; convert it"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            text.load(path)
    for missing in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=f"{missing} is no file; use source='python', source='generated'"):
            text.load(missing)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": 3}, TypeError, "source=3 must be a text or a path; use 'python', 'generated' or a file"),
        ({"num_characters": 0}, ValueError, "num_characters=0 must be at least 1; use 100000"),
        ({"num_characters": 5.0}, TypeError, "num_characters=5.0 must be an integer; use 100000"),
        ({"num_characters": 10**9}, ValueError, "num_characters=1000000000 is more than the "),
        ({"source": "generated", "seed": -1}, ValueError, "seed=-1 must be at least 0; use 0"),
    ],
)
def test_load_refuses(options, error, message):
    with pytest.raises(error) as caught:
        text.load(**options)
    assert str(caught.value).startswith(message)


@given(seed=st.integers(0, 2**64), length=st.integers(1, 40_000), more=st.integers(0, 40_000))
def test_generated_text_depends_on_the_seed_only(seed, length, more):
    shorter, longer = text.generate(length, seed), text.generate(length + more, seed)
    assert len(shorter) == length and longer[:length] == shorter and len(longer) == length + more


def test_other_seeds_give_other_texts():
    assert len({text.generate(200, seed) for seed in range(20)}) == 20
    corpus = text.load("generated", 5000, seed=3)
    assert corpus.text == text.generate(5000, 3) and corpus.entropy_rate == text.entropy_rate()


def test_grammar_is_a_chain_that_a_reader_can_follow():
    for state, groups in text.GRAMMAR.items():
        assert sum(share for _, _, share in groups) == pytest.approx(1, abs=1e-15)
        words = [word for group, _, _ in groups for word in group]
        assert not [(a, b) for k, a in enumerate(words) for j, b in enumerate(words) if j != k and b.startswith(a)]
        assert all(after in text.GRAMMAR for _, after, _ in groups), state


def conditional_entropy(contexts, characters):
    """Nats for a character, given its context, by the frequencies of both."""
    pairs, alone = Counter(zip(contexts, characters, strict=True)), Counter(contexts)
    return -sum(n * math.log(n / alone[context]) for (context, _), n in pairs.items()) / len(characters)


@pytest.fixture(scope="module")
def long_text():
    return text.generate(400_000, seed=1)


def test_entropy_rate_is_the_empirical_conditional_entropy(long_text):
    # What decides on the next character: the last word that is no article, adjective or noun (it tells a subject from
    # an object), the word before, and the beginning of the word itself. Nothing of the probabilities is used.
    weak = {"the ", "a "}.union(*(words for words, _, _ in text.GRAMMAR["subject"]))
    contexts, strong, last = [], ".\n", ".\n"
    words = re.findall(r"\S+\s", long_text)
    for word in words:
        contexts += [(strong, last, word[:k]) for k in range(len(word))]
        last, strong = word, strong if word in weak else word
    entropy = conditional_entropy(contexts, "".join(words))
    assert entropy == pytest.approx(text.entropy_rate(), rel=0.01)


def test_short_contexts_cannot_reach_the_entropy_rate(long_text):
    entropies = [
        conditional_entropy([long_text[i - k : i] for i in range(8, len(long_text))], long_text[8:])
        for k in (0, 1, 2, 4, 8)
    ]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] > 1.05 * text.entropy_rate()


@given(TEXTS, st.floats(0.01, 0.99))
def test_split_is_contiguous(content, validation):
    corpus = text.from_text(content)
    number = round(validation * len(content))
    if 0 < number < len(content):
        train, rest = corpus.split(validation)
        assert len(rest) == number
        assert torch.equal(torch.cat([train, rest]), corpus.encode(corpus.text))
    else:
        with pytest.raises(ValueError, match="must lie between 0 and 1 and leave both parts"):
            corpus.split(validation)


@pytest.mark.parametrize("validation", [0, 1, -0.1, 2.5, math.nan])
def test_split_refuses(validation):
    with pytest.raises(ValueError, match=f"validation={validation} must lie between 0 and 1"):
        text.from_text("banana" * 10).split(validation)


@given(st.integers(2, 200), st.integers(1, 199), st.integers(1, 20), st.integers(0, 2**66), st.integers(0, 10**12))
def test_windows_are_stretches_of_the_text(size, length, batch_size, seed, step):
    length = min(length, size - 1)
    tokens = torch.arange(size) * 3
    inputs, targets = text.windows(tokens, length, batch_size, seed, step)
    assert inputs.shape == targets.shape == (batch_size, length)
    assert inputs.is_contiguous() and targets.is_contiguous() and inputs.dtype == targets.dtype == torch.int64
    first = inputs[:, :1]
    assert torch.equal(inputs, first + 3 * torch.arange(length))
    assert torch.equal(targets, inputs + 3)
    assert (first % 3 == 0).all() and first.min() >= 0 and targets.max() < 3 * size


def test_windows_begin_everywhere():
    inputs, targets = text.windows(torch.arange(8), 5, 600, seed=0, step=0)
    counts = torch.bincount(inputs[:, 0])
    assert len(counts) == 3 and counts.min() > 150 and targets.max() == 7


def test_windows_depend_on_seed_and_step_only():
    tokens = torch.arange(10_000)

    def first(seed, step):
        return tuple(text.windows(tokens, 4, 8, seed, step)[0][:, 0].tolist())

    drawn = [first(seed, step) for seed in range(4) for step in range(4)]
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert drawn == [first(seed, step) for seed in range(4) for step in range(4)]
    assert len(set(drawn)) == 16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 10}, ValueError, "tokens.shape=(10,) must be (n,), n more than length=10; use a longer text"),
        ({"length": 0}, ValueError, "length=0 must be at least 1; use 64"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1; use 32"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0; use 0"),
        ({"step": 1.5}, TypeError, "step=1.5 must be an integer; use 0"),
        ({"tokens": torch.zeros(10)}, TypeError, "tokens is torch.float32, must be an int64 tensor of shape (n,)"),
        ({"tokens": "banana"}, TypeError, "tokens is str, must be an int64 tensor of shape (n,)"),
        ({"tokens": torch.zeros(2, 9, dtype=torch.int64)}, ValueError, "tokens.shape=(2, 9) must be (n,), n more"),
    ],
)
def test_windows_refuse(options, error, message):
    with pytest.raises(error) as caught:
        text.windows(**{"tokens": torch.arange(10), "length": 4, "batch_size": 2, "seed": 0, "step": 0, **options})
    assert str(caught.value).startswith(message)
