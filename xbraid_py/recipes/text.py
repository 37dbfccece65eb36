"""Text as a job: options, network and training of a character-level language model, and what it writes in the end.

Shape letters: `B` stretches of text, `S` characters of a stretch, `V` characters of the alphabet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import text
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.updates import Batch, evaluate
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import DecoderBlock, TokenEmbedding, TokenHead, generate
from xbraid_py.recipes.adamw import AdamWTraining, cross_entropy
from xbraid_py.recipes.minibatch import network_of, prepare
from xbraid_py.recipes.options.transformers import TextOptions
from xbraid_py.run.engine import Row
from xbraid_py.run.store.read import Checkpoint

_VALIDATION_BATCH = 64


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


class TextTraining(AdamWTraining[TextOptions]):
    """A language model, logits (B, S, V) of tokens (B, S), that learns a text by AdamW."""

    def __init__(
        self, options: TextOptions, corpus: text.Corpus, model: nn.Module, grid: ProcessGrid, comm: Communicator
    ):
        super().__init__(options, model, grid, comm, model.parameters())
        self.corpus = corpus
        self.training, self.validation = corpus.split()

    def batches(self, done: int) -> Iterator[Batch]:
        for step in range(done, self.total):
            yield stretches(self.training, self.options, self.options.samples, step)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of logits (B, S, V) and tokens (B, S), in nats per character."""
        return cross_entropy(outputs, targets)

    def validate(self) -> Row:
        numbers = range(self.options.validation_batches)
        batches = (stretches(self.validation, self.options, _VALIDATION_BATCH, number) for number in numbers)
        return {"val_loss": evaluate(self.trained.result, batches, self.loss, self.trained.grid)}

    def draw(self, rows: list[Row], figures: Path) -> None:
        options = self.options
        first = self.validation[: options.context]
        tokens = generate(self.trained.result, first, options.sample, options.context, options.seed)
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
