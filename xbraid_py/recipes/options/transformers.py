"""Options of the jobs of transformers, trained by AdamW; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes.options.minibatch import MinibatchOptions
from xbraid_py.run.run_options import free

if TYPE_CHECKING:
    from xbraid_py.planner import Layer


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(MinibatchOptions):
    """What all jobs of transformers are told.

    Parameters
    ----------
    num_layers
        Blocks.
    width
        Features of a token's state.
    heads
        Of the attention; divides width.
    updates
        Weight updates.
    learning_rate
        Of AdamW, after the warm-up; from there it falls to a tenth along a cosine.
    warmup
        Updates over which the learning rate rises.
    weight_decay
        Of AdamW.
    accumulate
        Micro-batches of an update, of batch_size samples each; the mean of their gradients counts.
    autocast
        Type of numbers that blocks and what lies around them are evaluated in while training (bfloat16), states and
        weights staying float32; not another one if not given.
    ema
        Factor of an exponential moving average of the weights, which validations and the trained model are of then:
        0.99 looks back on about 100 updates. Less at first, (1 + n) / (10 + n) after n updates.
    validation_batches
        Of 64 samples, in a validation.
    accuracy
        What is asked of the gradients.
    """

    num_layers: int = 16
    width: int = 64
    heads: int = 4
    updates: int = 400
    batch_size: int = 16
    warmup: int = 20
    weight_decay: float = 0.01
    accumulate: int = 1
    autocast: str | None = None
    ema: float | None = None
    clip: float | None = 1.0
    validate_every: int = free(50)
    validation_batches: int = free(8)
    checkpoint_every: int = free(50)
    mgrit: MGRIT | None = field(default=None, metadata={"members": MGRIT(coarse_parts=1)})
    accuracy: GradientControl = GradientControl()

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def layer(self) -> Layer:
        from xbraid_py.planner import TRANSFORMER

        return TRANSFORMER

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, updates=1, warmup=0, validation_batches=1)
        self.require_least(4, accumulate=1)
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 0.01")
        if self.autocast not in (None, "bfloat16"):
            raise ValueError(f"autocast={self.autocast!r} must be bfloat16, the type that CPUs have; use bfloat16")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema={self.ema} must be above 0 and below 1; use 0.99")

    @property
    def samples(self) -> int:
        """Of an update."""
        return self.batch_size * self.accumulate

    def require_heads(self) -> None:
        """Raise `ValueError` unless there can be such a network of blocks of another library."""
        self.require_least(4, num_layers=2, width=1, heads=1)
        self.require_most(1000, num_layers=10_000, width=10_000, heads=10_000)
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}; use 1")


@dataclass(frozen=True, kw_only=True)
class TextOptions(AdamWOptions):
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
    context
        Characters that the model looks back on.
    dropout
        Probability, with masks that depend on the layer and the update alone.
    seed
        Of initial weights, of the stretches and of a generated text.
    sample
        Characters that the trained model writes at the end, into sample.txt of the out folder.
    """

    source: str = "python"
    num_characters: int | None = None
    num_layers: int = 32
    T: float = 2.0
    width: int = 32
    context: int = 32
    dropout: float = 0.0
    learning_rate: float = 3e-3
    sample: int = free(300)
    out: Path = free(Path("runs/transformer"))

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, context=1, sample=0, num_characters=1)
        self.require_least(32, width=1)
        self.require_most(100_000, num_characters=10**8)  # drawn one by one
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1; use 0.1")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(AdamWOptions):
    """The fine-tuning job.

    Parameters
    ----------
    model
        Folder of a GPT-2 as `save_pretrained` writes it; without, one with random weights. Its sizes win.
    source
        Text: python (its manual), generated, or a text file in UTF-8. Tokens are its bytes.
    num_characters
        Take only so many characters of it, the first ones; all if not given.
    context
        Bytes that the model looks back on.
    dropout
        Probability behind attention and perceptron, with masks that depend on the layer and the update alone.
    weight_decay
        Of AdamW, for matrices; biases and norms have none.
    seed
        Of initial weights, of the stretches and of a generated text.
    sample
        Bytes that the trained model writes at the end, into sample.txt of the out folder.
    """

    model: Path | None = None
    source: str = "python"
    num_characters: int | None = None
    context: int = 64
    dropout: float = 0.0
    updates: int = 200
    learning_rate: float = 3e-3
    validation_batches: int = free(4)
    sample: int = free(300)
    out: Path = free(Path("runs/finetune"))

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, context=1, sample=0, num_characters=1)
        self.require_heads()
        self.require_most(1000, context=1_000_000)
        self.require_most(100_000, num_characters=10**8)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1; use 0.1")


@dataclass(frozen=True, kw_only=True)
class TranslateOptions(AdamWOptions):
    """The translation job.

    Parameters
    ----------
    task
        What a translation is: the sequence in reverse, or sorted (reverse, sort).
    length
        Tokens of a sequence.
    num_tokens
        Different ones.
    num_layers
        Blocks of the encoder, and of the decoder.
    seed
        Of initial weights and of the pairs.
    """

    task: str = "reverse"
    length: int = 8
    num_tokens: int = 16
    num_layers: int = 8
    width: int = 32
    updates: int = 200
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 40
    validate_every: int = free(100)
    validation_batches: int = free(4)
    checkpoint_every: int = free(100)
    out: Path = free(Path("runs/translate"))

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, length=1, num_tokens=1)
        self.require_heads()
        self.require_most(1000, length=100_000, num_tokens=1_000_000)
        if self.task not in ("reverse", "sort"):
            raise ValueError(f"task={self.task!r} must be reverse or sort; use reverse")
