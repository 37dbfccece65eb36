"""Modules of any kind, one behind the other and dealt out over the ranks: portions of a batch follow each other.

Shape letters: `N` modules, `n` of them owned here, `B` batch, `M` portions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, same_arguments, together
from xbraid_py.comm.base import present
from xbraid_py.comm.partition import Partition
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.alike import Watch
from xbraid_py.layer_parallel.habits import as_any_module, check_not_again
from xbraid_py.layer_parallel.inputs import Further
from xbraid_py.layer_parallel.module_call import Passage, Plan, PropagateModules
from xbraid_py.layer_parallel.owners import Owner, Place
from xbraid_py.layer_parallel.pipeline import Portions
from xbraid_py.layers.autocast import Cast
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.norm_dropout import Dropout
from xbraid_py.layers.trees import Form, flatten
from xbraid_py.mgrit import MGRIT

_INPUT = "shape and mode of the input"  # that ranks agree on
_BATCH_NORMS, _DROPOUTS = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd


class PipelineParallel(Owner):
    """Modules one behind the other, as in `torch.nn.Sequential`, each on one rank; exact, on any number of ranks.

    Modules may be of any kind, and change a state's shape, its type and its structure, if it is several tensors; no
    coarse level is needed, as `LayerParallel` needs layers of one kind for. Samples, on the first axis, are cut into
    portions: while one rank works on a portion, the rank before it works on the next. With M portions and P ranks of
    equal work a step takes (M + P - 1) / (M P) of the time of one rank.

    Every rank of the communicator makes the module, calls it with the same batch, and calls `backward`. What lies
    around it (head, loss) is computed on every rank alike. `parameters()` are those of the modules owned here;
    `state_dict()` is collective and holds all, on every rank. Gradients of the weights are summed over the portions in
    one fixed tree, and those of further inputs, which every rank gets, over the modules too, so results are bitwise the
    same on any number of ranks.

    Graphs of all portions are kept from the forward to the backward pass, since the loss is computed in between; with
    `recompute` only the states between the ranks are.

    Parameters
    ----------
    modules : sequence of nn.Module or callable
        Callables make a module; they are called where it lives, with random numbers that depend on `seed` and the
        number of the module. Of modules each rank keeps its own.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        A serial run without.
    portions : int, optional
        M, at most one for each sample. By default the greatest power of two up to 8 that leaves 8 samples in each.
    costs : sequence of float, optional
        Of the modules, in any unit: ranks get consecutive ones so that the greatest sum is as small as it can be.
        Without, as many modules each.
    output : {"all", "last"}
        Whether every rank gets the output, or only the last one, `last_rank` (elsewhere it is 0; see `broadcast_loss`).
        The gradient of the input is there on every rank, or only on the first one.
    recompute : bool
        Evaluate the modules again in the backward pass, and keep no graphs until then.
    seed : int
        Of modules that are made here, and of `xbraid_py.nn.Dropout`.
    torch_random : bool
        Let modules draw random numbers of torch's own, as `functional.dropout` and `nn.Dropout` do: torch's generator
        starts from the seed, the number of the call and of the portion, and that of the module then.

    Attributes
    ----------
    partition : Partition
        Owners of the modules.

    Raises
    ------
    ValueError
        If there is no module, the ranks do not pass the same arguments, two modules share a weight, or the costs do not
        fit.
    TypeError
        If something among `modules` is no module.

    Examples
    --------
    >>> model = PipelineParallel([nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)], portions=2)
    >>> loss = model(torch.ones(6, 4)).square().sum()
    >>> loss.backward()
    >>> list(model.state_dict())
    ['layers.0.weight', 'layers.0.bias', 'layers.2.weight', 'layers.2.bias']
    """

    def __init__(
        self,
        modules: Sequence[nn.Module | Callable[[], nn.Module]],
        comm: Any = None,
        *,
        portions: int | None = None,
        costs: Sequence[float] | None = None,
        output: Literal["all", "last"] = "all",
        recompute: bool = False,
        seed: int = 0,
        torch_random: bool = False,
    ):
        super().__init__()
        self.comm: Communicator = as_communicator(comm)
        with together(self.comm):
            modules = list(modules)
            costs = None if costs is None else [float(cost) for cost in costs]
            _check(modules, costs, output)
            self._options = MGRIT(cycle="pipeline", portions=portions)
            self.partition = dealt_out(len(modules), costs, self.comm.size)
            first, count = self.partition.first(self.comm.rank), self.partition.count(self.comm.rank)
            made = {str(number): _made(modules[number], seed, number) for number in range(first, first + count)}
        arguments = {"modules": len(modules), "costs": costs, "portions": portions, "output": output}
        arguments |= {"recompute": recompute, "seed": seed, "torch_random": torch_random}
        same_arguments(self.comm, arguments, kernels=BACKEND)
        self.layers = nn.ModuleDict(made)
        self.output, self.recompute, self.seed, self.torch_random = output, recompute, seed, torch_random
        has_masks = int(torch_random)
        for module in made.values():
            for number, part in enumerate(part for part in module.modules() if isinstance(part, Dropout)):
                part.number, has_masks = number, 1
        # Of any rank: what is refused for its masks is refused by all ranks.
        self._is_random = bool(self.comm.allgather(torch.tensor([has_masks]), (1,) * self.comm.size).any())
        self._draws = 0
        self._watch = Watch(self.comm)
        # Of the output by what a call was like, of portions that come to this rank and leave it.
        self._forms: dict[tuple, Form | None] = {}
        self._checked: set[tuple] = set()
        self.register_state_dict_post_hook(_gather)
        self.register_load_state_dict_pre_hook(_own_alone)
        self.watch()

    def places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """The parameters of the modules owned here: the number of its module, 1, and the number of modules."""
        for number, module in self.layers.items():
            yield from ((p, (int(number), 1, self.partition.num_rows)) for p in module.parameters())

    @property
    def first_rank(self) -> int:
        """Owner of the first module."""
        return self.partition.first_owner

    @property
    def last_rank(self) -> int:
        """Owner of the last module."""
        return self.partition.last_owner

    @property
    def own_layers(self) -> list[int]:
        """Numbers of the modules owned here."""
        return [int(number) for number in self.layers]

    @as_any_module
    def forward(self, u: Any, *inputs: Any, **named: Any) -> Any:
        """Output (B, ...) of the last module for the input u (B, ...) of the first one.

        Collective: every rank calls it, with an input of the same shape, in the same mode.

        Parameters
        ----------
        u : tensor, or tree of tensors
            The state of the first module, with the samples on the first axis of all its tensors. Modules may change its
            structure, its shapes and its types.
        *inputs, **named
            Further inputs, which every module gets behind its state, as of `LayerParallel`.

        Raises
        ------
        ValueError
            If the ranks differ in shape, type or mode; if portions would change what a module does, a module takes no
            such inputs, or does not keep the samples on the first axis. In the first call of a kind the error of a
            module is one of all ranks.
        """
        leaves, structure = flatten(u)
        message = None
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) for leaf in leaves):
            kind = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            message = f"u={kind} must be a tensor whose first axis is the samples, at least one, or a tree of such"
        elif len({len(leaf) for leaf in leaves}) > 1:
            counts = " and ".join(map(str, sorted({len(leaf) for leaf in leaves})))
            message = f"u has tensors of {counts} samples on their first axes; use one number"
        if message is not None:
            agree(self.comm, (message, None, None), _INPUT, "forward()")
            raise ValueError(message)
        form, given = Form.of(leaves, structure), Further(inputs, named, len(leaves[0]))
        cast = Cast.current(leaves[0].device.type)
        asks = tuple(leaf.requires_grad for leaf in leaves)
        key = (f"{form}", asks, given.form, torch.is_grad_enabled(), self.training, cast)
        agree(self.comm, (None, key, given.key), _INPUT, "forward()")
        shares = self.output == "all" and self.training and torch.is_grad_enabled()
        due = shares and self._watch.next_is_due()
        if due:
            self._watch.compare("the input", (*leaves, *given.leaves))
        portions = Portions.of(len(leaves[0]), self._options.portions_of(len(leaves[0])))
        if key not in self._forms:
            failed = self.comm.first_error(self._problem(len(portions), inputs, named))
            if failed is not None:
                raise ValueError(failed[1])
        if self.training:
            if self._is_random:
                check_not_again("PipelineParallel", "dropout")
            self._draws += 1
        plan = Plan(
            comm=self.comm,
            partition=self.partition,
            modules=self.layers,
            portions=portions,
            form=form,
            given=given,
            key=key,
            forms=self._forms,
            seed=self.seed,
            draw=self._draws,
            torch_random=self.torch_random,
            cast=cast,
            recompute=self.recompute,
            output=self.output,
            watch=self._watch if due else None,
        )
        self._check_cut(plan, leaves)
        weights = tuple(self.parameters())
        # All ranks take part in the backward pass, those without a weight as well.
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
        flags = self.comm.allgather(torch.tensor([int(wanted)]), (1,) * self.comm.size)
        anchor = torch.zeros((), requires_grad=bool(flags.any()))
        ends = PropagateModules.apply(plan, anchor, *leaves, *given.tensors, *weights)
        return present(self._forms[key]).structure.build(ends)

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: the number of calls in training, for masks of dropout."""
        return {"draws": self._draws}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws = int(state["draws"])

    def extra_repr(self) -> str:
        return f"num_modules={self.partition.num_rows}, own_layers={self.own_layers}"

    # ---- What a call is like

    def _problem(self, portions: int, inputs: tuple, named: dict[str, Any]) -> str | None:
        """What is wrong with the modules owned here, for so many portions and such further inputs."""
        for number, module in self.layers.items():
            for name, part in module.named_modules():
                what = f"module {number} has {type(part).__name__} ({name})"
                if isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None):
                    if portions > 1:
                        return (
                            f"{what} with statistics of the batch, which those of portions are not; use GroupNorm or "
                            f"LayerNorm, freeze it by eval(), or portions=1"
                        )
                if isinstance(part, _DROPOUTS) and part.training and part.p > 0.0 and not self.torch_random:
                    return (
                        f"{what}, whose masks depend on the number of ranks; use xbraid_py.nn.Dropout({part.p}), whose "
                        f"mask depends on the module and the update alone, or torch_random=True"
                    )
            if inputs or named:
                try:
                    inspect.signature(module.forward).bind(None, *inputs, **named)
                except TypeError as error:
                    return (
                        f"module {number} ({type(module).__name__}) cannot take the further inputs ({error}), and all "
                        f"modules get all of them; use a module around it whose forward(u, *inputs, **named) leaves "
                        f"them out"
                    )
        return None

    def _check_cut(self, plan: Plan, leaves: list[Tensor]) -> None:
        """Raise `ValueError`, on all ranks, if further inputs are cut into portions that belong to no samples."""
        cut = (plan.given.cut, str(plan.form.structure), plan.key[2][0])
        if len(plan.portions) == 1 or not any(plan.given.cut) or cut in self._checked:
            return
        if not (self._is_random and self.training):
            whole = replace(plan, portions=Portions.of(len(leaves[0]), 1), key=(*plan.key, "whole"))
            with torch.no_grad():
                Passage(whole, leaves, (), False, plan.portions)
        self._checked.add(cut)


