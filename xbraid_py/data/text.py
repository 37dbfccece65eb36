"""Texts for character-level language models that need no download: of Python's manual, generated, or of a file.

Shape letters: `B` windows in a batch, `S` characters in a window.
"""

from __future__ import annotations

import importlib
import os
from bisect import bisect
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.dataset import kind_of, whole_number

# The largest alphabet; of more characters the rarest are replaced by UNKNOWN, which is Unicode's sign for that.
MAX_CHARACTERS = 96
UNKNOWN = "\ufffd"
GENERATED_LENGTH = 500_000


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text and its alphabet.

    Parameters
    ----------
    text : str
        The text, of characters of the alphabet only.
    characters : str
        The alphabet, sorted, at most 96 characters; the token of a character is its place in it. If `UNKNOWN` is one
        of them, it stands for all characters that are not.
    entropy_rate : float or None
        Nats for a character that no model can go below in the long run; None if nobody knows.
    """

    text: str
    characters: str
    entropy_rate: float | None = None

    def encode(self, text: str) -> torch.Tensor:
        """Tokens (len(text),), int64; characters outside the alphabet become `UNKNOWN`, or raise `ValueError` if it
        lacks that.
        """
        alphabet, codes = _code_points(self.characters), _code_points(text)
        tokens = np.searchsorted(alphabet, codes).clip(max=len(alphabet) - 1)
        strange = alphabet[tokens] != codes
        if strange.any():
            if UNKNOWN not in self.characters:
                found = text[int(strange.argmax())]
                raise ValueError(f"text holds {found!r}, which is not in the alphabet; use some of {self.characters!r}")
            tokens[strange] = self.characters.index(UNKNOWN)
        return torch.from_numpy(tokens.astype(np.int64))

    def decode(self, tokens: torch.Tensor) -> str:
        """Text of tokens (S,) of an integer type; `ValueError` for another number of axes or a number that is no
        token.
        """
        last = len(self.characters) - 1
        if tokens.ndim != 1:
            raise ValueError(f"tokens.shape={tuple(tokens.shape)} must have one axis; use tokens[0] for the first row")
        numbers = tokens.tolist()
        for token in numbers:
            if not 0 <= token <= last:
                raise ValueError(f"tokens holds {token}, must lie in 0 .. {last}, the places in the alphabet")
        return "".join(self.characters[token] for token in numbers)

    def split(self, validation: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the first part of the text, for training, and of the rest, the share `validation` of it; both
        not empty.
        """
        cut = len(self.text) - round(validation * len(self.text)) if 0 < validation < 1 else 0
        if not 0 < cut < len(self.text):
            raise ValueError(
                f"validation={validation} must lie between 0 and 1 and leave both parts of the {len(self.text)} "
                f"characters something; use 0.1 and a text of at least 10 characters"
            )
        tokens = self.encode(self.text)
        return tokens[:cut], tokens[cut:]


