"""Options of (multi-level) training on images (paper 003); torch is not loaded for a help of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xbraid_py.multilevel.resnet.options import MODELS, CosineCycles, Discretization, ResNetTrainingOptions, plan
from xbraid_py.recipes.options.device import DeviceOptions
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    from xbraid_py.data.image_sets import ImageSplit
    from xbraid_py.layers.image_resnet import ImageResNet

KIND = "images"  # of the records and checkpoints of these runs
FILTERS, WIDE = (16, 32, 64), (32, 64, 128)
# Images of a minibatch, and zeros around an image, by the set (paper 003, section 5.2 and appendix A).
_BATCH_SIZES, _PADS = {"stl10": 32}, {"stl10": 12}


@dataclass(frozen=True, kw_only=True)
class ImageOptions(DeviceOptions):
    """Images, and what a residual network makes of them, whatever its blocks.

    Parameters
    ----------
    data
        The set of images.
    train_images
        Take only so many training images; 0 takes all that are found.
    test_images
        The same of the test images, which are those of the validations.
    data_dir
        Folder of the images; by default one of the set's name in the folder that XBRAID_DATA names.
    filters
        Of each stage; by default those of the paper, 16,32,64.
    norm
        Normalization: batch, group, batch with frozen statistics, none. Batch normalization takes each rank's share of
        a minibatch for itself, so that its results depend on the number of ranks.
    stem_stride
        Of the first convolution; 2 halves large images at once.
    eta_max
        Learning rate at the beginning of a cycle; it falls along a cosine.
    eta_min
        Learning rate at its end.
    batch_size
        Images of a minibatch, shared by the ranks; by default 100, or 32 of STL-10.
    momentum
        Of SGD.
    weight_decay
        Of SGD.
    pad
        Zeros around a training image, of which a part is cut out; by default 4, or 12 of STL-10.
    flip
        Flip every other training image, by chance.
    precision
        Of the numbers; bfloat16 and float16 are mixed with float32.
    channels_last
        Channels innermost in memory: faster on GPUs with mixed precision.
    validate_every
        Epochs between two looks at the test images; the ends of cycles come in addition.
    """

    data: Literal["cifar10", "cifar100", "stl10"] = "cifar10"
    train_images: int = 0
    test_images: int = 0
    data_dir: Path | None = free(None)
    filters: tuple[int, ...] | None = None
    norm: Literal["batch", "group", "frozen", "none"] = "batch"
    stem_stride: int = 1
    eta_max: float = 0.5
    eta_min: float = 0.001
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float = 2e-4
    pad: int | None = None
    flip: bool = True
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    validate_every: int = free(1)

    def __post_init__(self):
        DeviceOptions.__post_init__(self)
        if self.validate_every < 1:
            raise ValueError(f"validate_every={self.validate_every} must be at least 1; use 5")
        if self.pad is not None and self.pad < 0:
            raise ValueError(f"pad={self.pad} must be at least 0; use 4")

    def samples(self) -> ImageSplit:
        """The images; reads files, sends no message."""
        from xbraid_py.data.image_sets import load_split

        return load_split(self.data, self.train_images, self.test_images, self.data_dir)

    @property
    def border(self) -> int:
        """Zeros around a training image."""
        return _PADS.get(self.data, 4) if self.pad is None else self.pad


@dataclass(frozen=True, kw_only=True)
class MultiLevelOptions(ImageOptions):
    """Multi-level training on images, but for the model and the seed.

    Parameters
    ----------
    blocks
        Residual blocks of each stage in the first cycle; twice as many in every further one.
    wide
        Twice the filters, 32,64,128: a Wide ResNet.
    step_size
        Explicit step size h of the first cycle.
    last_step_size
        That of the model last; by default that of the last cycle.
    epochs
        Of each cycle.
    reset
        Begin with eta_max in every cycle; otherwise one cosine spans all of them.
    interpolation
        Of the weights in depth where the blocks are doubled.
    carry_momentum
        Prolong the momentum there as well; otherwise it begins anew.
    noise
        Standard deviation of noise on the weights of the blocks that are inserted there, in units of the weights' own;
        none if not given.
    """

    blocks: tuple[int, ...] = (2, 2, 2)
    wide: bool = False
    step_size: float = 1.0
    last_step_size: float | None = None
    epochs: tuple[int, ...] = (60, 50, 50)
    reset: bool = True
    interpolation: Literal["constant", "linear"] = "constant"
    carry_momentum: bool = False
    noise: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.wide and self.filters is not None and tuple(self.filters) != WIDE:
            raise ValueError(f"filters={list(self.filters)} and wide=True are two choices; use one of them")
        _ = self.optimization
        import torch

        first = self.levels("first")[0]
        with torch.device("meta"):  # no memory, no random numbers: only the checks, for which few blocks will do
            self.network(replace(first, blocks=tuple(min(count, 2) for count in first.blocks)), 10)

    @property
    def optimization(self) -> ResNetTrainingOptions:
        """The options of the training."""
        names = "momentum weight_decay interpolation carry_momentum precision channels_last".split()
        return ResNetTrainingOptions(
            cycles=CosineCycles(epochs=self.epochs, eta_max=self.eta_max, eta_min=self.eta_min, reset=self.reset),
            batch_size=_BATCH_SIZES.get(self.data, 100) if self.batch_size is None else self.batch_size,
            noise=self.noise or 0.0,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Filters of each stage."""
        return tuple(self.filters) if self.filters else WIDE if self.wide else FILTERS

    def levels(self, model: str) -> tuple[Discretization, ...]:
        """Networks of the cycles of a model, see `plan`."""
        return plan(model, self.blocks, len(self.epochs), self.step_size, self.last_step_size)

    def network(self, level: Discretization, num_classes: int) -> ImageResNet:
        """The network of a level, its weights at random."""
        from xbraid_py.layers.image_resnet import ImageResNet

        return ImageResNet(
            level.blocks,
            self.channels,
            num_classes,
            step_size=level.step_size,
            norm=self.norm,
            stem_stride=self.stem_stride,
        )

    def check(self, samples: ImageSplit, ranks: int) -> None:
        """Raise `ValueError` unless there are images enough, and minibatches and a device for so many ranks."""
        batch, images = self.optimization.batch_size, samples.train.num_samples
        if not ranks <= batch <= images:
            raise ValueError(
                f"batch_size={batch} must lie in {ranks} .. {images}, from the ranks to the training images there are; "
                f"use {min(100, images)}"
            )
        if not samples.test.num_samples:
            raise ValueError("test_images=0: the set has no test image; use a folder of --data_dir that has some")
        if self.border >= samples.train.size:
            size = samples.train.size
            raise ValueError(f"pad={self.border} must be smaller than images of {size} x {size} pixels; use 4")
        self.device_of(0)


