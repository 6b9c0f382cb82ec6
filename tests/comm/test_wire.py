"""Rows sent in FP8: quantised once, the same in every layout, and used without another quantisation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.dispatcher import Dispatcher
from counterflow.comm.flat import FlatDispatcher
from counterflow.comm.routed import DispatchOptions, RoutedDispatcher
from counterflow.comm.two_hop import TwoHopDispatcher
from counterflow.comm.wire import FP8Wire
from counterflow.fp8.linear import GroupedLinear
from counterflow.fp8.message import message_bytes, pack_message, unpack_message
from counterflow.fp8.quantize import fake_quantize, quantize
from counterflow.fp8.recipe import Monitor, Quantizer, Recipe
from counterflow.fp8.tensor_formats import WIRE_FORMAT, v3_formats
from counterflow.tests.comm.layer import make_case
from counterflow.tests.pool import Pool, Worker


def _dispatchers(experts: int) -> list[RoutedDispatcher]:
    group = dist.group.WORLD
    return [
        FlatDispatcher(group, experts, DispatchOptions(wire=FP8Wire())),
        TwoHopDispatcher(group, experts, DispatchOptions(wire=FP8Wire()), [0, 0, 1, 1][: group.size()]),
    ]


@pytest.mark.parametrize("width", [16, 128, 200, 7168])
def test_a_message_holds_codes_and_scales_bit_for_bit(width: int) -> None:
    quantized = quantize(torch.randn(5, width).bfloat16(), (1, 128), "e4m3", True)
    message = pack_message(quantized)
    assert message.shape == (5, message_bytes(width)) and message.shape[1] % 16 == 0
    apart = unpack_message(message, width)
    assert torch.equal(apart.data.view(torch.uint8), quantized.data.view(torch.uint8))
    assert torch.equal(apart.scale, quantized.scale)
    assert message_bytes(7168) == 7168 + 4 * 56, "V3's rows need no padding"


def test_gradients_arrive_as_the_quantised_values_of_their_tokens(pool: Pool) -> None:
    """Tokens arrive quantised in tiles of 1 x 128, their gradient returns unquantised, the outputs' gradient arrives
    quantised. The reference quantises in place, and sends nothing.
    """

    def check(worker: Worker) -> None:
        case = make_case(3, [6, 5, 0, 9], 8, 3, torch.bfloat16)
        x0, ids, weights = case.x[worker.rank], case.expert_ids[worker.rank], case.weights[worker.rank]
        expected_x = fake_quantize(x0, (1, 128), "e4m3", True)
        expected_grad = fake_quantize(case.grads[worker.rank], (1, 128), "e4m3", True)
        for dispatcher in _dispatchers(8):
            x = x0.clone().requires_grad_()
            dispatched = dispatcher.dispatch(x, ids, weights)
            assert dispatched.codes is not None and torch.equal(dispatched.codes.dequantize(), dispatched.x)
            y = dispatched.x.detach().clone().requires_grad_()
            out = dispatcher.combine(y, dispatched)
            out.backward(case.grads[worker.rank])
            # A sum of K equal rows, and the gradient of each of them, as they return to the token.
            returned = dispatcher.combine(y.grad, dispatched)
            for found, row in ((out.detach(), expected_x), (returned, expected_grad)):
                assert torch.equal(found, (3 * row.float()).bfloat16())
            dispatched.x.backward(torch.ones_like(dispatched.x))
            assert torch.equal(x.grad, torch.full_like(x, 3.0))
            codes = dispatched.incoming.take()
            assert codes is not None and torch.equal(codes.dequantize(), y.grad)
            assert dispatched.incoming.take() is None

    pool.run(check, 4)


def _expert_layers(recipe: Recipe, width: int) -> tuple[GroupedLinear, GroupedLinear]:
    made = (
        GroupedLinear(2, width, 128, recipe.linear("experts_up")),
        GroupedLinear(2, 128, width, recipe.linear("experts_down")),
    )
    for number, layer in enumerate(made):
        values = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(number))
        layer.weight.data = values.bfloat16() / 16
    return made


def test_experts_quantise_neither_tokens_nor_gradients_again(pool: Pool) -> None:
    """Tokens and gradients are quantised per token, not per row; products get the same values as without the wire."""

    def run(worker: Worker) -> None:
        experts, tokens, top_k, width = 4, 24, 2, 256
        generator = torch.Generator().manual_seed(worker.rank)
        x0 = torch.randn(tokens, width, generator=generator).bfloat16()
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        weights, grad = torch.rand(tokens, top_k), torch.randn(tokens, width, generator=generator).bfloat16()
        recipe, seen = Recipe(v3_formats()), list[tuple[str, int]]()
        recipe.monitor.observer = lambda name, given, *_: seen.append((name, len(given)))

        def step(dispatcher: Dispatcher) -> tuple[list[Tensor], list[tuple[str, int]]]:
            seen.clear()
            up, down = _expert_layers(recipe, width)
            x = x0.clone().requires_grad_()
            dispatched = dispatcher.dispatch(x, ids, weights)
            hidden = up(dispatched.x, dispatched.offsets, codes=dispatched.codes)
            y = down(hidden, dispatched.offsets, incoming=dispatched.incoming.take)
            out = dispatcher.combine(y, dispatched)
            out.backward(grad)
            assert x.grad is not None and up.weight.grad is not None and down.weight.grad is not None
            return [out.detach(), x.grad, up.weight.grad, down.weight.grad], list(seen)

        wire = FP8Wire(
            Quantizer("experts_up.input", WIRE_FORMAT, recipe.monitor),
            Quantizer("experts_down.gradient", WIRE_FORMAT, recipe.monitor),
        )
        plain, by_row = step(FlatDispatcher(dist.group.WORLD, experts))
        quick, by_token = step(FlatDispatcher(dist.group.WORLD, experts, DispatchOptions(wire=wire)))
        (rows,) = {count for name, count in by_row if name == "experts_down.input"}
        for name in ("experts_up.input", "experts_down.gradient"):
            # Once along the rows, for two of the products, and once along the columns, for the weights' gradient.
            assert [count for seen, count in by_row if seen == name] == [rows, rows], name
            assert [count for seen, count in by_token if seen == name] == [tokens, rows], name
        # To the last bit: with powers of two as scales, a value rounded along the rows is not rounded again along the
        # columns, unless it is 2^15 times smaller than the largest value there.
        for found, expected in zip(quick, plain, strict=True):
            assert torch.equal(found, expected)

    pool.run(run, 2)


def test_infinities_are_noted_before_they_are_sent() -> None:
    monitor = Monitor()
    wire = FP8Wire(Quantizer("experts_up.input", WIRE_FORMAT, monitor))
    x = torch.zeros(2, 128)
    x[1, 5] = float("inf")
    FlatDispatcher(None, 2, DispatchOptions(wire=wire)).dispatch(x, torch.tensor([[0], [1]]), torch.ones(2, 1))
    assert monitor.infinite == ["experts_up.input"]
