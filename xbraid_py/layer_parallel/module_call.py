"""One call of modules that are dealt out over the ranks: all portions forwards, and their slopes back.

Shape letters: `n` modules owned here, `B` batch, `M` portions.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import agree
from xbraid_py.comm.base import present
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum
from xbraid_py.layer_parallel.alike import Watch
from xbraid_py.layer_parallel.habits import Unwritten
from xbraid_py.layer_parallel.inputs import Arguments, Further, part_error
from xbraid_py.layer_parallel.pipeline import Portions
from xbraid_py.layer_parallel.solves import graph_is_kept
from xbraid_py.layers.autocast import Cast
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.norm_dropout import at_position
from xbraid_py.layers.trees import Form, flatten, has_slopes
from xbraid_py.mgrit.pipeline import follow

_ERRORS = (ValueError, TypeError, RuntimeError)  # of modules, and of torch
_DRAWS = 1 << 40  # from the number of an update to that of its next portion, as masks of dropout have them


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call is like.

    Parameters
    ----------
    comm : Communicator
    partition : Partition
        Owners of the modules.
    modules : nn.ModuleDict
        Those owned here, by their numbers.
    portions : Portions
    form : Form
        Of the input.
    given : Further
        What every module gets beside its state.
    key : tuple
        In what calls differ whose states have other forms; the same on every rank.
    forms : dict
        Those that are known: of the output by the key, of portions that come to this rank and leave it. It is added to.
    seed, draw : int
        Of masks of dropout.
    torch_random : bool
        Whether torch's own random numbers start from these for each module.
    cast : Cast or None
        What modules are evaluated in.
    recompute : bool
    output : {"all", "last"}
    watch : Watch or None
        Compares the gradient of the output among the ranks, if it is time to.
    """

    comm: Communicator
    partition: Partition
    modules: nn.ModuleDict
    portions: Portions
    form: Form
    given: Further
    key: tuple
    forms: dict
    seed: int
    draw: int
    torch_random: bool
    cast: Cast | None
    recompute: bool
    output: str
    watch: Watch | None

    def spread(self, state: Tensor | None, empty: Tensor, root: int) -> Tensor:
        """A tensor of rank `root`: on all ranks, or there, and 0 elsewhere. `empty` is written to, or given back."""
        own = self.comm.rank == root
        if self.output == "all":
            return self.comm.broadcast(present(state) if own else empty, root)
        return present(state) if own else empty.zero_()


@dataclass
class _Kept:
    """A portion before and behind the modules owned here, with the graph between.

    Each module has tensors of its own for the further inputs that need gradients (`inputs`).
    """

    starts: list[Tensor]
    ends: list[Tensor]
    inputs: Sequence[Sequence[Tensor]]


