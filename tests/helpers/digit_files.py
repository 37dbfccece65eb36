"""Small files in MNIST's format for tests: images with a bright row that tells the class, and noise."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from xbraid_py.data.mnist import PUBLISHED


def write_digits(folder: Path, num_train: int, num_test: int) -> Path:
    """Write the four files; returns their folder."""
    random = np.random.default_rng(0)
    for number, name in zip((num_train, num_train, num_test, num_test), PUBLISHED, strict=True):
        labels = (np.arange(number) % 10).astype(np.uint8)
        if "labels" in name:
            (folder / name).write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, number) + labels.tobytes())
        else:
            images = random.integers(0, 60, (number, 28, 28), dtype=np.uint8)
            images[np.arange(number), 3 + 2 * labels] = 250
            (folder / name).write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, number, 28, 28) + images.tobytes())
    return folder
