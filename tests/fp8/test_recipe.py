"""Classes that a recipe quantises: DeepSeek-V3's list, a user's changes, and refused changes."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor

from counterflow.configs.load import load_config
from counterflow.configs.write import to_yaml
from counterflow.fp8 import quantize
from counterflow.fp8 import recipe as recipes
from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.linear import GroupedLinear, Linear
from counterflow.fp8.recipe import Monitor, Quantizer
from counterflow.fp8.tensor_formats import CLASSES, KINDS, TensorFormat, v3_formats
from counterflow.settings import UsageError
from counterflow.tests.model.small import build, random_tokens, small_config, total_loss

# V3 §3.3.3: power-of-two scales for the inputs of the Linear after the attention operator (kept in E5M6), for
# activations before MoE up-projections, and for activation gradients before MoE down-projections.
POWERS_OF_TWO_IN_V3 = {
    "attention_out.input",
    "attention_out.cache",
    "experts_up.input",
    "shared_up.input",
    "experts_down.gradient",
    "shared_down.gradient",
}


def test_v3s_formats_are_those_of_the_report() -> None:
    formats = v3_formats("v3")
    assert set(formats) == set(CLASSES)
    for name, format in formats.items():
        assert format is not None
        assert format.fmt == ("e5m6" if name == "attention_out.cache" else "e4m3"), name
        assert format.tile(1) == ((128, 128) if name.endswith(".weight") else (1, 128)), name
        assert format.tile(0) == ((128, 128) if name.endswith(".weight") else (128, 1)), name
    assert {name for name, format in formats.items() if format is not None and format.pow2} == POWERS_OF_TWO_IN_V3
    assert all(format is not None and format.pow2 for format in v3_formats().values())


def test_embedding_head_router_norms_and_attention_are_not_quantised() -> None:
    """Every class occurs in a step, and every quantised tensor is an operand or a cache of a linear layer."""
    seen: dict[str, set[int]] = {}
    recipe = PrecisionConfig(recipe="fp8").make()

    def note(name: str, x: Tensor, _values: Tensor, _format: TensorFormat, *_: object) -> None:
        seen.setdefault(name, set()).add(x.shape[-1])

    recipe.monitor.observer = note
    config = small_config()
    model = build(config, dtype=torch.bfloat16, recipe=recipe)
    total_loss(model(random_tokens(config, 2, 30))).backward()
    assert set(seen) == set(CLASSES)
    assert all(config.vocab_size not in widths and config.n_routed_experts not in widths for widths in seen.values())
    layers = {name for name, module in model.named_modules() if isinstance(module, Linear | GroupedLinear)}
    owners = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith(".weight")}
    assert owners - layers == {f"{block}.mlp.gate" for block in ("layers.1", "layers.2", "mtp.0.block")}


def test_patterns_change_classes_and_the_last_wins() -> None:
    classes = {
        "*.gradient": ClassConfig(tile="128x128"),
        "experts_*": ClassConfig(format="e5m2"),
        "experts_down.*": ClassConfig(scales="fp32"),
        "mtp.*": ClassConfig(format="high"),
    }
    formats = PrecisionConfig(recipe="fp8", classes=classes).formats()
    assert formats["attention.gradient"] == TensorFormat("e4m3", square=True, pow2=True)
    assert formats["experts_up.gradient"] == TensorFormat("e5m2", square=True, pow2=True)
    assert formats["experts_down.input"] == TensorFormat("e5m2", square=False, pow2=False)
    assert formats["attention.input"] == TensorFormat("e4m3", square=False, pow2=True)
    assert [name for name, format in formats.items() if format is None] == [
        f"mtp.{r}" for r in ("input", "weight", "gradient")
    ]


def test_bf16_and_fp32_quantise_nothing() -> None:
    for name in ("bf16", "fp32"):
        precision = PrecisionConfig(recipe=name)  # type: ignore[arg-type]
        assert precision.format == name
        assert not any(precision.make().linear(kind).quantises for kind in KINDS)
    assert PrecisionConfig(recipe="fp8", high="fp32").format == "fp32"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{'expert_down.*': {format: high}}", "names no class of tensors (nearest: experts_down."),
        ("{'*.input': {format: e5m6}}", "e5m6 is a format of caches, and this names attention.input"),
        ("{'*.input': {tile: 64x64}}", "precision.classes.*.input.tile: expects 1x128, 128x128 or null, got '64x64'"),
        ("{'*.input': {fmt: e5m2}}", "unknown key (did you mean precision.classes.*.input.format?)"),
        ("{'*.input': e5m2}", "precision.classes.*.input: expects a section of keys, got 'e5m2'"),
    ],
)
def test_bad_classes_are_refused_with_what_works(given: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config("tiny", ["precision.recipe=fp8", f"precision.classes={given}"])
    assert says in str(caught.value)


def test_classes_belong_to_fp8() -> None:
    with pytest.raises(UsageError, match="is for recipe fp8, and the recipe is bf16"):
        load_config("tiny", ["precision.recipe=bf16", "precision.classes={'*.input': {format: high}}"])


def test_classes_are_printed_as_they_load() -> None:
    given = "{'*.gradient': {tile: 128x128}, 'experts_down.*': {format: high}}"
    config = load_config("tiny", ["precision.recipe=fp8", f"precision.classes={given}"])
    printed = to_yaml(config)
    assert '"*.gradient":\n      tile: "128x128"\n' in printed
    assert yaml.safe_load(printed)["precision"]["classes"] == {
        "*.gradient": {"tile": "128x128"},
        "experts_down.*": {"format": "high"},
    }


def test_where_the_host_reads_no_values_a_flag_spoils_the_sums_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (quantize, recipes):
        monkeypatch.setattr(module, "reads_values", lambda device: False)
    monitor = Monitor()
    quantizer, x = Quantizer("mtp.input", TensorFormat(), monitor), torch.ones(4, 256).bfloat16()
    for run in (quantizer.values, quantizer.encode):
        x[3, 200] = torch.inf
        sums = torch.zeros(2, dtype=torch.float64)
        run(x, 1)
        monitor.spoil(sums)
        assert sums.isnan().all() and not monitor.infinite
        monitor.clear()
        x[3, 200] = 1
        sums.zero_()
        run(x, 1)
        monitor.spoil(sums)
        assert not sums.any()
