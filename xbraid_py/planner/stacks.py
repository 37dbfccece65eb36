"""Advice for a stack that exists: its own blocks are timed here, and a sentence says which plan is fastest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import agree, together
from xbraid_py.layer_parallel import LayerParallel
from xbraid_py.layers.trees import flatten
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner.modules import ModuleWorkload
from xbraid_py.planner.plan import SERIAL, Plan, count, figure
from xbraid_py.planner.predict import Planner, Prediction
from xbraid_py.planner.recommend import measured_planner
from xbraid_py.planner.rule import Choice, decide, in_words

# Several ranks are worth their while from so many times one rank on.
_GAIN = 1.03


@dataclass(frozen=True)
class Advice:
    """Which plan is fastest for a stack on its ranks.

    Attributes
    ----------
    text : str
        In words; also what `str` gives.
    options : MGRIT
        Of the plan, as `LayerParallel(mgrit=...)` takes them; on one rank of several, or of a replica, exact ones.
    replicas : int
        Of the network, for `ProcessGrid(comm, replicas=...)`; each gets its share of the batch.
    ranks : int
        That the plan uses: all of them, or one.
    seconds, one_rank : float
        Predicted for an update by the plan, and on one rank, layer after layer.
    present : float or None
        The same as the stack is now; None where that is not simulated: in windows, or with serial ends.
    """

    text: str
    options: MGRIT
    replicas: int
    ranks: int
    seconds: float
    one_rank: float
    present: float | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class StackWorkload(ModuleWorkload):
    """Minibatches through the blocks of a stack, with a batch as the user has it.

    Parameters
    ----------
    model : LayerParallel
        Whose options the timed stacks have.
    state : (B, ...) tensor
        Of which `shape` and `batch` are those.
    given : tuple
        Further inputs, by place and by name.
    """

    model: LayerParallel
    state: Tensor
    given: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})

    def stack(self, comm, num_layers, options):
        window = self.model.windows[0]
        settings = window.settings
        pipelined = options.cycle == "pipeline"
        stack = LayerParallel(
            self.block,
            num_layers,
            self.model.grid.T / self.model.grid.num_layers * num_layers,
            comm,
            form=settings.form,
            returns=settings.returns,
            mgrit=options,
            accuracy=self.control,
            vmap=settings.vmap,
            recompute=settings.recompute in (True, "all"),
            spatial=None if pipelined else window.solvers.spatial,
            torch_random=settings.torch_random,
        )
        return stack.to(self.dtype)

    def input(self):
        return self._rows(self.state.detach(), self.batch).clone()

    def call(self, stack, u):
        leaves, structure = flatten(self.given)
        cut = (isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == len(self.state) for leaf in leaves)
        inputs, named = structure.build(
            [self._rows(leaf, len(u)) if each else leaf for leaf, each in zip(leaves, cut, strict=True)]
        )
        return stack(u, *inputs, **named)

    @staticmethod
    def _rows(tensor: Tensor, samples: int) -> Tensor:
        """So many samples; from the first one again where there are not as many."""
        return tensor[torch.arange(samples) % len(tensor)]


def advise(stack: LayerParallel, batch: Tensor, *inputs: Any, seconds: float = 3.0, **named: Any) -> Advice:
    """Time the blocks of a stack on its ranks, and say which plan is fastest there and by how much.

    Collective: every rank calls it, with the same batch; it takes some times `seconds`. What is timed are copies of a
    block, about a hundred of them in memory (of large blocks; of small ones two hundred): the stack, its record and
    torch's random numbers are as before.

    Replicas are predicted for the ranks of the stack. The lagged cycle is predicted with as many sweeps as the stack's
    last update took, or with 4 and 3 as a rule where there was none by it.

    Parameters
    ----------
    stack : LayerParallel
    batch : (B, ...) tensor
        What the stack is called with.
    *inputs
        Further inputs, as of a call.
    seconds : float
        About how long to time layers.
    **named
        Further inputs that have names.

    Returns
    -------
    Advice
        The same on every rank.

    Raises
    ------
    TypeError
        If this is no stack, or the batch no tensor.
    ValueError
        If the stack has splines, is compiled or not on the processor, or its blocks cannot be evaluated for the batch.
    """
    if not isinstance(stack, LayerParallel):
        raise TypeError(f"stack={type(stack).__name__} must be a LayerParallel; use the part of the model that is one")
    comm = stack.comm
    with together(comm):
        _check(stack, batch, seconds)
    # All ranks have noted the random numbers before any of them draws.
    numbers = torch.get_rng_state()
    agree(comm, (tuple(batch.shape), batch.dtype, seconds), "the batch of advise()", "advise()")
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with together(comm):
                workload = _workload(stack, batch, (inputs, named))
                _try(workload)
            planner = measured_planner(workload, comm, seconds=seconds, more_ranks=False)
            found = advice_of(stack, planner, len(batch), comm.size) if comm.rank == 0 else None
        return comm.bcast(found)
    finally:
        torch.set_rng_state(numbers)


def _check(stack: LayerParallel, batch: Any, seconds: float) -> None:
    """Raise an error for what cannot be timed."""
    if not isinstance(batch, Tensor):
        raise TypeError(f"batch={type(batch).__name__}: states of several tensors are not timed; use one tensor")
    window = stack.windows[0]
    if window.layers.splines is not None:
        raise ValueError("splines in depth are not timed, only blocks with weights of their own; leave splines out")
    if window.settings.compile:
        raise ValueError(f"compile={window.settings.compile!r}: compiled blocks are not timed; use compile=False")
    for tensor, what in ((batch, "batch"), (next(window.layers.parameters(), batch), "stack")):
        if tensor.device.type != "cpu":
            raise ValueError(f"{what} on {tensor.device}: only processors are timed; use {what}.cpu()")
    if batch.dim() < 2 or not len(batch) or batch.dtype != window.layers.dtype:
        raise ValueError(
            f"batch {tuple(batch.shape)} of {batch.dtype} is no state of samples for a stack of {window.layers.dtype}; "
            f"use what the stack is called with"
        )
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0.0 < seconds < float("inf"):
        raise ValueError(f"seconds={seconds!r} must be positive and finite; use 3.0")


def _workload(stack: LayerParallel, batch: Tensor, given: tuple[Sequence[Any], Mapping[str, Any]]) -> StackWorkload:
    module, sweeps = stack.windows[0].block.module, {}
    record = stack.record
    if record is not None and record.mode == "mgrit" and stack.windows[0].solvers.options.cycle == "lagged":
        sweeps = {"sweeps": max(1, record.iterations), "adjoint_sweeps": max(1, record.adjoint_iterations)}
    return StackWorkload(
        block=_copies(module),
        shape=tuple(batch.shape[1:]),
        num_layers=stack.grid.num_layers,
        batch=len(batch),
        dtype=batch.dtype,
        model=stack,
        state=batch,
        given=given,
        **sweeps,
    )


def _try(workload: StackWorkload) -> None:
    """Raise `ValueError` if blocks cannot be evaluated: later on ranks would wait for the one that finds it."""
    stack = workload.stack(SerialCommunicator(), 2, MGRIT(cycle="pipeline", portions=1))
    try:
        workload.call(stack, workload.input())
    except (RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(f"the block cannot be evaluated for this batch and these inputs: {error}") from error


def _copies(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(module)


def advice_of(stack: LayerParallel, planner: Planner, samples: int, size: int) -> Advice:
    """The advice by a planner for so many samples and ranks.

    Parameters
    ----------
    stack : LayerParallel
        Whose layers the planner knows the costs of.
    planner : Planner
    samples, size : int
    """
    num_layers = stack.grid.num_layers
    choice = decide(planner.of_each_kind(num_layers, size), num_layers, samples)
    best, serial = choice.prediction, choice.prediction.serial
    present = _present(stack, planner, samples, size)
    alone = is_alone(best)
    return Advice(
        _text(choice, planner, size, present),
        _options(choice, planner),
        1 if alone else best.plan.replicas,
        1 if alone else size,
        serial if alone and size > 1 else best.seconds,
        serial,
        None if present is None else present.seconds,
    )


def is_alone(best: Prediction) -> bool:
    """Whether the best plan is for one rank, or hardly better than that."""
    return best.num_ranks == 1 or best.speedup <= _GAIN


def _options(choice: Choice, planner: Planner) -> MGRIT:
    """Of each replica, which takes its share of a batch; with no more sweeps than were counted on."""
    best = choice.prediction
    if is_alone(best):
        return MGRIT(cycle="pipeline", portions=best.plan.portions if best.num_ranks == 1 else 1)
    if best.plan.is_exact:
        return MGRIT(cycle="pipeline", portions=best.plan.portions_each)
    return replace(choice.options, portions=None, max_iter=max(planner.sweeps, planner.adjoint_sweeps))


def _present(stack: LayerParallel, planner: Planner, samples: int, size: int) -> Prediction | None:
    """What the stack's own options are predicted to take."""
    if len(stack.windows) > 1:
        return None
    solvers = stack.windows[0].solvers
    options, levels = solvers.options, solvers.hierarchy.levels
    if options.cycle == "pipeline":
        plan = Plan(cycle="pipeline", portions=options.portions_of(samples))
    elif not solvers.are_iterative:
        plan = SERIAL
    else:
        times = (planner.sweeps, planner.adjoint_sweeps)
        if options.cycle != "lagged":
            times = (options.iterations, solvers.adjoint.iterations)
        plan = Plan(
            cycle=options.cycle,
            cfactors=tuple(level.factor for level in levels[:-1]),
            nrelax=options.nrelax,
            iterations=max(1, times[0]),
            adjoint_iterations=max(1, times[1]),
            euler=options.scheme == "euler" and options.parts(levels[0].factor) == 1,
        )
    return planner.predict(plan, stack.grid.num_layers, size)


