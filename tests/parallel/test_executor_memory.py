"""Memory of the executor, in bytes of live tensors: one pass per live micro-batch, nothing after its end."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from counterflow.comm.p2p import PipelineChannels
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.model.recompute import RecomputePolicy
from counterflow.model.transformer import MicroBatch, Part
from counterflow.parallel.executor import Executor, Program
from counterflow.parallel.schedule.actions import Action, Overlap, Schedule
from counterflow.parallel.schedule.catalogue import find_schedule
from counterflow.phases import Tape, run
from counterflow.tests.allocations import Allocations
from counterflow.tests.model.small import build, random_tokens, small_config
from counterflow.weight_gradients import WeightQueue, drain

SEQUENCES, LENGTH, MICRO_BATCHES = 2, 64, 4


class Ledger:
    """Bytes of tensors alive before each action."""

    def __init__(self, allocations: Allocations) -> None:
        self._allocations = allocations
        self.alive: dict[str, int] = {}

    def begin(self, action: Action | Overlap) -> None:
        self.alive[f"{action.kind}{action.microbatch}" if isinstance(action, Action) else "pair"] = self.bytes()

    def end(self, action: Action | Overlap) -> None:
        """Ignore the end."""

    def phase(self, side: str, name: str | None) -> None:
        """Ignore phases."""

    def bytes(self) -> int:
        return self._allocations.bytes_alive()


def ledger_of(schedule: Schedule, recompute: RecomputePolicy) -> tuple[Ledger, int]:
    """Ledger of a step on one rank, and the bytes that a pass holds between its forward and its backward."""
    config = small_config()
    model = build(config, recompute=recompute)
    for parameter in model.parameters():  # as the optimizer does
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batches = [
        MicroBatch(random_tokens(config, SEQUENCES, LENGTH, seed), torch.ones(SEQUENCES, dtype=torch.bool))
        for seed in range(MICRO_BATCHES)
    ]
    shape = torch.Size((SEQUENCES, LENGTH, config.hidden_size))
    executor = Executor({0: model}, PipelineChannels(0, {}), (), shape, torch.float32, torch.device("cpu"))
    program = Program.of(schedule, 0)
    executor.train(program, batches)  # rotary tables are made once and stay
    with Allocations() as allocations:
        tape = Tape()
        made = run(model.phases(batches[0], None, tape))
        one = allocations.bytes_alive()
        del made, tape
    with Allocations() as allocations:
        ledger = Ledger(allocations)
        results, _ = executor.train(program, batches, watch=ledger)
        results.clear()
        ledger.alive["end"] = ledger.bytes()
    return ledger, one


@pytest.mark.parametrize("recompute", ["none", "v3", "full"])
def test_each_live_micro_batch_holds_one_pass_and_its_backward_frees_it(recompute: RecomputePolicy) -> None:
    ledger, one = ledger_of(find_schedule("gpipe")(1, MICRO_BATCHES), recompute)
    alive, small = ledger.alive, 0.02 * one  # losses and counts of the results
    for number in range(MICRO_BATCHES):
        assert abs(alive[f"F{number}"] - number * one) < small + number * small, number
    backwards = [name for name in alive if name[0] == "B"]
    for left, name in zip(range(MICRO_BATCHES, 0, -1), backwards, strict=True):
        assert abs(alive[name] - left * one) < (left + 1) * small, name
    assert alive["end"] == 0


def test_deferred_weight_gradients_hold_their_inputs_and_end_with_w() -> None:
    ledger, one = ledger_of(find_schedule("zb1p")(1, MICRO_BATCHES), "none")
    alive = ledger.alive
    assert any(0.2 * one < alive[name] for name in alive if name[0] == "W"), "x and gradients of every linear layer"
    assert max(alive.values()) < 2.2 * one
    assert alive["end"] == 0


@pytest.mark.parametrize("recompute", ["none", "v3", "full"])
def test_a_deferred_w_holds_nothing_of_the_up_projections_nor_of_the_graph(recompute: RecomputePolicy) -> None:
    """The bytes are those of the operands of every other linear layer, each once."""
    config = small_config(num_nextn_predict_layers=0)
    part = Part(range(1, 3), first=False, last=False)
    shape = SEQUENCES, LENGTH, config.hidden_size
    gradients = []
    for until_w in (False, True):
        model = build(config, recompute=recompute, part=part)
        batch = MicroBatch(random_tokens(config, SEQUENCES, LENGTH, 3), torch.ones(SEQUENCES, dtype=torch.bool))
        generator = torch.Generator().manual_seed(7)
        run(model.phases(batch, torch.zeros(shape), Tape()))  # makes the rotary table
        with Allocations() as allocations:
            tape, deferred = Tape(), deque()
            x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
            run(model.phases(batch, tape.enter(x), tape))
            del x
            run(tape.backward(gradient, model.weight_queue, deferred, until_w))
            del tape, gradient
            made = [p.grad for p in model.parameters() if p.grad is not None]
            held = allocations.bytes_alive() - sum(gradient.nbytes for gradient in made)
        tokens = SEQUENCES * LENGTH
        for name, module in model.named_modules():
            if name.endswith(("q_up", "kv_up")):
                operands = 4 * tokens * sum(module.weight.shape)
                assert module.weight.grad is not None if until_w else module.weight.grad is None
                held -= 0 if until_w else operands
            elif isinstance(module, Linear | GroupedLinear):
                rows = tokens * config.num_experts_per_tok if isinstance(module, GroupedLinear) else tokens
                shared_input = name.endswith("kv_down")  # q_down's input
                held -= 4 * rows * (module.weight.shape[-2] + (0 if shared_input else module.weight.shape[-1]))
        assert 0 <= held < 0.01 * 4 * tokens * config.hidden_size, held  # ends of the experts' rows
        drain(deferred)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_full_recompute_holds_a_small_part() -> None:
    passes = [ledger_of(find_schedule("gpipe")(1, MICRO_BATCHES), recompute)[1] for recompute in ("none", "full")]
    assert passes[1] < 0.3 * passes[0]


@pytest.mark.parametrize("large", [False, True])
def test_a_large_gradient_goes_once_its_phase_has_read_it(large: bool) -> None:
    """The phase's own backward sees it die; an ordinary cut holds it to the end of the phase."""
    alive: list[bool] = []
    reference: list[StorageWeakRef] = []
    tape = Tape()
    x = tape.enter(torch.randn(8))
    tape.phase("first")
    middle = x * 2.0
    middle.register_hook(lambda _: alive.append(not reference[0].expired()))
    y = tape.cut(middle * 3.0, large=large)
    tape.phase("second")
    y.register_hook(lambda gradient: reference.append(StorageWeakRef(gradient.untyped_storage())))
    tape.leave(y.exp())
    expected = 6.0 * y.detach().exp()
    gradient, _ = run(tape.backward(torch.ones(8), WeightQueue(), None))
    assert alive == [not large]
    assert torch.equal(gradient, expected)
