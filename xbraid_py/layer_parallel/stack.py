"""A stack of residual blocks as one torch module, parallel over its layers, in one piece or window by window.

Shape letters: `N` layers, `n` of them owned here, `W` windows, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import same_arguments, together
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.accuracy import GradientControl, SolveRecord
from xbraid_py.layer_parallel.inputs import Inputs
from xbraid_py.layer_parallel.layout import Cut, Settings
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.solves import Solvers, for_adjoint
from xbraid_py.layer_parallel.window import Window
from xbraid_py.layers.existing import Existing, checked, first_difference, patterns_of, period_of, steps_of
from xbraid_py.layers.pixels import SpatialCoarsening
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid

Recompute = Literal[False, True, "states", "all"]


class LayerParallel(nn.Module):
    """u_{n+1} = u_n + h F(u_n, theta_n) for N layers of one kind, h = T / N: states and adjoints by MGRIT.

    With form="map" u_{n+1} = B(u_n, theta_n), for blocks that contain their own sum: those of `transformers`, of
    torchvision, or `nn.TransformerEncoderLayer`. Coarse steps for k layers take u + k (B(u) - u), so a block must
    change its state by little, as residual ones do.

    Every rank of the communicator makes the module, calls it with the same batch, and calls `backward`. What lies
    around it (opening, head, loss) is computed on every rank alike, with the same result, so that the training loop
    is that of a single process. Weights of a layer live on one rank; `parameters()` are those of the layers owned here,
    all layers stacked on the first axis, and an optimizer of `torch.optim` updates them there.

    In training mode propagation is by MGRIT; in evaluation mode without gradients it is exact, layer after layer, the
    samples following each other through the ranks in portions (the first axis of the state is the samples').
    Dropout and batch normalization are those of this package: all evaluations of an update meet the same network.

    With `MGRIT(cycle="pipeline")` the samples follow each other through the ranks in training too, forwards and back:
    gradients are exact, and the same bits on any number of ranks. Layers must not mix samples then; masks of dropout
    depend on the portion, and statistics of a batch are put together from those of its portions (of two samples at
    least). Graphs of all portions are kept until the backward pass: the loss is computed from all of the output, so no
    portion can go back before the last one has gone forwards. With recompute="states", or in windows, only the input is
    kept; in the backward pass each portion goes forwards again and back as soon as it can, and a rank has the graphs of
    at most as many portions as there are ranks from it to the last one.

    A stack too deep for the memory is propagated window by window: the layers of each window are shared among all
    ranks, the forward pass keeps the input of each window, the ranks in turns, and nothing else; the backward pass
    solves for the states of a window again, and then for its adjoints. So states and graphs of N / W layers are in
    memory at a time, for one forward solve more. Results are those of the stack in one piece: the same bits with exact
    propagation, otherwise up to the errors of the solves. So is `state_dict()`: either loads the other's, with any
    numbers of windows and of ranks.

    Parameters
    ----------
    block : callable
        Makes one block, an `nn.Module` that maps a state u to F(u) of the same shape, or to the next state; called for
        every layer owned here, with random numbers that depend on `seed` and the number of the layer.
    num_layers : int or LayerGrid
        The number of layers, or a grid whose steps may differ in length.
    T : float
        Final time; that of the grid, if one is given. A block whose `forward` has a parameter `t` gets the time at
        which its layer begins.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        A serial run without.
    form : {"increment", "map"}, optional
        Whether a block gives F(u), or the next state, its own sum included; then h is 1, whatever T is. By default
        F(u), and an error for a block that seems to contain its own sum.
    returns : int or str, optional
        Of blocks that give a tuple, or the like: which of its entries is F(u), or the next state.
    windows : int
        W. Where it does not divide the number of layers, the first windows have one layer more, or one interval more
        where a coarsening factor is given.
    serial_ends : (int, int)
        So many layers before and behind the others are not for the solver: they are propagated exactly, one after the
        other, on the ranks of the first and of the last of the others. Where the first and the last layers change the
        state most, as in transformers, this makes the gradient better than as many sweeps more; it costs their time.
        The "buffer layers" of "Layer-Parallel Training for Transformers" (arXiv 2601.09026). Only with `windows=1`.
    mgrit : MGRIT, optional
        Of the states. The default solves until the relative change is below 1e-2; `MGRIT(cycle="pipeline")` is exact.
    adjoint : MGRIT, optional
        Of the adjoints; what it leaves at its default is taken from `mgrit`.
    accuracy : GradientControl, optional
        What is asked of the gradients, of each window's weights.
    output : {"all", "last"}
        Whether every rank gets the output, or only the last one, `last_rank` (elsewhere it is 0; see `broadcast_loss`).
        The gradient of the input is there on every rank, or only on the first one.
    seed : int
        Of initial weights and of `Dropout`.
    vmap : bool, optional
        Evaluate the layers of all intervals of a rank in one call (`torch.func.vmap`), or one after the other; results
        agree to rounding. By default in one call where that is faster as a rule: if the finest level has 8 intervals or
        more, an input at most 65,536 numbers, a layer at most 16,384 weights, and all operations of the block have a
        batched form; blocks with masks of dropout have none. So the choice is the same on any number of ranks and in
        every run.
    recompute : {False, True, "states", "all"}
        True: do not keep the graphs of the layers for the backward pass, but evaluate them again: less memory, a third
        more time. "states": keep nothing but the input of the stack, and solve for the states again, as several windows
        always do. "all": both.
    splines : Splines, optional
        The parameters are coefficients of splines in depth then, (M, *shape) on every rank alike; t_n is the middle of
        layer n. Buffers that differ from layer to layer keep a row for each layer. Only in one piece.
    spatial : SpatialCoarsening, optional
        Fewer pixels on coarse levels, for blocks of convolutions.
    compile : bool or str
        Evaluate blocks by `torch.compile`, with a backend of that name; the first call takes up to a minute then, and
        docs/pytorch.md says where it pays.
    torch_random : bool
        Let blocks draw random numbers of torch's own, as `functional.dropout`, `nn.MultiheadAttention(dropout=0.1)` or
        `nn.Dropout` do: torch's generator starts from the seed, the number of the update and that of the layer then, so
        that all evaluations of a layer in an update draw the same ones, on any number of ranks.
    messages : torch.dtype, optional
        Of states and adjoints that go from one rank to the next, as torch.bfloat16, which halves those of float32. Each
        border between ranks rounds them then, so that results, also those of exact propagation, depend on the number of
        ranks in the digits that are cut off. By default that of the states.

    Attributes
    ----------
    windows : sequence of Window
        The stretches that are propagated at once, each with its `layers` and its `record`; a single one is the stack.
    layers : StackedWeights
        The weights of a stack in one piece.
    form : {"increment", "map"}
    period : int
        Blocks that make up one layer; more than one for a pattern of existing blocks.

    Raises
    ------
    ValueError
        If the ranks do not pass the same arguments, if a coarsening factor does not divide the number of layers, if
        there are more windows than layers or intervals, or if the block cannot be a layer.
    TypeError
        If `block` is no callable, or a module; if `windows` is no integer, or `splines` are none.
    """

    windows: Sequence[Window]

    def __init__(
        self,
        block: Callable[[], nn.Module] | Existing,
        num_layers: int | LayerGrid,
        T: float = 1.0,
        comm: Any = None,
        *,
        form: Literal["increment", "map"] | None = None,
        returns: int | str | None = None,
        windows: int = 1,
        serial_ends: tuple[int, int] = (0, 0),
        mgrit: MGRIT | None = None,
        adjoint: MGRIT | None = None,
        accuracy: GradientControl | None = None,
        output: Literal["all", "last"] = "all",
        seed: int = 0,
        vmap: bool | None = None,
        recompute: Recompute = False,
        splines: Splines | None = None,
        spatial: SpatialCoarsening | None = None,
        compile: bool | str = False,
        torch_random: bool = False,
        messages: torch.dtype | None = None,
    ):
        super().__init__()
        self.comm: Communicator = as_communicator(comm)
        options = mgrit or MGRIT()
        backwards = for_adjoint(adjoint, options)
        with together(self.comm):
            _check(block, form, windows, serial_ends, output, recompute, splines, compile, messages)
            self.grid = num_layers if isinstance(num_layers, LayerGrid) else LayerGrid(num_layers, T)
            cut = Cut(
                windows=windows,
                serial_ends=(serial_ends[0], serial_ends[1]),
                options=options,
                adjoint=backwards,
                output=output,
                spatial=spatial,
                messages=messages,
            )
            pieces = cut.pieces(self.grid, self.comm)
        if windows > 1:
            recompute = "all" if recompute in (True, "all") else "states"
        settings = Settings(
            accuracy=accuracy or GradientControl(),
            output=output,
            seed=seed,
            vmap=vmap,
            recompute=recompute,
            form=form,
            returns=returns,
            compile=compile,
            torch_random=torch_random,
        )
        arguments = {"grid": self.grid, "splines": splines} | vars(cut) | vars(settings)
        same_arguments(self.comm, arguments, kernels=BACKEND)
        made = [Window(block, solvers, settings, place, splines) for solvers, place in pieces]
        self.cut, self._main = cut, cut.main
        _warn_of_turns(self.comm, self.grid, options, pieces[cut.main][0])
        # Parameters have the names of their layers, in several windows behind the number of the window.
        if len(made) == 1:
            self.windows, self.layers = tuple(made), made[0].layers
        else:
            self.windows = nn.ModuleList(made)  # pyright: ignore[reportAttributeAccessIssue]  # a sequence of them
            self.register_state_dict_post_hook(_join)
            self.register_load_state_dict_pre_hook(_cut)
        for window in made:
            if window.block.takes_time:
                window.block.times = [0.0, *accumulate(self.grid.sizes())][:-1]
        self.output, self.form, self.period = output, form or "increment", 1

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[nn.Module],
        comm: Any = None,
        *,
        form: Literal["increment", "map"] = "map",
        returns: int | str | None = None,
        T: float = 1.0,
        **options,
    ) -> LayerParallel | PipelineParallel:
        """A stack with the weights of blocks that exist: each rank takes copies of those of its own layers.

        Blocks must be alike: the same classes, the same shapes of weights, the same attributes and buffers beside them.
        Where kinds take turns, with a period p that divides their number, p blocks are one layer of form "map". Blocks
        that differ in any way are possible where no coarse level needs likeness, with `MGRIT(cycle="pipeline")` or
        `MGRIT(max_levels=1)`: the result is a `PipelineParallel` then, whose modules are these blocks.

        Parameters
        ----------
        blocks : nn.ModuleList, nn.Sequential or iterable of nn.Module
            One for each layer, on every rank alike.
        comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
            A serial run without.
        form, returns, T
            As of `LayerParallel`, but blocks are taken for maps.
        **options
            As of `LayerParallel`.

        Raises
        ------
        ValueError
            If two blocks share weights, or differ, with the two and what they differ in.
        TypeError
            If these are no modules, or an option does not apply to them.
        """
        comm = as_communicator(comm)
        with together(comm):
            found = checked(blocks)
            if form not in ("increment", "map"):
                raise ValueError(f"form={form!r} must be increment (F of u + h F(u)) or map (the next state); use map")
            if options.get("splines") is not None:
                raise ValueError("splines of blocks that exist: each has weights of its own; leave splines out")
            period, h = period_of(found), T / len(found) if form == "increment" else None
            if period is None and needs_likeness(options):
                raise ValueError(
                    f"{first_difference(found)}; a coarse layer stands for like ones, so use "
                    f"mgrit=MGRIT(cycle='pipeline'), or PipelineParallel(blocks)"
                )
            of_pipeline = pipeline_options(options) if period is None else {}
            if period is not None and period > 1:
                found = patterns_of(found, period, returns, h, T)
                form, returns = "map", None
        if period is None:
            return PipelineParallel(steps_of(found, returns, h, T), comm, **of_pipeline)
        stack = cls(Existing(found), len(found), T, comm, form=form, returns=returns, **options)
        stack.period = period
        return stack

    @property
    def first_rank(self) -> int:
        """Owner of the first layer."""
        return self.windows[0].first_rank

    @property
    def last_rank(self) -> int:
        """Owner of the last layer."""
        return self.windows[-1].last_rank

    @property
    def sizes(self) -> list[float]:
        """Step sizes of all layers."""
        return [h for window in self.windows for h in window.sizes]

    @property
    def own_layers(self) -> list[int]:
        """Numbers of the layers owned here."""
        return [window.place.first_layer + layer for window in self.windows for layer in window.own_layers]

    @property
    def record(self) -> SolveRecord | None:
        """What the last forward and backward solve did: of the inner layers, where there are serial ends; of several
        windows the last solve of all, in the first one."""
        return self.windows[self._main].record

    @property
    def records(self) -> list[SolveRecord | None]:
        """What the last forward and backward solves of all windows did."""
        return [window.record for window in self.windows]

    def forward(self, u: Any, *inputs: Any, **named: Any) -> Any:
        """Output of the last layer for the input u (*S) of the first one.

        Collective: every rank calls it, with an input of the same shape, in the same mode.

        Parameters
        ----------
        u : tensor, or tree of tensors
            The state. Of several tensors (a tuple, a dict, a dataclass) it is one for the blocks too, which give back
            what has the same structure; all have the samples on the first axis, and one type.
        *inputs, **named
            Further inputs, which every layer gets behind its state: any trees, on every rank alike. Tensors among them
            may need gradients, which every rank gets. Where the batch is cut into portions (in a pipeline, and in
            evaluation mode) so are tensors with as many rows on the first axis as there are samples; others are handed
            on whole.

        Raises
        ------
        ValueError
            If the ranks differ in shape, type or mode, or the block cannot be evaluated for such states.
        """
        if isinstance(u, Tensor) and not inputs and not named:
            for window in self.windows:
                u = window(u)
            return u
        with together(self.comm):
            given = Inputs(u, inputs, named)
        state = given.state
        for window in self.windows:
            state = window(state, given)
        return given.user_state(state)

    def extra_repr(self) -> str:
        own = self.own_layers
        here = f"{own[0]}..{own[-1]}" if own else "none"
        windows = f", windows={len(self.windows)}" if len(self.windows) > 1 else ""
        return f"num_layers={self.grid.num_layers}, T={self.grid.T}{windows}, own_layers={here}"

    def table(self) -> str:
        """The levels of the solver, of the first window, as text."""
        solvers = self.windows[self._main].solvers
        return solvers.hierarchy.table(solvers.options)

    def advise(self, batch: Tensor, *inputs: Any, seconds: float = 3.0, **named: Any) -> Any:
        """Time the blocks on these ranks, and say in a sentence which plan is fastest; see `xbraid_py.advise`."""
        # The planner stands above this room: for its users only, and only when it is asked for.
        return import_module("xbraid_py").advise(self, batch, *inputs, seconds=seconds, **named)

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`: counts of updates, and how exactly solves are made.

        A stack with another number of windows takes it too.
        """
        states = [window.solver_state() for window in self.windows]
        return states[0] if len(states) == 1 else {**states[self._main], "windows": states}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`; of another number of windows each takes what that of the first one was."""
        states = state.get("windows", [state])
        if len(states) != len(self.windows):
            # Parts without iterations take from it the number of the update alone.
            states = [state] * len(self.windows)
        for window, own in zip(self.windows, states, strict=True):
            window.load_solver_state(own)


def needs_likeness(options: dict) -> bool:
    """Whether layers of a stack with these options must be alike."""
    mgrit = options.get("mgrit") or MGRIT()
    return mgrit.cycle != "pipeline" and mgrit.max_levels != 1


def pipeline_options(options: dict) -> dict:
    """Those of a `PipelineParallel` that does what a stack with these options does, which needs no like layers.

    Raises `TypeError` for an option that it has not.
    """
    mgrit = options["mgrit"]
    more = {key: value for key, value in options.items() if key != "mgrit" and value is not None}
    unknown = more.keys() - {"output", "recompute", "seed", "torch_random"}
    if unknown:
        raise TypeError(
            f"{sorted(unknown)[0]} is an option of like blocks; these differ, and are a PipelineParallel, with output, "
            f"recompute, seed and torch_random: leave it out"
        )
    portions = mgrit.portions if mgrit.cycle == "pipeline" else 1
    return more | {"portions": portions, "recompute": bool(more.get("recompute"))}


def _warn_of_turns(comm: Communicator, grid: LayerGrid, options: MGRIT, solvers: Solvers) -> None:
    """A warning, on one rank, where nobody has asked the ranks to take turns, and they do."""
    if comm.rank or comm.size == 1 or solvers.are_iterative or solvers.are_pipelined or options.max_levels == 1:
        return
    least = 3 * options.intervals if options.cycle == "lagged" else 4 * options.min_coarse
    warnings.warn(
        f"{grid.num_layers} layers are too few for a coarse level of {options.cycle!r}, so that the {comm.size} ranks "
        f"take turns, which is no faster than one: use MGRIT(cycle='pipeline'), which shares any number of layers, "
        f"or {least} layers and more; MGRIT(max_levels=1) says that turns are meant",
        stacklevel=4,
    )


def _check(block, form, windows, serial_ends, output, recompute, splines, compile, messages) -> None:
    """Raise an error for an argument that is no such thing."""
    if isinstance(block, list | tuple | nn.ModuleList | nn.Sequential):
        raise TypeError(
            f"block={type(block).__name__} must be a function that makes a block; for blocks that exist use "
            f"LayerParallel.from_blocks(blocks, comm)"
        )
    if form not in (None, "increment", "map"):
        raise ValueError(f"form={form!r} must be increment (F of u + h F(u)) or map (the next state); use map")
    if isinstance(block, nn.Module) or not (callable(block) or isinstance(block, Existing)):
        raise TypeError(
            f"block={type(block).__name__} must be a function that makes a block, one for each layer; "
            f"use block=lambda: MyBlock(64)"
        )
    if not isinstance(windows, int):
        raise TypeError(f"windows={windows!r} must be an integer; use 4")
    ends = tuple(serial_ends) if isinstance(serial_ends, tuple | list) else ()
    if len(ends) != 2 or not all(isinstance(count, int) and count >= 0 for count in ends):
        raise ValueError(f"serial_ends={serial_ends!r} must be two numbers of layers from 0 on; use (2, 2)")
    if any(ends) and splines is not None:
        raise ValueError(f"serial_ends={serial_ends} must be (0, 0) with splines, which run through all layers")
    if output not in ("all", "last"):
        raise ValueError(f"output={output!r} must be all or last; use all")
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute={recompute!r} must be False, True, states or all; use False")
    if not isinstance(compile, bool | str):
        raise TypeError(f"compile={compile!r} must be True, False, or the name of a backend; use True")
    if messages not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"messages={messages!r} must be None, or a short type of floats; use torch.bfloat16")
    if splines is not None:
        if not isinstance(splines, Splines):
            raise TypeError(f"splines={splines!r} must be Splines or None; use Splines(8)")
        if windows != 1:
            raise ValueError(f"splines={splines} must be None with windows={windows}; use windows=1")


def _join(stack: LayerParallel, state: dict, prefix: str, local_metadata) -> None:
    """Make the state of windows that of a stack in one piece."""
    first = f"{prefix}windows.0.layers."
    for name in [key.removeprefix(first) for key in state if key.startswith(first)]:
        parts = [state.pop(f"{prefix}windows.{w}.layers.{name}") for w in range(len(stack.windows))]
        state[f"{prefix}layers.{name}"] = torch.cat(parts)


def _cut(stack: LayerParallel, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    """The opposite of `_join`."""
    counts = [window.layers.partition.num_rows for window in stack.windows]
    for name in [column.name for column in stack.windows[0].block.columns]:
        tensor = state.pop(f"{prefix}layers.{name}", None)
        if tensor is None:
            continue
        if len(tensor) != sum(counts):
            errors.append(f"{prefix}layers.{name} has {len(tensor)} layers, the windows have {sum(counts)}")
            continue
        for w, part in enumerate(tensor.split(counts)):
            state[f"{prefix}windows.{w}.layers.{name}"] = part
