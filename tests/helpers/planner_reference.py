"""A slow, literal simulation of solves: every rank is a generator that works, sends and receives step by step.

Owners are lists with an entry for each row; nothing of the planner's partitions, clocks or formulas is used.
"""

from __future__ import annotations

from collections import defaultdict

from xbraid_py.planner import StepCost


def owners_of(num_layers, cfactors, num_ranks):
    """For each level the owners of its rows as induced by the finer level, and during its relaxation."""
    first = cfactors[0] if cfactors else 1
    intervals = num_layers // first
    share, extra = divmod(intervals, num_ranks)
    deal = [rank for rank in range(num_ranks) for _ in range(share + (rank < extra))]
    induced, levels = [rank for rank in deal for _ in range(first)], []
    for level in range(len(cfactors) + 1):
        rows = induced
        if level < len(cfactors):
            c = cfactors[level]
            rows = [induced[i - i % c] for i in range(len(induced))]
        levels.append((induced, rows))
        if level < len(cfactors):
            induced = rows[:: cfactors[level]]
    return levels


class Rank:
    """One rank's way through a solve, as generators.

    They yield ("work", seconds), ("send", to, bytes), ("receive", from), ("meet", bytes).
    """

    def __init__(self, me, plan, num_layers, num_ranks, costs, direction):
        self.me, self.plan, self.direction, self.costs = me, plan, direction, costs
        self.levels = owners_of(num_layers, plan.cfactors, num_ranks)
        self.steps = costs.states if direction > 0 else costs.adjoints
        self.coarse, self.coarse_sweep = self.steps.coarse, self.steps.coarse_sweep
        if plan.euler:
            self.coarse, self.coarse_sweep = map(self.cheaper, (self.coarse, self.coarse_sweep))
        self.times = plan.iterations if direction > 0 else plan.adjoint_iterations
        self.num_ranks = num_ranks

    def cheaper(self, step):
        each = step.each - self.steps.relax.each
        return StepCost(step.call, each if each > step.each / 2 else step.each / 2)

    def mine(self, level, induced=False):
        return [i for i, owner in enumerate(self.levels[level][0 if induced else 1]) if owner == self.me]

    def solve(self):
        for _ in self.mine(0):
            yield "work", self.steps.layer
        yield from self.make_levels()
        if self.plan.cycle == "serial":
            yield from self.sweep(0, self.steps.sweep)
            yield from self.ends(0.0)
            yield "meet", 16
        elif self.plan.cycle == "lagged":
            yield from self.lagged(1)
            for _ in range(self.times):
                yield from self.relax(0, self.steps.record)
                yield from self.vectors(2 * self.intervals(0))
                yield from self.lagged(1)
                yield from self.vectors(3 * self.intervals(0))
                if self.intervals(0):
                    yield "work", self.steps.correct.call + self.intervals(0) * self.steps.correct.each
                yield from self.ends(self.steps.check)
                yield "meet", 16 * len(self.levels[1][0])
        else:
            yield from self.relax(0, self.steps.relax)
            for i in range(self.times):
                yield from self.shift(0)
                yield from self.vectors(2 * self.intervals(0))
                last = i == self.times - 1
                yield from self.cycle(0, self.plan.cycle, True, self.steps.record if last else self.steps.relax)
            yield from self.shift(0)
            yield from self.vectors(2 * self.intervals(0))
            yield from self.ends(0.0)
            yield "meet", 16 * (self.times + 1) * len(self.levels[1][0])

    def lagged(self, level):
        if level == len(self.plan.cfactors):
            yield from self.sweep(level, self.coarse_sweep)
            yield from self.vectors(len(self.mine(level)))
            return
        yield from self.hand_over(level, True)
        yield from self.vectors(2 * len(self.mine(level)))
        for _ in range(2):
            yield from self.lagged(level + 1)
            yield from self.relax(level, self.coarse)
            yield from self.vectors(2 * self.intervals(level))
        yield from self.vectors(len(self.mine(level)))
        yield from self.hand_over(level, False)
        yield from self.hand_over(level, False)

    def cycle(self, level, kind, shifted, step):
        for i in range(self.plan.nrelax):
            if i > 0 or not shifted:
                yield from self.shift(level)
            yield from self.relax(level, self.steps.relax if level == 0 else self.coarse)
        if self.intervals(level):
            yield "work", self.coarse.call + self.intervals(level) * self.coarse.each
        yield from self.vectors(self.intervals(level))
        if level + 1 == len(self.plan.cfactors):
            yield from self.sweep(level + 1, self.coarse_sweep)
        else:
            yield from self.hand_over(level + 1, True)
            yield from self.hand_over(level + 1, True)
            yield from self.vectors(self.intervals(level + 1))
            yield from self.relax(level + 1, self.coarse)
            for part in "FV" if kind == "F" else "V":
                yield from self.cycle(level + 1, part, False, self.coarse)
            yield from self.hand_over(level + 1, False)
        yield from self.relax(level, step)

    def make_levels(self):
        for level in range(len(self.plan.cfactors)):
            for _ in self.mine(level):
                yield "work", self.costs.coarsen
        size = (1 if self.plan.euler else 2) * (
            self.costs.row_bytes + (self.costs.state_bytes if self.direction < 0 else 0)
        )
        for level in range(1, len(self.levels)):
            yield from self.hand_over(level, True, size)

    def relax(self, level, step):
        if self.mine(level):
            yield "work", step.call
        for _ in self.mine(level):
            yield "work", step.each

    def sweep(self, level, step):
        rows = self.mine(level)[:: self.direction]
        if not rows:
            return
        owners = self.levels[level][1]
        before, after = rows[0] - self.direction, rows[-1] + self.direction
        if 0 <= before < len(owners):
            yield "receive", owners[before]
        yield "work", step.call
        for _ in rows:
            yield "work", step.each
        if 0 <= after < len(owners):
            yield "send", owners[after], self.costs.state_bytes

    def shift(self, level):
        yield from self.vectors(self.intervals(level))
        rows = self.mine(level)[:: self.direction]
        if not rows:
            return
        owners = self.levels[level][1]
        before, after = rows[0] - self.direction, rows[-1] + self.direction
        if 0 <= after < len(owners):
            yield "send", owners[after], self.costs.state_bytes
        if 0 <= before < len(owners):
            yield "receive", owners[before]

    def hand_over(self, level, to_rows, size=None):
        induced, rows = self.levels[level]
        source, target = (induced, rows) if to_rows else (rows, induced)
        size = self.costs.state_bytes if size is None else size
        out, inward = defaultdict(int), defaultdict(int)
        for a, b in zip(source, target, strict=True):
            if a != b:
                out[b] += a == self.me
                inward[a] += b == self.me
        for dest in sorted(out):
            if out[dest]:
                yield "send", dest, out[dest] * size
        for origin in sorted(inward):
            if inward[origin]:
                yield "receive", origin

    def ends(self, check):
        if self.levels[0][1][-1] == self.me:
            yield "work", self.steps.ends + check

    def vectors(self, number):
        for _ in range(number):
            yield "work", self.costs.vector

    def intervals(self, level):
        return len(self.mine(level)) // self.plan.cfactors[level]


