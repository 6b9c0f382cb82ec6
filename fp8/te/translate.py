"""Translation of a layer's formats to one of Transformer Engine's recipes.

On Hopper the recipe is `Float8BlockScaling`. On Blackwell it is `MXFP8BlockScaling`, whose tiles are 1 x 32 for every
operand. Formats that neither can do are in `limits`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ...settings import UsageError
from ..recipe import LinearRecipe
from .library import CHECKED, Library
from .limits import INSTEAD, PRODUCTS


def make(library: Library, recipe: LinearRecipe) -> Any:
    """Transformer Engine's recipe for a layer without a `fault`."""
    of = {role: getattr(recipe, role).format for role in PRODUCTS}
    module, format = library.recipe, library.recipe.Format
    fmt = format.HYBRID if of["gradient"].fmt == "e5m2" else format.E4M3
    if library.microscaling:
        return _checked(library, module.MXFP8BlockScaling, fp8_format=fmt)
    made = _checked(
        library,
        module.Float8BlockScaling,
        fp8_format=fmt,
        x_block_scaling_dim=1 + of["input"].square,
        w_block_scaling_dim=1 + of["weight"].square,
        grad_block_scaling_dim=1 + of["gradient"].square,
    )
    # These are no fields: as keywords they would be dropped without a warning, and their defaults follow an
    # environment variable as it was when the library was imported.
    for name, role in (("fp8_quant_fwd_inp", "input"), ("fp8_quant_fwd_weight", "weight")):
        setattr(made, name, module.QParams(power_2_scale=of[role].pow2, amax_epsilon=0.0))
    made.fp8_quant_bwd_grad = module.QParams(power_2_scale=of["gradient"].pow2, amax_epsilon=0.0)
    return made


def _checked(library: Library, cls: Any, **given: Any) -> Any:
    """`cls(**given)`, after a check that all keywords are fields: the class ignores any other keyword.

    NVTE_BACKWARD_OVERRIDE, the environment's choice for the backward, is overridden in releases that read it.
    """
    known = {field.name for field in fields(cls)}
    missing = sorted(given.keys() - known)
    if missing:
        raise UsageError(
            f"Transformer Engine {library.version} has no {', '.join(missing)} in {cls.__name__}: {CHECKED} has, "
            f"and is the release that was checked; {INSTEAD}"
        )
    if "backward_override" in known:
        given["backward_override"] = None
    return cls(**given)
