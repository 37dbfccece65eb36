"""Further inputs of the layers, with gradients and without, against the plain loop over the blocks."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from blocks import SOLVES, UNCHECKED, B, C, L, distance, gradients, loss_of, reduced
from existing import LAYERS, WAYS, Decoder, decoder_inputs, input_of, made, plain, stack_of
from torch import nn

import xbraid_py.nn
from xbraid_py import MGRIT, GradientControl, LayerParallel, Splines

RANKS = pytest.mark.ranks(1, 2, 3)


def tensors_of(inputs: tuple, named: dict) -> dict:
    return {"memory": inputs[0], "table": named["tables"][0], "gain": named["option"]["gain"]}


@RANKS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_further_inputs_and_their_gradients(spmd, way):
    def body(comm):
        stack = stack_of(comm, Decoder, way)
        inputs, named = decoder_inputs(True)
        u = input_of().requires_grad_()
        output = stack(u, *inputs, **named)
        loss_of(output).backward()
        found = {"output": output.detach(), "weights": gradients(stack), "input": u.grad}
        found |= {name: tensor.grad for name, tensor in tensors_of(inputs, named).items()}
        with torch.no_grad():
            return found | {"inference": stack.eval()(u, *inputs, **named)}

    count = LAYERS.get(way, 9)
    inputs, named = decoder_inputs(True)
    u = input_of().requires_grad_()
    exact = plain(count, Decoder, u, inputs, named)
    for found in spmd(body):
        assert distance(found["output"], exact["output"].detach()) < 1e-12
        assert distance(found["inference"], exact["output"].detach()) < 1e-12
        assert distance(found["weights"], exact["weights"]) < 1e-12
        assert distance(found["input"], u.grad) < 1e-12
        for name, tensor in tensors_of(inputs, named).items():
            assert distance(found[name], tensor.grad) < 1e-11, name


@RANKS
@pytest.mark.parametrize("way", ["exact", "pipeline", "V", "lagged"])
def test_the_same_bits_on_any_number_of_ranks(spmd, way):
    def body(comm):
        stack = stack_of(comm, Decoder, way)
        inputs, named = decoder_inputs(True)
        u = input_of().requires_grad_()
        loss_of(stack(u, *inputs, **named)).backward()
        return {"input": u.grad} | {name: tensor.grad for name, tensor in tensors_of(inputs, named).items()}

    alone = body(None)
    for found in spmd(body):
        for name, gradient in alone.items():
            assert torch.equal(found[name], gradient), name


@RANKS
@pytest.mark.parametrize("way", ["exact", "pipeline", "V", "V, batched"])
def test_masks_without_gradients(spmd, way):
    def body(comm):
        stack = stack_of(comm, Decoder, way)
        inputs, named = decoder_inputs(False)
        output = stack(input_of(), *inputs, **named)
        loss_of(output).backward()
        return output.detach(), gradients(stack)

    inputs, named = decoder_inputs(False)
    exact = plain(LAYERS.get(way, 9), Decoder, input_of(), inputs, named)
    for output, weights in spmd(body):
        assert distance(output, exact["output"].detach()) < 1e-12
        assert distance(weights, exact["weights"]) < 1e-12


@RANKS
def test_gradients_of_further_inputs_alone(spmd):
    """Frozen blocks, such as those of a pretrained model behind an encoder that is trained."""

    def body(comm):
        stack = stack_of(comm, Decoder, "V").requires_grad_(False)
        inputs, named = decoder_inputs(True)
        loss_of(stack(input_of(), *inputs, **named)).backward()
        return inputs[0].grad

    inputs, named = decoder_inputs(True)
    plain(9, Decoder, input_of(), inputs, named)
    for found in spmd(body):
        assert distance(found, inputs[0].grad) < 1e-11


@RANKS
@pytest.mark.parametrize("recompute", [False, "states"])
def test_checks_of_the_gradient_go_on(spmd, recompute):
    # A loss whose slope does not depend on how exact the output is.
    slope = ref.random(B, L, C, seed=9)

    def body(comm):
        mgrit = MGRIT(cfactor=3, max_levels=2, min_coarse=1, max_iter=1)
        stack = stack_of(comm, Decoder, "V", accuracy=GradientControl(check=1), recompute=recompute, mgrit=mgrit)
        inputs, named = decoder_inputs(True)
        (stack(input_of(), *inputs, **named) * slope).sum().backward()
        return inputs[0].grad, gradients(stack), stack.record

    inputs, named = decoder_inputs(True)
    x = input_of()
    blocks = made(9, Decoder)
    for block in blocks:
        x = block(x, *inputs, **named)
    (x * slope).sum().backward()
    for memory, weights, record in spmd(body):
        # The exact gradient is the one that is used.
        assert record.measured and 0.0 < record.gradient_error < 1.0
        assert distance(memory, inputs[0].grad) < 1e-11
        assert distance(weights["q.weight"][4], blocks[4].q.weight.grad) < 1e-12


@RANKS
def test_ranks_that_differ_in_their_inputs(spmd):
    def body(comm):
        stack = stack_of(comm, Decoder, "V")
        inputs, named = decoder_inputs(False)
        more = named | {"scale": 1.0 + comm.rank}
        other = named if comm.rank else {**named, "mask": None}
        return [reduced(comm, lambda n=n: stack(input_of(), *inputs, **n)) for n in (more, other)]

    results = spmd(body)
    for found in results:
        if len(results) > 1:
            assert all("shape and mode of the input=" in error for error in found)
        else:
            assert found == [None, None]


def test_an_input_of_another_type():
    stack = stack_of(None, Decoder, "V")
    memory = ref.random(B, 2, C, seed=2).float().requires_grad_()
    with pytest.raises(ValueError, match=r"a further input with a gradient is torch.float32 .* use .to"):
        stack(input_of(), memory)


# ---- Masks by closure, and tensors that only look like samples


@RANKS
def test_a_mask_by_closure_fails_with_the_way_out(spmd):
    mask = torch.ones(B, L, L + 2, dtype=torch.bool)

    class Closure(Decoder):
        def forward(self, u):
            return super().forward(u, ref.random(1, 2, C, seed=2).expand(len(u), -1, -1), mask=mask)

    def body(comm):
        stack = stack_of(comm, Closure, "V", mgrit=MGRIT(cfactor=3))
        trained = stack(input_of().repeat(4, 1, 1)[:B])
        loss_of(trained).backward()
        stack.eval()
        big = stack_of(comm, Closure, "pipeline")

        def evaluate():
            with torch.no_grad():
                return stack(input_of())

        options = MGRIT(cfactor=3, portions=1)
        whole = stack_of(comm, Closure, "V", mgrit=options).eval()
        with torch.no_grad():
            fine = whole(input_of())
        return reduced(comm, evaluate), reduced(comm, lambda: big(input_of())), fine.detach(), trained.detach()

    for error, other, fine, trained in spmd(body):
        # 6 samples are one portion in evaluation mode.
        assert error is None
        assert "must be a further input, stack(u, mask)" in other
        assert distance(fine, trained) < 1e-1


@RANKS
def test_a_mask_by_closure_in_evaluation_mode(spmd):
    count = 32
    mask = torch.ones(count, L, L + 2, dtype=torch.bool)

    class Closure(Decoder):
        def forward(self, u, given=None):
            memory = ref.random(1, 2, C, seed=2).expand(len(u), -1, -1)
            return super().forward(u, memory, mask=mask if given is None else given)

    def body(comm):
        stack = stack_of(comm, Closure, "V").eval()
        u = ref.random(count, L, C, seed=1)

        def evaluate(*inputs):
            with torch.no_grad():
                return stack(u, *inputs)

        return reduced(comm, evaluate), evaluate(mask)

    x = ref.random(count, L, C, seed=1)
    for block in made(9, Closure):
        x = block(x)
    for error, found in spmd(body):
        assert "must be a further input, stack(u, mask)" in error and "MGRIT(portions=1)" in error
        assert distance(found, x.detach()) < 1e-12


@RANKS
def test_a_table_with_as_many_rows_as_there_are_samples(spmd):
    class Tabled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, u, table):
            return u + torch.tanh(self.linear(u + table)) / 8

    u, table = ref.random(B, B, C, seed=1), ref.random(B, C, seed=2)

    def body(comm):
        stack = stack_of(comm, Tabled, "pipeline")
        return reduced(comm, lambda: stack(u, table)), stack(u, table[None]).detach()

    x = u
    for block in made(9, Tabled):
        x = block(x, table)
    for error, found in spmd(body):
        assert "table[None]" in error
        assert distance(found, x.detach()) < 1e-12


# ---- What has no further inputs


def test_what_takes_no_further_inputs():
    stack = LayerParallel(lambda: xbraid_py.DenseBlock(C).double(), 6)
    with pytest.raises(ValueError, match="a DenseBlock takes a state of one tensor and nothing else"):
        stack(ref.random(B, C, seed=1), torch.ones(3))
    noisy = stack_of(None, Decoder, "V", accuracy=GradientControl(noise=0.25))
    inputs, named = decoder_inputs(False)
    with pytest.raises(ValueError, match=r"use GradientControl\(noise=0\)"):
        noisy(input_of(), *inputs, **named)


@RANKS
def test_splines_with_further_inputs(spmd):
    def body(comm):
        stack = LayerParallel(
            lambda: Decoder().double(),
            9,
            comm=comm,
            form="map",
            mgrit=SOLVES["V"],
            splines=Splines(4),
            accuracy=UNCHECKED,
        )
        inputs, named = decoder_inputs(True)
        output = stack(input_of(), *inputs, **named)
        loss_of(output).backward()
        columns = zip(stack.layers.block.columns, stack.layers.tensors(), strict=True)
        rows = {column.name: stack.layers.gathered(tensor) for column, tensor in columns}
        return output.detach(), inputs[0].grad, rows

    results = spmd(body)
    inputs, named = decoder_inputs(True)
    x, block = input_of(), Decoder().double()
    for n in range(9):
        weights = {name: rows[n] for name, rows in results[0][2].items()}
        x = torch.func.functional_call(block, weights, (x, *inputs), named)
    loss_of(x).backward()
    for output, back, _ in results:
        assert distance(output, x.detach()) < 1e-12 and distance(back, inputs[0].grad) < 1e-11