def load(source: str | os.PathLike = "python", num_characters: int | None = None, seed: int = 0) -> Corpus:
    """A text, the same on every rank with the same Python.

    Parameters
    ----------
    source : {"python", "generated"} or path-like
        "python": the topics of Python's own help, `pydoc_data/topics.py`, a part of the standard library of every
        CPython (PSF licence): excerpts of the language manual, 300,000 characters and more, other ones with another
        version of Python. Paragraphs that recur in several topics are taken once, lest the text for validation
        be known from training. "generated": sentences drawn from a small grammar (`GRAMMAR`), with
        a known entropy rate. Otherwise a text file in UTF-8; for a file of one of the two names use "./python".
    num_characters : int, optional
        Take only so many characters, the first ones; by default all, of a generated text 500,000.
    seed : int
        Seed of a generated text, not negative; a longer text of the same seed begins with the shorter.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or the installation has no help topics.
    TypeError
        If `source` is no text or path, or a number is no integer.
    ValueError
        If the file is empty or no UTF-8, or there are fewer characters than asked for.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r} must be a text or a path; use 'python', 'generated' or a file")
    if num_characters is not None:
        num_characters = whole_number("num_characters", num_characters, 1, 100_000)
    seed = whole_number("seed", seed, 0, 0)
    if source == "generated":
        return from_text(generate(num_characters or GENERATED_LENGTH, seed), entropy_rate())
    text = _help_topics() if source == "python" else _read(Path(source).expanduser())
    if num_characters is not None and num_characters > len(text):
        raise ValueError(
            f"num_characters={num_characters} is more than the {len(text)} of source={str(source)!r}; use at most "
            f"{len(text)}, or source='generated'"
        )
    return from_text(text[:num_characters])


def from_text(text: str, entropy_rate: float | None = None) -> Corpus:
    """The corpus of a text: its alphabet, in which all but the 95 most frequent characters of more than 96 are one.

    The entropy rate is in nats for a character, if it is known. Raises `ValueError` for an empty text.
    """
    if not text:
        raise ValueError("text='' must have at least one character; use a longer one")
    counts = Counter(text)
    if len(counts) > MAX_CHARACTERS:
        # Equally rare ones by code point, so that the alphabet does not depend on the order of the text.
        rare = [character for character in counts if character != UNKNOWN]
        by_rank = sorted(rare, key=lambda character: (-counts[character], character))
        kept = by_rank[: MAX_CHARACTERS - 1]
        text = text.translate({ord(character): UNKNOWN for character in by_rank[len(kept) :]})
        counts = Counter([*kept, UNKNOWN])
    return Corpus(text, "".join(sorted(counts)), entropy_rate)


def windows(
    tokens: torch.Tensor, length: int, batch_size: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretches of a text that begin at random places, and the same one character later.

    The places depend on the seed and the step only, so all ranks have the same without a message.

    Parameters
    ----------
    tokens : torch.Tensor
        Shape (n,), int64, n at least length + 1.
    length : int
        S, at least 1.
    batch_size : int
        B, at least 1.
    seed, step : int
        Neither negative; every step draws anew.

    Returns
    -------
    inputs, targets : torch.Tensor
        Shape (B, S), int64, contiguous, on the device of `tokens`: targets[b, s] is the token after inputs[b, s].

    Raises
    ------
    TypeError
        If `tokens` is no int64 tensor or a number no integer.
    ValueError
        If `tokens` has more axes than one or is too short, or a number is too small.
    """
    length, batch_size = whole_number("length", length, 1, 64), whole_number("batch_size", batch_size, 1, 32)
    seed, step = whole_number("seed", seed, 0, 0), whole_number("step", step, 0, 0)
    if not (isinstance(tokens, torch.Tensor) and tokens.dtype == torch.int64):
        raise TypeError(f"tokens is {kind_of(tokens)}, must be an int64 tensor of shape (n,); use Corpus.encode")
    if tokens.ndim != 1 or len(tokens) <= length:
        raise ValueError(
            f"tokens.shape={tuple(tokens.shape)} must be (n,), n more than length={length}; use a longer text or "
            f"shorter windows"
        )
    first = np.random.default_rng((seed, step)).integers(len(tokens) - length, size=batch_size)
    rows = torch.from_numpy(first[:, None] + np.arange(length)).to(tokens.device)
    return tokens[rows], tokens[rows + 1]


def _help_topics() -> str:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "source='python' needs pydoc_data/topics.py of the standard library, which this Python installation does "
            "not have; use source='generated' or the name of a text file"
        ) from error
    paragraphs = [paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n")]
    kept = {}
    for paragraph in paragraphs:
        # Line breaks differ with the indentation.
        kept.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(kept.values())


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; use source='python', source='generated' or a text file in UTF-8")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}; convert it") from error
    if not text.removeprefix("\ufeff"):
        raise ValueError(f"{path} is empty; use a text file with at least one character")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


