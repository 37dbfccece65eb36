"""Export: plain modules with the outputs of exact propagation, that work where there is no MPI."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from processes import PROJECT, job_environment
from small_runs import problem, save_state
from torch import nn

from xbraid_py import MGRIT, DenseBlock, LayerParallel, ResidualStep, to_sequential
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.nn import Dropout
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.run.options import to_dict
from xbraid_py.run.store.read import CheckpointError, file_name
from xbraid_py.run.store.write import Shard, save

SERIAL = MGRIT(max_levels=1)
N = 7


class Attention(nn.Module):
    """A pre-norm encoder block without its sums."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, u):
        x = self.norm(u)
        return self.out(torch.tanh(self.attention(x, x, x, need_weights=False)[0]))


class Tied(nn.Module):
    """One matrix in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, u):
        return torch.tanh(self.second(torch.tanh(self.first(u))))


def mlp():
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


def frozen_norm():
    norm = nn.BatchNorm1d(4)
    norm.running_mean.uniform_(-1.0, 1.0)
    norm.running_var.uniform_(0.5, 2.0)
    return nn.Sequential(norm.eval(), nn.Linear(4, 4), nn.Tanh())


BLOCKS = {
    "mlp": (mlp, (5, 4)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()), (5, 2, 4, 4)),
    "attention": (Attention, (5, 3, 4)),
    "tied": (Tied, (5, 4)),
    "frozen_norm": (frozen_norm, (5, 4)),
    "dense": (lambda: DenseBlock(4), (5, 4)),
}


def stack_of(make, comm=None, **others) -> LayerParallel:
    return LayerParallel(make, N, 3.0, comm, **{"mgrit": SERIAL, "seed": 3} | others).double()


def numbers(*shape) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def bits(*tensors) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def distance(a, b) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_gradients_are_those_of_exact_propagation(spmd, name):
    make, shape = BLOCKS[name]

    def body(comm):
        stack = stack_of(make, comm)
        plain = to_sequential(stack)
        u, w = numbers(*shape).requires_grad_(), numbers(*shape).requires_grad_()
        ours, theirs = stack(u), plain(w)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        gradients = [
            (
                own,
                torch.stack([dict(step.block.named_parameters())[name].grad for step in plain])[list(stack.own_layers)],
            )
            for name, own in ((name, p.grad) for name, p in stack.layers.named_parameters())
            if len(own)
        ]
        errors = [distance(a, b) for a, b in [(ours, theirs), (u.grad, w.grad), *gradients]]
        stack.eval()
        with torch.no_grad():
            errors.append(distance(stack(u), plain.eval()(u)))
        return errors, bits(ours) == bits(theirs), bits(*plain.parameters(), *plain.buffers())

    found = spmd(body)
    assert all(max(errors) < 1e-13 for errors, *_ in found), found
    # The dense stack has kernels of its own.
    assert name == "dense" or all(same for _, same, _ in found)
    assert all(weights == found[0][2] for *_, weights in found)


class Model(nn.Module):
    """Two stacks, one of them twice, among other parts."""

    def __init__(self, comm):
        super().__init__()
        with own_random_numbers(0):  # ranks that are threads share one generator
            self.opening, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.stages = nn.ModuleList([stack_of(mlp, comm), stack_of(lambda: DenseBlock(4), comm, seed=4)])
        self.again = self.stages[0]

    def forward(self, y):
        u = torch.tanh(self.opening(y))
        for stage in (*self.stages, self.again):
            u = stage(u)
        return self.head(u)


@pytest.mark.ranks(1, 3)
def test_a_model_with_stacks_comes_out_whole(spmd):
    def body(comm):
        model = Model(comm)
        model.head.requires_grad_(False)
        model.opening.eval()
        next(iter(model.again.layers.parameters())).requires_grad_(False)
        y = numbers(6, 3)
        expected = model(y)
        plain = to_sequential(model)
        kept = plain(y)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        wanted = {name for name, p in plain.named_parameters() if not p.requires_grad}
        return (
            distance(kept, expected),
            bits(plain(y)) == bits(kept),
            type(plain) is Model and plain.again is plain.stages[0],
            wanted == {"head.weight", "head.bias"} | {f"stages.0.{n}.block.0.weight" for n in range(N)},
            plain.training and plain.head.training and not plain.opening.training,
            not any(isinstance(part, LayerParallel) for part in plain.modules()),
        )

    for error, *rest in spmd(body):
        assert error < 1e-13 and all(rest)


def test_weights_that_are_shared_within_a_layer_stay_so():
    plain = to_sequential(stack_of(Tied))
    assert all(step.block.first.weight is step.block.second.weight for step in plain)
    assert len(list(plain.parameters())) == 2 * N


def test_frozen_statistics_are_those_of_the_layer_and_stay_frozen():
    stack = stack_of(frozen_norm)
    plain = to_sequential(stack)
    plain.train()
    means = torch.stack([step.block[0].running_mean for step in plain])
    assert torch.equal(means, dict(stack.layers.named_buffers())["0.running_mean"]) and len(means.unique(dim=0)) == N
    plain(numbers(5, 4))
    assert torch.equal(means, torch.stack([step.block[0].running_mean for step in plain]))
    assert not any(step.block[0].training for step in plain) and all(step.block[1].training for step in plain)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_dropout_is_plain(training):
    stack = stack_of(lambda: nn.Sequential(nn.Linear(4, 4), Dropout(0.5)))
    stack.train(training)
    plain, u = to_sequential(stack), numbers(50, 4)
    assert all(part.training == training for part in plain.modules())
    masks_differ = not torch.equal(plain(u), plain(u))
    assert masks_differ == training
    plain.eval()
    stack.eval()
    with torch.no_grad():
        assert distance(plain(u), stack(u)) < 1e-14


def test_a_step_is_u_plus_h_times_the_block():
    linear, u = nn.Linear(3, 3), torch.rand(2, 3)
    assert torch.equal(ResidualStep(linear, 0.25)(u), u + 0.25 * linear(u))


WITHOUT_MPI = """
import sys
sys.modules["mpi4py"] = None
import copy, io, torch
plain, inputs, expected = torch.load(sys.argv[1], weights_only=False)
for each in (plain, copy.deepcopy(plain)):
    assert torch.equal(each(inputs), expected)
