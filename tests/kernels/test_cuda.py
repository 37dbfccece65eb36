"""Stacks on a GPU: the same as the loop over modules there; over MPI several ranks share one device.

Ranks that are threads would wait for each other in the one thread that autograd has for a device, so there is only one.
"""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, distance, gradients, loop, loop_gradients, loss_of, unstacked

from xbraid_py import MGRIT, GradientControl, clip_grad_norm_

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.ranks(1),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


@pytest.mark.parametrize(
    ("block", "solve", "vmap"),
    [
        ("dense", "V", False),
        ("dense", "one-shot 3", False),
        ("mlp", "V", True),
        ("convolution", "V", False),
        ("convolution", "one-shot 3", True),
        ("attention", "V", False),
        ("mlp", "exact", None),
    ],
)
def test_equals_autograd_on_the_device(spmd, block, solve, vmap):
    """On the CPU the reference; results of another device differ by rounding."""
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, 9, solve=solve, vmap=vmap).to("cuda")
        u = case.input().cuda().requires_grad_()
        output = stack(u)
        (torch.sin(output) * case.input(seed=7).cuda()).sum().backward()
        state = stack.state_dict()
        with torch.no_grad():
            inference = stack.eval()(u)
        devices = {x.device.type for x in (output, u.grad, inference, *state.values(), *stack.parameters())}
        slopes = {name: value.cpu() for name, value in gradients(stack).items()}
        norm = clip_grad_norm_(stack, 1e9)
        state = {name: value.cpu() for name, value in state.items()}
        return devices, output.detach().cpu(), inference.cpu(), u.grad.cpu(), slopes, state, norm

    for devices, output, inference, of_input, slopes, state, norm in spmd(body):
        assert devices == {"cuda"}
        modules = unstacked(state, case)
        u = case.input().requires_grad_()
        exact = loop(modules, u)
        loss_of(exact).backward()
        wanted = loop_gradients(modules)
        assert distance(output, exact.detach()) < 1e-10 and distance(inference, exact.detach()) < 1e-10
        assert distance(of_input, u.grad) < 1e-10 and distance(slopes, wanted) < 1e-10
        assert norm == pytest.approx(torch.cat([value.flatten() for value in wanted.values()]).norm().item())


@pytest.mark.parametrize("block", ["dense", "convolution"])
def test_single_precision_and_measured_errors(spmd, block):
    """Adam with default types and the control of the accuracy, as a user would train."""
    case = CASES[block]

    def body(comm):
        stack = (
            case.stack(comm, 12, mgrit=MGRIT(cfactor=3), accuracy=GradientControl(check=2), vmap=None)
            .to("cuda")
            .float()
        )
        optimizer = torch.optim.Adam(stack.parameters(), 0.01)
        losses, records = [], []
        for _ in range(6):
            optimizer.zero_grad()
            loss = stack(case.input().cuda().float()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            records.append(stack.record)
        return losses, records

    results = spmd(body)
    for losses, records in results:
        assert losses == results[0][0] and records == results[0][1]
        assert losses[-1] < losses[0] and records[0].measured and 0.0 <= records[0].gradient_error < 1.0


@pytest.mark.parametrize("block", ["mlp", "dropout"])
def test_the_random_numbers_of_the_device_are_left_alone(block):
    torch.cuda.manual_seed(5)
    wanted = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    stack = CASES[block].stack(None, 9).to("cuda")
    loss = stack(CASES[block].input().cuda()).square().sum()
    loss.backward()
    assert torch.rand(3, device="cuda").equal(wanted)