_ADJECTIVES = ("small ", "old ", "brown ", "quick ", "lazy ", "quiet ")
_NOUNS = ("dog ", "cat ", "fox ", "bird ", "king ", "child ", "farmer ", "river ")
# State -> (words, state after them, probability of the group). The k-th word of a group is drawn with weight 1/k. In
# each state the words are distinct and none begins another, so a reader of the text knows the state at any time.
GRAMMAR = {
    "sentence": ((("the ", "a "), "subject", 1.0),),
    "subject": ((_ADJECTIVES, "subject", 0.3), (_NOUNS, "verb", 0.7)),
    "verb": (
        (("sees ", "likes ", "follows ", "finds ", "hears "), "article", 0.7),
        (("sleeps ", "waits "), "end", 0.3),
    ),
    "article": ((("the ", "a "), "object", 1.0),),
    "object": ((_ADJECTIVES, "object", 0.3), (_NOUNS, "end", 0.7)),
    "end": (((".\n",), "sentence", 0.6), (("and ",), "verb", 0.25), (("while ",), "sentence", 0.15)),
}


def generate(num_characters: int, seed: int = 0) -> str:
    """A text of sentences drawn from `GRAMMAR`, cut after `num_characters`; a longer one of the seed begins with a
    shorter.
    """
    num_characters = whole_number("num_characters", num_characters, 1, 100_000)
    random = np.random.default_rng(whole_number("seed", seed, 0, 0))
    chain = {
        state: ([move[:2] for move in moves], list(accumulate(share for _, _, share in moves))[:-1])
        for state, moves in _moves().items()
    }
    words, length, state = [], 0, "sentence"
    while length < num_characters:
        for draw in random.random(4096).tolist():
            moves, bounds = chain[state]
            word, state = moves[bisect(bounds, draw)]
            words.append(word)
            length += len(word)
    return "".join(words)[:num_characters]


@cache
def entropy_rate() -> float:
    """Entropy rate of a generated text in nats for a character: the lowest loss that a model can have.

    The words are a Markov chain over the states s of `GRAMMAR`. A reader who knows the text so far knows the state,
    because the first one is known and each word leads to one state; so the probability of a text of n words is the
    product of p(word | state), and by the chain rule it is also the product of the probabilities of its characters,
    each given all before it. The mean of -ln p(word | state) tends to sum_s pi(s) H(s) for a word, H(s) being the
    entropy of the words drawn in s and pi the stationary distribution, pi = pi M; the mean length of a word tends
    to sum_s pi(s) L(s). A character hence costs sum_s pi(s) H(s) / sum_s pi(s) L(s) nats. At the beginning of a
    window, where the state is not known yet, a model cannot be as good.
    """
    chain = _moves()
    index = {state: row for row, state in enumerate(chain)}
    transition = np.zeros((len(chain), len(chain)))
    entropy, length = np.zeros(len(chain)), np.zeros(len(chain))
    for state, moves in chain.items():
        for word, after, share in moves:
            transition[index[state], index[after]] += share
            entropy[index[state]] -= share * np.log(share)
            length[index[state]] += share * len(word)
    # pi (M - 1) = 0 and sum pi = 1: one equation more than unknowns, and consistent.
    equations = np.vstack([transition.T - np.eye(len(chain)), np.ones(len(chain))])
    stationary = np.linalg.lstsq(equations, np.eye(len(chain) + 1)[-1], rcond=None)[0]
    return float(stationary @ entropy / (stationary @ length))


def _moves() -> dict[str, list[tuple[str, str, float]]]:
    """State -> (word, state after it, probability) of all words of the grammar."""
    return {
        state: [
            (word, after, share / rank / sum(1 / k for k in range(1, len(words) + 1)))
            for words, after, share in groups
            for rank, word in enumerate(words, start=1)
        ]
        for state, groups in GRAMMAR.items()
    }
