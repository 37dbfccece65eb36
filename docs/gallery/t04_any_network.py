"""
Any torch network, layer-parallel
=================================

A training loop of torch stays as it is; its stack of residual blocks becomes `LayerParallel`. Here a small
convolutional network on generated images, what the stack says of its solves, and the way back to a plain module.

On several ranks: ``mpirun -n 2 python t04_any_network.py``, or ``torchrun --nproc-per-node 2 t04_any_network.py``.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import xbraid_py

torch.manual_seed(0)
comm = xbraid_py.world()

# %%
# Images of 12 x 12 pixels in four classes: a bright quarter in noise. All ranks make the same ones, from the same seed.

labels = torch.randint(4, (256,))
images = 0.7 * torch.randn(256, 1, 12, 12)
for image, label in zip(images, labels.tolist(), strict=True):
    row, column = 6 * (label // 2), 6 * (label % 2)
    image[0, row : row + 6, column : column + 6] += 0.8


# %%
# A block is F(u), of the shape of u; the stack makes u + h F(u) of it, 32 times.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, u):
        return torch.relu(self.conv(self.norm(u)))


def network(mgrit):
    torch.manual_seed(1)  # opening and head: the same on every rank, and in both networks
    stack = xbraid_py.LayerParallel(Block, num_layers=32, T=3.0, comm=comm, mgrit=mgrit, seed=1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, padding=1), stack, nn.Flatten(), nn.Linear(4 * 6 * 6, 4)), stack


def train(mgrit):
    model, stack = network(mgrit)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, records = [], []
    for step in range(24):
        batch = slice(32 * (step % 8), 32 * (step % 8) + 32)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        records.append(stack.record)
    return model, losses, records


# %%
# Once with the solver's defaults, and once exactly: as a plain loop over the layers would.

model, losses, records = train(xbraid_py.MGRIT())
_, exact, _ = train(xbraid_py.MGRIT(max_levels=1))
print(records[-1])

figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.5, 5), layout="constrained", sharex=True)
upper.plot(losses, label="solved by MGRIT")
upper.plot(exact, "--", label="layer after layer")
upper.set(ylabel="loss")
upper.legend()
lower.semilogy([each.gradient_error for each in records], "o-", markersize=3, label="estimated")
measured = [(n, each.gradient_error) for n, each in enumerate(records) if each.measured]
lower.semilogy(*zip(*measured, strict=True), "s", label="measured against the exact gradient")
lower.axhline(0.1, color="gray", linewidth=0.8, label="above this the solver is tightened")
lower.set(xlabel="update", ylabel="error of the gradient")
lower.set_yticks([0.02, 0.05, 0.1, 0.2], [0.02, 0.05, 0.1, 0.2])
lower.minorticks_off()
lower.legend()

# %%
# Evaluation is exact. `to_sequential` makes a plain torch module, which needs neither ranks nor this package's solvers,
# and `state_dict()` holds all layers on every rank.

model.eval()
plain = xbraid_py.to_sequential(model)
with torch.no_grad():
    same = torch.equal(model(images).argmax(1), plain(images).argmax(1))
    print(f"{(plain(images).argmax(1) == labels).double().mean():.1%} right; the plain module answers the same: {same}")

# %%
# Which plan is fastest on these ranks, and by how much, `print(stack.advise(batch))` says after some seconds of timing;
# what works as with any torch module, and what to take instead of what does not, stands in `a table
# <../pytorch.html>`_.