def _check(modules: list, costs: list[float] | None, output: str) -> None:
    """Raise an error for an argument that is no such thing."""
    if not modules:
        raise ValueError("modules=[] must have at least one module; use [nn.Linear(4, 4)]")
    for number, module in enumerate(modules):
        if not callable(module):
            raise TypeError(f"modules[{number}]={module!r} must be a module, or a function that makes one")
    places: dict[int, int] = {}
    for number, module in enumerate(modules):
        for p in module.parameters() if isinstance(module, nn.Module) else ():
            if places.setdefault(id(p), number) != number:
                raise ValueError(
                    f"modules[{number}] shares a weight with modules[{places[id(p)]}], which may be on another rank; "
                    f"make one module of what lies between"
                )
    if output not in ("all", "last"):
        raise ValueError(f"output={output!r} must be all or last; use all")
    if costs is not None and (len(costs) != len(modules) or not all(0.0 <= cost < float("inf") for cost in costs)):
        raise ValueError(f"costs={costs} must be {len(modules)} numbers from 0 on, one for each module")


def _made(module: nn.Module | Callable[[], nn.Module], seed: int, number: int) -> nn.Module:
    if isinstance(module, nn.Module):
        return module
    with own_random_numbers(hash((seed, number)) & (2**63 - 1)):
        found = module()
    if not isinstance(found, nn.Module):
        raise TypeError(f"modules[{number}]() made {type(found).__name__}; it must make an nn.Module")
    return found


