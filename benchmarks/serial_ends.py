"""What serial layers at both ends do to the gradient's error of a transformer, random and trained, beside more sweeps.

    python benchmarks/serial_ends.py [--quick] [--seeds 3] [--num_layers 64] [--steps 1,0.0625] [--updates 100]

A language model of decoder blocks (width 32, context 32, letters of the generated text) with N layers of step h:
h = 1 are usual blocks, u + F(u), and h = 2 / N are the defaults of `drivers/transformer.py`. The error is the 2-norm
of the difference from the exact gradient over that of the exact one, weights of all layers together, of a first solve
without warm start: V-cycles with cfactor 4 and FCF-relaxation, one to three iterations forwards and as many back. Of
weights as they are drawn, and after some updates by AdamW with exact gradients. Beside it how much every layer's
weights have of the squared error, the first and the last eight of them: whether it lies at the ends at all. Layers at
the ends cost their own time, one after the other: `serial` is their share of the layers.
Last line: `drawn_E_I` and `trained_E_I`, the medians over the seeds for E layers at each end and I iterations, of the
first step that is given.
"""

from __future__ import annotations

import argparse
from statistics import median

import common
import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, GradientControl, LayerParallel
from xbraid_py.data import text
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import DecoderBlock, TokenEmbedding, TokenHead
from xbraid_py.recipes.adamw import cross_entropy

WIDTH, HEADS, CONTEXT, SAMPLES = 32, 2, 32, 16
ENDS, ITERATIONS = (0, 2, 4, 8), (1, 2, 3)
UNCHECKED = GradientControl(check=0, adapt=False)


def network(num_layers: int, h: float, seed: int, tokens: int, mgrit: MGRIT, ends: int = 0) -> nn.Sequential:
    """Embedding, stack, head."""
    with own_random_numbers(seed):
        embedding, head = TokenEmbedding(tokens, WIDTH, CONTEXT), TokenHead(WIDTH, tokens)
    stack = LayerParallel(
        lambda: DecoderBlock(WIDTH, HEADS),
        num_layers,
        h * num_layers,
        mgrit=mgrit,
        accuracy=UNCHECKED,
        serial_ends=(ends, ends),
        seed=seed,
    )
    return nn.Sequential(embedding, stack, head).double()


def gradient(model: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of all layers' weights (N, p)."""
    model.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    return torch.cat(
        [torch.cat([p.grad.flatten(1) for p in window.layers.parameters()], 1) for window in model[1].windows]
    )


def errors(exact: nn.Sequential, settings: dict, batch) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Relative errors by layers at each end and iterations; the shares of first, inner and last layers without ends."""
    wanted, found, shares = gradient(exact, batch), {}, []
    for ends in ENDS:
        for iterations in ITERATIONS:
            mgrit = MGRIT(cycle="V", cfactor=4, max_levels=2, max_iter=iterations, tol=0.0)
            model = network(mgrit=mgrit, ends=ends, **settings)
            model.load_state_dict(exact.state_dict())
            off = gradient(model, batch) - wanted
            found[ends, iterations] = float(off.norm() / wanted.norm())
            if (ends, iterations) == (0, 2):
                squares = off.square().sum(1)
                parts = (squares[:8].sum(), squares[8:-8].sum(), squares[-8:].sum())
                shares = [float(part / squares.sum()) for part in parts]
    return found, shares


def table(step: float, arguments) -> dict[str, dict[tuple[int, int], float]]:
    """Medians over the seeds, of weights as they are drawn and of trained ones."""
    found: dict[str, list] = {"drawn": [], "trained": []}
    for seed in range(arguments.seeds):
        corpus = text.load("generated", 100_000, seed)
        training, _ = corpus.split()
        settings = {"num_layers": arguments.num_layers, "h": step, "seed": seed, "tokens": len(corpus.characters)}
        exact = network(mgrit=common.SERIAL, **settings)
        optimizer = torch.optim.AdamW(exact.parameters(), 1e-3)
        batch = text.windows(training, CONTEXT, SAMPLES, seed, 10**6)
        found["drawn"].append(errors(exact, settings, batch))
        for update in range(arguments.updates):
            gradient(exact, text.windows(training, CONTEXT, SAMPLES, seed, update))
            optimizer.step()
        found["trained"].append(errors(exact, settings, batch))
    medians = {}
    for kind, rows in found.items():
        medians[kind] = {key: median(errors[key] for errors, _ in rows) for key in rows[0][0]}
        shares = [median(shares[k] for _, shares in rows) for k in range(3)]
        print(
            f"\n{kind}, h={step:g}: squared error of the first 8 layers {shares[0]:.0%}, inner {shares[1]:.0%}, "
            f"last 8 {shares[2]:.0%} (2 iterations, no ends)"
        )
        print("  ends  serial" + "".join(f"{f'{count} iterations':>16s}" for count in ITERATIONS))
        for ends in ENDS:
            cells = "".join(f"{medians[kind][ends, count]:16.2e}" for count in ITERATIONS)
            print(f"{ends:6d}{2 * ends / arguments.num_layers:8.1%}{cells}", flush=True)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 32 layers and 20 updates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_layers", type=int, default=64)
    parser.add_argument("--steps", default="1,0.03125")
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.num_layers, arguments.updates = 1, 32, 20
    figures: dict[str, float] = {}
    for step in map(float, arguments.steps.split(",")):
        for kind, errors_of in table(step, arguments).items():
            for (ends, count), error in errors_of.items():
                figures.setdefault(f"{kind}_{ends}_{count}", error)
    print()
    common.finish("serial_ends", figures)


if __name__ == "__main__":
    main()
