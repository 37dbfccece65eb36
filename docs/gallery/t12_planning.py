"""
Planning for a cluster
======================

How many ranks, and who shares what? The planner simulates the critical path of an update, from the costs of a layer and
of a message, and ranks all plans: replicas, pipelines, and MGRIT inside of replicas. Here with constants that are
written down (``costs=rule``), so that the page is the same on every machine; by default ``xbraid-py plan`` measures the
machine first.
"""

import subprocess
import sys

import matplotlib.pyplot as plt

from xbraid_py.planner import TRANSFORMER, choose

words = "--num_layers 1024 --width 8 --batch 5000 --ranks 1,2,4,16,64,256,1024 --costs rule"
done = subprocess.run(
    [sys.executable, "-m", "xbraid_py", "plan", *words.split()], capture_output=True, text=True, check=True
)
print(done.stdout)

# %%
# "2 replicas, pipeline, 1 portion each" is plain data parallelism. Layers are spread where the samples of a replica get
# few: here from 64 ranks on. In a program ``--plan`` does the same choice (`choose`), says which plan it has taken, and
# ``stack.advise(batch)`` times the stack's own blocks:

ranks = [1, 4, 16, 64, 256]
for each in ranks:
    choice = choose(1024, 5000, each)
    print(f"{each:5} ranks: {choice.reason}")

# %%
# A transformer's layer costs much for each sample, so that samples are shared as long as there are any:

figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, layer, samples in [
    ("dense layers, 5,000 samples", None, 5000),
    ("transformer layers, 64 samples", TRANSFORMER, 64),
]:
    predictions = [choose(1024, samples, each, layer=layer).prediction for each in ranks]
    axes.loglog(ranks, [predictions[0].serial / each.seconds for each in predictions], "o-", label=name)
axes.loglog(ranks, ranks, ":", color="gray", label="ideal")
axes.set(xlabel="ranks", ylabel="times one rank", xticks=ranks, xticklabels=ranks)
axes.minorticks_off()
axes.legend()

# %%
# What the model assumes, and how well its predictions were met: `the planner <../planner.html>`_. Predictions of more
# than two ranks are simulated, not measured.

# %%
# On a machine of your own
# ------------------------
#
# ::
#
#     xbraid-py plan --num_layers 1024 --width 8 --batch 5000 --ranks 1,2,4,64,1024
#     mpirun -n 4 xbraid-py plan --ranks 1,2,4 --ranks_per_node 4     # more ranks than cores
#
# measures for some seconds: layers forwards and backwards, coarse steps, messages, how cores slow each other down. It
# says so when serial propagation is best. Ranks beyond a node's cores go to further nodes, over a network whose
# constants are assumed and shown as such (``--latency``, ``--bandwidth``, ``--stage``). ``--cycles lagged,V,F`` widens
# the search, ``--block conv`` or ``transformer`` plans for torch blocks, ``--json FILE`` keeps predictions and
# constants, and ``--map FILE`` draws who wins where, over samples and ranks.
