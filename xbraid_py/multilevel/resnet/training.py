"""Multi-level training of a residual network on images (paper 003, section 4): epochs as records.

Shape letters: `B` images, `H W` pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from xbraid_py.comm.errors import RunError
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.multilevel.resnet.cycles import Level
from xbraid_py.multilevel.resnet.refinement import refine, refined_tensors
from xbraid_py.multilevel.resnet.training_options import (
    PRECISIONS,
    EpochRecord,
    LabeledImages,
    Pipeline,
    ResNetTrainingOptions,
)

# Images of the test set that are propagated together: the same on any number of ranks.
_PORTION = 500


class ResNetTraining:
    """A run of (multi-level) training.

    Deterministic under a seed on the CPU. Training images that do not fill a minibatch are left out of an epoch;
    they are others in every epoch.

    Parameters
    ----------
    make : callable
        `make(level)`: the network of a level with its initial weights, the same on all ranks.
    levels : tuple of Level
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

    Raises
    ------
    ValueError
        If there are too few images, or the levels do not fit the cycles.
    """

    def __init__(
        self,
        make: Callable[[Level], ImageResNet],
        levels: tuple[Level, ...],
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

    def run(self, validate_every: int = 1, done: EpochRecord | None = None) -> Iterator[EpochRecord]:
        """Train to the end; yields a record after each epoch, when `network` is the one that it is of.

        Parameters
        ----------
        validate_every : int
            Epochs between two looks at the test images; the ends of cycles come in addition.
        done : EpochRecord, optional
            Where an earlier run has come to, whose state has been restored.

        Raises
        ------
        RunError
            On all ranks, if the loss is not finite.
        """
        cycles = self.options.cycles
        first, seconds, evaluations = (done.epoch, done.seconds, done.block_evaluations) if done else (0, 0.0, 0)
        for epoch in range(first, cycles.total):
            clock = time.perf_counter()
            cycle = cycles.cycle_of(epoch)
            blocks = self.levels[cycle].blocks
            if blocks != self.network.blocks:
                self.interpolate()
            loss, error = self._train(epoch)
            self._average_statistics()
            evaluations += self.steps_per_epoch * self.options.batch_size * sum(blocks)
            seconds += time.perf_counter() - clock
            due = (epoch + 1) % validate_every == 0 or epoch + 1 in cycles.ends
            rate = cycles.learning_rate((epoch + 1) * self.steps_per_epoch - 1, self.steps_per_epoch)
            found = self.evaluate() if due else (None, None)
            yield EpochRecord(epoch + 1, cycle + 1, blocks, rate, loss, error, *found, seconds, evaluations)

    def interpolate(self) -> None:
        """Double the blocks of every stage and halve the step size (paper 003, figure 5)."""
        coarse, momentum, how = self.network, self._momentum(), self.options.interpolation
        self.network = self._placed(refine(coarse, how))
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

    def state(self) -> dict[str, Tensor]:
        """Where the run has come to, by name: weights, statistics, momentum; the same on all ranks after an epoch.

        Everything else is a function of the seed and the epoch.
        """
        found = {f"network/{name}": value.detach() for name, value in self.network.state_dict().items()}
        found |= {f"momentum/{name}": value for name, value in self._momentum().items()}
        if self._scaler.is_enabled():
            scale = self._scaler.state_dict()
            found["scaler"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
        return {name: value if value.dim() else value.reshape(1) for name, value in found.items()}

    def restore(self, state: Mapping[str, Tensor], epoch: int) -> None:
        """Go on from what `state` of the same run gave after so many epochs.

        Raises
        ------
        ValueError, KeyError
            If it is of another network, or something is missing.
        """
        self.network = self._placed(self.make(self.levels[self.options.cycles.cycle_of(epoch - 1)]))
        own = self.network.state_dict()
        given = {name.removeprefix("network/"): value for name, value in state.items() if name.startswith("network/")}
        if given.keys() != own.keys():
            raise ValueError(f"state holds other arrays than this network: {sorted(given.keys() ^ own.keys())[:3]}")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(given[name].reshape(value.shape))
        self.optimizer = self._new_optimizer()
        momentum = {name.removeprefix("momentum/"): v for name, v in state.items() if name.startswith("momentum/")}
        if momentum:
            self._set_momentum(momentum)
        if self._scaler.is_enabled():
            scale, tracker = state["scaler"].tolist()
            known = self._scaler.state_dict()
            self._scaler.load_state_dict(known | {"scale": scale, "_growth_tracker": int(tracker)})

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
        return network.to(self.device, self.dtype, memory_format=layout)

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
