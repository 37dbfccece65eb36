"""What a run of (multi-level) training on images is told, whoever starts it; and the training made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.augmentation import Augmentation, standardize
from xbraid_py.data.image_subsets import Samples
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.resnet.cycles import CosineCycles, Level, plan
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.multilevel.resnet.training_options import EpochRecord, Pipeline, ResNetTrainingOptions

FILTERS, WIDE = (16, 32, 64), (32, 64, 128)
# Images of a minibatch, and zeros around an image, by the set (paper 003, section 5.2 and appendix A).
_BATCH_SIZES, _PADS = {"stl10": 32}, {"stl10": 12}


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Data, network and training, but for the model and the seed.

    Parameters
    ----------
    data
        The set of images.
    train_images
        Take only so many training images; 0 takes all that are found.
    test_images
        The same of the test images.
    blocks
        Residual blocks of each stage in the first cycle; twice as many in every further one.
    wide
        Twice the filters: a Wide ResNet.
    filters
        Of each stage; by default 16,32,64, or 32,64,128 with --wide.
    norm
        Normalization: batch, group, batch with frozen statistics, none. Batch normalization takes each rank's share of
        a minibatch for itself, so that its results depend on the number of ranks.
    stem_stride
        Of the first convolution; 2 halves large images at once.
    step_size
        Explicit step size h of the first cycle.
    last_step_size
        That of the model last; by default that of the last cycle.
    epochs
        Of each cycle.
    eta_max
        Learning rate at the beginning of a cycle.
    eta_min
        Learning rate at its end.
    reset
        Begin with eta_max in every cycle; otherwise one cosine spans all of them.
    batch_size
        Images of a minibatch, shared by the ranks; by default 100, or 32 of STL-10.
    momentum
        Of SGD.
    weight_decay
        Of SGD.
    interpolation
        Of the weights in depth where the blocks are doubled.
    carry_momentum
        Prolong the momentum there as well; otherwise it begins anew.
    pad
        Zeros around a training image, of which a part is cut out; by default 4, or 12 of STL-10.
    flip
        Flip every other training image, by chance.
    precision
        Of the numbers; bfloat16 and float16 are mixed with float32.
    channels_last
        Channels innermost in memory: faster on GPUs with mixed precision.
    device
        Where it runs; on several GPUs every rank takes its own.
    validate_every
        Epochs between two looks at the test images; the ends of cycles come in addition.
    """

    data: Literal["cifar10", "cifar100", "stl10"] = "cifar10"
    train_images: int = 0
    test_images: int = 0
    blocks: tuple[int, ...] = (2, 2, 2)
    wide: bool = False
    filters: tuple[int, ...] | None = None
    norm: Literal["batch", "group", "frozen", "none"] = "batch"
    stem_stride: int = 1
    step_size: float = 1.0
    last_step_size: float | None = None
    epochs: tuple[int, ...] = (60, 50, 50)
    eta_max: float = 0.5
    eta_min: float = 0.001
    reset: bool = True
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 2e-4
    interpolation: Literal["constant", "linear"] = "constant"
    carry_momentum: bool = False
    pad: int | None = None
    flip: bool = True
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    validate_every: int = 1

    def __post_init__(self):
        if self.wide and self.filters is not None and tuple(self.filters) != WIDE:
            raise ValueError(f"filters={list(self.filters)} and wide=True are two choices; use one of them")
        if self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every} must be at least 1; use 5")
        if self.pad is not None and self.pad < 0:
            raise ValueError(f"pad={self.pad} must be at least 0; use 4")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} must be cpu or cuda; use cpu")
        _ = self.training
        with torch.device("meta"):  # no memory, no random numbers: only the checks
            self._network(self.levels("first")[0], 10)

    @property
    def training(self) -> ResNetTrainingOptions:
        """The options of the training."""
        names = "momentum weight_decay interpolation carry_momentum precision channels_last".split()
        return ResNetTrainingOptions(
            cycles=CosineCycles(epochs=self.epochs, eta_max=self.eta_max, eta_min=self.eta_min, reset=self.reset),
            batch_size=_BATCH_SIZES.get(self.data, 100) if self.batch_size is None else self.batch_size,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Filters of each stage."""
        return tuple(self.filters) if self.filters else WIDE if self.wide else FILTERS

    def levels(self, model: str) -> tuple[Level, ...]:
        """Networks of the cycles of a model, see `plan`."""
        return plan(model, self.blocks, len(self.epochs), self.step_size, self.last_step_size)

    def make(self, model: str, seed: int, samples: Samples, grid: ProcessGrid | None = None) -> ResNetTraining:
        """The training of a model, ready to go.

        All models of a seed have the same minibatches and the same augmentation.

        Raises
        ------
        ValueError
            If there are too few images, or there is no such device.
        """

        def network(level: Level) -> ImageResNet:
            with own_random_numbers(seed):
                return self._network(level, samples.num_classes)

        return ResNetTraining(
            network,
            self.levels(model),
            samples.train,
            samples.test,
            Pipeline(Augmentation(pad=self._pad, flip=self.flip, seed=seed), standardize),
            self.training,
            seed=seed,
            grid=grid,
            device=self.device_of(grid.data.rank if grid else 0),
        )

    def check(self, samples: Samples, ranks: int) -> None:
        """Raise `ValueError` unless there are images enough, and minibatches and a device for so many ranks."""
        batch, images = self.training.batch_size, samples.train.num_samples
        if not ranks <= batch <= images:
            raise ValueError(
                f"batch_size={batch} must lie in {ranks} .. {images}, from the ranks to the training images there are; "
                f"use {min(100, images)}"
            )
        if not samples.test.num_samples:
            raise ValueError("test_images=0: the set has no test image; use a folder of --data_dir that has some")
        pad, size = self._pad, samples.train.size
        if pad >= size:
            raise ValueError(f"pad={pad} must be smaller than images of {size} x {size} pixels; use 4")
        self.device_of(0)

    def device_of(self, rank: int) -> torch.device:
        """That of a rank."""
        if self.device == "cpu":
            return torch.device("cpu")
        if not torch.cuda.is_available():
            raise ValueError("device=cuda: PyTorch finds no such device here; use cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    @property
    def _pad(self) -> int:
        return _PADS.get(self.data, 4) if self.pad is None else self.pad

    def _network(self, level: Level, num_classes: int) -> ImageResNet:
        return ImageResNet(
            level.blocks,
            self.channels,
            num_classes,
            step_size=level.step_size,
            norm=self.norm,
            stem_stride=self.stem_stride,
        )


def numbers_of(record: EpochRecord) -> dict[str, Any]:
    """A record by the names that reports and files have."""
    return {
        "epoch": record.epoch,
        "cycle": record.cycle,
        "blocks": record.blocks,
        "learning_rate": record.learning_rate,
        "train_loss": record.loss,
        "train_error": record.error,
        "test_loss": record.test_loss,
        "test_error": record.test_error,
        "seconds": record.seconds,
        "block_evaluations": record.block_evaluations,
    }
