"""From the formats of a linear layer to one of Transformer Engine's recipes, or the reason why there is none.

On Hopper that is `Float8BlockScaling`: the formats are what they say. On Blackwell it is `MXFP8BlockScaling`, whose
tiles are 1 x 32 for every operand, for the tensor cores there know no others; so only V3's own tiles are taken for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...settings import UsageError
from ..tensor_formats import KINDS, Formats, Kind, TensorFormat
from .library import CHECKED, INSTEAD, Library

if TYPE_CHECKING:
    from ..recipe import LinearRecipe

PRODUCTS = ("input", "weight", "gradient")
"""The roles whose tensors are multiplied; what a cache holds is ours to choose."""


def fault(kind: Kind, formats: Formats, microscaling: bool = False) -> str | None:
    """Which class of this kind's Transformer Engine cannot do, and what it can; None if it does them all.

    A kind with all three operands in high precision never reaches it.
    """
    of = {role: formats.get(f"{kind}.{role}") for role in PRODUCTS}
    given = {role: format for role, format in of.items() if format is not None}
    if not given:
        return None
    if len(given) < len(of):
        high = next(role for role in of if role not in given)
        return f"{kind}.{high} is high: Transformer Engine quantises all three of {', '.join(of)}, or none of them"
    square = [role for role, format in given.items() if format.square]
    if len(square) > 1:
        classes = " and ".join(f"{kind}.{role}" for role in square)
        return f"{classes} have tiles of 128x128: Transformer Engine multiplies them by tiles of 1x128 alone"
    for role in ("input", "weight"):
        if given[role].fmt != "e4m3":
            return f"{kind}.{role} is {given[role].fmt}: Transformer Engine has e5m2 for gradients alone"
    return _microscaling_fault(kind, given) if microscaling else None


def _microscaling_fault(kind: Kind, given: dict[str, TensorFormat]) -> str | None:
    for role, format in given.items():
        if not format.pow2:
            return f"{kind}.{role} has FP32 scales, and this GPU multiplies by powers of two alone (scales: pow2)"
        if format.square != (role == "weight"):
            return (
                f"{kind}.{role} has tiles of {'128x128' if format.square else '1x128'}: on this GPU tiles are 1x32 "
                "whatever is asked, in place of 1x128 for inputs and gradients and 128x128 for weights"
            )
    return None


def faults(formats: Formats, microscaling: bool = False) -> Iterator[str]:
    """What Transformer Engine cannot do of a whole model's formats."""
    for kind in KINDS:
        found = fault(kind, formats, microscaling)
        if found is not None:
            yield f"{found}; {INSTEAD}"


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
    # These are no fields: as keywords they would be dropped without a word, and their defaults follow a variable of
    # the environment as it was when the library was imported.
    for name, role in (("fp8_quant_fwd_inp", "input"), ("fp8_quant_fwd_weight", "weight")):
        setattr(made, name, module.QParams(power_2_scale=of[role].pow2, amax_epsilon=0.0))
    made.fp8_quant_bwd_grad = module.QParams(power_2_scale=of["gradient"].pow2, amax_epsilon=0.0)
    return made


def _checked(library: Library, cls: Any, **given: Any) -> Any:
    """`cls(**given)`, after a look whether these are its fields: it takes any other keyword and forgets it.

    What the environment says about the backward (NVTE_BACKWARD_OVERRIDE) is set aside, where the release asks it.
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
