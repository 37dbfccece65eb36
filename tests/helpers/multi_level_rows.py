"""Rows of the study of multi-level residual networks, as runs leave them."""

from __future__ import annotations

from studies.multi_level.tables import CURVE, result_of


def settings(model, seed=0, **changes):
    given = {"data": "cifar10", "model": model, "blocks": [2, 2, 2], "epochs": [2, 1, 1], "seed": seed}
    return given | {"wide": False, "filters": None} | changes


def points(error, seconds, work, untested=()):
    return [
        dict(
            zip(
                CURVE,
                (
                    epoch,
                    1 + (epoch > 2) + (epoch > 3),
                    0.1,
                    1.0 / epoch,
                    error / epoch,
                    0.5,
                    None if epoch in untested else 1.25 * error / epoch,
                    seconds * epoch,
                    work * epoch,
                ),
                strict=True,
            )
        )
        for epoch in (1, 2, 3, 4)
    ]


def row(model, error=0.4, seconds=30.0, work=100, seed=0, untested=(), **changes):
    return {"settings": settings(model, seed, **changes), "result": result_of(points(error, seconds, work, untested))}
