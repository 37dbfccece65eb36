"""The parts of residual networks for images: residual modules, blocks with a step size, the head (paper 003).

Shape letters: `B` images, `C` channels, `H W` pixels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from xbraid_py.layers.batch_norm import MovingBatchNorm2d

Norm = Literal["batch", "moving", "group", "frozen", "none"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization with its running statistics, in training mode too; they do not move.

    Weights and statistics have the names that they have in `nn.BatchNorm2d`, so either loads the other's state dict.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.eval()

    def train(self, mode: bool = True):
        """In evaluation mode, whatever is asked for."""
        return super().train(False)


def normalization(norm: Norm, channels: int, groups: int) -> nn.Module:
    """One of `Norm` for so many channels; `groups` are those of a group normalization."""
    if norm == "group":
        return nn.GroupNorm(groups, channels)
    kinds = {"batch": nn.BatchNorm2d, "moving": MovingBatchNorm2d, "frozen": FrozenBatchNorm2d, "none": nn.Identity}
    return kinds[norm](channels)


class ResidualModule(nn.Module):
    """F(Y): normalization, ReLU and a 3x3 convolution without bias, twice.

    Parameters
    ----------
    inputs, filters : int
        Channels of Y and of F(Y).
    stride : int
        Of the first convolution.
    norm, groups
        As of `ImageResNet`.
    """

    def __init__(self, inputs: int, filters: int, stride: int = 1, norm: Norm = "batch", groups: int = 4):
        super().__init__()
        self.norm1 = normalization(norm, inputs, groups)
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
        self.norm2 = normalization(norm, filters, groups)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to F(Y) (B, filters, H / stride, W / stride), halves rounded up."""
        y = self.conv1(functional.relu(self.norm1(y)))
        return self.conv2(functional.relu(self.norm2(y)))


class ResidualBlock(nn.Module):
    """Y + h F(Y) (paper 003, eq. 2); in a transition Y is pooled 2x2 and gets zero channels behind each of its own.

    Zero channels in one place would be groups of a group normalization that hold nothing but h F(Y): they would be
    scaled to 1 whatever h is, and refining the time grid changed the network by more than O(h).

    Parameters
    ----------
    residual : ResidualModule
        F. With stride 2 the block is a transition.
    step_size : float
        h. With 0 the residual module is left out, and not evaluated: what remains is the shortcut.
    """

    def __init__(self, residual: ResidualModule, step_size: float):
        super().__init__()
        self.residual, self.step_size = residual, step_size

    @property
    def is_transition(self) -> bool:
        """Whether the block halves the image."""
        return self.residual.conv1.stride != (1, 1)

    def shortcut(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) in the shape of F(Y)."""
        if not self.is_transition:
            return y
        y = functional.avg_pool2d(y, 2, ceil_mode=True)  # odd images are halved as the convolution does
        behind_each, behind_all = divmod(self.residual.conv1.out_channels, y.shape[1])
        y = functional.pad(y[:, :, None], (0, 0, 0, 0, 0, behind_each - 1)).flatten(1, 2)
        return functional.pad(y, (0, 0, 0, 0, 0, behind_all))

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to the next state."""
        if self.step_size == 0.0:
            return self.shortcut(y)
        # In this order the sum has the memory format of the convolution's output; that of a shortcut may be another.
        return self.step_size * self.residual(y) + self.shortcut(y)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size:g}"


class Head(nn.Module):
    """Normalization, ReLU, mean over the pixels, linear map: states (B, C, H, W) to logits (B, classes)."""

    def __init__(self, filters: int, num_classes: int, norm: Norm, groups: int):
        super().__init__()
        self.norm = normalization(norm, filters, groups)
        self.linear = nn.Linear(filters, num_classes)

    def forward(self, y: Tensor) -> Tensor:
        """Y (B, C, H, W) to (B, classes)."""
        return self.linear(functional.relu(self.norm(y)).mean((2, 3)))
