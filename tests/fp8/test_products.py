"""Products of BF16 on CPUs, native or widened: the choice, the results, and the same choice in every product."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.comm.flat import FlatDispatcher
from counterflow.fp8 import products
from counterflow.fp8.config import PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.products import Products, multiplies_bf16
from counterflow.fp8.recipe import Recipe
from counterflow.model.config import ModelConfig
from counterflow.model.core_attention import causal_attention
from counterflow.model.loss import cross_entropy_sum
from counterflow.model.naming import initialise
from counterflow.model.transformer import Transformer

NATIVE, WIDENED = Products(widened=False), Products(widened=True)
ENDS = (40, 40, 130, 200)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bw": True, "avx512_vnni": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_tile": True, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
    ids=str,
)
def test_auto_follows_the_flags_of_the_cpu(
    flags: Mapping[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "cpu_capabilities", lambda: flags)
    assert Products.choose("auto").widened is not native
    assert Products().widened is not native
    assert Recipe().products == Products.choose("auto")
    assert Products.choose("native") == NATIVE
    assert Products.choose("widened") == WIDENED


@pytest.mark.parametrize(
    ("limit", "native"),
    [
        ("", True),
        ("avx2", False),
        ("AVX512_CORE", False),
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("avx10_1_512", True),
        ("DEFAULT", True),
    ],
)
def test_instructions_that_onednn_may_not_use_do_not_count(limit: str, native: bool) -> None:
    assert multiplies_bf16({"avx512_bf16": True}, limit) is native
    assert not multiplies_bf16({"avx512_bf16": False}, limit)


def test_the_key_reaches_every_layer() -> None:
    for setting, widened in (("native", False), ("widened", True)):
        for name in ("bf16", "fp8"):
            recipe = PrecisionConfig(recipe=name, cpu_products=setting).make()  # type: ignore[arg-type]
            assert recipe.products.widened is widened
            assert recipe.linear("mtp").products.widened is widened


def test_a_widened_product_is_the_fp32_product_rounded_once() -> None:
    a, b = random(3, 50, 130), random(130, 70, seed=1)
    assert torch.equal(WIDENED.multiply(a, b), (a.float() @ b.float()).bfloat16())
    x, stack, dy = random(200, 130), random(4, 130, 70, seed=1), random(200, 70, seed=2)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    rows, matrices = WIDENED.multiply(x, stack, offsets), WIDENED.multiply(dy.mT, x, offsets)
    assert matrices.shape == (4, 70, 130)
    for expert, (start, stop) in enumerate(pairwise((0, *ENDS))):
        part = slice(start, stop)
        assert torch.equal(rows[part], (x[part].float() @ stack[expert].float()).bfloat16())
        assert torch.equal(matrices[expert], (dy[part].float().mT @ x[part].float()).bfloat16())


def test_products_of_fp32_are_the_same_in_both() -> None:
    a, b = random(50, 130).float(), random(130, 70, seed=1).float()
    assert torch.equal(WIDENED.multiply(a, b), NATIVE.multiply(a, b))


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
def test_native_and_widened_differ_by_one_rounding_at_most(grouped: bool) -> None:
    """Both sum K exact products in FP32 and round the sum to the eight significant bits of BF16."""
    a, b = random(200, 136), random(*((4,) if grouped else ()), 136, 72, seed=1)
    offsets = torch.tensor(ENDS, dtype=torch.int32) if grouped else None
    native, widened = (way.multiply(a, b, offsets).double() for way in (NATIVE, WIDENED))
    matrices = b.double() if grouped else b.double().unsqueeze(0)
    spans = list(pairwise((0, *(ENDS if grouped else (200,)))))
    sizes = [a[start:stop].double().abs() @ matrix.abs() for (start, stop), matrix in zip(spans, matrices, strict=True)]
    # Each side is off by half a unit of BF16's last place, at most 2^-8 of the value, and by the error of its sum: K
    # roundings to FP32, each at most 2^-24 of the sum of magnitudes.
    bound = 2 * (2.0**-8 * torch.maximum(native.abs(), widened.abs()) + 136 * 2.0**-24 * torch.cat(sizes))
    assert ((native - widened).abs() <= bound).all()


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
def test_the_three_products_of_a_layer_are_widened(grouped: bool) -> None:
    recipe = PrecisionConfig(recipe="bf16", cpu_products="widened").make().linear("experts_up")
    layer = GroupedLinear(4, 130, 70, recipe) if grouped else Linear(130, 70, recipe)
    weight = random(*layer.weight.shape, seed=1)
    layer.weight.data = weight
    x, dy = random(200, 130).requires_grad_(), random(200, 70, seed=2)
    more = (torch.tensor(ENDS, dtype=torch.int32),) if grouped else ()
    y = layer(x, *more)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None
    matrices = weight.float() if grouped else weight.float().unsqueeze(0)
    gradients = layer.weight.grad if grouped else layer.weight.grad.unsqueeze(0)
    for (start, stop), matrix, gradient in zip(
        pairwise((0, *(ENDS if grouped else (200,)))), matrices, gradients, strict=True
    ):
        rows, grad_rows = x.detach()[start:stop].float(), dy[start:stop].float()
        assert torch.equal(y[start:stop], (rows @ matrix.T).bfloat16())
        assert torch.equal(x.grad[start:stop], (grad_rows @ matrix).bfloat16())
        assert torch.equal(gradient, (grad_rows.T @ rows).bfloat16())


def test_widened_attention_is_fp32_attention_rounded_once() -> None:
    parts = [random(1, 2, 300, size, seed=size) for size in (24, 24, 16)]
    grad = random(1, 2, 300, 16, seed=5)
    results = []
    for wide in (False, True):
        leaves = [(part.float() if wide else part.clone()).requires_grad_() for part in parts]
        out = causal_attention(*leaves, products=WIDENED)  # type: ignore[misc]
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for rounded, exact in zip(*results, strict=True):
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


def test_the_widened_head_computes_in_fp32_and_rounds_its_gradients() -> None:
    labels = torch.randint(0, 90, (70,), generator=torch.Generator().manual_seed(3))
    results = []
    for wide in (False, True):
        hidden, weight = ((x.float() if wide else x).requires_grad_() for x in (random(70, 40), random(90, 40, seed=1)))
        loss = cross_entropy_sum(hidden, weight, labels, WIDENED)
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    (loss, *gradients), (exact, *exact_gradients) = results
    assert torch.equal(loss, exact)
    for found, expected in zip(gradients, exact_gradients, strict=True):
        assert found is not None and expected is not None
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


class ProductsSeen(TorchDispatchMode):
    """Counts of matrix products by the type of their first operand."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "linear", "matmul", "scaled_dot_product_attention", "mv")

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.removeprefix("_scaled_dot_product_").split(".")[0] in self.NAMES:
            dtype = next(value.dtype for value in args if isinstance(value, Tensor))
            self.count[dtype] = self.count.get(dtype, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "v3"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8"])
def test_no_product_of_a_training_step_passes_the_key_by(recipe: str, recompute: str) -> None:
    tokens = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    seen = {}
    for setting in ("native", "widened"):
        model = small_model(PrecisionConfig(recipe=recipe, cpu_products=setting), recompute)  # type: ignore[arg-type]
        with ProductsSeen() as counter:
            output = model(tokens)
            (output.loss + output.mtp_losses[0]).backward()
            with torch.no_grad():
                model.logits(tokens)
        seen[setting] = counter.count
    assert torch.bfloat16 not in seen["widened"]
    assert seen["widened"][torch.float32] > 100
    assert seen["native"][torch.bfloat16] > 100, "the same step has products of BF16 where they are native"


def small_model(precision: PrecisionConfig, recompute: Any) -> Transformer:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=32,
        num_nextn_predict_layers=1,
    )
    model = Transformer(config, FlatDispatcher(None, 8), range(8), recompute, recipe=precision.make())
    initialise(model, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model.train()
