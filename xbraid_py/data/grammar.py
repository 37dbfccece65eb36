"""Sentences drawn from a small grammar: a text whose entropy rate is known.

The grammar is a Markov chain of words. Its texts ask a model for spelling, for the frequencies of words, and for what
came earlier in a sentence: after "the old brown" only the words further back tell whether a verb is still to come.
"""

from __future__ import annotations

from bisect import bisect
from functools import cache
from itertools import accumulate

import numpy as np

from xbraid_py.data.dataset import whole_number

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
    """A text of sentences drawn from `GRAMMAR`, cut after `num_characters`.

    Parameters
    ----------
    num_characters : int
        Length, at least 1.
    seed : int
        Not negative; a longer text of the same seed begins with the shorter.
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
