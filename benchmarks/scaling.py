"""Strong scaling of a weight update: simulated from the measured constants of this machine, up to 4096 ranks.

    python benchmarks/scaling.py [--quick] [--ranks_per_node 32] [--out docs/scaling.png]
    python benchmarks/scaling.py --measure 1,2,4,8,16

The layers, the messages within a node and the contention of its cores are measured here; the nodes and their network
are stated: so many ranks on each, by default 100 Gbit/s with 2 us. Efficiency is the speedup over serial propagation
on one rank, for each rank. Compared are our cycle (the best plan for each number of ranks, and one fixed plan),
V-cycles with FCF-relaxation, cfactor 4 and two iterations for states and adjoints, and serial propagation, passed on
from rank to rank. With --measure real updates on so many ranks follow, one job for each, beside their prediction.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from math import log
from pathlib import Path

import common
import planner as planner_benchmark
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from xbraid_py.comm import SerialCommunicator
from xbraid_py.planner import CLUSTER, SERIAL, Link, Plan, Planner, Prediction, Workload, measured_planner

FIXED = "one-shot, fixed"
NAMED = (64, 256, 1024)  # ranks of the figures
STYLES = {
    "one-shot, best": ("#0072b2", "-", "o"),
    FIXED: ("#0072b2", "--", "o"),
    "V-cycle, FCF": ("#e69f00", "-", "s"),
    "serial": ("0.55", "-", "^"),
}


def published(num_layers: int) -> Plan:
    """V-cycles with FCF-relaxation, two iterations, coarsened by 4 as long as that goes."""
    levels = max(1, int(log(num_layers / 4, 4) + 1e-9))
    return Plan(cycle="V", cfactors=(4,) * levels, iterations=2, adjoint_iterations=2, euler=True)


def simulate(planner: Planner, num_layers: int, ranks: list[int]) -> dict[str, list[Prediction]]:
    """Predictions of each cycle for each number of ranks."""
    best = [planner.best(num_layers, each) for each in ranks]
    # The plan that is best at the largest number of ranks of the figures, for all numbers.
    fixed = planner.best(num_layers, max(NAMED)).plan
    plans = {FIXED: fixed, "V-cycle, FCF": published(num_layers), "serial": SERIAL}
    found = {name: [planner.predict(plan, num_layers, each) for each in ranks] for name, plan in plans.items()}
    return {"one-shot, best": best} | found


def table(found: dict[str, list[Prediction]], num_layers: int) -> str:
    """Efficiencies, milliseconds and the best plan for every number of ranks."""
    lines = [f"{'ranks':>5s}  " + "  ".join(f"{name:>22s}" for name in found) + "  best plan"]
    for row in zip(*found.values(), strict=True):
        texts = (f"{100 * each.efficiency:11.1f}% {1e3 * each.seconds:6.1f} ms" for each in row)
        lines.append(f"{row[0].num_ranks:5d}  " + "  ".join(texts) + f"  {row[0].plan.text(num_layers)}")
    return "\n".join(lines)


def draw(found: dict[str, list[Prediction]], title: str, path: Path) -> None:
    """Picture: speedup and efficiency over ranks."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    speedup, efficiency = figure.subplots(1, 2)
    for name, row in found.items():
        color, line, marker = STYLES[name]
        ranks = [each.num_ranks for each in row]
        style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "label": name}
        speedup.loglog(ranks, [each.speedup for each in row], **style)
        efficiency.semilogx(ranks, [100 * each.efficiency for each in row], **style)
    speedup.loglog(ranks, ranks, color="0.8", linewidth=1, label="ideal", zorder=0)
    top = max(each.speedup for row in found.values() for each in row)
    speedup.set_ylim(top=3 * top)
    for axes, text in ((speedup, "speedup over serial, one rank"), (efficiency, "efficiency (%)")):
        axes.set_xlabel("ranks")
        axes.set_ylabel(text)
        axes.set_xticks(ranks[::2], [str(each) for each in ranks[::2]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(color="0.9")
    efficiency.set_ylim(0, 105)
    speedup.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def measure(ranks: str, num_layers: int, batch: int) -> None:
    """Real updates on these numbers of ranks of this machine."""
    print(
        f"\nmeasured here\n{'ranks':>5s}  {'plan':10s} {'measured ms':>11s} {'predicted ms':>12s} {'efficiency':>10s}"
    )
    options = argparse.Namespace(depths=str(num_layers), batch=batch, passes=3, updates=10)
    serial = None
    for each in common.integers(ranks):
        for row in planner_benchmark.start(each, options):
            serial = row["measured"] if row["plan"] == "serial" else serial
            share = f"{100 * serial / row['measured'] / each:9.1f}%" if serial else ""
            milliseconds = f"{1e3 * row['measured']:11.2f} {1e3 * row['predicted']:12.2f}"
            print(f"{each:5d}  {row['plan']:10s} {milliseconds} {share:>10s}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 1024 ranks, every other number of them")
    parser.add_argument("--num_layers", type=int, default=4096)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=5000)
    parser.add_argument("--ranks_per_node", type=int, default=32, help="of the nodes that are simulated")
    parser.add_argument("--latency", type=float, default=CLUSTER.latency, help="between nodes, seconds")
    parser.add_argument("--bandwidth", type=float, default=CLUSTER.bandwidth, help="between nodes, bytes/s")
    parser.add_argument("--out", type=Path, help="file of the picture")
    parser.add_argument("--measure", metavar="RANKS", help="real updates on so many ranks, as in 1,2,4")
    arguments = parser.parse_args()
    architecture = replace(Workload(num_layers=1, batch=1).architecture, width=arguments.width)
    workload = Workload(num_layers=arguments.num_layers, batch=arguments.batch, architecture=architecture)
    stage = CLUSTER.stage * arguments.latency / CLUSTER.latency
    network = Link(arguments.latency, arguments.bandwidth, stage, "assumed")
    planner = measured_planner(workload, SerialCommunicator(), network)
    node = replace(planner.machine, cores=arguments.ranks_per_node, ranks_per_node=arguments.ranks_per_node)
    planner = replace(planner, machine=node)
    ranks = [2**i for i in range(0, 11, 2)] if arguments.quick else [2**i for i in range(13)]
    found = simulate(planner, arguments.num_layers, ranks)
    costs = planner.costs
    print(
        f"{arguments.num_layers} layers, width {arguments.width}, {arguments.batch} samples, float64; "
        f"{arguments.ranks_per_node} ranks a node\n"
        f"layer: {1e6 * costs.states.record.each:.1f} us forward, {1e6 * costs.adjoints.record.each:.1f} us backward; "
        f"contention {node.contention:.2f}\n"
        f"within a node: {1e6 * node.shared.latency:.1f} us, {node.shared.bandwidth / 1e9:.1f} GB/s "
        f"({node.shared.source}); between nodes: {1e6 * network.latency:.1f} us, {network.bandwidth / 1e9:.1f} GB/s "
        f"(assumed)\nefficiency and time of an update\n"
    )
    print(table(found, arguments.num_layers))
    if arguments.out is not None:
        draw(
            found, f"Simulated strong scaling: {arguments.num_layers} layers, {arguments.batch} samples", arguments.out
        )
    if arguments.measure:
        measure(arguments.measure, arguments.num_layers, arguments.batch)
    figures = {}
    for name, key in (("one-shot, best", "ours"), (FIXED, "fixed"), ("V-cycle, FCF", "v_fcf"), ("serial", "serial")):
        for each in found[name]:
            if each.num_ranks in NAMED:
                figures[f"{key}_efficiency_{each.num_ranks}"] = each.efficiency
    common.finish("scaling", figures)


if __name__ == "__main__":
    main()
