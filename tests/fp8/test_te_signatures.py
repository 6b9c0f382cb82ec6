"""Our calls of Transformer Engine against the signatures of its published wheels."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import counterflow
from counterflow.fp8.config import PrecisionConfig
from counterflow.fp8.te import library as libraries
from counterflow.fp8.te import translate as recipes
from counterflow.fp8.te.backend import TransformerEngine
from counterflow.parallel.config import OptimConfig
from counterflow.parallel.optimizer.adamw import Update
from counterflow.parallel.optimizer.fused_adamw import FusedAdamW
from counterflow.tests.fp8 import fake_te
from counterflow.tests.fp8.fake_te import RECORDED
from counterflow.tests.fp8.record_te_signatures import CALLABLES, RELEASES, download, parse, read

PACKAGE = Path(counterflow.__file__).parent
OURS = [*sorted((PACKAGE / "fp8/te").glob("*.py")), PACKAGE / "parallel/optimizer/fused_adamw.py"]


def chains(path: Path, root: str) -> set[str]:
    """Names of attributes taken of an attribute called `root`: `X.Y` of `self.library.pytorch.X.Y`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            if node.attr == root:
                found.add(".".join(names[1:]))
            node = node.value
    return {name for name in found if name}


def test_every_name_we_use_was_recorded() -> None:
    used = {name for path in OURS for name in chains(path, "pytorch")}
    assert used == {
        "autocast",
        "Linear",
        "GroupedLinear",
        "DotProductAttention",
        "optimizers",
        "optimizers.FusedAdam",
        "is_mxfp8_available",
        "is_fp8_block_scaling_available",
    }
    for release in RECORDED.values():
        assert {name.split(".")[0] for name in used} <= set(release["exports"])
    written = (PACKAGE / "fp8/te/translate.py").read_text(encoding="utf-8")
    for release in RECORDED.values():
        assert all(name in written for name in ("Float8BlockScaling", "MXFP8BlockScaling", "QParams"))
        assert {"E4M3", "HYBRID"} <= set(release["formats"])
        for attributes in release["attributes"].values():
            assert attributes[:2] == ["_fp8_workspaces", "save_original_input"]
    assert RECORDED[RELEASES[1]]["attributes"]["GroupedLinear"][2:] == ["use_grouped_tensor"]


def test_every_call_binds_in_the_oldest_release_and_in_the_one_it_was_written_for() -> None:
    """The fake binds each call to the record of both releases; this test makes every kind of call."""
    with fake_te.installed():
        for capability in ((9, 0), (10, 3)):
            library = fake_te.library(capability)
            assert libraries.architecture_fault(library) is None
            recipe = PrecisionConfig(recipe="fp8").make()
            backend = TransformerEngine(library, recipe.formats)
            linear = recipe.linear("attention")
            assert linear is not None
            x = torch.ones(32, 32, dtype=torch.bfloat16)
            for groups, shape in ((None, (32, 32)), (2, (2, 32, 32))):
                weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
                counts = None if groups is None else [32, 0]
                backend.linear(linear, groups)(x, weight, None, None, counts=counts).sum().backward()
        backend.attention(2, 24, 16)(torch.ones(1, 2, 8, 24), torch.ones(1, 2, 8, 24), torch.ones(1, 2, 8, 16))
        flat = [torch.ones(4) for _ in range(4)]
        FusedAdamW(library)(*flat, OptimConfig(), 0.1, Update(1e-3, 1))
        called = {name for name in fake_te.CALLS if name != "weight quantised"}
    assert called == set(CALLABLES) - {"Float8BlockQuantizer"}, "and that one is for the tests on GPUs"


def test_the_record_is_what_the_fake_promises() -> None:
    for name, release in RECORDED.items():
        for recipe in (fake_te.Float8BlockScaling, fake_te.MXFP8BlockScaling, fake_te.QParams):
            recorded = release["recipes"][recipe.__name__]
            fields = set(recipe.__dataclass_fields__)
            newer = {"backward_override", "enable_2d_quantization"} if name == RELEASES[0] else set()
            assert fields - newer == set(recorded["fields"]), recipe
            assert all(hasattr(recipe, other) for other in recorded["others"]), recipe
    assert ".".join(map(str, libraries.OLDEST)) == RELEASES[0].removesuffix(".0")
    assert RELEASES[1] == libraries.CHECKED


def test_a_call_with_a_wrong_keyword_is_seen() -> None:
    with pytest.raises(TypeError, match="recipes"):
        fake_te.Autocast(enabled=True, recipes=None)  # type: ignore[call-arg]
    signature = parse(RECORDED["2.20.2"]["callables"]["Linear.__init__"])
    with pytest.raises(TypeError):
        signature.bind(None, in_features=1, out_features=1, fuse_wgrad_acumulation=True)


def test_recipes_are_made_of_fields_and_what_is_no_field_is_set_afterwards() -> None:
    """An unknown keyword would be dropped without a warning: this library's recipes are pydantic dataclasses."""
    dropped = fake_te.Float8BlockScaling(fp8_quant_fwd_inp=fake_te.QParams(power_2_scale=True))  # type: ignore[call-arg]
    assert not dropped.fp8_quant_fwd_inp.power_2_scale
    library = fake_te.library()
    v3 = PrecisionConfig(recipe="fp8", scales="v3").make()
    pow2 = {}
    for kind in ("attention", "attention_out", "experts_up", "experts_down"):
        linear = v3.linear(kind)
        assert linear is not None
        made = recipes.make(library, linear)
        roles = made.fp8_quant_fwd_inp, made.fp8_quant_fwd_weight, made.fp8_quant_bwd_grad
        pow2[kind] = [role.power_2_scale for role in roles]
        assert made.backward_override is None, "what the environment wants of the backward is set aside"
        dims = made.x_block_scaling_dim, made.w_block_scaling_dim, made.grad_block_scaling_dim
        assert dims == (1, 2, 1)
    # V3 names the input after attention, those of the experts' up-projections, and gradients of their down-projections.
    assert pow2 == {
        "attention": [False, False, False],
        "attention_out": [True, False, False],
        "experts_up": [True, False, False],
        "experts_down": [False, False, True],
    }


@pytest.fixture(scope="module")
def wheels(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Sources of both releases: the installed one's where it is one of them, else from pip, kept from run to run."""
    found: dict[str, Path] = {}
    installed = libraries.find_version()
    if installed in RELEASES:
        spec = importlib.util.find_spec("transformer_engine")
        if spec is not None and spec.submodule_search_locations:
            found[installed] = Path(spec.submodule_search_locations[0]).parent
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("transformer-engine")
    for release in set(RELEASES) - set(found):
        try:
            found[release] = download(release, folder)
        except (subprocess.SubprocessError, OSError) as error:
            reason: Any = getattr(error, "stderr", None) or error
            text = f"the wheel of {release} cannot be had, so the record is not compared with it: {reason}"
            if "CI" in os.environ:
                pytest.fail(text)
            pytest.skip(text)
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_the_record_equals_the_published_wheel(release: str, wheels: dict[str, Path]) -> None:
    assert read(wheels[release]) == RECORDED[release]
