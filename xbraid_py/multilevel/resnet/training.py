"""Multi-level training of a residual network on images (paper 003, section 4): options, epochs as records, state.

Shape letters: `B` images, `H W` pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.multilevel.resnet.options import Discretization, ResNetTrainingOptions
from xbraid_py.multilevel.resnet.refinement import perturb, refine, refined_tensors
from xbraid_py.run.store.read import Checkpoint, no_state
from xbraid_py.run.store.write import Shard

# Images of the test set that are propagated together: the same on any number of ranks.
_PORTION = 500
# Type of the weights, and of the products where it is another one.
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}


class LabeledImages(Protocol):
    """Images (B, 3, H, W) uint8, and labels (B,) int64."""

    @property
    def pixels(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Pipeline:
    """What becomes of images before the network sees them.

    `augment(pixels, indices, epoch)`, from uint8 to uint8, is for training images by their numbers in the set, which
    are on the CPU; `standardize(pixels, dtype)` goes from uint8 to floating point.
    """

    augment: Callable[[Tensor, Tensor, int], Tensor]
    standardize: Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class EpochRecord:
    """The state of a training run after an epoch.

    Attributes
    ----------
    epoch, cycle : int
        From 1.
    blocks : tuple of int
        Of each stage of the network.
    learning_rate : float
        Of the last training step.
    loss, error : float
        Mean cross entropy and share of wrong answers over the epoch's minibatches, each before its update.
    seconds : float
        Time of training so far.
    block_evaluations : int
        Images times blocks propagated for training so far, by all ranks: the unit of work.
    """

    epoch: int
    cycle: int
    blocks: tuple[int, ...]
    learning_rate: float
    loss: float
    error: float
    seconds: float
    block_evaluations: int


class ResNetTraining:
    """A run of (multi-level) training.

    Deterministic under a seed on the CPU. Training images that do not fill a minibatch are left out of an epoch;
    they are others in every epoch.

    Parameters
    ----------
    make : callable
        `make(level)`: the network of a level with its initial weights, the same on all ranks.
    levels : tuple of Discretization
        Of each cycle, see `plan`; the network is refined wherever their blocks change.
    train, test : LabeledImages
        The same on all ranks.
    pipeline : Pipeline
    options : ResNetTrainingOptions
    seed : int
        Of the order of the images.
    grid : ProcessGrid, optional
        Of replicas on one rank each, which share every minibatch and average the gradients.
    device : torch.device or str

    Attributes
    ----------
    network : ImageResNet
        As it is now.
    optimizer : torch.optim.SGD
    epoch : int
        Epochs made.
    seconds, block_evaluations
        So far, see `EpochRecord`.

    Raises
    ------
    ValueError
        If there are too few images, or the levels do not fit the cycles.
    """

    def __init__(
        self,
        make: Callable[[Discretization], ImageResNet],
        levels: tuple[Discretization, ...],
        train: LabeledImages,
        test: LabeledImages,
        pipeline: Pipeline,
        options: ResNetTrainingOptions,
        *,
        seed: int = 0,
        grid: ProcessGrid | None = None,
        device: torch.device | str = "cpu",
    ):
        if len(levels) != len(options.cycles.epochs):
            raise ValueError(
                f"levels holds {len(levels)} networks for {len(options.cycles.epochs)} cycles; use one for each"
            )
        if options.batch_size > len(train.labels):
            raise ValueError(
                f"batch_size={options.batch_size} exceeds the {len(train.labels)} training images; "
                f"use {len(train.labels)} at most"
            )
        if grid is not None and options.batch_size < grid.replicas:
            raise ValueError(
                f"batch_size={options.batch_size} is less than one for each of {grid.replicas} ranks; use 100"
            )
        self.make, self.levels, self.pipeline, self.options = make, levels, pipeline, options
        self.seed, self.grid, self.device = seed, grid, torch.device(device)
        self.dtype, self._product_dtype = PRECISIONS[options.precision]
        self.train, self.test = ((each.pixels.to(device), each.labels.to(device)) for each in (train, test))
        self.steps_per_epoch = len(train.labels) // options.batch_size
        self.network = self._placed(make(levels[0]))
        self.optimizer = self._new_optimizer()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=options.precision == "float16")
        self.epoch, self.seconds, self.block_evaluations = 0, 0.0, 0

    def run(self) -> Iterator[EpochRecord]:
        """Train to the end, from where it is; yields a record after each epoch, when `network` is the one it is of.

        Raises `RunError` on all ranks if the loss is not finite.
        """
        cycles, steps = self.options.cycles, self.steps_per_epoch
        while self.epoch < cycles.total:
            clock = time.perf_counter()
            cycle = cycles.cycle_of(self.epoch)
            blocks = self.levels[cycle].blocks
            if blocks != self.network.blocks:
                self.interpolate()
            loss, error = self._train(self.epoch)
            self._average_statistics()
            self.epoch += 1
            self.block_evaluations += steps * self.options.batch_size * sum(blocks)
            self.seconds += time.perf_counter() - clock
            rate = cycles.learning_rate(self.epoch * steps - 1, steps)
            yield EpochRecord(self.epoch, cycle + 1, blocks, rate, loss, error, self.seconds, self.block_evaluations)

    def interpolate(self) -> None:
        """Double the blocks of every stage and halve the step size (paper 003, figure 5)."""
        coarse, momentum, how = self.network, self._momentum(), self.options.interpolation
        self.network = self._placed(refine(coarse, how))
        if self.options.noise:
            # Of the seed and the epoch alone, so that a run which goes on has the same.
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            perturb(self.network, self.options.noise, random)
        self.optimizer = self._new_optimizer()
        if self.options.carry_momentum and momentum:
            self._set_momentum(refined_tensors(coarse, momentum, how))

    def evaluate(self) -> tuple[float, float]:
        """Mean cross entropy and share of wrong answers on the test images, the same on all ranks; collective."""
        self.network.eval()
        pixels, labels = self.test
        portions = Partition.balanced(-(-len(labels) // _PORTION), self.grid.replicas if self.grid else 1)
        rank = self.grid.replica if self.grid else 0
        rows = torch.zeros(portions.count(rank), 2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for row, portion in enumerate(range(portions.first(rank), portions.first(rank) + portions.count(rank))):
                some = slice(portion * _PORTION, (portion + 1) * _PORTION)
                logits, loss = self._forward(pixels[some], labels[some])
                rows[row, 0] = loss.double() * len(logits)
                rows[row, 1] = (logits.argmax(1) != labels[some]).sum()
        if self.grid:
            counts = [portions.count(each) for each in range(self.grid.replicas)]
            rows = self.grid.data.ordered_sum(rows.cpu(), counts)
        else:
            rows = rows.cpu().cumsum(0)[-1]
        loss, wrong = (rows / len(labels)).tolist()
        return loss, wrong

    def state(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """Where the run has come to after an epoch: weights, statistics, momentum; and the counters.

        Everything else is a function of the seed and the epoch. All ranks have the same: the first one gives it.
        """
        found = {f"network/{name}": value.detach() for name, value in self.network.state_dict().items()}
        found |= {f"momentum/{name}": value for name, value in self._momentum().items()}
        if self._scaler.is_enabled():
            scale = self._scaler.state_dict()
            found["scaler"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
        if self.grid is not None and self.grid.replica > 0:
            found = {}
        rows = {name: (value if value.dim() else value.reshape(1)).cpu() for name, value in found.items()}
        numbers = {"epoch": self.epoch, "seconds": self.seconds, "block_evaluations": self.block_evaluations}
        return {name: Shard(value, 0, len(value)) for name, value in rows.items()}, numbers

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from what `state` of the same run gave; sends no message.

        Raises `CheckpointError`, `LookupError`, `RuntimeError`, `TypeError` or `ValueError` if it is of another
        network, or something is missing.
        """
        numbers = checkpoint.meta["state"]
        epoch = numbers["epoch"]
        if type(epoch) is not int or not 1 <= epoch <= self.options.cycles.total:
            raise no_state(checkpoint.path, f"epoch={epoch!r}")
        self.network = self._placed(self.make(self.levels[self.options.cycles.cycle_of(epoch - 1)]))
        load_network(checkpoint, self.network)
        self.optimizer = self._new_optimizer()
        prefix = "momentum/"
        held = [name for name in checkpoint.names() if name.startswith(prefix)]
        if held:
            self._set_momentum({name.removeprefix(prefix): checkpoint.rows(name) for name in held})
        if self._scaler.is_enabled():
            scale, tracker = checkpoint.rows("scaler").tolist()
            known = self._scaler.state_dict()
            self._scaler.load_state_dict(known | {"scale": scale, "_growth_tracker": int(tracker)})
        self.epoch, self.seconds = epoch, float(numbers["seconds"])
        self.block_evaluations = int(numbers["block_evaluations"])

    def _train(self, epoch: int) -> tuple[float, float]:
        """An epoch; its loss and error."""
        self.network.train()
        pixels, labels = self.train
        batch, steps, grid = self.options.batch_size, self.steps_per_epoch, self.grid
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=random)
        sums = torch.zeros(2, steps, dtype=torch.float64, device=self.device)
        for step, chosen in enumerate(order[: steps * batch].split(batch)):
            rate = self.options.cycles.learning_rate(epoch * steps + step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            share = grid.shard(chosen) if grid else chosen
            here = share.to(self.device)
            wanted = labels[here]
            logits, loss = self._forward(self.pipeline.augment(pixels[here], share, epoch), wanted)
            self.optimizer.zero_grad()
            self._scaler.scale(loss).backward()
            if grid:
                grid.average_gradients(self.network, samples=len(share))
            self._scaler.step(self.optimizer)
            self._scaler.update()
            # Looked at after the epoch: a GPU need not wait for it now.
            sums[0, step] = loss.detach().double() * len(share)
            sums[1, step] = (logits.detach().argmax(1) != wanted).sum()
        sums = sums.cpu() / batch
        if grid:
            sums = grid.data.ordered_sum(sums[None], [1] * grid.replicas)
        bad = (~sums[0].isfinite()).nonzero()
        if len(bad):
            at = int(bad[0])
            raise RunError(
                f"epoch {epoch + 1}, minibatch {at + 1}: the loss is {float(sums[0, at])}; use a smaller eta_max"
            )
        loss, error = sums.mean(1).tolist()
        return loss, error

    def _forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and mean loss of images as they lie in the set."""
        inputs = self.pipeline.standardize(pixels, self.dtype)
        if self.options.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self._product_dtype, enabled=self._product_dtype is not None):
            logits = self.network(inputs)
            return logits, nn.functional.cross_entropy(logits, labels)

    def _average_statistics(self) -> None:
        """The running statistics of all ranks become their means."""
        buffers = [each for each in self.network.buffers() if each.is_floating_point()]
        if not self.grid or not buffers:
            return
        flat = torch.cat([each.reshape(-1) for each in buffers])
        mean = self.grid.data.ordered_sum(flat[None], [1] * self.grid.replicas) / self.grid.replicas
        for buffer, part in zip(buffers, mean.split([each.numel() for each in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def _placed(self, network: ImageResNet) -> ImageResNet:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        options: dict[str, Any] = {"memory_format": layout}  # which torch's types do not know
        return network.to(self.device, self.dtype, **options)

    def _new_optimizer(self) -> torch.optim.SGD:
        options = self.options
        return torch.optim.SGD(
            self.network.parameters(),
            lr=options.cycles.eta_max,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

    def _momentum(self) -> dict[str, Tensor]:
        """By the names of the parameters; empty before the first step."""
        state = self.optimizer.state
        found = {name: state[p].get("momentum_buffer") for name, p in self.network.named_parameters() if p in state}
        return {name: value for name, value in found.items() if value is not None}

    def _set_momentum(self, momentum: Mapping[str, Tensor]) -> None:
        for name, parameter in self.network.named_parameters():
            value = momentum[name].reshape(parameter.shape)
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(value)


def load_network(checkpoint: Checkpoint, network: ImageResNet) -> None:
    """Take weights and statistics from a checkpoint of training.

    Raises `CheckpointError` or `RuntimeError` if they are those of another network.
    """
    own, prefix = network.state_dict(), "network/"
    held = {name.removeprefix(prefix) for name in checkpoint.names() if name.startswith(prefix)}
    if held != own.keys():
        raise no_state(checkpoint.path, f"other arrays than this network has: {sorted(held ^ own.keys())[:3]}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(checkpoint.rows(f"{prefix}{name}").reshape(value.shape))