@dataclass(frozen=True, kw_only=True)
class ImageRunOptions(MultiLevelOptions, RunOptions):
    """Runs of multi-level training on images: several models and seeds, one after the other.

    Parameters
    ----------
    models
        First, last, multilevel.
    seeds
        Of weights, order and augmentation of the images.
    out
        Folder of the tables and the picture of all; in it one for each run, such as multilevel_0.
    resume
        Checkpoint to go on from, of a single run; or auto, for the newest good one of each run (if there is one).
    checkpoint_every
        Epochs between two checkpoints.
    """

    models: tuple[str, ...] = MODELS
    seeds: tuple[int, ...] = (0,)
    out: Path = free(Path("runs/cifar"))
    checkpoint_every: int = free(1)

    def __post_init__(self):
        RunOptions.__post_init__(self)
        MultiLevelOptions.__post_init__(self)
        for name in ("models", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name each at least one, and each once; use one of them")
        for model in self.models:
            self.levels(model)
        count = len(self.models) * len(self.seeds)
        if self.resume not in (None, "auto") and count > 1:
            raise ValueError(f"resume={self.resume} is of one run, but there are {count}; use auto")

    @property
    def runs(self) -> list[ImageRunOptions]:
        """The options of each run alone, with its own folder.

        That is a folder in `out`, or `out` itself if it has the run's name: so `xbraid-py resume` gives it.
        """
        return [self._alone(model, seed) for seed in self.seeds for model in self.models]

    def _alone(self, model: str, seed: int) -> ImageRunOptions:
        name = f"{model}_{seed}"
        out = self.out if self.out.name == name else self.out / name
        return replace(self, models=(model,), seeds=(seed,), out=out)