buffer = io.BytesIO()
torch.save(plain, buffer)
buffer.seek(0)
again = torch.load(buffer, weights_only=False)
again(inputs).square().sum().backward()
assert all(p.grad.isfinite().all() for p in again.parameters())
try:
    import mpi4py
except ImportError:
    print("done")
"""


def without_mpi(path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_MPI, str(path)]
    environment = job_environment({"XBRAID_KERNELS": "torch"})
    return subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=100)


def test_it_works_where_mpi_is_missing(tmp_path):
    model = nn.Sequential(
        nn.Linear(3, 4).double(), stack_of(mlp), stack_of(lambda: DenseBlock(4)), nn.Linear(4, 2).double()
    )
    plain, inputs = to_sequential(model), numbers(5, 3)
    torch.save((plain, inputs, plain(inputs).detach()), tmp_path / "plain.pt")
    done = without_mpi(tmp_path / "plain.pt")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", ["vector", "scalar"])
def test_a_checkpoint_is_the_network_that_was_trained(spmd, shared_tmp_path, bias, dtype):
    def body(comm):
        architecture = DenseResNetOptions(width=3, T=2.0, bias=bias)
        trained = replace(problem(comm, dtype=getattr(torch, dtype)), architecture=architecture)
        options = NestedOptions(refinements=1, updates=(2, 2))
        run = NestedIteration(trained, 16, options=options, scales=InitialScales(layers=0.3), seed=1)
        found = []
        for record in run.run():
            network, x, features = run.network, run.weights, run.problem.features.to(getattr(torch, dtype))
            configuration = {"network": to_dict(architecture)}
            path = save_state(shared_tmp_path, run, record.update, configuration=configuration)
            plain = to_sequential(path)
            logits = plain(features.T)
            classes = network.predict(x, features)
            weights = [p for stack in plain for p in stack.parameters()]
            same = sum(p.numel() for p in weights) == network.layout.num_parameters
            error = None
            if comm.size == 1:
                u = network.steps(x).relax(network.open(x, features)[None], network.grid.num_layers, None, None)
                error = distance(logits.T, network.classify(x, u[0]))
            found.append((torch.equal(logits.argmax(1), classes), same, len(plain[1]), error, logits.dtype))
        return found

    for found in spmd(body):
        assert [depth for _, _, depth, *_ in found] == [8, 8, 16, 16, 16]
        assert all(same and count for same, count, *_ in found), found
        assert {kind for *_, kind in found} == {getattr(torch, dtype)}
        bound = 1e-13 if dtype == "float64" else 1e-5
        assert all(error is None or error < bound for *_, error, _ in found), found


def test_what_holds_no_stack_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^source=Linear holds no LayerParallel, .*; use copy\.deepcopy\(source\)$"):
        to_sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="^source=int must be a LayerParallel, a module that holds one, or the path"):
        to_sequential(3)
    model = nn.Sequential(stack_of(mlp))
    model.ranks = SerialCommunicator()
    with pytest.raises(ValueError, match=r"^source\.ranks is a communicator.*; keep it outside of the module$"):
        to_sequential(model)


def test_what_is_no_checkpoint_of_a_network_is_refused(tmp_path):
    text = tmp_path / "model.pt"
    torch.save({}, text)
    for path in (text, tmp_path / "missing.h5", str(tmp_path)):
        with pytest.raises(CheckpointError, match="give another file"):
            to_sequential(path)
    other = tmp_path / file_name(1)
    save(
        other, SerialCommunicator(), {"weights/layers.weight": Shard(torch.zeros(2, 3, 3), 0, 2)}, {"configuration": {}}
    )
    with pytest.raises(ValueError, match="holds no dense network trained in depth; give a file of the checkpoints"):
        to_sequential(other)