def _text(choice: Choice, planner: Planner, size: int, present: Prediction | None) -> str:
    """The advice in words."""
    best, num_layers, others = choice.prediction, choice.num_layers, [choice.runner_up]
    what = f"{count(num_layers, 'layer')}, {count(choice.samples, 'sample')}, {count(size, 'rank')}"
    if is_alone(best):
        others = [best, *others] if best.kind != "serial" else others
        text = (
            f"{what}: one rank is fastest, one layer after the other, {_ms(min(best.seconds, best.serial))} an update"
        )
    else:
        text = (
            f"{what}: fastest is {in_words(best, num_layers)}, {_ms(best.seconds)} an update, "
            f"{figure(best.speedup)} times one rank"
        )
    others = [each for each in others if each is not None and each.num_ranks > 1]
    for each in others[:1]:
        text += f"; next: {in_words(each, num_layers, short=True)}, {figure(each.speedup)} times"
    if present is not None and present.plan not in (best.plan, SERIAL):
        text += f"; as the stack is: {in_words(present, num_layers, short=True)}, {figure(present.speedup)} times"
    if any(each is not None and each.plan.cycle == "lagged" for each in (best, *others[:1], present)):
        text += f" (lagged cycle: {planner.sweeps} and {planner.adjoint_sweeps} sweeps)"
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
