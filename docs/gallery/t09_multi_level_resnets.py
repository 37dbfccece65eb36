"""
Multi-level ResNets
===================

A shallow residual network first, with large steps; in the middle of the training its blocks are doubled and its step
size is halved, so that it computes nearly the same, and the training goes on with a learning rate that begins anew. The
method of B. Chang, L. Meng, E. Haber, F. Tung, D. Begert, "Multi-level Residual Networks from Dynamical Systems View",
2018.
"""

import matplotlib.pyplot as plt
import torch

import xbraid_py
from xbraid_py.data.images import Augmentation, Images, standardize
from xbraid_py.multilevel.resnet.options import CosineCycles, plan
from xbraid_py.multilevel.resnet.training import Pipeline

# %%
# Noise of 8 x 8 pixels, with one channel brighter in the upper half for each of three classes: a stand-in for CIFAR,
# which ``drivers/cifar.py`` takes.


def images(count, seed):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    pixels = torch.randint(0, 200, (count, 3, 8, 8), generator=random)
    for i, label in enumerate(labels.tolist()):
        pixels[i, label, :4, :] += 45
    return Images(pixels.to(torch.uint8), labels)


train, test = images(300, 0), images(200, 1)

# %%
# Refined, a network has twice the blocks and the same outputs up to the error of its time steps, which halves from
# refinement to refinement:

torch.manual_seed(0)
network = xbraid_py.ImageResNet((2, 2), (4, 8), 3, norm="group").eval()
inputs = standardize(test.pixels)
with torch.no_grad():
    for _ in range(5):
        fine = xbraid_py.refine(network).eval()
        change = (fine(inputs) - network(inputs)).norm() / network(inputs).norm()
        blocks = " to ".join(str([len(stage) for stage in each.stages]) for each in (network, fine))
        print(f"{blocks:22} blocks: outputs change by {float(change):.1%}")
        network = fine

# %%
# Three cycles of epochs; in each the learning rate falls along a cosine. "multilevel" doubles the blocks between them,
# "last" has the blocks of the last cycle all the time.

cycles = CosineCycles(epochs=(6, 5, 5), eta_max=0.2)
options = xbraid_py.ResNetTrainingOptions(cycles=cycles, batch_size=50)
figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for model in ("multilevel", "last"):

    def make(level):
        torch.manual_seed(3)
        return xbraid_py.ImageResNet(level.blocks, (4, 8), 3, step_size=level.step_size, norm="group")

    run = xbraid_py.ResNetTraining(
        make, plan(model, (1, 2), 3), train, test, Pipeline(Augmentation(pad=1, seed=0), standardize), options
    )
    records = list(run.run())
    evaluations = [each.block_evaluations / 1000 for each in records]
    panels[0].plot([each.epoch for each in records], [each.loss for each in records], "o-", label=model)
    panels[1].plot(evaluations, [each.loss for each in records], "o-", label=model)
    print(
        f"{model}: blocks {records[0].blocks} to {records[-1].blocks}, {evaluations[-1]:.0f} thousand block evaluations"
    )
panels[0].set(xlabel="epoch", ylabel="training loss")
panels[1].set(xlabel="block evaluations in thousands")
panels[0].legend()