def link(machine, a, b):
    return machine.shared if a // machine.ranks_per_node == b // machine.ranks_per_node else machine.network


def exact(ranks, machine):
    """End of the last rank, where each has a core of its own."""
    clocks, waiting, mail, met = [0.0] * len(ranks), [None] * len(ranks), defaultdict(list), {}
    live = set(range(len(ranks)))
    while live:
        for me in sorted(live):
            while True:
                if waiting[me] is None:
                    waiting[me] = next(ranks[me], ("end",))
                kind, *what = waiting[me]
                if kind == "end":
                    live.discard(me)
                    break
                if kind == "work":
                    clocks[me] += what[0]
                elif kind == "send":
                    way = link(machine, me, what[0])
                    clocks[me] += what[1] / way.bandwidth
                    mail[me, what[0]].append(clocks[me] + way.latency)
                elif kind == "receive":
                    if not mail[what[0], me]:
                        break
                    clocks[me] = max(clocks[me], mail[what[0], me].pop(0))
                elif kind == "meet":
                    met[me] = clocks[me]
                    if len(met) < len(ranks):
                        break
                    end = max(met.values()) + machine.collective(len(ranks), what[0])
                    met.clear()
                    clocks = [end] * len(ranks)
                    waiting = [None] * len(ranks)
                    continue
                waiting[me] = None
    return max(clocks)


def sliced(ranks, machine, slice_seconds):
    """The same with cores shared, in small slices of time: in each, the ranks at work share the cores of their node."""
    now, left, waiting = 0.0, [0.0] * len(ranks), [None] * len(ranks)
    mail, met, live = defaultdict(list), set(), set(range(len(ranks)))
    release = None
    while live:
        if release is not None and now >= release:
            release, waiting = None, [None] * len(ranks)
            met.clear()
        for me in sorted(live):
            while left[me] <= 0.0:
                if waiting[me] is None:
                    waiting[me] = next(ranks[me], ("end",))
                    if waiting[me][0] == "work":
                        left[me] = left[me] + waiting[me][1]
                        waiting[me] = None
                        continue
                    if waiting[me][0] == "send" and len(waiting[me]) == 3:
                        _, to, size = waiting[me]
                        waiting[me] = "send", to
                        left[me] += size / link(machine, me, to).bandwidth
                        continue
                kind, *what = waiting[me]
                if kind == "end":
                    live.discard(me)
                    break
                if kind == "send":
                    mail[me, what[0]].append(now + link(machine, me, what[0]).latency)
                elif kind == "receive":
                    if not mail[what[0], me] or mail[what[0], me][0] > now:
                        break
                    mail[what[0], me].pop(0)
                elif kind == "meet":
                    met.add(me)
                    if len(met) == len(ranks) and release is None:
                        release = now + machine.collective(len(ranks), what[0])
                    break
                waiting[me] = None
        working = [me for me in range(len(ranks)) if left[me] > 0.0]
        on_node = defaultdict(int)
        for me in working:
            on_node[me // machine.ranks_per_node] += 1
        for me in working:
            left[me] -= slice_seconds / machine.slowdown(on_node[me // machine.ranks_per_node])
        now += slice_seconds
    return now
