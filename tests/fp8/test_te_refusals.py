"""Refusals of the Transformer Engine backend; each names the version, the architecture or the class."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from counterflow.configs.load import load_config
from counterflow.fp8.config import ClassConfig, PrecisionConfig
from counterflow.fp8.te import library as libraries
from counterflow.fp8.te import limits
from counterflow.fp8.te.backend import TransformerEngine
from counterflow.settings import UsageError
from counterflow.tests.fp8 import fake_te
from counterflow.training.backend import backend_faults, choose_recipe, quantised_widths

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def install(monkeypatch: pytest.MonkeyPatch, version: str | None, module: ModuleType | None = None) -> None:
    """Pretend that a release is installed; without a module its import fails as without the package's binaries."""

    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    real = importlib.import_module

    def import_module(name: str, *rest: Any) -> ModuleType:
        if name.startswith("transformer_engine"):
            if module is None:
                raise RuntimeError("Found empty `transformer-engine` meta package installed.\nInstall it with extras.")
            return module
        return real(name, *rest)

    monkeypatch.setattr(libraries.importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        (None, CUDA, r"Transformer Engine >= 2\.9 is not installed \(pip install .*"),
        ("2.8.0+abc", CUDA, r"Transformer Engine 2\.8\.0\+abc is installed, and 2\.9 is the oldest that works"),
        ("1.14", CUDA, r"1\.14 is installed, and 2\.9"),
        ("2.20.2", CPU, r"computes on NVIDIA GPUs, and this rank's device is cpu"),
        ("2.20.2", CUDA, r"2\.20\.2 is installed but cannot be imported: Found empty `transformer-engine`"),
    ],
)
def test_a_library_that_cannot_be_used_is_refused(
    version: str | None, device: torch.device, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version)
    with pytest.raises(UsageError, match=rf"{message}.*; precision.backend emulated needs neither it nor a GPU"):
        libraries.load(device)
    assert "transformer_engine" not in sys.modules


def test_versions_with_two_digits_are_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.9", "2.10.0", "2.20.2+cu13", "3.0.dev1"):
        install(monkeypatch, version)
        assert libraries.version_fault() is None, version


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ((8, 9), r"needs compute capability 9\.0 \(Hopper\) or 10\.x \(Blackwell\), and this GPU has .* 8\.9"),
        ((12, 0), r"compute capability 12\.0, on which .* not to converge \(Transformer Engine issue 2382\)"),
        ((9, 0), None),
        ((10, 0), None),
        ((10, 3), None),
    ],
)
def test_architectures(capability: tuple[int, int], message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fake_te.library(capability)
    merged = ModuleType("transformer_engine")
    vars(merged).update({**vars(found.pytorch), **vars(found.recipe)})
    install(monkeypatch, "2.20.2", merged)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if message is None:
        assert libraries.load(CUDA).microscaling == (capability >= (10, 0))
        return
    with pytest.raises(UsageError, match=message):
        libraries.load(CUDA)


def test_what_the_library_says_of_the_gpu_is_passed_on() -> None:
    library = fake_te.library()
    library.pytorch.is_fp8_block_scaling_available = lambda return_reason: (False, "requires CUDA >= 12.9.")
    fault = libraries.architecture_fault(library)
    assert fault is not None and "has no FP8 block scaling here (CUDA" in fault and fault.endswith("CUDA >= 12.9.")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"experts_up.weight": {"format": "high"}}, "experts_up.weight is high: .* all three of input, weight, grad"),
        ({"mtp.gradient": {"tile": "128x128"}}, "mtp.weight and mtp.gradient have tiles of 128x128: .* of 1x128"),
        ({"dense_up.input": {"format": "e5m2"}}, "dense_up.input is e5m2: .* e5m2 for gradients alone"),
    ],
    ids=["one of three high", "two square", "e5m2 forward"],
)
def test_classes_that_it_cannot_do_are_named(classes: dict[str, Any], message: str) -> None:
    given = {pattern: ClassConfig(**values) for pattern, values in classes.items()}
    with pytest.raises(ValueError, match=f"te does not go with this: {message}.*; precision.backend emulated needs"):
        PrecisionConfig(recipe="fp8", backend="te", classes=given)
    (fault,) = limits.faults(PrecisionConfig(recipe="fp8", classes=given).formats())
    with pytest.raises(UsageError, match=message):
        TransformerEngine(fake_te.library(), PrecisionConfig(recipe="fp8", classes=given).formats())
    assert fault


