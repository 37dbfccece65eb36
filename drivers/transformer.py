"""Text: a character-level language model of many decoder blocks, trained in parallel over its layers.

    u_0 = embedding(text),   u_{n+1} = u_n + h F(u_n, theta_n),  n = 0 .. N-1,  h = T/N,   logits = head(u_N),

where u + F(u) is a pre-norm decoder block of causal self-attention and a perceptron. AdamW. Try

    mpirun -n 4 python drivers/transformer.py
    mpirun -n 4 python drivers/transformer.py --resume auto
    mpirun -n 4 python drivers/transformer.py --source generated --replicas 2
    python drivers/transformer.py --smoke --exact
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, GradientControl, LayerParallel
from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import text
from xbraid_py.layer_parallel.minibatch.state import Trained
from xbraid_py.layer_parallel.minibatch.updates import evaluate
from xbraid_py.layers.transformer import DecoderBlock, TokenEmbedding, TokenHead, generate
from xbraid_py.recipes.digits_resume import read_resumed
from xbraid_py.recipes.digits_run import follow
from xbraid_py.run.folder import claim
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging
from xbraid_py.run.tensorboard import require_tensorboard

# What may differ between a run and its continuation: where things are, how often it looks, how ranks are shared out.
FREE = (
    *("out", "resume", "smoke", "record_every", "validate_every", "validation_batches", "checkpoint_every", "keep"),
    *("sample", "tensorboard", "replicas"),
)
VALIDATION_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Options:
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
    batch_size
        Stretches of text of an update, of all replicas together.
    learning_rate
        Of AdamW, after the warm-up; from there it falls to a tenth along a cosine.
    warmup
        Updates over which the learning rate rises.
    weight_decay
        Of AdamW.
    clip
        2-norm above which the gradient is scaled down.
    seed
        Of initial weights, of the stretches and of a generated text.
    replicas
        Copies of the network, each on as many ranks, that share out every batch; divides the number of ranks.
    exact
        Propagate layer after layer instead of by MGRIT.
    record_every
        Updates between two rows of the record.
    validate_every
        Updates between two validations.
    validation_batches
        Of 64 stretches, in a validation.
    sample
        Characters that the trained model writes at the end.
    checkpoint_every
        Updates between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    out
        Folder of the record, the checkpoints, the picture and the sample.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one).
    tensorboard
        Write event files for TensorBoard as well.
    smoke
        A run of seconds: other defaults, each of which may still be given.
    mgrit
        Solver of the states.
    adjoint
        Solver of the adjoints; what is left at its default is taken from mgrit.
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
    clip: float = 1.0
    seed: int = 0
    replicas: int = 1
    exact: bool = False
    record_every: int = 1
    validate_every: int = 50
    validation_batches: int = 8
    sample: int = 300
    checkpoint_every: int = 50
    keep: int = 3
    out: Path = Path("runs/transformer")
    resume: str | None = None
    tensorboard: bool = False
    smoke: bool = False
    mgrit: MGRIT = MGRIT(coarse_parts=1)
    adjoint: MGRIT = MGRIT()
    accuracy: GradientControl = GradientControl()

    def __post_init__(self):
        least = {"context": 1, "updates": 1, "batch_size": 1, "warmup": 0, "replicas": 1, "record_every": 1}
        least |= {"validate_every": 1, "validation_batches": 1, "sample": 0, "checkpoint_every": 1, "keep": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}; use 10")
        for name, good in (("learning_rate", "0.003"), ("clip", "1.0")):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 0.01")
        if self.batch_size < self.replicas:
            raise ValueError(f"batch_size={self.batch_size} is less than replicas={self.replicas}; use {self.replicas}")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The text job in seconds."""

    __doc__ = Options.__doc__
    source: str = "generated"
    num_characters: int | None = 5000
    num_layers: int = 16
    width: int = 8
    heads: int = 2
    context: int = 16
    updates: int = 8
    batch_size: int = 8
    warmup: int = 2
    validate_every: int = 4
    validation_batches: int = 1
    sample: int = 20
    checkpoint_every: int = 4
    mgrit: MGRIT = MGRIT(cfactor=4)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    if comm.size % options.replicas:
        raise ValueError(f"replicas={options.replicas} does not divide the {comm.size} rank(s); use 1")
    corpus = text.load(options.source, options.num_characters, options.seed)
    training, validation = corpus.split()
    stretches(validation, options, 1, 0)  # too short a text is refused here
    num_tokens = len(corpus.characters)
    alone = build(options, None, num_tokens)  # without ranks it sends no message, and refuses what others would refuse
    if options.tensorboard:
        require_tensorboard()
    folder = claim(options.out, comm)
    start = read_resumed(options.resume, options.out, to_dict(options), FREE, alone)
    sample = options.out / "sample.txt"

    def run() -> None:
        grid = ProcessGrid(comm, options.replicas)
        model = build(options, grid.layers, num_tokens)
        optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(options, update))

        def validate() -> dict[str, float]:
            batches = (stretches(validation, options, VALIDATION_BATCH, k) for k in range(options.validation_batches))
            return {"validation_loss": evaluate(model, batches, loss, grid)}

        def write_sample() -> None:
            first = validation[: options.context]
            written = corpus.decode(generate(model, first, options.sample, options.context, options.seed))
            if comm.rank == 0:
                sample.write_text(written, encoding="utf-8")

        tested = follow(
            Trained(model=model, optimizer=optimizer, scheduler=schedule, grid=grid),
            lambda done: (stretches(training, options, options.batch_size, k) for k in range(done, options.updates)),
            loss,
            validate,
            folder=folder,
            configuration=to_dict(options),
            num_updates=options.updates,
            record_every=options.record_every,
            test_every=options.validate_every,
            checkpoint_every=options.checkpoint_every,
            keep=options.keep,
            clip=options.clip,
            start=start,
            finish=write_sample,
            sizes={"num_tokens": num_tokens},
            tensorboard=options.tensorboard,
        )
        if comm.rank == 0:
            written = sample.read_text(encoding="utf-8") if sample.exists() else ""
            print(f"\n{written[: options.context]}|{written[options.context :]}\n")
            known = "" if corpus.entropy_rate is None else f" (entropy rate {corpus.entropy_rate:.4f})"
            reached = f"validation loss: {tested['validation_loss']:.4f} nats per character{known}"
            print(f"{reached}, {tested['seconds']:.1f} seconds of training", flush=True)

    return run


