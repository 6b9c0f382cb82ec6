"""Limits of Transformer Engine: formats that it cannot compute, with the reason. Read without torch.

On Hopper the library's tiles are those of the formats. On Blackwell tiles are 1 x 32 for every operand, because the
tensor cores there support no others, so only V3's own tiles are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..tensor_formats import KINDS, Formats, Kind, TensorFormat

INSTEAD = "precision.backend emulated needs neither it nor a GPU"

PRODUCTS = ("input", "weight", "gradient")
"""Roles whose tensors are multiplied. The format of a cache is not limited."""


def fault(kind: Kind, formats: Formats, microscaling: bool = False) -> str | None:
    """Fault of this kind's formats for Transformer Engine: the class, and supported formats; None without a fault.

    A kind with all three operands in high precision never reaches the library.
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
    """Faults of a whole model's formats for Transformer Engine."""
    for kind in KINDS:
        found = fault(kind, formats, microscaling)
        if found is not None:
            yield f"{found}; {INSTEAD}"