@pytest.mark.parametrize(
    "classes",
    [
        {},
        {"*.gradient": {"format": "e5m2"}},
        {"*.weight": {"tile": "1x128"}, "*.gradient": {"tile": "128x128"}},
        {"attention.*": {"format": "high"}},
        {"*.cache": {"format": "high"}},
        {"*": {"scales": "fp32"}},
    ],
    ids=str,
)
def test_what_it_can_do_is_taken(classes: dict[str, Any]) -> None:
    given = {pattern: ClassConfig(**values) for pattern, values in classes.items()}
    recipe = PrecisionConfig(recipe="fp8", backend="te", classes=given).make()
    TransformerEngine(fake_te.library(), recipe.formats)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"mtp.input": {"scales": "fp32"}}, "mtp.input has FP32 scales, and this GPU multiplies by powers of two"),
        ({"mtp.weight": {"tile": "1x128"}}, "mtp.weight has tiles of 1x128: on this GPU tiles are 1x32"),
    ],
)
def test_blackwell_has_scales_and_tiles_of_its_own(classes: dict[str, Any], message: str) -> None:
    given = {pattern: ClassConfig(**values) for pattern, values in classes.items()}
    formats = PrecisionConfig(recipe="fp8", classes=given).formats()
    assert list(limits.faults(formats)) == []
    (fault,) = limits.faults(formats, microscaling=True)
    assert message in fault


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "fp32"}, "recipe is fp32"),
        ({"recipe": "fp8", "high": "fp32"}, "high is fp32"),
        ({"recipe": "fp8", "products": "promoted"}, "products are promoted"),
    ],
)
def test_keys_that_do_not_go_with_it_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"te does not go with this: {message}"):
        PrecisionConfig(backend="te", **settings)


def config(*overrides: str) -> Any:
    return load_config("tiny", ["precision.recipe=fp8", *overrides])


def test_auto_takes_it_on_gpus_and_emulates_on_none_of_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="counterflow")
    assert choose_recipe(config(), CPU).backend is None
    with fake_te.installed():
        assert choose_recipe(config("precision.backend=emulated"), CUDA).backend is None
        widths = quantised_widths(config().model, config().precision.formats())
        uneven = next(name for name, width in widths.items() if width % 16)
        with pytest.raises(
            UsageError, match=re.escape(f"needs Transformer Engine on GPUs: {uneven} is {widths[uneven]}")
        ):
            choose_recipe(config(), CUDA)
        with pytest.raises(UsageError, match=re.escape(f"precision.backend is te: {uneven} is {widths[uneven]}: ")):
            choose_recipe(config("precision.backend=te"), CPU)
        high = "precision.classes={'attention*.*': {format: high}}"
        assert choose_recipe(config(high), CUDA).backend is not None, "widths of what is not quantised do not matter"
        plain = choose_recipe(config("precision.recipe=bf16"), CUDA)
        assert plain.backend is not None and plain.alignment == 1, "for attention and AdamW alone"
        assert choose_recipe(config("precision.recipe=fp32"), CUDA).backend is None
        with pytest.raises(UsageError, match=r"on GPUs: products are promoted.* with precision\.backend emulated$"):
            choose_recipe(config("precision.products=promoted"), CUDA)
    install(monkeypatch, None)
    assert choose_recipe(config("precision.recipe=bf16"), CUDA).backend is None
    assert "without Transformer Engine: Transformer Engine >= 2.9 is not installed" in caplog.text
    with pytest.raises(UsageError, match=r">= 2\.9 is not installed .* Set precision.recipe to bf16"):
        choose_recipe(config(), CUDA)
    with pytest.raises(UsageError, match=r"precision\.backend is te: Transformer Engine >= 2\.9 is not installed"):
        choose_recipe(config("precision.backend=te"), CUDA)


def test_a_run_that_asks_for_it_ends_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.3.0")
    faults = backend_faults(config("precision.backend=te", "run.device=cpu"))
    assert [fault.split(":")[0] for fault in faults] == ["precision.backend is te"] * len(faults)
    told = "\n".join(faults)
    assert "Transformer Engine 2.3.0 is installed, and 2.9 is the oldest" in told and "run.device is cpu" in told
    assert "kv_lora_rank + qk_rope_head_dim is 24: " in told and "(nearest: 16 or 32)" in told
    assert backend_faults(config("run.device=cpu")) == [] == backend_faults(config("precision.recipe=bf16"), "cuda")
    (fault,) = backend_faults(config(), "cuda")
    assert fault.startswith("precision.recipe fp8 needs Transformer Engine on GPUs: Transformer Engine 2.3.0 is")


def test_v3_itself_has_widths_it_takes() -> None:
    widths = quantised_widths(load_config("deepseek-v3-671b").model, PrecisionConfig(recipe="fp8").formats())
    assert all(width % 32 == 0 for width in widths.values()), widths
    assert widths["model.kv_lora_rank + qk_rope_head_dim"] == 576
