"""Modules of any kind, one behind the other and dealt out over the ranks: portions of a batch follow each other.

Shape letters: `N` modules, `n` of them owned here, `B` batch, `M` portions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree, same_arguments, together
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.habits import as_any_module, check_not_again
from xbraid_py.layer_parallel.pipeline import Portions
from xbraid_py.layer_parallel.solves import graph_is_kept
from xbraid_py.layers.autocast import Cast
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.norm_dropout import Dropout, at_position
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.pipeline import follow

_BATCH_NORMS, _DROPOUTS = nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd
_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_AXES = 14  # of a state, at most


class PipelineParallel(nn.Module):
    """Modules one behind the other, as in `torch.nn.Sequential`, each on one rank; exact, on any number of ranks.

    Modules may be of any kind, and change the shape of a state; no coarse level is needed, as `LayerParallel` needs
    layers of one kind for. Samples, on the first axis, are cut into portions: while one rank works on a portion, the
    rank before it works on the next. With M portions and P ranks of equal work a step takes (M + P - 1) / (M P) of the
    time of one rank.

    Every rank of the communicator makes the module, calls it with the same batch, and calls `backward`. What lies
    around it (head, loss) is computed on every rank alike. `parameters()` are those of the modules owned here;
    `state_dict()` is collective and holds all, on every rank. Gradients of the weights are summed over the portions in
    one fixed tree, so results are bitwise the same on any number of ranks.

    Graphs of all portions are kept from the forward to the backward pass, since the loss is computed in between; with
    `recompute` only the states between the ranks are.

    Parameters
    ----------
    modules : sequence of nn.Module or callable
        Callables make a module; they are called where it lives, with random numbers that depend on `seed` and the
        number of the module. Of modules each rank keeps its own.
    comm : Communicator or mpi4py.MPI.Comm, optional
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
        same_arguments(self.comm, arguments | {"recompute": recompute, "seed": seed}, kernels=BACKEND)
        self.layers = nn.ModuleDict(made)
        self.output, self.recompute, self.seed = output, recompute, seed
        has_masks = 0
        for module in made.values():
            for number, part in enumerate(part for part in module.modules() if isinstance(part, Dropout)):
                part.number, has_masks = number, 1
        # Of any rank: what is refused for its masks is refused by all ranks.
        self._is_random = bool(self.comm.allgather(torch.tensor([has_masks]), (1,) * self.comm.size).any())
        self._draws = 0
        # Shape and type: of the output by what a batch was like, of portions that come to this rank and leave it.
        self._forms: dict[tuple, tuple[tuple[int, ...], torch.dtype]] = {}
        self.register_state_dict_post_hook(_gather)
        self.register_load_state_dict_pre_hook(_own_alone)

    @property
    def first_rank(self) -> int:
        """Owner of the first module."""
        return self.partition.owner(0)

    @property
    def last_rank(self) -> int:
        """Owner of the last module."""
        return self.partition.owner(self.partition.num_rows - 1)

    @property
    def own_layers(self) -> list[int]:
        """Numbers of the modules owned here."""
        return [int(number) for number in self.layers]

    @as_any_module
    def forward(self, u: Tensor) -> Tensor:
        """Output (B, ...) of the last module for the input u (B, ...) of the first one.

        Collective: every rank calls it, with an input of the same shape, in the same mode.

        Raises
        ------
        ValueError
            If the ranks differ in shape, type or mode; if portions would change what a module does, or a module does
            not keep the samples on the first axis.
        """
        message = key = None
        if not isinstance(u, Tensor) or u.dim() == 0 or not len(u):
            kind = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            message = f"u={kind} must be a tensor whose first axis is the samples, at least one"
        else:
            key = self._key(u)
        agree(self.comm, (message, key), "shape and mode of the input")
        if message:
            raise ValueError(message)
        if key not in self._forms:
            failed = self.comm.first_error(self._problem(self._options.portions_of(len(u))))
            if failed is not None:
                raise ValueError(failed[1])
        if self.training:
            if self._is_random:
                check_not_again("PipelineParallel", "dropout")
            self._draws += 1
        weights = tuple(self.parameters())
        # All ranks take part in the backward pass, those without a weight as well.
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
        flags = self.comm.allgather(torch.tensor([int(wanted)]), (1,) * self.comm.size)
        anchor = torch.zeros((), requires_grad=bool(flags.any()))
        return _PropagateModules.apply(self, key, anchor, u, *weights)

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: the number of calls in training, for masks of dropout."""
        return {"draws": self._draws}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`."""
        self._draws = int(state["draws"])

    def extra_repr(self) -> str:
        return f"num_modules={self.partition.num_rows}, own_layers={self.own_layers}"

    # ---- What a call is like

    def _key(self, u: Tensor) -> tuple:
        return tuple(u.shape), u.dtype, torch.is_grad_enabled(), self.training, u.requires_grad

    def _problem(self, portions: int) -> str | None:
        """What is wrong with the modules owned here, for so many portions."""
        for number, module in self.layers.items():
            for name, part in module.named_modules():
                what = f"module {number} has {type(part).__name__} ({name})"
                if isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None):
                    if portions > 1:
                        return (
                            f"{what} with statistics of the batch, which those of portions are not; use GroupNorm or "
                            f"LayerNorm, freeze it by eval(), or portions=1"
                        )
                if isinstance(part, _DROPOUTS) and part.training and part.p > 0.0:
                    return (
                        f"{what}, whose masks depend on the number of ranks; use xbraid_py.nn.Dropout({part.p}), whose "
                        f"mask depends on the module and the update alone"
                    )
        return None

    def _through(self, state: Tensor, draw: int) -> Tensor:
        """A portion through the modules owned here."""
        samples = len(state)
        for number, module in self.layers.items():
            with at_position(self.seed, draw, int(number)):
                state = module(state)
            if not isinstance(state, Tensor) or not state.dim() or len(state) != samples:
                kind = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(
                    f"module {number} ({type(module).__name__}) makes {kind} of {samples} samples; they must stay on "
                    f"the first axis of one tensor"
                )
        return state

    def _spread(self, state: Tensor | None, like: Tensor, root: int) -> Tensor:
        """A state of rank `root`: on all ranks, or there, and 0 elsewhere."""
        own = self.comm.rank == root
        if self.output == "all":
            return self.comm.broadcast(state if own else like.new_empty(like.shape), root)
        return state if own else like.new_zeros(like.shape)


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


