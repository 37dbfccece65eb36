"""Translation as a job: an encoder and a decoder that learn pairs of sequences, each parallel in its layers.

Shape letters: `B` pairs, `S` tokens of a sequence, `V` tokens, that before a translation included, `d` features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.pairs import START, pairs, shifted
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.updates import Batch, evaluate
from xbraid_py.layer_parallel.parallelize import parallelize
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.recipes.adamw import AdamWTraining, cross_entropy
from xbraid_py.recipes.minibatch import network_of, prepare
from xbraid_py.recipes.options.transformers import TranslateOptions
from xbraid_py.run.engine import Row
from xbraid_py.run.store.read import Checkpoint

_VALIDATION_BATCH = 64
_VALIDATION = 1 << 40  # steps of the draws that no update has


class Translator(nn.Module):
    """Logits (B, S, V) of the tokens of translations, from pairs (B, 2, S): sequences, and what the decoder is shown.

    Parameters
    ----------
    options : TranslateOptions
    """

    def __init__(self, options: TranslateOptions):
        super().__init__()
        num_tokens, width = options.num_tokens + 1, options.width
        self.embedding, self.places = nn.Embedding(num_tokens, width), nn.Embedding(options.length, width)
        depth = options.num_layers
        form = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, options.heads, **form)
        encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.body = nn.Transformer(width, options.heads, num_decoder_layers=depth, custom_encoder=encoder, **form)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, inputs: Tensor) -> Tensor:
        sources, before = inputs.unbind(1)
        length = inputs.shape[2]
        places = self.places(torch.arange(length, device=inputs.device))
        mask = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
        states = self.body(self.embedding(sources) + places, self.embedding(before) + places, tgt_mask=mask)
        return self.head(states)


def prepare_translate(options: TranslateOptions, comm: Communicator) -> Callable[[], Row]:
    """Check everything, without a message; returns the run."""
    options, plan = options.planned(comm.size)

    def make(model: nn.Module, grid: ProcessGrid) -> TranslateTraining:
        return TranslateTraining(options, model, grid, comm)

    return prepare("translate", "translate", options, comm, partial(build, options), make, {}, plan)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from pairs (B, 2, S) to logits (B, S, V)."""
    return to_sequential(network_of(checkpoint, TranslateOptions, build))


def build(options: TranslateOptions, comm: Communicator | None) -> nn.Module:
    """The network: the layers of the encoder, and those of the decoder, in a stack each."""
    with own_random_numbers(options.seed):
        model = Translator(options)
    more = {**options.solvers, "accuracy": options.accuracy, "seed": options.seed}
    for half in ("encoder", "decoder"):
        parallelize(model, comm, f"body.{half}.layers", form="map", **more)
    return model


class TranslateTraining(AdamWTraining[TranslateOptions]):
    """A translator that learns by AdamW."""

    def batches(self, done: int) -> Iterator[Batch]:
        for step in range(done, self.total):
            yield self._pairs(self.options.samples, step)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of logits (B, S, V) and tokens (B, S), in nats per token."""
        return cross_entropy(outputs, targets)

    def validate(self) -> Row:
        def found(measure: Callable[[Tensor, Tensor], Tensor]) -> float:
            numbers = range(self.options.validation_batches)
            batches = (self._pairs(_VALIDATION_BATCH, _VALIDATION + number) for number in numbers)
            return evaluate(self.trained.result, batches, measure, self.trained.grid)

        return {"val_loss": found(self.loss), "val_accuracy": found(_share_of_tokens)}

    def draw(self, rows: list[Row], figures: Path) -> Row | None:
        plain = to_sequential(self.trained.result)
        super().draw(rows, figures)
        if not rows:
            return None
        (inputs, targets) = self._pairs(_VALIDATION_BATCH, _VALIDATION)
        found = translate(plain, inputs[:, 0])
        lines = [
            f"{' '.join(map(str, source.tolist()))} -> {' '.join(map(str, end.tolist()))}"
            for source, end in zip(inputs[:8, 0], found[:8], strict=True)
        ]
        (self.options.out / "sample.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"translated": float((found == targets).all(1).double().mean())}

    def say(self, row: Row) -> str:
        return (
            f"\nvalidation: {row['val_loss']:.4f} nats per token, {100 * row['val_accuracy']:.2f} % of the tokens, "
            f"{row['seconds']:.1f} seconds of training; translations are in {self.options.out / 'sample.txt'}"
        )

    def _pairs(self, number: int, step: int) -> Batch:
        """A batch of so many pairs: what goes into the network, and the translations."""
        options = self.options
        sources, targets = pairs(options.task, options.num_tokens, options.length, number, options.seed, step)
        return torch.stack([sources, shifted(targets)], 1), targets


@torch.no_grad()
def translate(model: nn.Module, sources: Tensor) -> Tensor:
    """Translations (B, S) of sequences (B, S), each token the likeliest behind those before it.

    Parameters
    ----------
    model : nn.Module
        Like a `Translator`; without ranks, or called on all of them.
    sources : (B, S) tensor of int64
    """
    was_training = model.training
    model.eval()
    found = before = torch.full_like(sources, START)
    for place in range(sources.shape[1]):
        found = model(torch.stack([sources, before], 1)).argmax(-1)
        # What stands behind is not seen.
        before[:, place + 1 : place + 2] = found[:, place : place + 1][:, : before.shape[1] - place - 1]
    model.train(was_training)
    return found


def _share_of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).double().mean()
