"""Fine-tuning as a job: a GPT-2 of `transformers` learns from the bytes of a text, in parallel over its layers.

Shape letters: `B` stretches of text, `S` bytes of a stretch, `V` tokens, of which the first 256 are the bytes.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import text
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.updates import Batch, evaluate
from xbraid_py.layer_parallel.parallelize import parallelize
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import generate
from xbraid_py.recipes.adamw import AdamWTraining, cross_entropy
from xbraid_py.recipes.minibatch import network_of, prepare
from xbraid_py.recipes.options.transformers import FinetuneOptions
from xbraid_py.run.engine import Row
from xbraid_py.run.store.read import Checkpoint

BYTES = 256
_VALIDATION_BATCH = 64
_log = logging.getLogger(__name__)


def prepare_finetune(options: FinetuneOptions, comm: Communicator) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run."""
    config = _config(options)
    options = replace(
        options,
        num_layers=config.n_layer,
        width=config.n_embd,
        heads=config.n_head,
        context=min(options.context, config.n_positions),
    )
    written = text.load(options.source, options.num_characters, options.seed).text.encode()
    tokens = torch.frombuffer(bytearray(written), dtype=torch.uint8).long()
    parts = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    hold(comm, "text", *parts)
    if options.context >= len(parts[1]):
        raise ValueError(
            f"context={options.context} must be less than the {len(parts[1])} bytes there are for validation; use "
            f"{max(len(parts[1]) // 2, 1)}, or a longer text"
        )
    options, plan = options.planned(comm.size)

    def make(model: nn.Module, grid: ProcessGrid) -> FinetuneTraining:
        return FinetuneTraining(options, parts, model, grid, comm)

    return prepare("finetune", "finetune", options, comm, partial(build, options), make, {}, plan)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained model of a checkpoint, as `transformers` has it."""
    return to_sequential(network_of(checkpoint, FinetuneOptions, build))


def build(options: FinetuneOptions, comm: Communicator | None) -> nn.Module:
    """The model, its blocks in parallel; what lies around them is the same on every rank."""
    kind = load_transformers().GPT2LMHeadModel
    with own_random_numbers(options.seed):
        if options.model is None:
            model = kind(_config(options))
        else:
            model = kind.from_pretrained(options.model, config=_config(options), local_files_only=True).float()
    more = {**options.solvers, "accuracy": options.accuracy, "seed": options.seed}
    return parallelize(model, comm, "transformer.h", form="map", **more)


def _config(options: FinetuneOptions) -> Any:
    """The configuration of the model. `ValueError` if its folder holds none for bytes."""
    kind = load_transformers().GPT2Config
    # The attention's own masks would be others in every sweep of a solve.
    common = {"attn_pdrop": 0.0, "resid_pdrop": options.dropout, "embd_pdrop": 0.0, "use_cache": False}
    if options.model is None:
        sizes = {"n_layer": options.num_layers, "n_embd": options.width, "n_head": options.heads}
        ends = {"bos_token_id": None, "eos_token_id": None}
        return kind(vocab_size=BYTES, n_positions=options.context, **sizes, **ends, **common)
    if not (options.model / "config.json").is_file():
        raise ValueError(f"model={options.model} is no folder with a config.json; give one that save_pretrained wrote")
    try:
        found = kind.from_pretrained(options.model, local_files_only=True, **common)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={options.model} cannot be read: {error}") from error
    if found.vocab_size < BYTES or found.n_layer < 2:
        raise ValueError(
            f"model={options.model} has {found.vocab_size} tokens and {found.n_layer} blocks; {BYTES} and 2 are needed"
        )
    return found


def load_transformers() -> ModuleType:
    """The package `transformers`, which text needs no torchvision for. `ValueError` if it cannot be loaded."""
    if "transformers" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            pass
        except RuntimeError as error:
            _log.warning("torchvision does not fit torch, and is left out: %s", error)
            sys.modules["torchvision"] = cast(Any, None)  # as if it were not there
    try:
        package = importlib.import_module("transformers")
        assert package.GPT2LMHeadModel
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"the model is one of transformers, which is not to be had ({error}); install it") from error
    return package


class FinetuneTraining(AdamWTraining[FinetuneOptions]):
    """A GPT-2 that learns a text, given as the bytes for training and those for validation, by AdamW."""

    def __init__(
        self,
        options: FinetuneOptions,
        tokens: tuple[Tensor, Tensor],
        model: nn.Module,
        grid: ProcessGrid,
        comm: Communicator,
    ):
        super().__init__(options, model, grid, comm)
        self.training, self.validation = tokens

    def batches(self, done: int) -> Iterator[Batch]:
        for step in range(done, self.total):
            yield self._stretches(self.training, self.options.samples, step)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean cross entropy of the logits (B, S, V) and bytes (B, S), in nats per byte."""
        return cross_entropy(outputs.logits, targets)

    def validate(self) -> Row:
        numbers = range(self.options.validation_batches)
        batches = (self._stretches(self.validation, _VALIDATION_BATCH, number) for number in numbers)
        return {"val_loss": evaluate(self.trained.result, batches, self.loss, self.trained.grid)}

    def draw(self, rows: list[Row], figures: Path) -> None:
        plain: Any = to_sequential(self.trained.result).eval()  # a model of transformers
        if rows:
            load_transformers().utils.logging.disable_progress_bar()
            plain.save_pretrained(self.options.out / "model")
            first = self.validation[: self.options.context]
            written = generate(_Logits(plain), first, self.options.sample, self.options.context, self.options.seed)
            self._sample.write_text(bytes(written.tolist()).decode(errors="replace"), encoding="utf-8")
        super().draw(rows, figures)

    def say(self, row: Row) -> str:
        written = self._sample.read_text(encoding="utf-8") if self._sample.exists() else ""
        return (
            f"\n{written}\n\nvalidation loss: {row['val_loss']:.4f} nats per byte (entropy of the bytes alone "
            f"{_entropy(self.training):.4f}), {row['seconds']:.1f} seconds of training; the model is in "
            f"{self.options.out / 'model'}"
        )

    @property
    def _sample(self) -> Path:
        return self.options.out / "sample.txt"

    def _stretches(self, tokens: Tensor, number: int, step: int) -> Batch:
        """A batch of so many stretches of text, and of the bytes that follow each of theirs."""
        return text.windows(tokens, self.options.context, number, self.options.seed, step)


def _entropy(tokens: Tensor) -> float:
    """What a model that knows how often each byte occurs, and nothing else, would come to, in nats."""
    shares = tokens.bincount() / len(tokens)
    return float(torch.special.entr(shares).sum())


class _Logits(nn.Module):
    """The logits (B, S, 256) of a language model for bytes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits[..., :BYTES]
