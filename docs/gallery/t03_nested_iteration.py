"""
Peaks by nested iteration
=========================

Few layers first: a network of 16 layers is trained, its layers are cut in two, the network of 32 layers goes on from
there, and then that of 64. The method of E. C. Cyr, S. Günther, J. B. Schroder, "Multilevel Initialization for
Layer-Parallel Deep Neural Network Training", 2019. The program of the same problem with everything around it is
``drivers/peaks.py``.
"""

import matplotlib.pyplot as plt
import torch

import xbraid_py
from xbraid_py.data import peaks

# %%
# Points of a square in five classes, by the level sets of a function with hills and valleys.

train, validation = peaks.generate(1000, 1000, seed=0)
comm = xbraid_py.world()
solver = xbraid_py.MGRIT()  # the lagged cycle: one fine sweep a solve


def problem():
    return xbraid_py.Problem(
        features=train.features,
        labels=train.labels,
        num_classes=5,
        architecture=xbraid_py.DenseResNetOptions(width=8, T=5.0),
        regularization=xbraid_py.Regularization(),
        forward=solver,
        adjoint=solver.for_adjoint(),
        comm=comm,
    )


# %%
# The same work twice: nested, and by the deep network alone. A record is made before each update.

nested = xbraid_py.NestedOptions(refinements=2, updates=(60, 40, 20))
alone = xbraid_py.NestedOptions(refinements=0, updates=(45,))
runs = {}
for name, options in {"nested": nested, "64 layers alone": alone}.items():
    run = xbraid_py.NestedIteration(problem(), 64, options=options, seed=0)
    runs[name] = (run, list(run.run()))
    last = runs[name][1][-1]
    print(f"{name}: {last.work:.0f} work units, {last.evaluation.accuracy:.1%} of the training points")

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for name, (_, records) in runs.items():
    axes.plot([each.work for each in records], [each.evaluation.value for each in records], label=name)
for before, after in zip(runs["nested"][1], runs["nested"][1][1:], strict=False):
    if after.num_layers > before.num_layers:
        axes.axvline(after.work, color="gray", linewidth=0.8)
        axes.text(after.work, axes.get_ylim()[1], f" {after.num_layers} layers", va="top", fontsize=9)
axes.set(xlabel="work units (an update of 64 layers)", ylabel="objective")
axes.legend(loc="center right")

# %%
# What the nested network has learned: its classes over the square, and the true ones.

run, _ = runs["nested"]
mesh = peaks.mesh(120)
learned = run.network.predict(run.weights, mesh).reshape(120, 120)
true = torch.as_tensor(peaks.class_of(*mesh.numpy())).reshape(120, 120)
share = (run.network.predict(run.weights, validation.features) == validation.labels).double().mean()
figure, panels = plt.subplots(1, 2, figsize=(7, 3.5), layout="constrained")
for axes, classes, title in zip(panels, (true, learned), ("true", f"learned: {share:.1%} right"), strict=True):
    axes.imshow(classes, origin="lower", cmap="viridis", extent=(-3, 3, -3, 3))
    axes.set_title(title)

# %%
# It is not always ahead: over five seeds and more, and in the paper's regime, `the page of the four papers
# <../papers.html>`_ has the comparison.
