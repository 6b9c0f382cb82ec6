"""Recompute policies: the same numbers, less memory between forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from counterflow.benchmarks.fp8 import ARCHITECTURE, SIDES, held
from counterflow.comm.dispatcher import Dispatched
from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.recipe import Recipe
from counterflow.model import attention as attention_module
from counterflow.model.config import ModelConfig
from counterflow.model.feed_forward import RoutedExperts
from counterflow.model.kernels import Kernels
from counterflow.model.recompute import Keep, Rebuild, RecomputePolicy, Saved
from counterflow.model.rope import rotary_factors
from counterflow.model.transformer import Output, Transformer
from counterflow.phases import Uncut
from counterflow.tests.allocations import Allocations
from counterflow.tests.model.small import build, global_gradients, random_tokens, small_config, total_loss

POLICIES: tuple[RecomputePolicy, ...] = ("none", "v3", "full")


def run(
    policy: RecomputePolicy,
    config: ModelConfig,
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
) -> tuple[Output, dict[str, Tensor]]:
    """Output of the last of `steps` micro-batches, and the gradients of all together."""
    model = build(config, recompute=policy, dtype=dtype, recipe=recipe)
    for step in range(steps):
        output = model(random_tokens(config, 2, 140, seed=step), torch.tensor([True, step != 1]))
        total_loss(output).backward()
    return output, global_gradients(model)


@pytest.mark.parametrize("policy", ["v3", "full"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, PrecisionConfig(recipe="fp32")),
        (torch.bfloat16, PrecisionConfig(recipe="bf16")),
        (torch.bfloat16, PrecisionConfig(recipe="fp8")),
        (torch.bfloat16, PrecisionConfig(recipe="fp8", scales="v3")),
        (torch.bfloat16, PrecisionConfig(recipe="fp8", classes={"*.cache": ClassConfig(format="high")})),
    ],
    ids=["fp32", "bf16", "fp8", "fp8 v3 scales", "fp8 high caches"],
)
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_losses_gradients_and_counts_are_bit_equal(
    policy: RecomputePolicy, dtype: torch.dtype, precision: PrecisionConfig, q_lora_rank: int | None
) -> None:
    config = small_config(q_lora_rank=q_lora_rank)
    expected, expected_gradients = run("none", config, steps=2, dtype=dtype, recipe=precision.make())
    output, gradients = run(policy, config, steps=2, dtype=dtype, recipe=precision.make())
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.balance, expected.balance)
    assert all(map(torch.equal, output.mtp_losses, expected.mtp_losses))
    assert torch.equal(output.counts, expected.counts)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("policy", POLICIES)
def test_the_backward_does_not_count_tokens_again(policy: RecomputePolicy) -> None:
    config = small_config()
    output = build(config, recompute=policy)(random_tokens(config, 2, 30))
    before = output.counts.clone()
    total_loss(output).backward()
    assert torch.equal(output.counts, before)
    assert output.counts.sum(1).tolist() == [2 * 30 * config.num_experts_per_tok] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_the_graph_can_be_walked_twice(policy: RecomputePolicy) -> None:
    config = small_config()
    model = build(config, recompute=policy)
    loss = total_loss(model(random_tokens(config, 2, 30)))
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in global_gradients(model).items()}
    loss.backward()
    for name, gradient in global_gradients(model).items():
        assert torch.equal(gradient, 2 * once[name]), name


def bytes_held(policy: RecomputePolicy) -> int:
    """Bytes that one micro-batch holds between its forward and its backward."""
    config = small_config(num_nextn_predict_layers=0, num_hidden_layers=4)
    model = build(config, recompute=policy)
    tokens = random_tokens(config, 2, 256)
    model(tokens)  # rotary tables are made once and stay
    with Allocations() as allocations:
        output = model(tokens)
    held = allocations.bytes_alive()
    del output
    assert allocations.bytes_alive() == 0  # nothing stays when the graph is freed
    return held


def test_v3_holds_less_than_none_and_full_less_than_v3() -> None:
    none, v3, full = (bytes_held(policy) for policy in POLICIES)
    print(f"held for the backward: none {none / 2**20:.2f} MiB, v3 {v3 / 2**20:.2f} MiB, full {full / 2**20:.2f} MiB")
    assert v3 < 0.75 * none
    assert full < 0.25 * v3


def test_fp8_keeps_half_of_what_linear_layers_and_swiglu_keep_in_bf16() -> None:
    """FP8 keeps one byte and its share of a scale instead of two bytes, twelve bits for the attention's output, and no
    output of SwiGLU."""
    sides = "bf16", "fp8"
    totals, kept = zip(*(held(ARCHITECTURE, SIDES[side], "none") for side in sides), strict=True)
    assert kept[1] < 0.5 * kept[0]
    (bf16, _), (fp8, _) = (held(ARCHITECTURE, SIDES[side], "v3") for side in sides)
    assert fp8 < 0.72 * bf16, "in all: the residual stream, latents and the head's loss do not shrink"
    assert fp8 < 0.45 * totals[0], "with V3's recomputation, compared with BF16 without any"


Watched = dict[str, list[StorageWeakRef]]


def watch(watched: Watched, name: str, tensor: Tensor) -> None:
    watched.setdefault(name, []).append(StorageWeakRef(tensor.untyped_storage()))


def watching(monkeypatch: pytest.MonkeyPatch) -> tuple[Watched, Kernels, Callable[[], int]]:
    """Kernels that note the outputs of norms and SwiGLU, and how often they ran; inputs of attention are noted too."""
    watched: Watched = {}
    plain, calls = Kernels.make(), [0]

    def norm(*args: Any) -> Tensor:
        calls[0] += 1
        result = plain.rms_norm(*args)
        watch(watched, "norm", result)
        return result

    def swiglu(*args: Any) -> Tensor:
        calls[0] += 1
        result = plain.swiglu(*args)
        watch(watched, "swiglu", result)
        return result

    attend = attention_module.attend

    def attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Any]:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            watch(watched, name, tensor)
        return attend(query, key, value, *options)

    monkeypatch.setattr(attention_module, "attend", attention)
    return watched, Kernels(**{**vars(plain), "rms_norm": norm, "swiglu": swiglu}), lambda: calls[0]


def watched_forward(
    policy: RecomputePolicy, monkeypatch: pytest.MonkeyPatch
) -> tuple[Watched, Output, Transformer, Callable[[], int]]:
    """A forward that notes the outputs of norms and SwiGLU and the inputs of attention."""
    watched, kernels, calls = watching(monkeypatch)
    config = small_config(num_nextn_predict_layers=0)
    model = build(config, recompute=policy, kernels=kernels)
    output = model(random_tokens(config, 2, 64))
    return watched, output, model, calls


def alive(watched: Watched) -> dict[str, int]:
    return {name: sum(not ref.expired() for ref in refs) for name, refs in watched.items()}


def test_v3_drops_norm_outputs_attention_inputs_and_swiglu_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, output, *_ = watched_forward("v3", monkeypatch)
    assert output.loss.requires_grad
    # Three layers with four norms each and the final norm; one dense layer and two with routed and shared experts.
    assert {name: len(refs) for name, refs in watched.items()} == {
        "norm": 13,
        "query": 3,
        "key": 3,
        "value": 3,
        "swiglu": 5,
    }
    assert alive(watched) == {"norm": 0, "query": 0, "key": 0, "value": 0, "swiglu": 0}


def test_without_recompute_all_of_these_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counterpart that shows that the test above can fail."""
    watched, output, *_ = watched_forward("none", monkeypatch)
    assert output.loss.requires_grad
    assert alive(watched) == {"norm": 12, "query": 3, "key": 3, "value": 3, "swiglu": 5}  # the head keeps no input


