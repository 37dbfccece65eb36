"""Small files in the format of CIFAR-10's binary version that several tests train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_cifar10(folder: Path) -> Path:
    """Two of six files, of 40 and 20 images: noise, brighter in places that the class tells."""
    random = np.random.default_rng(0)
    for name, count in (("data_batch_2.bin", 40), ("test_batch.bin", 20)):
        labels = random.integers(0, 10, count)
        pixels = random.integers(0, 100, (count, 3, 32, 32))
        for i, label in enumerate(labels):
            pixels[i, label % 3, 3 * label : 3 * label + 5] += 120
        records = np.concatenate([labels[:, None], pixels.reshape(count, -1)], axis=1)
        (folder / name).write_bytes(records.astype(np.uint8).tobytes())
    return folder
