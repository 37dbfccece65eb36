"""
A Hugging Face model
====================

`parallelize` puts one stack in place of the like blocks of a model that exists; the rest of the model, its classes and
its names stay. Here a GPT-2 made from a configuration, so that nothing is downloaded, learns the letters of a sentence.
``drivers/finetune.py`` is the complete program.
"""

import matplotlib.pyplot as plt
import torch

import xbraid_py
from xbraid_py.recipes.finetune import load_transformers

try:  # a program would say `from transformers import GPT2Config, GPT2LMHeadModel`
    transformers = load_transformers()
    GPT2Config, GPT2LMHeadModel = transformers.GPT2Config, transformers.GPT2LMHeadModel
except ValueError as error:
    GPT2Config = None
    print(f"SKIPPED, nothing below was run: {error}")

# %%
# 16 layers of width 32 and a vocabulary of bytes. With the same seed all ranks have the same weights.

if GPT2Config is not None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=16, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    plain = GPT2LMHeadModel(config)
    text = b"A residual network is a time-stepping scheme, and a layer is a time step. " * 8
    tokens = torch.tensor(list(text))[: 8 * 48].view(8, 48)
    with torch.no_grad():
        before = plain.eval()(tokens).logits

    model = xbraid_py.parallelize(plain, xbraid_py.world(), mgrit=xbraid_py.MGRIT(cycle="pipeline"))
    with torch.no_grad():
        print("logits changed by", float((model(tokens).logits - before).abs().max()))
    print(model.transformer.h)

# %%
# A pipeline is exact, and what one takes on few ranks; ``mgrit=xbraid_py.MGRIT()`` would solve for all layers at once.
# The optimizer is made afterwards, since the weights of the layers are stacked now.

if GPT2Config is not None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, "o-")
    axes.set(xlabel="update", ylabel="loss")

# %%
# And back: the model of its library, with the trained weights.

if GPT2Config is not None:
    back = xbraid_py.to_sequential(model.eval())
    print(type(back).__name__, len(back.transformer.h), "blocks of", type(back.transformer.h[0]).__name__)