def test_v3_rebuilds_each_tensor_once_and_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, output, _, calls = watched_forward("v3", monkeypatch)
    forward = calls()
    total_loss(output).backward()
    # All run again except the final norm, and none twice: the norms of the latents serve the recipe of attention's
    # operands and the weights of the up-projections.
    assert calls() - forward == forward - 1
    del output
    assert set(alive(watched).values()) == {0}


def in_turn(first: Generator[str, None, Any], second: Generator[str, None, Any], lead: int) -> list[Tensor]:
    """Run two generators phase by phase in turn, the first `lead` phases ahead, and return the tensors of both."""
    results: dict[int, Tensor] = {}
    schedule = itertools.chain([0] * lead, itertools.cycle([0, 1]))
    while len(results) < 2:
        number = next(schedule)
        if number not in results:
            try:
                next((first, second)[number])
            except StopIteration as end:
                results[number] = end.value[0]
    return [results[0], results[1]]


def two_blocks(
    policy: RecomputePolicy, kernels: Kernels, dtype: torch.dtype
) -> tuple[Transformer, list[tuple[Any, ...]]]:
    """Model whose last two layers are MoE, and the arguments of the forward of each."""
    config = small_config(num_nextn_predict_layers=0)
    model = build(config, recompute=policy, kernels=kernels, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 2, 50, config.hidden_size, generator=generator).to(dtype)
    rotary, valid = rotary_factors(config, 50), torch.tensor([True, True])
    return model, [(x.requires_grad_(), rotary, valid) for x in inputs.unbind()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lead", [0, 1, 3])
def test_two_blocks_phase_by_phase_in_turn_give_the_bits_of_one_after_the_other(lead: int, dtype: torch.dtype) -> None:
    found = []
    for policy in POLICIES:
        for together in (False, True):
            model, given = two_blocks(policy, Kernels.make(), dtype)
            blocks = list(model.layers.values())[1:]
            if together:
                first, second = (block.phases(*each, Uncut()) for block, each in zip(blocks, given, strict=True))
                results = in_turn(first, second, lead)
            else:
                results = [block(*each)[0] for block, each in zip(blocks, given, strict=True)]
            torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])
            gradients = {**global_gradients(model), **{f"x{i}": x.grad for i, (x, *_) in enumerate(given)}}
            found.append({**gradients, **{f"result {i}": result.detach() for i, result in enumerate(results)}})
    expected, *others = found
    assert sum(name.endswith("w1") for name in expected) >= 2 * 8, "of the experts of both blocks"
    for other in others:
        assert other.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(other[name], tensor)] == []