def build(options: Options, comm: Communicator | None, num_tokens: int) -> nn.Sequential:
    """The network: embedding, layers, head; what lies around the layers is the same on every rank."""
    torch.manual_seed(options.seed)
    stack = LayerParallel(
        lambda: DecoderBlock(options.width, options.heads, dropout=options.dropout),
        options.num_layers,
        options.T,
        comm,
        mgrit=replace(options.mgrit, max_levels=1) if options.exact else options.mgrit,
        adjoint=replace(options.adjoint, max_levels=1) if options.exact else options.adjoint,
        accuracy=options.accuracy,
        seed=options.seed,
    )
    embedding = TokenEmbedding(num_tokens, options.width, options.context)
    return nn.Sequential(embedding, stack, TokenHead(options.width, num_tokens))


def stretches(tokens: Tensor, options: Options, number: int, step: int) -> tuple[Tensor, Tensor]:
    """A batch of so many stretches of text, and of the characters that follow each of theirs."""
    return text.windows(tokens, options.context, number, options.seed, step)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, S, V) and tokens (B, S), in nats per character."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rate(options: Options, update: int) -> float:
    """Share of the learning rate: rising linearly, then falling to a tenth along a cosine."""
    done = (update - options.warmup) / max(options.updates - options.warmup, 1)
    return min((update + 1) / (options.warmup + 1), 0.55 + 0.45 * math.cos(math.pi * min(max(done, 0.0), 1.0)))


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