class Passage:
    """One forward pass of all portions, and the backward pass that belongs to it.

    In the first call of a kind an error of a module is one of all ranks: who waits for what it would have made is told.

    Parameters
    ----------
    plan : Plan
    leaves : sequence of Tensor
        The input.
    weights : sequence of Tensor
        Of the modules owned here.
    keep : bool
        Whether there will be a backward pass.
    compare : Portions, optional
        Of a plan with one portion: whether each module makes the same of one of these, too.

    Attributes
    ----------
    ends : list of Tensor
        The output, on the owner of the last module; the caller takes it out.
    """

    def __init__(
        self,
        plan: Plan,
        leaves: Sequence[Tensor],
        weights: Sequence[Tensor],
        keep: bool,
        compare: Portions | None = None,
    ):
        self.plan, self.keep, self.compare = plan, keep, compare
        self.leaves = [leaf.detach() for leaf in leaves]
        self.weights = [weight for weight in weights if weight.requires_grad]
        rows, rank = plan.partition, plan.comm.rank
        is_used = rows.count(rank) > 0
        self.begins = is_used and rows.neighbor(rank, -1) is None
        self.finishes = is_used and rows.neighbor(rank, +1) is None
        # Which tensors before the modules owned here get slopes; of what comes from other ranks all that can.
        self._asking = [leaf.requires_grad for leaf in leaves] if self.begins else None
        # Where it is recomputed, what comes before the modules alone.
        self.kept: dict[int, _Kept | list[Tensor]] = {}
        self._is_first, self._error = plan.key not in plan.forms, None
        found: dict[int, list[Tensor]] = {}
        follow(
            plan.comm,
            rows,
            +1,
            range(len(plan.portions)),
            begin=lambda number: [plan.portions.part(leaf, number) for leaf in self.leaves],
            template=self._expected,
            through=self._forward,
            end=lambda number, state: found.update({number: state}),
        )
        if self._is_first:
            error, self._error = self._error, None
            failed = plan.comm.first_error(None if error is None else f"{error}")
            if error is not None:
                raise error
            if failed is not None:
                raise ValueError(failed[1])
        self.ends = [torch.cat(parts) for parts in zip(*(found[n] for n in sorted(found)), strict=True)]
        if self._is_first:
            form = Form.of(self.ends, plan.forms[self._place("leaves", 0)].structure) if self.finishes else None
            plan.forms[plan.key] = plan.comm.bcast(form, plan.partition.last_owner)

    # ---- What portions are like

    def _place(self, way: str, number: int) -> tuple:
        return way, number, self.plan.key

    def _form(self, way: str, number: int) -> Form:
        """Of a portion that "arrives" here, or "leaves"."""
        if way == "arrives" and self.begins:
            shapes = tuple((self.plan.portions.rows.count(number), *shape[1:]) for shape in self.plan.form.shapes)
            return replace(self.plan.form, shapes=shapes)
        return self.plan.forms[self._place(way, number)]

    def _expected(self, number: int) -> Tensor:
        """A tensor for the state of a portion that comes from the rank before; at first its form does."""
        plan = self.plan
        if self._is_first:
            behind = present(plan.partition.neighbor(plan.comm.rank, -1))
            size = int(plan.comm.recv(torch.empty(1, dtype=torch.int64, device="cpu"), behind))
            text = plan.comm.recv(torch.empty(size, dtype=torch.uint8, device="cpu"), behind)
            plan.forms[self._place("arrives", number)] = pickle.loads(text.numpy().tobytes())
        form = self._form("arrives", number)
        return self.leaves[0].new_empty(0) if form is None else form.template(self.leaves[0])

    def _announce(self, number: int, form: Form | None) -> None:
        """Note what a portion looks like, and tell the rank behind, at first; later ones must look the same."""
        forms, place = self.plan.forms, self._place("leaves", number)
        if not self._is_first:
            if forms[place] != form:
                raise ValueError(f"a state {form} was {forms[place]} before, for such an input")
            return
        forms[place] = form
        if not self.finishes:
            try:
                text = pickle.dumps(form)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"a state {form} cannot go to the next rank ({error}); use a tuple or a dict, or a class that is "
                    f"defined at the top of a file"
                ) from error
            ahead = present(self.plan.partition.neighbor(self.plan.comm.rank, +1))
            self.plan.comm.isend(torch.tensor([len(text)], dtype=torch.int64, device="cpu"), ahead)()
            self.plan.comm.isend(torch.frombuffer(bytearray(text), dtype=torch.uint8), ahead)()

    # ---- Forwards

    def _forward(self, number: int, state: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        """A portion from the rank before, through the modules owned here."""
        if not self._is_first:
            return self._passed(number, state)
        try:
            if self.begins or self._form("arrives", number) is not None:
                return self._passed(number, state)
        except _ERRORS as error:
            self._error = self._error or error
        self._announce(number, None)
        return self.leaves[0].new_empty(0)

    def _passed(self, number: int, state: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
        starts = state if isinstance(state, list) else self._form("arrives", number).unpack(state)
        if self.keep and not self.plan.recompute:
            kept, form = self._graph(number, starts)
            self.kept[number] = kept
            ends = [end.detach() for end in kept.ends]
        else:
            with torch.no_grad():
                tensors, arguments = self.plan.given.of_portion(self.plan.portions, number)
                inputs = [tensors] * len(self.plan.modules)
                ends, form = self._through(number, [start.clone() for start in starts], inputs, arguments)
            if self.keep:
                self.kept[number] = starts
        self._announce(number, form)
        return ends if self.finishes else form.pack(ends, self.leaves[0])

    def _graph(self, number: int, starts: Sequence[Tensor]) -> tuple[_Kept, Form]:
        """A portion through the modules owned here, with the graph."""
        asking = self._asking or [True] * len(starts)
        starts = [start.detach() for start in starts]
        for start, asks in zip(starts, asking, strict=True):
            start.requires_grad_(asks and has_slopes(start.dtype))
        tensors, arguments = self.plan.given.of_portion(self.plan.portions, number)
        inputs = [[tensor.detach().requires_grad_() for tensor in tensors] for _ in self.plan.modules]
        device, cast = self.leaves[0].device.type, self.plan.cast
        # In the backward pass what was cast forwards is cast again, and nothing else.
        with torch.enable_grad(), cast.context() if cast else torch.autocast(device, enabled=False):
            # A copy, which a module may write to.
            ends, form = self._through(number, [start.clone() for start in starts], inputs, arguments)
        return _Kept(starts, ends, inputs), form

    def _through(
        self, number: int, leaves: list[Tensor], inputs: Sequence[Sequence[Tensor]], arguments: Arguments
    ) -> tuple[list[Tensor], Form]:
        """A portion through the modules owned here, of which each gets the arguments that its `inputs` make."""
        plan, samples = self.plan, self.plan.portions.rows.count(number)
        structure = self._form("arrives", number).structure
        for (name, module), own in zip(plan.modules.items(), inputs, strict=True):
            compare, before = self.compare, structure
            part = [] if compare is None else [compare.part(leaf, 1).clone() for leaf in leaves]
            more, named = arguments(own)
            what = f"module {name} ({type(module).__name__})"
            with self._random_numbers(what, number, int(name), module.training):
                leaves, structure = flatten(module(structure.build(leaves), *more, **named))
            has_samples = [isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == samples for leaf in leaves]
            if not has_samples or not all(has_samples):
                kinds = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
                raise ValueError(
                    f"{what} makes {kinds[0] if structure.is_leaf else kinds} of {samples} samples; they must stay on "
                    f"the first axis of one tensor, or of all tensors of a tree; what is the same for all samples must "
                    f"be a further input, model(u, table), and of a tuple with more a module must give the state alone"
                )
            if compare is not None:
                self._compare(compare, what, module, before.build(part), leaves)
        return leaves, Form.of(leaves, structure)

    @contextmanager
    def _random_numbers(self, what: str, portion: int, number: int, training: bool) -> Iterator[None]:
        """What a module draws for a portion: alike on any number of ranks, and whenever it is evaluated."""
        position = (self.plan.seed, self.plan.draw + portion * _DRAWS, number)
        with at_position(*position):
            if self.plan.torch_random and training:
                with own_random_numbers(hash(position) & (2**63 - 1)):
                    yield
                return
            before = self._generator() if self._is_first else None
            yield
            if before is not None and not torch.equal(before, self._generator()):
                raise ValueError(
                    f"{what} draws random numbers of torch's own, as dropout of attention does, which depend on the "
                    f"number of ranks and are others when it is evaluated again; use torch_random=True"
                )

    def _generator(self) -> Tensor:
        """The state of torch's random numbers."""
        return torch.cuda.get_rng_state(self.leaves[0].device) if self.leaves[0].is_cuda else torch.get_rng_state()

    def _compare(self, portions: Portions, what: str, module: nn.Module, part: Any, whole: list[Tensor]) -> None:
        """Raise `ValueError` if a module makes something else of a portion than of the batch."""
        tensors, arguments = self.plan.given.of_portion(portions, 1)
        more, named = arguments(tensors)
        try:
            found, _ = flatten(module(part, *more, **named))
        except RuntimeError as error:
            raise part_error(what, "portions=1", error) from error
        for each, leaf in zip(found, whole, strict=True):
            if has_slopes(leaf.dtype) and (portions.part(leaf, 1) - each).norm() > 1e-2 * each.norm():
                raise part_error(what, "portions=1")

    # ---- Backwards

    def backward(
        self, slopes: Sequence[Tensor], keep: bool
    ) -> tuple[list[Tensor], list[Tensor], Mapping[int, list[Tensor]]]:
        """Gradients of the input (B, ...), on its owner, and of the weights owned here, as far as they are asked for.

        And those of the further inputs by the modules owned here, as `Further.sums` takes them.

        Parameters
        ----------
        slopes : sequence of (B, ...) tensor
            Gradient of the output, on the owner of the last module.
        keep : bool
            Whether this may be called again.
        """
        plan = self.plan
        sums = [TreeSum(len(plan.portions)) for _ in self.weights]
        rows: dict[int, list[Tensor]] = {}
        backs = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in self._own_asking()]

        def through(number: int, state: list[Tensor] | Tensor) -> list[Tensor] | Tensor:
            kept = self.kept[number] if keep else self.kept.pop(number)
            if isinstance(kept, list):
                kept, _ = self._graph(number, kept)
            slope = state if isinstance(state, list) else self._form("leaves", number).slopes.unpack(state)
            ends = [end for end in kept.ends if has_slopes(end.dtype)]
            pairs = [(end, v) for end, v in zip(ends, slope, strict=True) if end.requires_grad]
            asked = [start for start in kept.starts if start.requires_grad]
            count = len(asked)
            asked += [*self.weights, *(tensor for own in kept.inputs for tensor in own)]
            if pairs and asked:
                options = {"retain_graph": keep, "allow_unused": True, "materialize_grads": True}
                found = torch.autograd.grad([end for end, _ in pairs], asked, [v for _, v in pairs], **options)
            else:
                found = [torch.zeros_like(each) for each in asked]
            of_inputs = iter(found[count + len(self.weights) :])
            by_module = [[next(of_inputs).reshape(-1) for _ in own] for own in kept.inputs]
            rows[number] = [torch.stack(each) for each in zip(*by_module, strict=True)]
            for tree, gradient in zip(sums, found[count:], strict=False):
                # It may be the memory of another gradient too.
                tree.add(number, gradient)
            if self.begins:
                return list(found[:count])
            return self._form("arrives", number).slopes.pack(found[:count], self.leaves[0])

        def put(number: int, parts: Sequence[Tensor]) -> None:
            for back, part in zip(backs, parts, strict=True):
                plan.portions.put(back, number, part)

        with torch.autocast(self.leaves[0].device.type, enabled=False):
            follow(
                plan.comm,
                plan.partition,
                -1,
                range(len(plan.portions)),
                begin=lambda number: [plan.portions.part(slope, number) for slope in slopes],
                template=lambda number: self._form("leaves", number).slopes.template(self.leaves[0]),
                through=through,
                end=put,
            )
        return backs, [tree.result() for tree in sums], rows

    def _own_asking(self) -> list[Tensor]:
        asking = self._asking or [False] * len(self.leaves)
        return [leaf for leaf, asks in zip(self.leaves, asking, strict=True) if asks]


class PropagateModules(torch.autograd.Function):
    """`apply(plan, anchor, *leaves, *further, *weights)`: all portions forwards; backwards, their slopes."""

    @staticmethod
    def forward(ctx, plan: Plan, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The output of the last module, its leaves."""
        count = len(plan.form.shapes)
        keep = any(ctx.needs_input_grad)
        passage = Passage(plan, tensors[:count], tensors[count + len(plan.given.tensors) :], keep)
        if keep:
            ctx.passage = passage
            ctx.unwritten = Unwritten((*tensors[:count], *plan.given.leaves) if plan.recompute else ())
        ends, passage.ends = passage.ends or [None] * len(plan.forms[plan.key].shapes), []
        form = plan.forms[plan.key]
        empty = (tensors[0].new_empty(shape, dtype=kind) for shape, kind in zip(form.shapes, form.dtypes, strict=True))
        found = [plan.spread(end, each, plan.partition.last_owner) for end, each in zip(ends, empty, strict=True)]
        ctx.mark_non_differentiable(*(each for each in found if not has_slopes(each.dtype)))
        return tuple(found)

    @staticmethod
    def backward(ctx, *slopes: Tensor):
        """Gradients of the input, of further inputs and of the weights owned here."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a PipelineParallel has no second derivatives; use torch.nn.Sequential"
            )
        passage = ctx.passage
        if passage is None:
            raise RuntimeError(
                "backward through a PipelineParallel a second time: what its forward pass kept has been freed; use "
                "backward(retain_graph=True) the first time"
            )
        plan, keep = passage.plan, graph_is_kept()
        agree(plan.comm, None, "", "backward()")
        ctx.unwritten.check()
        dtypes = plan.forms[plan.key].dtypes
        if plan.watch is not None:
            plan.watch.compare("the gradient of the output", slopes)
        own = [slope.contiguous() for slope, dtype in zip(slopes, dtypes, strict=True) if has_slopes(dtype)]
        backs, of_weights, rows = passage.backward(own, keep)
        wanted = ctx.needs_input_grad[2:]
        count, stop = len(passage.leaves), len(passage.leaves) + len(plan.given.tensors)
        back, first = iter(backs or [None] * count), plan.partition.first_owner
        of_leaves = [
            plan.spread(next(back), torch.empty_like(leaf, memory_format=torch.contiguous_format), first)
            if want
            else None
            for leaf, want in zip(passage.leaves, wanted[:count], strict=True)
        ]
        of_inputs = plan.given.sums(rows, plan.portions, plan.partition, plan.comm) if plan.given.tensors else []
        if not keep:
            # A loss that is still around would otherwise hold all graphs during the next forward pass.
            ctx.passage = None
        weights = iter(of_weights)
        return None, None, *of_leaves, *of_inputs, *(next(weights) if want else None for want in wanted[stop:])
