"""How good a classifier is: confusion matrix, overall, average and per-class accuracy, Cohen's kappa."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """Of predicted classes against true ones.

    Attributes
    ----------
    confusion : (K, K) int64 tensor
        Samples of each true class (row) that were taken for each class (column).
    """

    confusion: Tensor

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor, num_classes: int) -> Scores:
        """Scores of predictions (B,) against labels (B,), int64, both in 0 .. num_classes - 1.

        Raises
        ------
        ValueError
            If the shapes differ, there is no sample, or a class is out of range.
        TypeError
            If one of them is not int64.
        """
        if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
            raise ValueError(
                f"predicted.shape={tuple(predicted.shape)} and labels.shape={tuple(labels.shape)} must be the same "
                f"(B,), B at least 1; use (100,)"
            )
        for name, classes in (("predicted", predicted), ("labels", labels)):
            if classes.dtype != torch.int64:
                raise TypeError(f"{name} is {classes.dtype}, must be int64; use {name}.long()")
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= num_classes:
                raise ValueError(f"{name} holds {low} .. {high}, must lie in 0 .. num_classes - 1 = {num_classes - 1}")
        pairs = labels * num_classes + predicted
        return cls(torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes))

    @property
    def overall(self) -> float:
        """Share of all samples that are classified rightly."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())

    @property
    def per_class(self) -> list[float | None]:
        """Share of the samples of each class that are; None for a class without samples."""
        totals, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [r / n if n else None for r, n in zip(right, totals, strict=True)]

    @property
    def average(self) -> float:
        """Mean of these over the classes that have samples."""
        shares = [share for share in self.per_class if share is not None]
        return sum(shares) / len(shares)

    @property
    def kappa(self) -> float:
        """Cohen's kappa: (p_o - p_e) / (1 - p_e), with the agreement p_e that is to be expected by chance."""
        total = float(self.confusion.sum())
        expected = float((self.confusion.sum(0).double() @ self.confusion.sum(1).double()) / total**2)
        # All samples of one class, and taken for it: agreement is certain, and full.
        return 1.0 if expected == 1.0 else (self.overall - expected) / (1.0 - expected)

    def as_dict(self) -> dict:
        """All figures, JSON-able."""
        return {
            "overall_accuracy": self.overall,
            "average_accuracy": self.average,
            "kappa": self.kappa,
            "class_accuracy": self.per_class,
        }
