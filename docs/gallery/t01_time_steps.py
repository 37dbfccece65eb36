"""
A network as a time-stepping scheme
===================================

A residual network adds to its state, layer by layer. Read as time steps, its layers discretize an equation in depth,
and a network of twice as many layers takes steps of half the size: that is what all methods here build on.
"""

import matplotlib.pyplot as plt
import torch

import xbraid_py

# %%
# Four samples of width 2 go through :math:`u_{n+1} = u_n + h\,F(u_n, W_n)` with :math:`F = \tanh(W u + b)`, from
# depth 0 to :math:`T = 2`. The weights are those of a smooth curve in depth, so that networks of any number of layers
# can take theirs from it.

T = 2.0
start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, -1.0]], dtype=torch.float64)


def weights(t):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return 2.0 * torch.cos(torch.tensor(t)) * turn, 0.3 * torch.sin(torch.tensor([t, 2 * t], dtype=torch.float64))


def states(layers):
    u, h, found = start, T / layers, [start]
    for n in range(layers):
        matrix, bias = weights(n * h)
        u = u + h * torch.tanh(u @ matrix.T + bias)
        found.append(u)
    return torch.stack(found)


figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for layers, marker in [(4, "o"), (8, "s"), (64, "")]:
    path = states(layers)
    for sample in range(len(start)):
        axes.plot(*path[:, sample].T, marker=marker, color=f"C{sample}", alpha=0.4 + 0.6 * (layers == 64))
axes.set(title="4 layers (o), 8 layers (squares) and 64 (lines)", xlabel="$u_1$", ylabel="$u_2$")

# %%
# Twice as many layers halve the distance to the limit: Euler's method has order 1. A coarse network is therefore an
# approximation of a fine one, cheap and of use: its weights start the training of the fine one (nested iteration), its
# states correct those of the fine one (MGRIT), and its weights' updates correct the fine one's (MG/OPT).

end = states(4096)[-1]
counts = [4, 8, 16, 32, 64, 128]
errors = [float((states(layers)[-1] - end).abs().max()) for layers in counts]
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
axes.loglog(counts, errors, "o-", label="distance of the output to the limit")
axes.loglog(counts, [errors[0] * counts[0] / each for each in counts], "--", label="order 1")
axes.set(xlabel="layers", ylabel="largest error")
axes.set_xticks(counts, counts)
axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], [0.02, 0.05, 0.1, 0.2, 0.5])
axes.minorticks_off()
axes.legend()

# %%
# The same network as a torch module, its layers to be spread over the ranks of a job: `LayerParallel` makes
# :math:`u + h F(u)` of a block :math:`F`, with :math:`h = T / N`, and draws the weights of each layer from a seed.

stack = xbraid_py.LayerParallel(lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), 64, T)
output = stack(start.float())
print(output.shape, stack.record)