@pytest.mark.parametrize("lead", [0, 1, 3])
@pytest.mark.parametrize("policy", ["none", "v3"])
def test_two_blocks_in_turn_drop_the_tensors_that_each_drops_alone(
    policy: RecomputePolicy, lead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipes registered in the attention phase still apply when the phase of the shared experts saves the tensors."""
    watched, kernels, _ = watching(monkeypatch)
    model, given = two_blocks(policy, kernels, torch.float32)
    blocks = list(model.layers.values())[1:]
    results = in_turn(*(block.phases(*each, Uncut()) for block, each in zip(blocks, given, strict=True)), lead)
    made = {"norm": 8, "query": 2, "key": 2, "value": 2, "swiglu": 4}
    assert {name: len(refs) for name, refs in watched.items()} == made
    assert alive(watched) == (made if policy == "none" else dict.fromkeys(made, 0))
    assert all(result.requires_grad for result in results)


@torch.no_grad()
def test_a_block_frees_the_rows_before_the_outputs_have_returned() -> None:
    model, given = two_blocks("none", Kernels.make(), torch.float32)
    block, rows = list(model.layers.values())[1], list[StorageWeakRef]()
    run_experts = block.run_experts

    def watched(dispatched: Dispatched, saved: Saved) -> Tensor:
        rows.append(StorageWeakRef(dispatched.x.untyped_storage()))
        assert not rows[-1].expired()
        return run_experts(dispatched, saved)

    with mock.patch.object(block, "run_experts", watched):
        held = {phase: [ref.expired() for ref in rows] for phase in block.phases(*given[0], Uncut())}
    assert held["combine"] == held["finish"] == [True]


def test_evaluation_does_not_prepare_recompute() -> None:
    config = small_config()
    tokens = random_tokens(config, 2, 20)
    results = []
    for policy in POLICIES:
        with torch.no_grad():
            results.append(build(config, recompute=policy).eval()(tokens).loss)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rebuild_serves_views_and_several_users_from_one_recipe() -> None:
    made = []
    x = torch.randn(6, 4, requires_grad=True)

    def recipe() -> tuple[Tensor]:
        made.append(1)
        return (x.detach() * 2,)

    saved = Rebuild()
    with saved.hooks():
        doubled = x * 2
        saved.rebuild((doubled,), recipe)
        view = doubled.view(4, 6).t()
        loss = (view * view).sum() + (doubled**3).sum()
        reference = StorageWeakRef(doubled.untyped_storage())
    saved.close()
    del doubled, view
    assert reference.expired()
    loss.backward()
    assert len(made) == 1
    expected = 2 * (2 * 2 * x) + 2 * 3 * (2 * x) ** 2
    assert torch.allclose(x.grad, expected)


def test_rebuild_leaves_other_tensors_alone() -> None:
    x = torch.randn(5, requires_grad=True)
    saved = Rebuild()
    with saved.hooks():
        dropped = x.exp()
        saved.rebuild((dropped,), lambda: (x.detach().exp(),))
        loss = (dropped.sin() * x.sigmoid()).sum()
    saved.close()
    (expected,) = torch.autograd.grad((x.exp().sin() * x.sigmoid()).sum(), x)
    loss.backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("policy", ["none", "v3"])
def test_experts_that_no_token_chose_get_zero_gradients(policy: RecomputePolicy) -> None:
    """A rank may receive no row, and all tensors without elements share the address 0."""
    config = small_config()
    experts = RoutedExperts(config, 4, Kernels.make(), Recipe())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.empty(0, config.hidden_size, requires_grad=True)
    weights = torch.empty(0, requires_grad=True)
    saved = Rebuild() if policy == "v3" else Keep()
    with saved.hooks():
        offsets = torch.zeros(4, dtype=torch.int32)
        result = experts(Dispatched(x * 1.0, weights * 1.0, offsets, [0] * 4, None), saved)
    saved.close()
    result.backward(torch.empty(0, config.hidden_size))
    assert result.shape == (0, config.hidden_size)
    assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in experts.parameters())
