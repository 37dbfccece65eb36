"""Networks for the tests of transfers in width: dense, convolutional and mixed, and with duplicated neurons."""

import copy

import torch
from torch import nn

F64 = torch.float64


def dense(*widths: int, bias: bool = True) -> nn.Sequential:
    parts = [nn.Flatten()]
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(inputs, outputs, bias=bias, dtype=F64), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def convolutional(*channels: int, bias: bool = True) -> nn.Sequential:
    parts = []
    for inputs, outputs in zip(channels, channels[1:], strict=False):
        parts += [nn.Conv2d(inputs, outputs, (3, 2), padding=1, bias=bias, dtype=F64), nn.LeakyReLU(0.2)]
    return nn.Sequential(*parts[:-1])


def mixed(*channels: int, neurons: tuple[int, ...] = (10, 4), bias: bool = True) -> nn.Sequential:
    """Convolutions of stride 2 and pooling on 9 x 9 pixels leave 2 x 2 positions of each channel."""
    parts = [nn.Conv2d(channels[0], channels[1], 3, 2, bias=bias, dtype=F64), nn.ReLU()]
    for inputs, outputs in zip(channels[1:], channels[2:], strict=False):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="circular", bias=bias, dtype=F64), nn.ReLU()]
    parts += [nn.MaxPool2d(2), nn.Flatten()]
    for inputs, outputs in zip((4 * channels[-1], *neurons), neurons, strict=False):
        parts += [nn.Linear(inputs, outputs, bias=bias, dtype=F64), nn.ReLU()]
    return nn.Sequential(*parts[:-1], nn.Unflatten(1, (2, -1)))


NETWORKS = {
    "dense": (lambda bias=True: dense(3, 7, 6, 2, bias=bias), (5, 3)),
    "conv": (lambda bias=True: convolutional(2, 5, 4, 1, bias=bias), (5, 2, 6, 5)),
    "mixed": (lambda bias=True: mixed(3, 5, 6, bias=bias), (5, 3, 9, 9)),
}


def made(name: str, seed: int = 0, bias: bool = True) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    return build(bias), torch.randn(shape, dtype=F64)


def weight_layers(network: nn.Sequential) -> list[nn.Module]:
    return [part for part in network if isinstance(part, (nn.Linear, nn.Conv2d))]


def duplicated(network: nn.Sequential, copies: int, lengths: bool, seed: int = 3) -> nn.Sequential:
    """Every hidden neuron or channel `copies` times in random places, the copies times positive numbers or not.

    What they feed takes each copy with a weight of its own. The function is another one.
    """
    numbers = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.rand(count, generator=numbers, dtype=F64) * 4 + 0.1

    wide = copy.deepcopy(network)
    parts = weight_layers(wide)
    before = torch.arange(parts[0].weight.shape[1])
    taken = torch.ones(len(before), dtype=F64)
    for part in parts:
        weight, last = part.weight.detach(), part is parts[-1]
        rows = torch.arange(len(weight))
        if not last:
            rows = rows.repeat(copies)[torch.randperm(copies * len(rows), generator=numbers)]
        scale = factors(len(rows)) if lengths and not last else torch.ones(len(rows), dtype=F64)
        values = weight.reshape(len(weight), int(before.max()) + 1, -1)[rows][:, before]
        values = values * scale[:, None, None] * taken[:, None]
        part.weight = nn.Parameter(values.reshape(len(rows), -1, *weight.shape[2:]))
        if part.bias is not None:
            part.bias = nn.Parameter(part.bias.detach()[rows] * scale)
        sizes = ("in_features", "out_features") if weight.ndim == 2 else ("in_channels", "out_channels")
        for name, size in zip(sizes, (part.weight.shape[1], len(rows)), strict=True):
            setattr(part, name, size)
        before, taken = rows, factors(len(rows))
    return wide
