"""Whatever is public and takes a communicator takes one of mpi4py, or a process group of torch, as it is."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Callable

import torch
from blocks import CASES, loss_of

import xbraid_py as xb
from xbraid_py.comm import Communicator
from xbraid_py.layers.module_block import own_random_numbers

N = 8
GRID = xb.LayerGrid(N, 2.0)
OPTIONS = xb.MGRIT(cfactor=2, min_coarse=2)


def hierarchy(comm) -> xb.Hierarchy:
    return xb.Hierarchy.plan(OPTIONS, GRID, comm.size)


def dense_steps(comm) -> xb.ResidualSteps:
    layer = xb.DenseLayer(4, 4, "tanh")
    rows = hierarchy(comm).partition.count(comm.rank)
    return xb.ResidualSteps(layer, torch.full((rows, layer.num_parameters), 0.1, dtype=torch.float64), GRID.h)


def solved(given, comm) -> float:
    start = torch.ones(4, 3, dtype=torch.float64)
    propagator = xb.Forward(dense_steps(comm), None, start)
    end = xb.Solver(OPTIONS, hierarchy(comm), given).solve(propagator, start).end
    return comm.bcast(None if end is None else end.sum().item(), comm.size - 1)


def problem_of(given) -> xb.Problem:
    draw = torch.Generator().manual_seed(0)
    return xb.Problem(
        features=torch.randn(2, 6, generator=draw, dtype=torch.float64),
        labels=torch.arange(6) % 3,
        num_classes=3,
        architecture=xb.DenseResNetOptions(width=4, T=2.0),
        regularization=xb.Regularization(),
        forward=OPTIONS,
        adjoint=OPTIONS.for_adjoint(),
        comm=given,
    )


def objective(given, comm) -> float:
    objective = problem_of(given).objective(N)
    return objective.evaluate(objective.network.initial(xb.InitialScales(), 0)).value


def network(given, comm) -> float:
    made = problem_of(comm).network(N)
    again = xb.DenseResNet(
        made.opening, made.block, made.classification, made.grid, made.partition, given, made.dtype, made.splines
    )
    x = again.initial(xb.InitialScales(), 0)
    return again.predict(x, problem_of(comm).features).sum().item()


def stack(given, comm) -> float:
    made = CASES["mlp"].stack(given, N, solve="lagged")
    loss = loss_of(made(CASES["mlp"].input()))
    loss.backward()
    return loss.item()


def shared_loss(given, comm) -> float:
    loss = torch.tensor(float(comm.rank), requires_grad=True)
    found = xb.broadcast_loss(loss, given, comm.size - 1)
    found.backward()
    return found.item() + comm.size - comm.bcast(loss.grad.item(), comm.size - 1)


def gru(given, comm) -> float:
    made = xb.ParallelGRU(2, 3, comm=given, mgrit=xb.MGRIT(cfactor=2, min_coarse=2))
    return made(torch.ones(N, 1, 2))[0].sum().item()


def lstm(given, comm) -> float:
    made = xb.ParallelLSTM(2, 3, comm=given, mgrit=xb.MGRIT(cfactor=2, min_coarse=2))
    return made(torch.ones(N, 1, 2))[0].sum().item()


def equation(given, comm) -> float:
    return float(xb.solve(xb.TimeStepper(lambda u, t0, t1: u / (1 + t1 - t0)), 1.0, [0.0, 0.5, 1.0], given).end)


def modules(given, comm) -> float:
    with own_random_numbers(0):
        plain = [torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)]
    return xb.PipelineParallel(plain, given)(torch.ones(4, 2)).sum().item()


def parallelized(given, comm) -> float:
    with own_random_numbers(0):
        blocks = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()) for _ in range(N)]
    model = xb.parallelize(torch.nn.Sequential(*blocks), given, form="map", mgrit=OPTIONS)
    return model(torch.ones(4, 3)).sum().item()


def scaler(given, comm) -> float:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], 0.1)
    made = xb.GradScaler(given, init_scale=4.0, device="cpu")
    made.scale(weight.sum() * (float("inf") if comm.rank == comm.size - 1 else 1.0)).backward()
    made.step(optimizer)  # of no rank: one has an overflow
    made.update()
    return weight.sum().item() + made.get_scale()


def stages(given, comm) -> float:
    with own_random_numbers(0):
        plain = xb.ImageResNet((5, 5), (4, 8), norm="group")
    return xb.parallel_stages(plain, given, mgrit=OPTIONS)(torch.ones(2, 3, 8, 8)).sum().item()


def kept(given, comm) -> float:
    """A checkpoint of a model without layers on ranks, whose ranks have to be given."""
    path = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 3.0)
    xb.save_checkpoint(f"{path}/a.h5", model, comm=given)
    torch.nn.init.zeros_(model.weight)
    xb.load_checkpoint(f"{path}/a.h5", model, comm=given)
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
    return model.weight.item()


def grid(given, comm) -> float:
    made = xb.ProcessGrid(given, comm.size)
    made.average_gradients([])
    return made.shard(torch.arange(2 * comm.size)).sum().item() / (4 * made.replica + 1)


CALLS: dict[str, Callable] = {
    "DenseResNet": network,
    "GradScaler": scaler,
    "LayerParallel": stack,
    "ParallelGRU": gru,
    "ParallelLSTM": lstm,
    "PipelineParallel": modules,
    "Problem": objective,
    "ProcessGrid": grid,
    "Solver": solved,
    "as_communicator": lambda given, comm: float(xb.as_communicator(given).size == comm.size),
    "broadcast_batch": lambda given, comm: xb.broadcast_batch(torch.tensor([2.0 + comm.rank]), given).item(),
    "broadcast_loss": shared_loss,
    "load_checkpoint": kept,
    "parallelize": parallelized,
    "parallel_stages": stages,
    "save_checkpoint": kept,
    "solve": equation,
}


def outcomes(given, comm: Communicator) -> dict[str, tuple[float, float]]:
    """What each call gives for the communicator given, and for the library's own."""
    return {name: (call(given, comm), call(comm, comm)) for name, call in CALLS.items()}


def test_all_that_takes_one_is_among_the_calls():
    found = set()
    for name in xb.__all__:
        made = getattr(xb, name)
        if inspect.isfunction(made) or (inspect.isclass(made) and not issubclass(made, BaseException)):
            parameters = inspect.signature(made).parameters.values()
            if any(each.name == "comm" or "Communicator" in str(each.annotation) for each in parameters):
                found.add(name)
    assert found == set(CALLS)


def test_they_take_a_communicator_of_mpi_and_a_process_group(spmd):
    """Over MPI and torch; on threads, which both know nothing of, the calls are tried with what there is."""

    def body(comm):
        given = getattr(comm, "mpi", getattr(comm, "group", comm))
        # Not made anew for every batch: that would take a message.
        assert xb.as_communicator(given) is xb.as_communicator(given)
        return outcomes(given, comm)

    for found in spmd(body):
        assert not [name for name, (a, b) in found.items() if a != b]
