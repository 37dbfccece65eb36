"""Advice for a stack that exists: forms of the sentence, what it leaves as it was, what it refuses. No times."""

import re

import pytest
import torch
from torch import nn

import xbraid_py
from xbraid_py import MGRIT, GradientControl, LayerParallel, Splines
from xbraid_py.comm import SerialCommunicator
from xbraid_py.nn import Dropout
from xbraid_py.planner import Constants, Layer
from xbraid_py.planner.modules import ModuleWorkload, convolution, measure_module
from xbraid_py.planner.stacks import Advice, advice_of, is_alone

UNCHECKED = GradientControl(check=0, adapt=False)
FASTEST = (
    r"one rank is fastest, one layer after the other, [\d.e+]+ ms an update",
    r"fastest is .*(replicas|pipeline|lagged cycle|one layer).*, [\d.e+]+ ms an update, [\d.]+ times one rank",
)
SENTENCE = re.compile(
    rf"16 layers, 40 samples, (?P<ranks>\d) ranks?: ({'|'.join(FASTEST)})(; next: .*, [\d.]+ times)?"
    r"; as the stack is: lagged cycle of \d ranks?, [\d.]+ times \(lagged cycle: 1 and 1 sweeps\)"
)


class Masked(nn.Module):
    """F(u, mask, scale=...), with dropout."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), Dropout(0.2)

    def forward(self, u, mask, scale):
        return scale * self.drop(torch.tanh(self.linear(u))) * mask


def stack_on(comm, **more) -> LayerParallel:
    options = {"mgrit": MGRIT(cfactor=4, max_iter=1, tol=0.0), "accuracy": UNCHECKED} | more
    return LayerParallel(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh()), 16, 1.0, comm, **options)


def batch_of(samples: int = 40) -> torch.Tensor:
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(0))


def kept(stack: LayerParallel) -> tuple:
    """What there is of a stack, comparable."""
    tensors = [t.tolist() for p in stack.parameters() for t in (p.detach(), p.grad)]
    return tensors, stack.record, stack.solver_state(), stack.training, torch.get_rng_state().tolist()


@pytest.mark.ranks(1, 2)
def test_a_sentence_and_nothing_else(spmd):
    def body(comm):
        stack = stack_on(comm)
        stack(batch_of()).sum().backward()
        comm.barrier()
        before = kept(stack)
        comm.barrier()
        advice = stack.advise(batch_of(), seconds=0.01)
        comm.barrier()
        return advice, before == kept(stack)

    results = spmd(body)
    advice = results[0][0]
    assert all(each == advice for each, _ in results) and all(same for _, same in results)
    found = SENTENCE.fullmatch(str(advice))
    assert found is not None, advice.text
    assert int(found["ranks"]) == len(results) and advice.ranks in (1, len(results))
    assert advice.ranks % advice.replicas == 0 and min(advice.seconds, advice.one_rank, advice.present) > 0.0
    # What is advised can be made.
    stack_on(None, mgrit=advice.options)


def test_further_inputs_and_the_mode_of_evaluation():
    stack = LayerParallel(Masked, 8, 1.0)
    stack.eval()
    u, mask = batch_of(8), torch.ones(8, 1)
    advice = xbraid_py.advise(stack, u, mask, scale=torch.tensor(0.5), seconds=0.01)
    assert advice.text.startswith("8 layers, 8 samples, 1 rank: one rank is fastest")
    assert advice.replicas == advice.ranks == 1 and not stack.training and stack.record is None


@pytest.mark.parametrize("parts", [{"windows": 2}, {"serial_ends": (2, 2)}], ids=["windows", "ends"])
def test_what_is_not_simulated_is_not_said(parts):
    advice = stack_on(None, **parts).advise(batch_of(), seconds=0.01)
    assert advice.present is None and "as the stack is" not in advice.text


def test_blocks_that_exist():
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(8)]
    stack = LayerParallel.from_blocks(blocks)
    assert "1 rank" in str(stack.advise(torch.randn(4, 3, 8), seconds=0.01))


# A layer of a tenth of a second for each sample, and none that messages could matter for.
LAYER = Layer(
    state=0.1, adjoint=0.2, state_fixed=0.0, adjoint_fixed=0.0, state_bytes=24, num_weights=42, is_module=True
)


@pytest.mark.parametrize(
    ("samples", "ranks", "words", "replicas"),
    [
        (40, 1, "one rank is fastest, one layer after the other, 1.92e+05 ms", 1),
        (40, 2, "fastest is 2 replicas of 1 rank", 2),
        (40, 4, "fastest is 4 replicas of 1 rank", 4),
        (1, 2, "one rank is fastest", 1),
    ],
)
def test_the_words_by_constants_that_are_written_down(samples, ranks, words, replicas):
    planner = Constants().planner(LAYER, samples)
    stack = stack_on(None)
    advice = advice_of(stack, planner, samples, ranks)
    assert isinstance(advice, Advice) and words in advice.text, advice.text
    assert advice.replicas == replicas and advice.seconds == pytest.approx(advice.one_rank / replicas, rel=0.05)
    if samples == 40:
        assert advice.options.cycle == "pipeline" and advice.one_rank == pytest.approx(16 * 40 * 0.3, rel=0.05)


def test_one_rank_is_as_good_as_hardly_better():
    planner = Constants().planner(LAYER, 40)
    best = planner.best(16, 2)
    assert not is_alone(best) and is_alone(planner.best(16, 1))


def test_costs_of_more_samples_than_are_timed_are_on_the_line():
    workload = ModuleWorkload(block=convolution, shape=(8, 4, 4), num_layers=4, batch=64)
    costs, _ = measure_module(workload, SerialCommunicator(), 0.01)
    assert costs.samples == 64 and {each.samples for each in costs.others} == {1, 4, 32}
    assert costs.at(64) is costs and costs.at(48).states.sweep.each > 0.0


@pytest.mark.parametrize(
    ("batch", "more", "words", "error", "message"),
    [
        ((batch_of(), batch_of()), {}, {}, TypeError, "batch=tuple: states of several tensors are not timed"),
        (batch_of(), {"splines": Splines(4)}, {}, ValueError, "splines in depth are not timed"),
        (batch_of(), {"compile": "eager"}, {}, ValueError, "compile='eager': compiled blocks are not timed"),
        (batch_of().double(), {}, {}, ValueError, "batch (40, 6) of torch.float64 is no state of samples"),
        (batch_of()[0], {}, {}, ValueError, "batch (6,) of torch.float32 is no state of samples"),
        (batch_of(), {}, {"seconds": 0.0}, ValueError, "seconds=0.0 must be positive and finite; use 3.0"),
        (batch_of(), {}, {"seconds": "1"}, ValueError, "seconds='1' must be positive and finite; use 3.0"),
    ],
)
def test_what_cannot_be_timed_is_refused(batch, more, words, error, message):
    with pytest.raises(error) as caught:
        stack_on(None, **more).advise(batch, **words)
    assert str(caught.value).startswith(message)


def test_only_stacks_have_advice():
    with pytest.raises(TypeError, match="stack=Linear must be a LayerParallel"):
        xbraid_py.advise(nn.Linear(6, 6), batch_of())


@pytest.mark.ranks(2)
def test_ranks_with_other_batches_are_refused_together(spmd):
    def body(comm):
        with pytest.raises(ValueError, match="the batch of advise"):
            stack_on(comm).advise(batch_of(8 + comm.rank))
        return True

    assert all(spmd(body))


@pytest.mark.ranks(1, 2)
def test_a_batch_of_another_width_is_refused_on_all_ranks(spmd):
    def body(comm):
        with pytest.raises(ValueError) as caught:
            stack_on(comm).advise(torch.randn(8, 5))
        return str(caught.value)

    found = set(spmd(body))
    assert len(found) == 1 and "5" in found.pop()


def test_further_inputs_that_are_missing_are_an_error_of_the_call():
    with pytest.raises((TypeError, ValueError), match="mask"):
        LayerParallel(Masked, 8, 1.0).advise(batch_of(8))