def dealt_out(count: int, costs: list[float] | None, num_ranks: int) -> Partition:
    """Owners of consecutive modules: equal numbers, or the greatest sum of costs as small as it can be."""
    if costs is None or num_ranks >= count:
        return Partition.balanced(count, num_ranks)

    def bounds(most: float) -> list[int]:
        """Ends of stretches, each as long as `most` lets it be."""
        ends, total = [0], 0.0
        for number, cost in enumerate(costs):
            if total + cost > most and number > ends[-1]:
                ends.append(number)
                total = 0.0
            total += cost
        return [*ends, count]

    # The sums that come into question are those of stretches.
    sums = [0.0, *accumulate(costs)]
    stretches = sorted({max(0.0, b - a) for i, a in enumerate(sums) for b in sums[i + 1 :]} | {max(costs)})
    low, high = 0, len(stretches) - 1
    while low < high:
        middle = (low + high) // 2
        fits = stretches[middle] >= max(costs) and len(bounds(stretches[middle])) <= num_ranks + 1
        low, high = (low, middle) if fits else (middle + 1, high)
    # Sums of floats, made in another order, may be a little above one of the list.
    found = bounds(stretches[high] * (1.0 + 1e-9))
    return Partition((*found, *[count] * (num_ranks + 1 - len(found))))


def _gather(model: PipelineParallel, state: dict, prefix: str, local_metadata) -> None:
    """Make the state of the modules owned here that of all, in their order."""
    agree(model.comm, None, "", "state_dict()")
    start = f"{prefix}layers."
    own = {key: state.pop(key) for key in [key for key in state if key.startswith(start)]}
    parts = model.comm.bcast(model.comm.gather({key.removeprefix(start): value for key, value in own.items()}))
    for part in parts:
        for key, value in part.items():
            # What is owned here stays what it was, as in any state dict.
            state[start + key] = own.get(start + key, value)


def _own_alone(model: PipelineParallel, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    """Drop what belongs to modules of other ranks."""
    start = f"{prefix}layers."
    others = set(map(str, range(model.partition.num_rows))) - set(model.layers)
    for key in [key for key in state if key.startswith(start)]:
        if key.removeprefix(start).split(".")[0] in others:
            del state[key]
