"""
Long sequences
==============

`ParallelGRU` and `ParallelLSTM` take the places of torch's, and solve for all steps of a sequence at once. Here a GRU
has to say in which of two directions a noisy signal of 128 steps drifts.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import xbraid_py

torch.manual_seed(0)
comm = xbraid_py.world()

# %%
# A drift that is small beside the noise of each step.

labels = torch.randint(2, (64,))
x = torch.randn(64, 128, 4)
x[:, :, 0] += 0.3 * (2 * labels - 1)[:, None]

# %%
# ``kind="implicit"`` has steps that are implicit in the state, for which long coarse steps are stable; ``kind="plain"``
# has those of `torch.nn.GRU`, and loads its weights. Every rank calls it with the same batch.


def train(**options):
    torch.manual_seed(1)
    gru = xbraid_py.ParallelGRU(4, 16, batch_first=True, comm=comm, output="last", seed=1, **options)
    head = nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*gru.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        _, last = gru(x)
        loss = nn.functional.cross_entropy(head(last[-1]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return gru, losses


figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, options in {
    "implicit, MGRIT": {"kind": "implicit", "dt": 0.1},
    "implicit, step after step": {"kind": "implicit", "dt": 0.1, "mgrit": xbraid_py.MGRIT(max_levels=1)},
    "plain, MGRIT": {"kind": "plain"},
}.items():
    gru, losses = train(**options)
    axes.plot(losses, "--" if "after" in name else "-", label=name)
    print(
        f"{name}: loss {losses[-1]:.3f}, sweeps {gru.record.forward_sweeps}, gradient error {gru.record.gradient_error}"
    )
axes.set(xlabel="update", ylabel="loss")
axes.legend()

# %%
# The same weights in torch's own module, and the same results where the solver has converged:

gru = xbraid_py.ParallelGRU(4, 16, batch_first=True, comm=comm)
torchs = nn.GRU(4, 16, batch_first=True)
torchs.load_state_dict(gru.state_dict())
with torch.no_grad():
    print("largest difference", float((gru.eval()(x)[0] - torchs(x)[0]).abs().max()))

# %%
# Packed and unbatched sequences, two directions and dropout between layers are as torch's. ``windows=4`` solves a
# quarter of the sequence at a time, with a quarter of the memory.
