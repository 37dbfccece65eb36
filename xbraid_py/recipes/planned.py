"""Which plan a job goes by: what its options give, what the run began with, or the planner's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import Choice, Layer, Workload, choose, measured
from xbraid_py.run.engine import Row, Training, resumed_configuration, train
from xbraid_py.run.folder import claim
from xbraid_py.run.options import from_dict

Prepare = Callable[..., Callable[[], Row]]


def by_plan(
    options: Any, workload: Workload, comm: Communicator, prepared: Prepare, most: int | None = None
) -> Callable[[], Row]:
    """Prepare a run with the solver and the replicas of a plan, where the options do not give them.

    Parameters
    ----------
    options : RunOptions
        With `mgrit`, `replicas` and `plan`; the first two None where the plan is to say.
    workload : Workload
        What is trained.
    comm : Communicator
    prepared : callable
        `prepared(options, text, **claimed)` checks everything without a message and returns the run; `text` is for its
        header, and `claimed` for `run.engine.train`.
    most : int, optional
        Replicas at most: 1 where a replica would have to see all samples.

    Raises
    ------
    ValueError, OSError
        What `prepared` finds wrong.
    """
    if options.mgrit is not None:
        return prepared(options, f"plan: as given, {_replicas(options.replicas or 1)}")
    written = resumed_configuration(options)
    if written is not None:
        # A run goes on as it was planned, on any number of ranks.
        mgrit = MGRIT() if written["mgrit"] is None else from_dict(MGRIT, written["mgrit"])
        replicas = options.replicas or replicas_of(mgrit, workload.batch, comm.size, most)
        return prepared(replace(options, mgrit=mgrit, replicas=replicas), f"plan: as begun, {_replicas(replicas)}")
    if options.replicas is not None:
        mgrit = MGRIT(cycle="pipeline")
        if options.replicas > mgrit.portions_of(workload.batch):
            mgrit = replace(mgrit, portions=options.replicas)
        return prepared(replace(options, mgrit=mgrit), f"plan: {_replicas(options.replicas)}, as given")
    if most == 1:
        mgrit = MGRIT(cycle="pipeline")
        return prepared(replace(options, mgrit=mgrit, replicas=1), "plan: a pipeline of the ranks (exact)")
    if options.plan == "rule":
        optim: dict[str, Any] = {"pairs": workload.optim.memory, "itemsize": workload.dtype.itemsize}
        size = workload.num_layers, workload.batch, comm.size
        return prepared(*_chosen(options, choose(*size, width=workload.architecture.width, **optim)))
    # What is wrong is said before measuring.
    prepared(replace(options, mgrit=MGRIT(cycle="pipeline"), replicas=1))
    folder = claim(options.out, comm)
    return lambda: prepared(*_chosen(options, measured(workload, comm)), folder=folder)()


def _chosen(options: Any, choice: Choice) -> tuple[Any, str]:
    """The options with the plan of a choice in them, and its text and reason."""
    return replace(options, mgrit=choice.options, replicas=choice.plan.replicas), f"{choice.text} ({choice.reason})"


def of_modules(options: Any, num_layers: int, layer: Layer, lagged: MGRIT, ranks: int) -> tuple[Any, str]:
    """Options of a minibatch job with the solver and the replicas of the plan by rule in them, and its text.

    Parameters
    ----------
    options : MinibatchOptions
    num_layers : int
    layer : Layer
        What a layer costs.
    lagged : MGRIT
        Options where the lagged cycle is chosen.
    ranks : int
    """
    if options.mgrit is not None or options.exact:
        replicas = options.replicas or 1
        return replace(options, replicas=replicas), f"plan: as given, {_replicas(replicas)}"
    written = resumed_configuration(options)
    if written is not None and written["mgrit"] is not None:
        wanted = options.replicas or written["replicas"] or 1
        replicas = wanted if ranks % wanted == 0 else 1
        mgrit = from_dict(MGRIT, written["mgrit"])
        return replace(options, mgrit=mgrit, replicas=replicas), f"plan: as begun, {_replicas(replicas)}"
    choice = choose(num_layers, options.batch_size, ranks, layer=layer)
    plan = choice.plan
    if options.replicas not in (None, plan.replicas):
        mgrit = MGRIT(cycle="pipeline")
        return replace(options, mgrit=mgrit), f"plan: {_replicas(options.replicas)}, as given (exact)"
    # Each replica makes portions of its own share of a batch.
    mgrit = MGRIT(cycle="pipeline") if plan.is_exact else replace(lagged, intervals=num_layers // plan.cfactors[0])
    return replace(options, mgrit=mgrit, replicas=plan.replicas), f"{choice.text} ({choice.reason})"


def replicas_of(mgrit: MGRIT, samples: int, ranks: int, most: int | None = None) -> int:
    """The greatest number of replicas that divides the ranks and leaves each a portion of the samples."""
    limit = min(ranks, mgrit.portions_of(samples), most or ranks)
    return max(each for each in range(1, limit + 1) if ranks % each == 0)


def train_by_plan(
    kind: str,
    training: Callable[[Communicator, Any], Training],
    options: Any,
    comm: Communicator,
    *,
    check: Callable[[], object] = lambda: None,
    **more: Any,
) -> Callable[[], Row]:
    """`run.engine.train` for a training whose replicas are groups of ranks, made when the run begins.

    Parameters
    ----------
    kind, more
        As there.
    training : callable
        `training(comm, options)` makes it; on one rank without a message.
    options : RunOptions
        With `replicas`.
    comm : Communicator
    check : callable
        Raises what is wrong with the replicas, without a message.
    """
    if options.replicas in (None, 1):
        return train(kind, training(comm, options), options, comm, **more)
    check()
    alone = training(SerialCommunicator(), replace(options, replicas=1))
    return train(kind, lambda: training(comm, options), options, comm, check=alone.load, **more)


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"
