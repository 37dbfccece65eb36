"""Text as a job: options, network and training of a character-level language model, and what it writes in the end.

Shape letters: `B` stretches of text, `S` characters of a stretch, `V` characters of the alphabet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import text
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.minibatch.updates import Batch, evaluate
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import DecoderBlock, TokenEmbedding, TokenHead, generate
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import TRANSFORMER, Layer
from xbraid_py.recipes.minibatch import MinibatchOptions, MinibatchTraining, network_of, prepare
from xbraid_py.run.engine import Row, free
from xbraid_py.run.store.read import Checkpoint

_VALIDATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TextOptions(MinibatchOptions):
    """The text job.

    Parameters
    ----------
    source
        Text: python (its manual), generated (with a known entropy rate), or a text file in UTF-8.
    num_characters
        Take only so many characters of it, the first ones; all if not given.
    num_layers
        Decoder blocks.
    T
        Final time; a step is T / num_layers. With T = num_layers the blocks are those of a usual transformer; in
        hundreds of updates small steps learn more, and MGRIT needs fewer sweeps.
    width
        Features of a character's state.
    heads
        Of the attention; divides width.
    context
        Characters that the model looks back on.
    dropout
        Probability, with masks that depend on the layer and the update alone.
    updates
        Weight updates.
    learning_rate
        Of AdamW, after the warm-up; from there it falls to a tenth along a cosine.
    warmup
        Updates over which the learning rate rises.
    weight_decay
        Of AdamW.
    seed
        Of initial weights, of the stretches and of a generated text.
    validation_batches
        Of 64 stretches, in a validation.
    sample
        Characters that the trained model writes at the end, into sample.txt of the out folder.
    accuracy
        What is asked of the gradients.
    """

    source: str = "python"
    num_characters: int | None = None
    num_layers: int = 32
    T: float = 2.0
    width: int = 32
    heads: int = 4
    context: int = 32
    dropout: float = 0.0
    updates: int = 400
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float | None = 1.0
    validate_every: int = free(50)
    validation_batches: int = free(8)
    sample: int = free(300)
    checkpoint_every: int = free(50)
    out: Path = free(Path("runs/transformer"))
    mgrit: MGRIT | None = field(default=None, metadata={"members": MGRIT(coarse_parts=1)})
    accuracy: GradientControl = GradientControl()

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def layer(self) -> Layer:
        return TRANSFORMER

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, context=1, updates=1, warmup=0, validation_batches=1, sample=0, num_characters=1)
        self.require_least(32, width=1)
        self.require_most(100_000, num_characters=10**8)  # drawn one by one
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1; use 0.1")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 0.01")


def prepare_text(options: TextOptions, comm: Communicator) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run."""
    corpus = text.load(options.source, options.num_characters, options.seed)
    hold(comm, "text", *corpus.split())
    shortest = min(map(len, corpus.split()))
    if options.context >= shortest:
        raise ValueError(
            f"context={options.context} must be less than the {shortest} characters there are for validation; "
            f"use {shortest // 2}, or a longer text"
        )
    sizes = {"num_tokens": len(corpus.characters)}
    options, plan = options.planned(comm.size)

    def make(model: nn.Module, grid: ProcessGrid) -> TextTraining:
        return TextTraining(options, corpus, model, grid, comm)

    return prepare("text", "transformer", options, comm, partial(build, options, **sizes), make, sizes, plan)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from tokens (B, S) to logits (B, S, V)."""
    return to_sequential(network_of(checkpoint, TextOptions, build))


def build(options: TextOptions, comm: Communicator | None, num_tokens: int) -> nn.Sequential:
    """The network: embedding, layers, head; what lies around the layers is the same on every rank."""
    with own_random_numbers(options.seed):
        embedding = TokenEmbedding(num_tokens, options.width, options.context)
        head = TokenHead(options.width, num_tokens)
    stack = LayerParallel(
        lambda: DecoderBlock(options.width, options.heads, dropout=options.dropout),
        options.num_layers,
        options.T,
        comm,
        **options.solvers,
        accuracy=options.accuracy,
        seed=options.seed,
    )
    return nn.Sequential(embedding, stack, head)


class TextTraining(MinibatchTraining):
    """A language model, logits (B, S, V) of tokens (B, S), that learns a text by AdamW."""

    def __init__(
        self, options: TextOptions, corpus: text.Corpus, model: nn.Module, grid: ProcessGrid, comm: Communicator
    ):
        optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(options, update))
        trained = MinibatchState(model=model, optimizer=optimizer, comm=comm, scheduler=schedule, grid=grid)
        super().__init__(options, trained, options.updates)
        self.corpus = corpus
        self.training, self.validation = corpus.split()

    def batches(self, done: int) -> Iterator[Batch]:
        for step in range(done, self.total):
            yield stretches(self.training, self.options, self.options.batch_size, step)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of logits (B, S, V) and tokens (B, S), in nats per character."""
        return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def validate(self) -> Row:
        numbers = range(self.options.validation_batches)
        batches = (stretches(self.validation, self.options, _VALIDATION_BATCH, number) for number in numbers)
        return {"val_loss": evaluate(self.trained.model, batches, self.loss, self.trained.grid)}

    def draw(self, rows: list[Row], figures: Path) -> None:
        options = self.options
        first = self.validation[: options.context]
        tokens = generate(self.trained.model, first, options.sample, options.context, options.seed)
        if rows:
            self._sample.write_text(self.corpus.decode(tokens), encoding="utf-8")
        super().draw(rows, figures)

    def say(self, row: Row) -> str:
        written = self._sample.read_text(encoding="utf-8") if self._sample.exists() else ""
        context, entropy = self.options.context, self.corpus.entropy_rate
        known = "" if entropy is None else f" (entropy rate {entropy:.4f})"
        return (
            f"\n{written[:context]}|{written[context:]}\n\nvalidation loss: {row['val_loss']:.4f} nats per character"
            f"{known}, {row['seconds']:.1f} seconds of training"
        )

    @property
    def _sample(self) -> Path:
        return self.options.out / "sample.txt"


def stretches(tokens: Tensor, options: TextOptions, number: int, step: int) -> Batch:
    """A batch of so many stretches of text, and of the characters that follow each of theirs."""
    return text.windows(tokens, options.context, number, options.seed, step)


def rate(options: TextOptions, update: int) -> float:
    """Share of the learning rate: rising linearly, then falling to a tenth along a cosine."""
    done = (update - options.warmup) / max(options.updates - options.warmup, 1)
    return min((update + 1) / (options.warmup + 1), 0.55 + 0.45 * math.cos(math.pi * min(max(done, 0.0), 1.0)))
