"""
Adaptive depth and splines
==========================

Layers need not be equally long, nor have weights of their own. Depth can be refined where the discretization error is,
and weights can be splines in depth, with few coefficients for many layers.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import xbraid_py
from xbraid_py.data import peaks

# %%
# Adaptive depth
# --------------
#
# Nested iteration, but each refinement cuts only the layers that make up half of the estimated error: the lengths of
# the layers say where that was.

train, _ = peaks.generate(400, 400, seed=0)
solver = xbraid_py.MGRIT(max_levels=1)  # few long layers leave a coarse level little to do
problem = xbraid_py.Problem(
    features=train.features, labels=train.labels, num_classes=5,
    architecture=xbraid_py.DenseResNetOptions(width=8, T=5.0),
    regularization=xbraid_py.Regularization(), forward=solver, adjoint=solver, comm=xbraid_py.world(),
)  # fmt: skip
adaptive = xbraid_py.AdaptiveOptions(indicator="richardson", fraction=0.5)
options = xbraid_py.NestedOptions(refinements=3, updates=(30, 20, 20, 20), adaptive=adaptive)
run = xbraid_py.NestedIteration(problem, 64, options=options, seed=0)
lengths = {}
for record in run.run():
    if record.lengths:
        lengths[record.num_layers] = torch.tensor(record.lengths, dtype=torch.float64)
print(f"{record.num_layers} layers in place of 64, {record.evaluation.accuracy:.1%} of the training points right")

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for row, each in enumerate(lengths.values()):
    ends = torch.cat([torch.zeros(1), 5.0 * each.cumsum(0) / each.sum()])
    axes.vlines(ends, row - 0.4, row + 0.4, color=f"C{row}")
axes.set(xlabel="depth", yticks=range(len(lengths)), yticklabels=[f"{layers} layers" for layers in lengths])

# %%
# Splines in depth
# ----------------
#
# ``Splines(8, 1)``: the weights of 64 layers are piecewise linear in depth between 8 coefficients each.


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


points, labels = train.features.T.float(), train.labels
figure, axes = plt.subplots(figsize=(6.5, 3.5), layout="constrained")
for name, splines in {"a row for each layer": None, "8 coefficients, linear": xbraid_py.Splines(8, 1)}.items():
    torch.manual_seed(0)
    stack = xbraid_py.LayerParallel(block, 64, 5.0, splines=splines)
    model = nn.Sequential(nn.Linear(2, 8), stack, nn.Linear(8, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    number = sum(each.numel() for each in stack.parameters())
    axes.plot(losses, label=f"{name}: {number} numbers")
axes.set(xlabel="update", ylabel="loss")
axes.legend()
