"""
FAS in width
============

V-cycles over networks of half as many neurons: neurons that are alike are paired by their weights, the narrow network
is trained with a correction that makes its gradient that of the wide one, and what it has learned goes back to both of
each pair. The method of C. Ponce, R. Li, C. Mao, P. Vassilevski, "Multilevel-in-Layer Training for Deep Neural Network
Regression", 2022.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import xbraid_py
from xbraid_py.multilevel import Minibatches

# %%
# A regression: a function of two variables by a dense network of two hidden layers.

random = torch.Generator().manual_seed(0)
x = torch.rand(800, 2, generator=random, dtype=torch.float64)
y = torch.sin(6 * x[:, :1]) * torch.cos(4 * x[:, 1:])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)).double()


# %%
# One, two and three levels with the same learning rate, over work units: a forward and backward pass of the wide
# network over a minibatch. The coarse levels have their part in them, and so has the correction.

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for levels in (1, 2, 3):
    options = xbraid_py.WidthTrainingOptions(levels=levels, learning_rate=0.02, steps=4)
    training = xbraid_py.WidthTraining(network(), nn.functional.mse_loss, Minibatches(x, y, 50, seed=0), options)
    work, errors = [], []
    for record in training.run(60 if levels > 1 else 150):
        if record.work > 600:
            break
        model = network()
        nn.utils.vector_to_parameters(training.x, model.parameters())
        with torch.no_grad():
            errors.append(nn.functional.mse_loss(model(x), y).item())
        work.append(record.work)
    axes.plot(work, errors, label=f"{levels} level{'s' * (levels > 1)}")
    print(f"{levels} levels {record.widths}: mean square error {errors[-1]:.2e} after {work[-1]:.0f} work units")
axes.set(xlabel="work units", ylabel="mean square error", yscale="log")
axes.legend()

# %%
# Here one level is ahead of both. Which method wins depends on the learning rate that each is given; with each at its
# best, on the problems of the paper, the comparison is among the `results <../benchmarks/width.html>`_.
# ``drivers/poisson.py`` and ``drivers/darcy.py`` are the programs.
