"""Who wins where: the best plan for every number of samples and of ranks, as a picture and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from xbraid_py.planner.plan import count, figure
from xbraid_py.planner.predict import Planner, Prediction, rounded
from xbraid_py.planner.rule import decide, few_of_each_kind, in_words

# Kinds of plans, and their colors.
_COLORS = {
    "serial": "0.85",
    "replicas": "#9ecae1",
    "pipeline": "#c7e9c0",
    "replicas of pipelines": "#41ab5d",
    "lagged": "#fdd0a2",
    "replicas of lagged": "#f16913",
}
_LABELS = {
    "serial": "one layer after the other",
    "replicas": "replicas of one rank",
    "lagged": "MGRIT",
    "replicas of lagged": "replicas of MGRIT",
}
_SHARED = ("serial", "replicas")  # no layers are spread


@dataclass(frozen=True)
class Map:
    """Choices for numbers of samples and of ranks.

    Attributes
    ----------
    num_layers : int
    samples, ranks : tuple of int
        In ascending order.
    best : dict
        For (samples, ranks) the prediction of the plan that is chosen.
    sharing : dict
        For numbers of samples how many times faster than one rank replicas of one rank are at best.
    """

    num_layers: int
    samples: tuple[int, ...]
    ranks: tuple[int, ...]
    best: dict[tuple[int, int], Prediction]
    sharing: dict[int, float]

    def row(self, samples: int) -> list[Prediction]:
        """Those of a number of samples, for all numbers of ranks."""
        return [self.best[samples, ranks] for ranks in self.ranks]

    def spread_from(self, samples: int) -> int | None:
        """The least number of ranks for which layers are spread over ranks; None if they never are."""
        return next((each.num_ranks for each in self.row(samples) if each.kind not in _SHARED), None)


def powers_of_two(first: int, last: int) -> tuple[int, ...]:
    """1, 2, 4, ... from `first` on, and `last`."""
    found = []
    while first < last:
        found.append(first)
        first *= 2
    return (*found, last)


def make_map(
    planner_of: Callable[[int], Planner],
    num_layers: int,
    samples: Sequence[int],
    ranks: Sequence[int],
    cycles: Sequence[str] = ("lagged",),
) -> Map:
    """The rule's choices.

    Parameters
    ----------
    planner_of : callable
        The planner for a number of samples.
    num_layers : int
    samples, ranks : sequence of int
    cycles : sequence of str
        Cycles to choose from besides exact propagation.
    """
    best, sharing = {}, {}
    for number in sorted(samples):
        planner, sharing[number] = planner_of(number), 1.0
        for each in sorted(ranks):
            found = few_of_each_kind(planner, num_layers, each, cycles)
            best[number, each] = decide(found, num_layers, number).prediction
            alone = [plan.speedup for plan in found if plan.kind == "replicas"]
            sharing[number] = max(sharing[number], *alone, 0.0)
    return Map(num_layers, tuple(sorted(samples)), tuple(sorted(ranks)), best, sharing)


def in_sentences(found: Map) -> list[str]:
    """What a map says of spreading layers: when, when not, and what it gains; all numbers from the map."""
    begins = {samples: found.spread_from(samples) for samples in found.samples}
    spread = {samples: ranks for samples, ranks in begins.items() if ranks is not None}
    most = found.ranks[-1]
    if not spread:
        return [f"Layers should not be spread at all up to {most:,} ranks: sharing samples, or one rank, is as good."]
    sentences = []
    left = sorted(samples / ranks for samples, ranks in spread.items() if samples > 1)
    named = _few([samples for samples in found.samples if samples in spread])
    where = "; ".join(f"{count_of(samples, 'sample')}: {spread[samples]:,}" for samples in named)
    if left:
        middle = median(left)
        same = ", that is to about as many ranks as samples" if 0.5 <= middle <= 2.0 else ""
        sentences.append(
            f"Share the samples among replicas of one rank until each has about {figure(middle)} left "
            f"({figure(left[0])} to {figure(left[-1])}, by their number){same}; "
            f"with more ranks spread the layers as well."
        )
    sentences.append(f"Layers are spread from so many ranks on: {where}.")
    if len(spread) < len(found.samples):
        never = [samples for samples in found.samples if samples not in spread]
        sentences.append(f"They never are with {_either(f'{samples:,}' for samples in never)} samples.")
    cells = [each for (samples, _), each in found.best.items() if samples > 1 and each.kind not in _SHARED]
    within = sum(each.plan.replicas > 1 for each in cells)
    if cells:
        sentences.append(
            f"Where they are spread, {within / len(cells):.0%} of the plans do it inside replicas, and "
            f"{sum(each.plan.is_exact for each in cells) / len(cells):.0%} are exact; the others are MGRIT."
        )
    gains = []
    for samples in _few(found.samples):
        row = found.row(samples)
        shared = found.sharing[samples]
        whole = max(row, key=lambda each: rounded(each.speedup))
        if whole.kind not in _SHARED and whole.speedup > shared:
            gains.append(
                f"{count_of(samples, 'sample')}: {figure(shared)} by sharing them alone, {figure(whole.speedup)} by "
                f"{in_words(whole, found.num_layers, short=True)}"
            )
    if gains:
        sentences.append(f"Times one rank at best, {'; '.join(gains)}.")
    idle = [samples for samples in found.samples if all(each.speedup < 1.1 for each in found.row(samples))]
    if idle:
        sentences.append(f"No number of ranks pays with {_either(f'{each:,}' for each in idle)} samples.")
    return sentences


def count_of(number: int, what: str) -> str:
    """`1 sample`, `5,000 samples`."""
    return count(number, what).replace(str(number), f"{number:,}", 1)


def _few(numbers: Sequence[int]) -> list[int]:
    """Up to five of them, the first and the last among them."""
    if len(numbers) <= 5:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / 4)] for i in range(5)]


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def draw(found: Map, title: str, path: Path) -> None:
    """Picture: the kind of the best plan as a color, its speed-up over one rank as a number."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = list(_COLORS)
    numbers = [[_kind_number(found.best[samples, ranks], kinds) for samples in found.samples] for ranks in found.ranks]
    picture = Figure(figsize=(1.5 + 0.62 * len(found.samples), 2.2 + 0.36 * len(found.ranks)), layout="constrained")
    axes = picture.subplots()
    axes.pcolormesh(
        numbers, cmap=ListedColormap(list(_COLORS.values())), vmin=-0.5, vmax=len(kinds) - 0.5, edgecolors="w"
    )
    for y, ranks in enumerate(found.ranks):
        for x, samples in enumerate(found.samples):
            best = found.best[samples, ranks]
            axes.text(x + 0.5, y + 0.5, figure(best.speedup), ha="center", va="center", fontsize=8)
    axes.set_xticks([x + 0.5 for x in range(len(found.samples))], [f"{each:,}" for each in found.samples], fontsize=8)
    axes.set_yticks([y + 0.5 for y in range(len(found.ranks))], [f"{each:,}" for each in found.ranks], fontsize=8)
    axes.set_xlabel("samples")
    axes.set_ylabel("ranks")
    axes.set_title(f"{title}\nbest plan, and times one rank", fontsize=10)
    present = sorted({number for row in numbers for number in row})
    patches = [
        Patch(color=_COLORS[kinds[number]], label=_LABELS.get(kinds[number], kinds[number])) for number in present
    ]
    picture.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)


def _label(kind: str) -> str:
    return {"replicas": "replicas of one rank", "lagged": "MGRIT", "replicas of lagged": "replicas of MGRIT"}.get(
        kind, kind
    )


def _kind_number(prediction: Prediction, kinds: list[str]) -> int:
    kind = prediction.kind
    if kind not in kinds:
        kind = "lagged" if prediction.plan.replicas == 1 else "replicas of lagged"
    return kinds.index(kind)
