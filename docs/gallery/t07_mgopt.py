"""
MG/OPT in depth
===============

A cycle makes steps on the deep network, then on one of half as many layers whose objective is shifted so that its
gradient begins as the restricted one, and so on; what the coarse networks have learned is interpolated and added. The
method of L. Gaedke-Merzhäuser, A. Kopaničáková, R. Krause, "Multilevel Minimization for Deep Residual Networks", 2020.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import xbraid_py
from xbraid_py.data import circles

# %%
# In a training loop
# ------------------
#
# Any model with a `LayerParallel` stack: `DepthCycle` makes the coarse networks, and a step is a V-cycle on one
# minibatch. Points of a disc and of a ring around it are the two classes. Adam at the same rate on all levels, beside
# Adam alone.

train, _ = circles.generate(400, 100, seed=0, dtype=torch.float32)
points, labels = train.features.T, train.labels
comm = xbraid_py.world()


def block():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU())


def network():
    torch.manual_seed(0)
    stack = xbraid_py.LayerParallel(block, num_layers=64, T=1.0, comm=comm)
    return nn.Sequential(nn.Linear(2, 3), stack, nn.Linear(3, 2))


def loss_of(model):
    return nn.functional.cross_entropy(model(points), labels)


curves = {}
for levels in (1, 2, 4):
    model = network()
    if levels == 1:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses, work = [], []
        for step in range(36):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            work.append(step + 1)
    else:
        cycle = xbraid_py.DepthCycle(model, levels, line_search=True)
        optimizer = torch.optim.Adam(cycle.parameters(), lr=0.02)
        losses, work = [], []
        while cycle.work < 36:
            losses.append(cycle.step(optimizer, loss_of))
            work.append(cycle.work)
    curves[levels] = (work, losses)
    print(f"{levels} levels: loss {losses[-1]:.4f} after {work[-1]:.0f} work units")

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for levels, (work, losses) in curves.items():
    axes.plot(work, losses, label="1 level: Adam" if levels == 1 else f"{levels} levels")
axes.set(xlabel="work units (gradients of 64 layers)", ylabel="loss")
axes.legend()

# %%
# All samples are in every gradient here. On small minibatches it is another matter: the comparison with plain loops is
# among the `results <../benchmarks/depth.html>`_.
#
# As the paper has it
# -------------------
#
# The dense network as an optimization problem, all samples in every gradient, and the paper's schedule: one step on
# each level on the way down, two on the way up of the coarser ones. ``drivers/circles.py`` is the program, with 2048
# layers.

solver = xbraid_py.MGRIT(max_levels=1)
data, _ = circles.generate(400, 100, seed=0)
problem = xbraid_py.Problem(
    features=data.features, labels=data.labels, num_classes=2,
    architecture=xbraid_py.DenseResNetOptions(width=3, T=1.0),
    regularization=xbraid_py.Regularization(), forward=solver, adjoint=solver, comm=comm,
)  # fmt: skip
options = xbraid_py.MGOptOptions(levels=4)
run = xbraid_py.MGOpt(problem, 64, options)
run.x = run.objectives[0].network.initial(xbraid_py.InitialScales(), seed=0)
for record in run.run(6):
    print(record.cycle, f"{record.evaluation.value:.4f}", f"{record.work:.1f} work units", record.gradients)