# ---- One call


class _Call:
    """One forward pass of all portions, and the backward pass that belongs to it."""

    def __init__(self, model: PipelineParallel, u: Tensor, weights: tuple[Tensor, ...], key: tuple, keep: bool):
        self.model, self.comm, self.u, self.keep = model, model.comm, u.detach(), keep
        self.weights = [weight for weight in weights if weight.requires_grad]
        self.draw = model._draws
        self.cast = Cast.current(u.device.type)
        self.portions = Portions.of(len(u), model._options.portions_of(len(u)))
        rows, rank = model.partition, self.comm.rank
        is_used = rows.count(rank) > 0
        self.begins = is_used and rows.neighbor(rank, -1) is None
        self.finishes = is_used and rows.neighbor(rank, +1) is None
        self.with_start = is_used and (not self.begins or u.requires_grad)
        # By portion: input and output, with the graph between; without it, the input alone.
        self.kept: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.ends: dict[int, Tensor] = {}
        self.call = key
        follow(
            self.comm,
            rows,
            +1,
            range(len(self.portions)),
            begin=lambda number: self.portions.part(self.u, number),
            template=self._expected,
            through=self._forward,
            end=lambda number, state: self.ends.update({number: state}),
        )
        end = torch.cat([self.ends.pop(number) for number in sorted(self.ends)]) if self.finishes else None
        if self.call not in model._forms:
            form = (tuple(end.shape), end.dtype) if self.finishes else None
            model._forms[self.call] = self.comm.bcast(form, model.last_rank)
        shape, dtype = model._forms[self.call]
        self.end, self.like = end, u.new_empty((), dtype=dtype).expand(shape)

    def _form(self, number: int) -> tuple:
        return self.portions.rows.count(number), self.call

    def _expected(self, number: int) -> Tensor:
        """A tensor for the state of a portion that comes from the rank before; at first its form does."""
        forms, key = self.model._forms, ("arrives", *self._form(number))
        if key not in forms:
            behind = self.model.partition.neighbor(self.comm.rank, -1)
            kind, axes, *sizes = self.comm.recv(torch.empty(_AXES + 2, dtype=torch.int64), behind).tolist()
            forms[key] = tuple(sizes[:axes]), _TYPES[kind]
        shape, dtype = forms[key]
        return self.u.new_empty(shape, dtype=dtype)

    def _announce(self, number: int, state: Tensor) -> None:
        """Tell the rank behind what a portion looks like, once; later ones must look the same."""
        forms, key = self.model._forms, ("leaves", *self._form(number))
        form = tuple(state.shape), state.dtype
        if key not in forms:
            if state.dtype not in _TYPES or state.dim() > _AXES:
                raise ValueError(
                    f"a state {form[0]} {form[1]} cannot go to the next rank; use at most {_AXES} axes of {_TYPES}"
                )
            sizes = [*form[0], *[0] * (_AXES - state.dim())]
            told = torch.tensor([_TYPES.index(state.dtype), state.dim(), *sizes], dtype=torch.int64)
            self.comm.isend(told, self.model.partition.neighbor(self.comm.rank, +1))()
            forms[key] = form
        elif forms[key] != form:
            raise ValueError(
                f"a state {form[0]} {form[1]} was {forms[key][0]} {forms[key][1]} before, for such an input"
            )

    def _graph(self, number: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of the modules owned here, with the graph between."""
        draw = self.draw + number * (1 << 40)
        start = state.detach()
        start.requires_grad_(self.with_start and start.is_floating_point())
        # In the backward pass what was cast forwards is cast again.
        with torch.enable_grad(), self.cast.context() if self.cast else nullcontext():
            # A copy, which a module may write to.
            return start, self.model._through(start.clone(), draw)

    def _forward(self, number: int, state: Tensor) -> Tensor:
        if self.keep and not self.model.recompute:
            start, end = self.kept[number] = self._graph(number, state)
            end = end.detach()
        else:
            with torch.no_grad():
                end = self.model._through(state.clone(), self.draw + number * (1 << 40))
            if self.keep:
                self.kept[number] = state, None
        end = end.contiguous()
        if not self.finishes:
            self._announce(number, end)
        return end

    def backward(self, slope: Tensor, keep: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input (B, ...), on its owner, and of the weights owned here that ask for one.

        Parameters
        ----------
        slope : (B, ...) tensor
            Gradient of the output, on the owner of the last module.
        keep : bool
            Whether this may be called again.
        """
        sums = [TreeSum(len(self.portions)) for _ in self.weights]
        wants_back = self.begins and self.with_start and self.u.is_floating_point()
        back = torch.empty_like(self.u, memory_format=torch.contiguous_format) if wants_back else None

        def through(number: int, v: Tensor) -> Tensor:
            start, end = self.kept[number] if keep else self.kept.pop(number)
            if end is None:
                start, end = self._graph(number, start)
            asked = [*([start] if start.requires_grad else []), *self.weights]
            found = [v]
            if end.requires_grad and asked:
                options = {"retain_graph": keep, "allow_unused": True, "materialize_grads": True}
                found = list(torch.autograd.grad(end, asked, v, **options))
            elif asked:
                found = [torch.zeros_like(each) for each in asked]
            after = found.pop(0) if start.requires_grad else v
            for tree, gradient in zip(sums, found, strict=True) if asked else ():
                # It may be the memory of another gradient too.
                tree.add(number, gradient)
            return after.contiguous()

        follow(
            self.comm,
            self.model.partition,
            -1,
            range(len(self.portions)),
            begin=lambda number: self.portions.part(slope, number),
            template=self._awaited,
            through=through,
            end=lambda number, v: None if back is None else self.portions.put(back, number, v),
        )
        return back, [tree.result() for tree in sums]

    def _awaited(self, number: int) -> Tensor:
        """A tensor for the slope of a portion, which is like the state that went to the rank behind."""
        shape, dtype = self.model._forms["leaves", *self._form(number)]
        return self.u.new_empty(shape, dtype=dtype)


class _PropagateModules(torch.autograd.Function):
    """`apply(model, key, anchor, u, *weights)`: all portions forwards; backwards, their slopes."""

    @staticmethod
    def forward(ctx, model: PipelineParallel, key: tuple, anchor: Tensor, u: Tensor, *weights: Tensor) -> Tensor:
        """The output of the last module."""
        keep = any(ctx.needs_input_grad)
        call = _Call(model, u, weights, key, keep)
        if keep:
            ctx.model, ctx.call = model, call
        end, call.end = call.end, None
        return model._spread(end, call.like, model.last_rank)

    @staticmethod
    def backward(ctx, slope: Tensor):
        """Gradients of the input and of the weights owned here."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a PipelineParallel has no second derivatives; use torch.nn.Sequential"
            )
        call, model = ctx.call, ctx.model
        if call is None:
            raise RuntimeError(
                "backward through a PipelineParallel a second time: what its forward pass kept has been freed; use "
                "backward(retain_graph=True) the first time"
            )
        keep = graph_is_kept()
        back, found = call.backward(slope.contiguous(), keep)
        of_u = model._spread(back, call.u, model.first_rank) if ctx.needs_input_grad[3] else None
        if not keep:
            # A loss that is still around would otherwise hold all graphs during the next forward pass.
            ctx.call = None
        own = iter(found)
        wanted = ctx.needs_input_grad[4:]
        return None, None, None, of_u, *(next(own) if want else None for want in wanted)
